"""Statistics of a layer over any set of shards, merged from what was measured when each was written."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.store.arrays import is_quantised
from actcache.store.open import CaptureCatalog
from actcache.store.statistics import Moments, QuantisationError, merge, no_moments, quantisation_error


class LayerStatistics(NamedTuple):
    """Statistics of one layer's kept rows in some shards.

    n_rows        count.
    mean, variance, least, greatest  [d] float64, per dimension; the variance divides by n_rows.
    norm_mean     mean Euclidean norm of a row.    norm_max  greatest.
    n_non_finite  kept rows that hold a NaN or an infinity; they are in none of the other numbers.
    """

    n_rows: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    least: NDArray[np.float64]
    greatest: NDArray[np.float64]
    norm_mean: float
    norm_max: float
    n_non_finite: int


def layer_statistics(capture: CaptureCatalog, shards: Sequence[int]) -> dict[int, LayerStatistics]:
    """By the model's layer number."""
    n_layers, width = len(capture.capture.layers), capture.capture.width
    merged, totals = _kept_moments(capture, shards), np.zeros((n_layers, 5))
    for shard in shards:
        found = capture.side("totals", shard)[0]
        totals[:, 3] = np.maximum(totals[:, 3], found[:, 3])
        totals[:, [0, 1, 2, 4]] += found[:, [0, 1, 2, 4]]
    found_layers: dict[int, LayerStatistics] = {}
    for layer, m, (_, norm_sum, _squares, norm_max, n_non_finite) in zip(
        capture.capture.layers, merged, totals, strict=True
    ):
        assert m.mean.shape == (width,)
        n = max(m.n, 1)
        found_layers[layer] = LayerStatistics(
            m.n,
            m.mean,
            m.m2 / n,
            m.least,
            m.greatest,
            float(norm_sum / n),
            float(norm_max),
            int(n_non_finite),
        )
    return found_layers


def quantisation_errors(capture: CaptureCatalog, shards: Sequence[int]) -> dict[int, QuantisationError]:
    """By the model's layer number; UsageError where rows are stored as they are."""
    if not is_quantised(capture.capture):
        raise UsageError(
            f"{capture.capture.name} is stored with codec {capture.capture.codec}, which changes no number: there is no "
            f"error to tell"
        )
    kept = _kept_moments(capture, shards)
    errors = [np.zeros(capture.capture.width) for _ in kept]
    ordinary = [no_moments(capture.capture.width) for _ in kept]
    for shard in shards:
        for i, (n, mean, deviations, squared) in enumerate(capture.side("error", shard)[0]):
            ordinary[i] = merge(ordinary[i], Moments(int(n[0]), mean, deviations, mean, mean))
            errors[i] += squared
    return {
        layer: quantisation_error(kept[i], ordinary[i], errors[i])
        for i, layer in enumerate(capture.capture.layers)
    }


def _kept_moments(capture: CaptureCatalog, shards: Iterable[int]) -> list[Moments]:
    merged = [no_moments(capture.capture.width) for _ in capture.capture.layers]
    for shard in shards:
        moments, totals = capture.side("moments", shard)[0], capture.side("totals", shard)[0]
        merged = [merge(m, Moments(int(totals[i, 0]), *moments[i])) for i, m in enumerate(merged)]
    return merged
