"""How well a stream shuffles, as numbers, each beside what a perfect shuffle of the window and of everything would give.

Nothing here is needed to stream; a measurement reads the next batches of a copy and leaves the stream alone.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import lgamma
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.flow import Batch
from actcache.store import keyed

F64 = NDArray[np.float64]

_SIMULATED_BATCHES = 64
_POOR_VARIANCE = 1.2
_POOR_DOCUMENT_SHARE = 0.01


class Expected(NamedTuple):
    """What a shuffle that knows no order would give in batches of b rows.

    distinct   groups (sequences or documents) in a batch.
    previous   share of a batch's rows whose group was in the batch before.
    largest    share of the largest group of a batch.
    """

    distinct: float
    previous: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Shuffle quality over `n_batches` batches of `batch_size` rows.

    variance_ratio       variance of batch means over that of batches drawn at random from all rows; mean over dimensions.
    sequences            distinct sequences per batch.      documents  distinct documents per batch.
    largest_document     share of a batch's rows from one document, mean over batches of the largest.
    previous_sequence    share of rows whose sequence was in the batch before.
    window               the same under a perfect shuffle of each window.
    everything           the same under a perfect shuffle of all rows of the epoch.
    warnings             what is poor, and what to change.
    """

    n_batches: int
    batch_size: int
    variance_ratio: float
    sequences: float
    documents: float
    largest_document: float
    previous_sequence: float
    window: dict[str, float]
    everything: dict[str, float]
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def expected(counts: NDArray[np.int64], b: int, seed: int = 0) -> Expected:
    """Expectations for batches of b rows drawn without replacement from groups of `counts` rows.

    distinct = sum_s 1 - C(n - c_s, b) / C(n, b);  previous = sum_s c_s/n (1 - C(n - c_s, b) / C(n - 1, b)), the chance
    that a group also has one of b other rows; largest is the mean over 64 simulated batches.
    """
    counts = counts[counts > 0].astype(np.int64)
    n = int(counts.sum())
    b = min(b, n)
    sizes, how_many = np.unique(counts, return_counts=True)
    absent = np.array([_ratio(n - int(c), n, b) for c in sizes])
    absent_before = np.array([_ratio(n - int(c), n - 1, b) for c in sizes])
    distinct = float((how_many * (1 - absent)).sum())
    previous = float((how_many * sizes / n * (1 - absent_before)).sum())
    ends = np.cumsum(counts)
    largest = 0.0
    for i in range(_SIMULATED_BATCHES):
        drawn = (keyed.hash_u64(keyed.derive(seed, "quality", i), np.arange(b)) % np.uint64(n)).astype(
            np.int64
        )
        largest += float(np.bincount(np.searchsorted(ends, drawn, side="right")).max()) / b
    return Expected(distinct, previous, largest / _SIMULATED_BATCHES)


def _ratio(a: int, n: int, b: int) -> float:
    """C(a, b) / C(n, b) for a <= n; 0 where b > a."""
    if b > a:
        return 0.0
    return float(np.exp(lgamma(a + 1) - lgamma(a - b + 1) - lgamma(n + 1) + lgamma(n - b + 1)))


class QualityMeter:
    """Collects batches. `groups` of rows are numbers: sequences, documents."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows  # of the epoch, for the finite population correction
        self.n_batches = 0
        self._size = 0
        self._sums: dict[str, float] = dict.fromkeys(("sequences", "documents", "largest", "previous"), 0.0)
        self._n_followed = 0
        self._before: NDArray[np.int64] | None = None
        self._shift: torch.Tensor | None = None
        self._moments: list[torch.Tensor] = []

    def update(self, batch: Batch) -> None:
        """Count one batch."""
        sequence, document = batch.sequence.numpy(), batch.document.numpy()
        distinct, inverse = np.unique(sequence, return_inverse=True)
        self._sums["sequences"] += len(distinct)
        if self._before is not None:
            self._sums["previous"] += float(np.isin(distinct, self._before)[inverse].mean())
            self._n_followed += 1
        self._before = distinct
        counts = np.unique(document, return_counts=True)[1]
        self._sums["documents"] += len(counts)
        self._sums["largest"] += float(counts.max()) / len(batch)
        x = batch.rows.reshape(len(batch), -1).to("cpu", torch.float64)
        if self._shift is None:
            self._shift = x.mean(0)
            self._moments = [torch.zeros_like(self._shift) for _ in range(4)]
        x = x - self._shift
        mean = x.mean(0)
        for total, value in zip(self._moments, (mean, mean**2, x.mean(0), (x**2).mean(0)), strict=True):
            total += value
        self.n_batches += 1
        self._size = max(self._size, len(batch))

    def variance_ratio(self) -> float:
        """Var(batch mean) / (Var(x) / b * (N - b) / (N - 1)), mean over dimensions that vary."""
        g, b = self.n_batches, self._size
        mean, mean_squares, first, second = (total / g for total in self._moments)
        between = (mean_squares - mean**2) * g / max(1, g - 1)
        variance = second - first**2
        by_chance = variance / b * max(self._n_rows - b, 1) / max(self._n_rows - 1, 1)
        varies = variance > 0
        return float((between[varies] / by_chance[varies]).mean())

    def means(self) -> dict[str, float]:
        """Per batch: distinct `sequences` and `documents`, share of the `largest` document, rows whose sequence was `previous`."""
        found = {name: total / self.n_batches for name, total in self._sums.items()}
        return {**found, "previous": self._sums["previous"] / max(1, self._n_followed)}

    def result(
        self, window: Iterable[tuple[Expected, Expected]], everything: tuple[Expected, Expected]
    ) -> Quality:
        """The numbers, beside expectations of (sequences, documents) per window and for all rows."""
        windows, mean, ratio = list(window), self.means(), self.variance_ratio()
        return Quality(
            n_batches=self.n_batches,
            batch_size=self._size,
            variance_ratio=ratio,
            sequences=mean["sequences"],
            documents=mean["documents"],
            largest_document=mean["largest"],
            previous_sequence=mean["previous"],
            window=_mean([_as_dict(*pair) for pair in windows]),
            everything=_as_dict(*everything),
            warnings=_warnings(ratio, mean["largest"], everything[1].largest),
        )


def _as_dict(sequences: Expected, documents: Expected) -> dict[str, float]:
    return {
        "sequences": sequences.distinct,
        "documents": documents.distinct,
        "largest_document": documents.largest,
        "previous_sequence": sequences.previous,
    }


def _mean(values: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(v[name] for v in values) / len(values) for name in values[0]}


def _warnings(ratio: float, largest: float, by_chance: float) -> list[str]:
    found = []
    if ratio > _POOR_VARIANCE:
        found.append(
            f"batch means vary {ratio:.2f} times as much as random batches would: raise window_rows, or build with more "
            f"sequences per shard"
        )
    if largest > max(_POOR_DOCUMENT_SHARE, 2 * by_chance):
        found.append(
            f"one document makes up {100 * largest:.1f} % of a batch (by chance {100 * by_chance:.1f} %): raise window_rows"
        )
    return found
