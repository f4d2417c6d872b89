"""What the side arrays and the ledger record of a shard need, gathered from its chunks.

The same comes from encoding rows and from reading a whole object again: side objects are functions of the rows as stored.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.store.arrays import ERRORS, ArraySpec, is_quantised
from actcache.store.dtypes import as_float32, disk_dtype, scratch
from actcache.store.quantise import Quantised
from actcache.store.schema import Capture, PlannedShard
from actcache.store.shard import ShardReader, n_stored_chunks
from actcache.store.statistics import RowStatistics, merge, no_moments, row_statistics

RUN_BYTES = 4 << 20
"""Of rows. Of a quarter of this, two threads take longer than one: they wait for the interpreter's lock more than they work."""

F64 = NDArray[np.float64]


class Run(NamedTuple):
    """Adjacent chunks of one layer that are worked on together: few long steps instead of many short ones.

    A short last chunk is a run of its own, so that all chunks of a run have the same number of rows.
    """

    layer_i: int
    first: int
    n_chunks: int
    n_rows: int
    n_kept: int


class Found(NamedTuple):
    """What a run came to.

    quantised       its chunks in codes; empty where rows are stored as they are.
    squared_errors  [d] of quantising, summed over its kept rows; None where it was read.
    """

    statistics: RowStatistics
    quantised: list[Quantised]
    squared_errors: F64 | None = None


class Gathered:
    """What the side arrays of one shard will hold. Runs are added in the order of `runs`.

    on_non_finite  told (layer index, row of the shard, whether it holds a NaN) of every stored row that is not finite.
    """

    def __init__(
        self,
        capture: Capture,
        rows: ArraySpec,
        planned: PlannedShard,
        on_non_finite: Callable[[int, int, bool], None],
    ) -> None:
        assert rows.inner is not None
        self._planned, self._on_non_finite = planned, on_non_finite
        self.n_layers, rows_per_shard, width = rows.chunk
        self.rows_per_chunk, self.is_quantised = rows.inner[1], is_quantised(capture)
        self.chunks_per_shard = rows_per_shard // self.rows_per_chunk
        self._chunk_bytes = self.rows_per_chunk * width * disk_dtype(capture.dtype).itemsize
        self._norm = np.full((self.n_layers, rows_per_shard), np.nan, np.float32)
        self._is_finite = np.ones((self.n_layers, planned.kept), np.bool_)
        self._moments = [no_moments(width) for _ in range(self.n_layers)]
        self._ordinary = list(self._moments)
        self._scales: dict[str, NDArray[np.float32]] = {}
        if self.is_quantised:
            shape = (self.n_layers, self.chunks_per_shard, width)
            self._scales = {name: np.full(shape, np.nan, np.float32) for name in ("scale", "offset")}
        self.squared_errors = np.zeros((self.n_layers, width))

    @property
    def n_chunks(self) -> int:
        """Stored chunks of a layer."""
        return n_stored_chunks(self._planned.stored, self.rows_per_chunk)

    def runs(self) -> list[Run]:
        """All stored chunks, layer by layer, up to `RUN_BYTES` of rows together."""
        r, (kept, stored) = self.rows_per_chunk, (self._planned.kept, self._planned.stored)
        most, n_whole = max(1, RUN_BYTES // self._chunk_bytes), stored // r
        parts = [(first, min(most, n_whole - first), r) for first in range(0, n_whole, most)]
        if stored % r:
            parts.append((n_whole, 1, stored % r))
        return [
            Run(layer_i, first, n, n * rows, min(max(0, kept - first * r), n * rows))
            for layer_i in range(self.n_layers)
            for first, n, rows in parts
        ]

    def add(self, run: Run, found: Found) -> None:
        """The next run."""
        i, at, statistics = run.layer_i, run.first * self.rows_per_chunk, found.statistics
        for row in np.flatnonzero(~statistics.is_finite):
            self._on_non_finite(i, at + int(row), bool(np.isnan(statistics.norm[row])))
        self._norm[i, at : at + run.n_rows] = statistics.norm
        self._is_finite[i, at : at + run.n_kept] = statistics.is_finite[: run.n_kept]
        self._moments[i] = merge(self._moments[i], statistics.moments)
        if self.is_quantised:
            self._ordinary[i] = merge(self._ordinary[i], statistics.ordinary)
        for name, values in self._scales.items():
            values[i, run.first : run.first + run.n_chunks] = [getattr(q, name) for q in found.quantised]
        if found.squared_errors is not None:
            self.squared_errors[i] += found.squared_errors

    def side_values(self) -> dict[str, NDArray[Any]]:
        """The numbers of every side array but `exact`, by name."""
        values: dict[str, NDArray[Any]] = {
            "norm": self._norm,
            "moments": np.stack([np.stack([m.mean, m.m2, m.least, m.greatest]) for m in self._moments]),
            "totals": np.array([self._totals(i) for i in range(self.n_layers)], np.float64),
        }
        return values | self._scales | ({"error": self._error()} if self.is_quantised else {})

    def _totals(self, layer_i: int) -> list[float]:
        norm = self._norm[layer_i, : self._planned.kept][self._is_finite[layer_i]].astype(np.float64)
        n_non_finite = self._planned.kept - len(norm)
        return [len(norm), norm.sum(), (norm**2).sum(), norm.max(initial=0.0), n_non_finite]

    def _error(self) -> F64:
        found = np.empty((self.n_layers, len(ERRORS), self.squared_errors.shape[1]))
        for i, moments in enumerate(self._ordinary):
            found[i] = np.full_like(moments.mean, moments.n), moments.mean, moments.m2, self.squared_errors[i]
        return found


def gather(reader: ShardReader, gathered: Gathered, dtype: str) -> None:
    """The same from a whole object: every chunk is read, checked and decoded, a run at a time."""
    r = gathered.rows_per_chunk
    for run in gathered.runs():
        quantised: list[Quantised] = []
        x, width = scratch("read", (run.n_chunks * r, reader.shape[1])), run.n_rows // run.n_chunks
        for i in range(run.n_chunks):
            at = (run.layer_i, run.first + i)
            if reader.quantised is not None:
                quantised.append(reader.read_codes(*at)._replace(codes=np.empty((width, 0), np.uint8)))
            rows = reader.read(*at)[:width]
            as_float32(rows, dtype, x[i * width : (i + 1) * width])
        exact_rows = [q.exact_rows + np.uint32(i * width) for i, q in enumerate(quantised)]
        found = row_statistics(
            x[: run.n_rows], "float32", run.n_kept, np.concatenate(exact_rows) if exact_rows else None
        )
        gathered.add(run, Found(found, quantised))
