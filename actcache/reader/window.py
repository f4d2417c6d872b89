"""One window being filled: chunks are read, checked, decoded and scattered to their shuffled place by threads.

A buffer has `head` spare rows in front, where the rows left over from the window before are copied, so that every
batch is one contiguous slice. Buffers are recycled when no tensor refers to them any more.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import ActcacheError
from actcache.reader.order import Arrangement, Members
from actcache.store.shard import ShardReader

_CHUNKS_PER_JOB = 4
_LIVENESS_S = 5.0
_READ_AHEAD_BYTES = 16 << 20


class BufferPool:
    """Row buffers [n, d] that are used again once every tensor made from them is gone."""

    def __init__(self, n_rows: int, width: int, dtype: np.dtype[Any]) -> None:
        self._shape, self._dtype = (n_rows, width), dtype
        self._free: list[NDArray[Any]] = []
        self._lock = threading.RLock()  # the collector may give a buffer back in the middle of `take`
        self.n_allocated = 0

    @property
    def buffer_bytes(self) -> int:
        """Bytes of one buffer."""
        return self._shape[0] * self._shape[1] * self._dtype.itemsize

    def take(self, limit: int | None) -> NDArray[Any] | None:
        """A view of a free buffer, or of a new one while fewer than `limit` exist (None: no limit)."""
        with self._lock:
            if self._free:
                raw = self._free.pop()
            elif limit is None or self.n_allocated < limit:
                raw = np.empty(self._shape, self._dtype)
                self.n_allocated += 1
            else:
                return None
        view = raw[:]
        weakref.finalize(view, self._give_back, raw).atexit = False
        return view

    def _give_back(self, raw: NDArray[Any]) -> None:
        with self._lock:
            self._free.append(raw)


class Source(NamedTuple):
    """One chunk of a window.

    slots  where its selected rows go, counted in this reader's own slots; -1 is never among them.
    rows   which rows of the chunk they are.
    """

    reader: ShardReader
    layer_i: int
    chunk: int
    rows: NDArray[np.int64]
    slots: NDArray[np.int64]


class Layout(NamedTuple):
    """What goes where in a window.

    sources   the chunks this reader decodes.
    layer     [n] int64 model layer of the row in each of this reader's slots.
    row       [n] int64 global row index of each.
    partition the partition of the row in each slot of the whole window (all ranks).
    """

    sources: list[Source]
    layer: NDArray[np.int64]
    row: NDArray[np.int64]
    partition: NDArray[np.int16]


class Fill:
    """A window on its way into a buffer. `wait` returns when every row is in place, or raises what went wrong."""

    def __init__(
        self,
        view: NDArray[Any],
        head: int,
        lay_out: Callable[[], Layout],
        pool: ThreadPoolExecutor,
        *,
        chunk_bytes: int,
    ) -> None:
        self.rows: Tensor = torch.from_numpy(view)
        self.head = head
        self.layout: Layout | None = None
        self._array: NDArray[Any] | None = view
        self._pool, self._lay_out = pool, lay_out
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._n_jobs = 0
        self.error: BaseException | None = None
        self._n_ahead = max(1, _READ_AHEAD_BYTES // chunk_bytes)
        pool.submit(self._open)

    def _open(self) -> None:
        try:
            layout = self._lay_out()
            self.layout = layout
            starts = range(0, len(layout.sources), _CHUNKS_PER_JOB)
            self._n_jobs = len(starts)
            if not starts:
                self._finish()
            self._will_need(layout.sources[: self._n_ahead])
            for start in starts:
                self._pool.submit(self._scatter, layout.sources, start)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self._fail(error)

    def _will_need(self, sources: list[Source]) -> None:
        for source in sources:
            source.reader.will_need(source.layer_i, source.chunk)

    def _scatter(self, sources: list[Source], start: int) -> None:
        """Decode a few chunks to their place, and have those `_READ_AHEAD_BYTES` further on read meanwhile."""
        try:
            array = self._array
            if array is None:
                return
            target, scratch = array[self.head :], None
            self._will_need(sources[start + self._n_ahead : start + self._n_ahead + _CHUNKS_PER_JOB])
            for source in sources[start : start + _CHUNKS_PER_JOB]:
                if self.error is not None:
                    return
                rows = source.reader.read(source.layer_i, source.chunk, scratch)
                scratch = rows if rows.flags.writeable else None
                target[source.slots] = rows if len(source.rows) == len(rows) else rows[source.rows]
            with self._lock:
                self._n_jobs -= 1
                is_last = self._n_jobs == 0
            if is_last:
                self._finish()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self._finish()

    def _finish(self) -> None:
        self._array = None  # the tensor alone keeps the buffer from now on
        self._done.set()

    def cancel(self, reason: str) -> None:
        """Make running jobs stop at their next chunk."""
        self.error = self.error or ActcacheError(reason)
        self._done.set()

    def wait(self) -> Layout:
        """Wait until the window is whole."""
        while not self._done.wait(_LIVENESS_S):
            if self._pool._shutdown:
                raise ActcacheError("the stream was closed while its consumer was waiting for a window")
        if self.error is not None:
            raise self.error
        assert self.layout is not None
        return self.layout


def lay_out(
    members: Members,
    arrangement: Arrangement,
    selected: list[NDArray[np.int64]],
    readers: list[ShardReader],
    chunk: NDArray[np.int64],
    layer_index: NDArray[np.int64],
    layer: NDArray[np.int64],
    first_row: NDArray[np.int64],
    is_mine: NDArray[np.bool_],
) -> Layout:
    """Turn an arrangement into work for the threads.

    selected     per member, the selected rows within its chunk.
    readers      per member, its shard.     chunk  [m] its chunk number.
    layer_index  [m] its index on the layer axis.  layer [m] its model layer.  first_row [m] row of its chunk's first.
    is_mine      [P] which partitions this rank reads.
    """
    mine = is_mine[arrangement.partition]
    own_slot = np.cumsum(mine) - 1  # slot of the window -> slot among this rank's
    n_own = int(mine.sum())
    out_layer, out_row = np.empty(n_own, np.int64), np.empty(n_own, np.int64)
    sources: list[Source] = []
    start = 0
    for m, rows in enumerate(selected):
        slots = arrangement.slot[start : start + len(rows)]
        start += len(rows)
        if not is_mine[members.partition[m]] or not len(rows):
            continue
        slots = own_slot[slots]
        out_layer[slots], out_row[slots] = layer[m], first_row[m] + rows
        sources.append(Source(readers[m], int(layer_index[m]), int(chunk[m]), rows, slots))
    return Layout(sources, out_layer, out_row, arrangement.partition)
