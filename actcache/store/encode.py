"""Rows of a shard to the bytes of its object, chunk by chunk on a pool of threads, with the statistics of each on the way.

A chunk is still in the processor's cache when its statistics are taken, and what is gathered here is all that the side
arrays and the ledger record need: the same `Gathered` comes from encoding rows and from reading a whole object again.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.store.arrays import ERRORS, ArraySpec, is_quantised
from actcache.store.codec import CRC_BYTES, crc32c, trailer, with_trailer
from actcache.store.dtypes import as_float32, row_fill, scratch
from actcache.store.quantise import EXACT, Quantised, quantise
from actcache.store.schema import Capture, PlannedShard
from actcache.store.shard import Chunks, ShardReader, n_stored_chunks
from actcache.store.statistics import ChunkStatistics, chunk_statistics, column_sums, merge, no_moments

Parts = list[bytes | memoryview]
F64 = NDArray[np.float64]


class Found(NamedTuple):
    """One chunk, encoded or read.

    parts            its bytes in file order; none where it was read.
    lengths, crcs    of the chunk and, where quantised, of the block behind it; lengths with trailer.
    squared_errors   [d] of quantising, summed over ordinary rows.
    """

    statistics: ChunkStatistics
    quantised: Quantised | None
    parts: Parts
    lengths: tuple[int, ...] = ()
    crcs: tuple[int, ...] = ()
    squared_errors: F64 | None = None


class Gathered:
    """What the side arrays of one shard will hold, from its chunks, each layer's in order.

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
        n_layers, rows_per_shard, width = rows.chunk
        self.rows_per_chunk, self.is_quantised = rows.inner[1], is_quantised(capture)
        self.chunks_per_shard = rows_per_shard // self.rows_per_chunk
        self._norm = np.full((n_layers, rows_per_shard), np.nan, np.float32)
        self._is_finite = np.ones((n_layers, planned.kept), np.bool_)
        self._moments = [no_moments(width) for _ in range(n_layers)]
        self._ordinary = list(self._moments)
        self._scales: dict[str, NDArray[np.float32]] = {}
        if self.is_quantised:
            shape = (n_layers, self.chunks_per_shard, width)
            self._scales = {name: np.full(shape, np.nan, np.float32) for name in ("scale", "offset")}
        self.squared_errors = np.zeros((n_layers, width))

    def kept_in(self, chunk: int) -> int:
        """Rows of a chunk that are kept: its first ones."""
        return min(max(0, self._planned.kept - chunk * self.rows_per_chunk), self.rows_per_chunk)

    def stored_in(self, chunk: int) -> int:
        """Rows of a chunk that are stored: its first ones."""
        return min(max(0, self._planned.stored - chunk * self.rows_per_chunk), self.rows_per_chunk)

    @property
    def n_chunks(self) -> int:
        """Stored chunks of a layer."""
        return n_stored_chunks(self._planned.stored, self.rows_per_chunk)

    def add(self, layer_i: int, chunk: int, found: Found) -> None:
        """The next chunk of a layer."""
        first, statistics = chunk * self.rows_per_chunk, found.statistics
        for row in np.flatnonzero(~statistics.is_finite):
            self._on_non_finite(layer_i, first + int(row), bool(np.isnan(statistics.norm[row])))
        self._norm[layer_i, first : first + len(statistics.norm)] = statistics.norm
        kept = self.kept_in(chunk)
        self._is_finite[layer_i, first : first + kept] = statistics.is_finite[:kept]
        self._moments[layer_i] = merge(self._moments[layer_i], statistics.moments)
        if found.quantised is not None:
            self._ordinary[layer_i] = merge(self._ordinary[layer_i], statistics.ordinary)
            for name, values in self._scales.items():
                values[layer_i, chunk] = getattr(found.quantised, name)
        if found.squared_errors is not None:
            self.squared_errors[layer_i] += found.squared_errors

    def side_values(self) -> dict[str, NDArray[Any]]:
        """The numbers of every side array but `exact`, by name."""
        values: dict[str, NDArray[Any]] = {
            "norm": self._norm,
            "moments": np.stack([np.stack([m.mean, m.m2, m.least, m.greatest]) for m in self._moments]),
            "totals": np.array([self._totals(i) for i in range(len(self._norm))], np.float64),
        }
        return values | self._scales | ({"error": self._error()} if self.is_quantised else {})

    def _totals(self, layer_i: int) -> list[float]:
        norm = self._norm[layer_i, : self._planned.kept][self._is_finite[layer_i]].astype(np.float64)
        n_non_finite = self._planned.kept - len(norm)
        return [len(norm), norm.sum(), (norm**2).sum(), norm.max(initial=0.0), n_non_finite]

    def _error(self) -> F64:
        found = np.empty((len(self._ordinary), len(ERRORS), self.squared_errors.shape[1]))
        for i, moments in enumerate(self._ordinary):
            found[i] = np.full_like(moments.mean, moments.n), moments.mean, moments.m2, self.squared_errors[i]
        return found


