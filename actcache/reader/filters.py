"""Which kept rows a stream leaves out, decided from the side arrays alone: no activation is read for it."""

import threading

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.store.open import CaptureCatalog

_SHARDS_FOR_MEDIAN = 64


class NormFilter:
    """Drops rows whose norm exceeds their layer's limit. Reads each shard's norms once, keeps only what is dropped.

    layer_index  where each selected layer lies on the layer axis.    limits  the greatest norm kept, per layer.
    """

    def __init__(
        self,
        catalog: CaptureCatalog,
        kept: NDArray[np.int64],
        layer_index: NDArray[np.int64],
        limits: tuple[float, ...],
    ) -> None:
        self._catalog, self._kept, self._layer_index, self._limits = catalog, kept, layer_index, limits
        self._dropped: dict[int, list[NDArray[np.int64]]] = {}
        self._lock = threading.Lock()

    def dropped(self, shard: int) -> list[NDArray[np.int64]]:
        """Per selected layer, the kept rows of the shard that are dropped, ascending."""
        with self._lock:
            if shard not in self._dropped:
                norm = self._catalog.side("norm", shard)[:, : self._kept[shard]]
                self._dropped[shard] = [
                    np.flatnonzero(norm[i] > limit)
                    for i, limit in zip(self._layer_index, self._limits, strict=True)
                ]
            return self._dropped[shard]


def limits_from_ratio(
    catalog: CaptureCatalog, kept: NDArray[np.int64], shards: range, layers: tuple[int, ...], ratio: float
) -> tuple[float, ...]:
    """Per layer, `ratio` times the median norm of kept rows: what counts as an outlier becomes a number.

    The median is over at most 64 training shards, evenly spaced, so it costs the same on any store.
    """
    if ratio <= 1:
        raise UsageError(
            f"outlier_norm_ratio={ratio} would drop half of all rows; it is a multiple of the median norm, such as 10"
        )
    spaced = np.unique(
        np.linspace(shards.start, shards.stop - 1, min(len(shards), _SHARDS_FOR_MEDIAN)).astype(int)
    )
    norms = [catalog.side("norm", int(shard))[:, : kept[shard]] for shard in spaced]
    return tuple(
        float(np.median(np.concatenate([n[catalog.layer_index(layer)] for n in norms]))) * ratio
        for layer in layers
    )
