"""Which kept rows a stream leaves out, decided from what lies beside the activations: none of them is read for it."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.store.open import CaptureCatalog

_SHARDS_FOR_MEDIAN = 64

PlanObject = Callable[[str, int], NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRules:
    """What a row must be to be streamed. None: no such rule.

    norm_limits     per selected layer, the greatest norm.
    positions       the positions that are streamed, ascending.
    exclude_tokens  token ids that are not, ascending.
    """

    norm_limits: tuple[float, ...] | None = None
    positions: tuple[int, ...] | None = None
    exclude_tokens: tuple[int, ...] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether every kept row passes."""
        return self.norm_limits is None and self.positions is None and self.exclude_tokens is None


class RowFilter:
    """Applies `RowRules`. What a shard's side arrays say is read once and kept as a few bits per row.

    lanes  per lane of the order, indexes of its layers on the layer axis; a row of several layers passes where all do.
    kept   [shard] kept rows.
    """

    def __init__(
        self,
        catalog: CaptureCatalog,
        plan_object: PlanObject,
        kept: NDArray[np.int64],
        rules: RowRules,
        lanes: Sequence[NDArray[np.int64]],
    ) -> None:
        self._catalog, self._plan_object, self._kept, self._rules, self._lanes = (
            catalog,
            plan_object,
            kept,
            rules,
            lanes,
        )
        self._limit_of: dict[int, float] = {}
        if rules.norm_limits is not None:
            self._limit_of = dict(zip(np.concatenate(lanes).tolist(), rules.norm_limits, strict=True))
        self._passing: dict[int, list[NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()

    def passing(self, shard: int, lane: int) -> NDArray[np.bool_]:
        """[kept] bool: which kept rows of a shard pass in one lane."""
        with self._lock:
            if shard not in self._passing:
                common = self._common(shard)
                norm = self._catalog.side("norm", shard) if self._limit_of else None
                self._passing[shard] = [np.packbits(self._in_lane(common, norm, of)) for of in self._lanes]
            packed = self._passing[shard][lane]
        return np.unpackbits(packed, count=int(self._kept[shard])).view(np.bool_)

    def n_planned(self, shard: int) -> int:
        """Rows of a shard that pass in one lane by what the plan says: all rules but the norm limits."""
        return int(self._common(shard).sum())

    def forget_before(self, shard: int) -> None:
        """Let go of what is known of lower shards."""
        with self._lock:
            self._passing = {s: bits for s, bits in self._passing.items() if s >= shard}

    def _common(self, shard: int) -> NDArray[np.bool_]:
        """What the plan alone decides, the same for every layer."""
        n, rules = int(self._kept[shard]), self._rules
        passing = np.ones(n, np.bool_)
        if rules.positions is None and rules.exclude_tokens is None:
            return passing
        position = self._plan_object("row_position", shard)[:n]
        if rules.positions is not None:
            passing &= np.isin(position, np.array(rules.positions, np.uint32))
        if rules.exclude_tokens is not None:
            first = self._catalog.plan.grid.sequences_of(shard).start
            sequence = self._plan_object("row_sequence", shard)[:n].astype(np.int64) - first
            token = self._plan_object("tokens", shard)[sequence, position]
            passing &= ~np.isin(token, np.array(rules.exclude_tokens, np.uint32))
        return passing

    def _in_lane(
        self, common: NDArray[np.bool_], norm: NDArray[np.float32] | None, layer_index: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        passing = common
        if norm is not None:
            for i in layer_index.tolist():
                passing = passing & (norm[i, : len(common)] <= self._limit_of[i])
        return passing


def limits_from_ratio(
    catalog: CaptureCatalog,
    kept: NDArray[np.int64],
    shards: Sequence[int],
    layers: tuple[int, ...],
    ratio: float,
) -> tuple[float, ...]:
    """Per layer, `ratio` times the median norm of kept rows: what counts as an outlier becomes a number.

    The median is over at most 64 training shards, evenly spaced, so it costs the same on any store.
    """
    if ratio <= 1:
        raise UsageError(
            f"outlier_norm_ratio={ratio} would drop half of all rows; it is a multiple of the median norm, such as 10"
        )
    spaced = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), _SHARDS_FOR_MEDIAN)).astype(int))
    norms = [catalog.side("norm", shards[i])[:, : kept[shards[i]]] for i in spaced.tolist()]
    return tuple(
        float(np.median(np.concatenate([n[catalog.layer_index(layer)] for n in norms]))) * ratio
        for layer in layers
    )


def resolve_positions(chosen: Sequence[int] | slice | None, seq_len: int) -> tuple[int, ...] | None:
    """The positions of a slice or list, ascending; negative ones count from the end."""
    if chosen is None:
        return None
    try:
        found = np.unique(np.arange(seq_len)[chosen if isinstance(chosen, slice) else list(chosen)])
    except IndexError as error:
        raise UsageError(f"positions={chosen!r} is out of range: sequences have {seq_len}") from error
    if not len(found):
        raise UsageError(f"positions={chosen!r} selects none of {seq_len} positions")
    return tuple(found.tolist())
