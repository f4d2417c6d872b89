"""Rows of a shard to the bytes of its object, on a pool of threads, with the statistics of each run of chunks on the way.

A run is still in the processor's caches when its statistics are taken.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.store.arrays import ArraySpec, is_quantised
from actcache.store.codec import CRC_BYTES, crc32c, trailer, with_trailer
from actcache.store.dtypes import row_fill
from actcache.store.gathered import Found, Gathered, Run
from actcache.store.quantise import EXACT, quantise
from actcache.store.schema import Capture
from actcache.store.shard import Chunks
from actcache.store.statistics import row_statistics

Parts = list[bytes | memoryview]


class EncodedRun(NamedTuple):
    """One run, encoded.

    parts          its bytes in file order.
    lengths, crcs  of each part but the trailers, lengths with trailer: of every chunk and, where quantised, of the
                   block behind it.
    """

    found: Found
    parts: Parts
    lengths: list[int]
    crcs: list[int]


class RunEncoder:
    """Rows of runs to bytes. Safe to call from many threads."""

    def __init__(self, capture: Capture, rows: ArraySpec) -> None:
        assert rows.inner is not None
        self._dtype, self._is_quantised = capture.dtype, is_quantised(capture)
        self._codec, self._shape = rows.codec, rows.inner[1:]

    def encode(self, rows: NDArray[Any], run: Run) -> EncodedRun:
        """Encode the stored rows [n, d] of a run; a short chunk is filled up with the fill value."""
        return self._quantise(rows, run) if self._is_quantised else self._as_it_is(rows, run)

    def _as_it_is(self, rows: NDArray[Any], run: Run) -> EncodedRun:
        encoded = EncodedRun(Found(row_statistics(rows, self._dtype, run.n_kept), []), [], [], [])
        for chunk in np.split(rows, run.n_chunks):
            self._append(encoded, *self._codec.encode(self._padded(chunk, row_fill(self._dtype))))
        return encoded

    def _quantise(self, rows: NDArray[Any], run: Run) -> EncodedRun:
        q = quantise(rows, run.n_chunks, self._dtype, run.n_kept)
        statistics = row_statistics(q.said, self._dtype, run.n_kept, q.exact_rows)
        encoded = EncodedRun(Found(statistics, q.chunks, q.errors), [], [], [])
        for chunk in q.chunks:
            self._append(encoded, *self._codec.encode(self._padded(chunk.codes, EXACT)))
            block = chunk.block()
            self._append(encoded, block, crc32c(block))
        return encoded

    @staticmethod
    def _append(encoded: EncodedRun, data: bytes | memoryview, crc: int) -> None:
        encoded.parts.extend((data, trailer(crc)))
        encoded.lengths.append(len(data) + CRC_BYTES)
        encoded.crcs.append(crc)

    def _padded(self, rows: NDArray[Any], fill: Any) -> NDArray[Any]:
        """One whole chunk, because Zarr knows no short inner chunk."""
        if rows.shape == self._shape:
            return rows
        whole = np.full(self._shape, fill, dtype=rows.dtype)
        whole[: rows.shape[0]] = rows
        return whole


class EncodedShard:
    """The parts of a shard in file order, encoded on `pool` a few runs ahead of the writer.

    rows  [l, stored, d] numbers on disk dtype. Iterate once, then ask for `chunks`.
    """

    def __init__(
        self,
        rows: NDArray[Any],
        encoder: RunEncoder,
        gathered: Gathered,
        pool: Executor,
        n_ahead: int,
    ) -> None:
        self._rows, self._encoder, self._gathered = rows, encoder, gathered
        self._pool, self._n_ahead = pool, n_ahead
        self._lengths: list[int] = []
        self._crcs: list[int] = []
        self._errors = 0

    def __iter__(self) -> Iterator[Parts]:
        pending: deque[tuple[Run, Future[EncodedRun]]] = deque()
        for run in self._gathered.runs():
            at = run.first * self._gathered.rows_per_chunk
            rows = self._rows[run.layer_i, at : at + run.n_rows]
            pending.append((run, self._pool.submit(self._encoder.encode, rows, run)))
            if len(pending) > self._n_ahead:
                yield self._take(pending)
        while pending:
            yield self._take(pending)
        yield self._last()

    def _take(self, pending: deque[tuple[Run, Future[EncodedRun]]]) -> Parts:
        run, job = pending.popleft()
        encoded = job.result()
        self._gathered.add(run, encoded.found)
        self._lengths += encoded.lengths
        self._crcs += encoded.crcs
        return encoded.parts

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
        shape = (self._gathered.n_layers, self._gathered.n_chunks, n_parts)
        lengths, crcs = (np.array(t, np.uint32).reshape(shape) for t in (self._lengths, self._crcs))
        chunks, *blocks = (Chunks(lengths[..., i], crcs[..., i]) for i in range(n_parts))
        return replace(chunks, blocks=blocks[0], errors=self._errors) if blocks else chunks