class ChunkEncoder:
    """Rows [r, d] of one chunk to its bytes. Safe to call from many threads."""

    def __init__(self, capture: Capture, rows: ArraySpec) -> None:
        assert rows.inner is not None
        self._dtype, self._is_quantised = capture.dtype, is_quantised(capture)
        self._codec, self._shape = rows.codec, rows.inner[1:]

    def encode(self, rows: NDArray[Any], kept: int) -> Found:
        """Encode stored rows, of which the first `kept` are kept; a short chunk is filled up with the fill value."""
        if self._is_quantised:
            return self._quantise(rows, kept)
        data, crc = self._codec.encode(self._padded(rows, row_fill(self._dtype)))
        x = as_float32(rows, self._dtype, None if self._dtype == "float32" else scratch("rows", rows.shape))
        return Found(chunk_statistics(x, kept), None, [data, trailer(crc)], (len(data) + CRC_BYTES,), (crc,))

    def _quantise(self, rows: NDArray[Any], kept: int) -> Found:
        q, said, x = quantise(rows, self._dtype, kept)
        y = as_float32(said, self._dtype, scratch("said", said.shape))
        statistics = chunk_statistics(y, kept, q.exact_rows)
        with np.errstate(invalid="ignore"):  # rows stored exactly may hold anything
            error = np.subtract(x, y, out=scratch("error", x.shape))
        error[q.exact_rows] = 0
        error[kept:] = 0
        squared_errors = column_sums(np.multiply(error, error, out=error))
        data, crc = self._codec.encode(self._padded(q.codes, EXACT))
        block = q.block()
        block_crc = crc32c(block)
        return Found(
            statistics,
            q,
            [data, trailer(crc), block, trailer(block_crc)],
            (len(data) + CRC_BYTES, len(block) + CRC_BYTES),
            (crc, block_crc),
            squared_errors,
        )

    def _padded(self, rows: NDArray[Any], fill: Any) -> NDArray[Any]:
        """One whole chunk, because Zarr knows no short inner chunk."""
        if rows.shape == self._shape:
            return rows
        whole = np.full(self._shape, fill, dtype=rows.dtype)
        whole[: rows.shape[0]] = rows
        return whole


class EncodedShard:
    """The parts of a shard in file order, encoded on `pool` a few chunks ahead of the writer.

    rows  [l, stored, d] numbers on disk dtype. Iterate once, then ask for `chunks`.
    """

    def __init__(
        self,
        rows: NDArray[Any],
        encoder: ChunkEncoder,
        gathered: Gathered,
        pool: Executor,
        n_ahead: int,
    ) -> None:
        self._rows, self._encoder, self._gathered = rows, encoder, gathered
        self._pool, self._n_ahead = pool, n_ahead
        self._lengths: list[tuple[int, ...]] = []
        self._crcs: list[tuple[int, ...]] = []
        self._errors = 0

    def __iter__(self) -> Iterator[Parts]:
        pending: deque[tuple[int, int, Future[Found]]] = deque()
        r, gathered = self._gathered.rows_per_chunk, self._gathered
        for layer_i, chunk in np.ndindex(len(self._rows), gathered.n_chunks):
            rows = self._rows[layer_i, chunk * r : (chunk + 1) * r]
            job = self._pool.submit(self._encoder.encode, rows, gathered.kept_in(chunk))
            pending.append((layer_i, chunk, job))
            if len(pending) > self._n_ahead:
                yield self._take(pending)
        while pending:
            yield self._take(pending)
        yield self._last()

    def _take(self, pending: deque[tuple[int, int, Future[Found]]]) -> Parts:
        layer_i, chunk, job = pending.popleft()
        found = job.result()
        self._gathered.add(layer_i, chunk, found)
        self._lengths.append(found.lengths)
        self._crcs.append(found.crcs)
        return found.parts

    def _last(self) -> Parts:
        """What lies behind the chunks: the errors of quantising, and the index."""
        parts: Parts = []
        if self._gathered.is_quantised:
            errors = self._gathered.squared_errors.astype("<f8").tobytes()
            self._errors = crc32c(errors)
            parts.append(with_trailer(errors, self._errors))
        return [*parts, self.chunks.index_bytes(self._gathered.chunks_per_shard)]

    @property
    def chunks(self) -> Chunks:
        """Lengths and crc32c of what was encoded."""
        n_parts = 2 if self._gathered.is_quantised else 1
        shape = (len(self._rows), self._gathered.n_chunks, n_parts)
        lengths, crcs = (np.array(t, np.uint32).reshape(shape) for t in (self._lengths, self._crcs))
        chunks, *blocks = (Chunks(lengths[..., i], crcs[..., i]) for i in range(n_parts))
        return replace(chunks, blocks=blocks[0], errors=self._errors) if blocks else chunks


def gather(reader: ShardReader, gathered: Gathered, dtype: str) -> None:
    """The same from a whole object: every chunk is read, checked and decoded, one at a time."""
    for layer_i, chunk in np.ndindex(reader.chunks.length.shape):
        q = None if reader.quantised is None else reader.read_codes(layer_i, chunk)
        rows = reader.read(layer_i, chunk)[: gathered.stored_in(chunk)]
        x = as_float32(rows, dtype, None if dtype == "float32" else scratch("said", rows.shape))
        found = chunk_statistics(x, gathered.kept_in(chunk), None if q is None else q.exact_rows)
        gathered.add(layer_i, chunk, Found(found, q, []))
