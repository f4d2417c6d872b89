"""One window being filled: chunks are read, checked, decoded and scattered to their shuffled place by threads.

From a local disk the threads that decode also read. From object storage other threads (`Fetching`) wait for requests,
many at once, and hand what came to those that decode; the bytes between them are bounded, however many wait.

A buffer has `head` spare rows in front, where the rows left over from the window before are copied, so that every
batch is one contiguous slice. Buffers are recycled when no tensor refers to them any more.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import ActcacheError
from actcache.reader.counters import Counters
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
    def n_rows(self) -> int:
        """Rows of one buffer."""
        return self._shape[0]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of one buffer."""
        return self._shape[0] * self._shape[1] * self._dtype.itemsize

    @property
    def n_free(self) -> int:
        """Buffers nobody refers to."""
        return len(self._free)

    def take(self) -> NDArray[Any]:
        """A view of a free buffer, or of a new one."""
        with self._lock:
            if self._free:
                raw = self._free.pop()
            else:
                raw = np.empty(self._shape, self._dtype)
                self.n_allocated += 1
        view = raw[:]
        weakref.finalize(view, self._give_back, raw).atexit = False
        return view

    def _give_back(self, raw: NDArray[Any]) -> None:
        with self._lock:
            self._free.append(raw)


class Room:
    """A bound on bytes that are fetched, or being fetched, and not yet decoded."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0
        self._changed = threading.Condition()

    def take(self, n_bytes: int, is_over: Callable[[], bool]) -> bool:
        """Wait for room (more than the limit fits when nothing else is there); False once `is_over`."""
        with self._changed:
            while not is_over():
                if not self._taken or self._taken + n_bytes <= self._limit:
                    self._taken += n_bytes
                    return True
                self._changed.wait(_LIVENESS_S)
        return False

    def give(self, n_bytes: int) -> None:
        """Give back what was taken; 0 makes those that wait look whether they still should."""
        with self._changed:
            self._taken -= n_bytes
            self._changed.notify_all()


class Fetching(NamedTuple):
    """Threads that wait for object storage, and the room for what they bring."""

    pool: ThreadPoolExecutor
    room: Room


class Lane(NamedTuple):
    """Where the rows of one layer of one capture go: columns [column, column + d) of buffer number `buffer`."""

    buffer: int
    layer_index: int
    column: int


class Source(NamedTuple):
    """One chunk of a window.

    rows   which rows of the chunk are selected.
    slots  where each goes, counted in this reader's own slots.
    """

    reader: ShardReader
    lane: Lane
    chunk: int
    rows: NDArray[np.int64]
    slots: NDArray[np.int64]


class Layout(NamedTuple):
    """What goes where in a window.

    sources    the chunks this reader decodes.
    layer      [n] int64 model layer of the row in each of this reader's slots (the first, where a row has several).
    row        [n] int64 global row number of each.
    partition  the partition of the row in each slot of the whole window, all ranks.
    """

    sources: list[Source]
    layer: NDArray[np.int64]
    row: NDArray[np.int64]
    partition: NDArray[np.int16]


class Fill:
    """A window on its way into buffers. `wait` returns when every row is in place, or raises what went wrong.

    views  one buffer per hook, [head + n, d].
    """

    def __init__(
        self,
        views: list[NDArray[Any]],
        head: int,
        lay_out: Callable[[], Layout],
        pool: ThreadPoolExecutor,
        counters: Counters,
        *,
        chunk_bytes: int,
        fetching: Fetching | None = None,
    ) -> None:
        self.tensors: list[Tensor] = [torch.from_numpy(view) for view in views]
        self.head = head
        self.layout: Layout | None = None
        self._views: list[NDArray[Any]] | None = views
        self._pool, self._lay_out, self._counters = pool, lay_out, counters
        self._fetching = fetching
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._n_jobs = 0
        self.error: BaseException | None = None
        self._n_ahead = max(1, _READ_AHEAD_BYTES // chunk_bytes)
        pool.submit(self._open)

    def _open(self) -> None:
        started = perf_counter()
        try:
            layout = self._lay_out()
            self.layout = layout
            self._counters.add(layout_s=perf_counter() - started)
            jobs = _jobs(layout.sources, by_request=self._fetching is not None)
            self._n_jobs = len(jobs)
            if not jobs:
                self._finish()
            if self._fetching is None:
                self._will_need(layout.sources[: self._n_ahead])
            for start, job in jobs:
                if self._fetching is None:
                    ahead = layout.sources[start + self._n_ahead :][: len(job)]
                    self._pool.submit(self._scatter, job, ahead)
                else:
                    self._fetching.pool.submit(self._fetch, job, self._fetching.room)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self._fail(error)

    @staticmethod
    def _will_need(sources: list[Source]) -> None:
        for source in sources:
            source.reader.will_need(source.lane.layer_index, source.chunk)

    def _fetch(self, job: list[Source], room: Room) -> None:
        """What one request brings, on a thread that may wait."""
        reader, wanted = job[0].reader, [(source.lane.layer_index, source.chunk) for source in job]
        n_bytes = sum(reader.n_bytes(*one) for one in wanted)
        if not room.take(n_bytes, lambda: self.error is not None):
            return
        try:
            bodies = reader.fetch(wanted)
            self._pool.submit(self._scatter_fetched, job, bodies, room, n_bytes)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            room.give(n_bytes)
            self._fail(error)

    def _scatter_fetched(
        self, job: list[Source], bodies: list[bytes | memoryview], room: Room, n_bytes: int
    ) -> None:
        try:
            self._scatter(job, [], bodies)
        finally:
            bodies.clear()
            room.give(n_bytes)

    def _scatter(
        self, job: list[Source], ahead: list[Source], bodies: list[bytes | memoryview] | None = None
    ) -> None:
        """Decode a few chunks to their place, and have those `_READ_AHEAD_BYTES` further on read meanwhile."""
        try:
            views, scratch = self._views, None
            if views is None:
                return
            self._will_need(ahead)
            for i, source in enumerate(job):
                if self.error is not None:
                    return
                scratch = self._place(source, views, scratch, None if bodies is None else bodies[i])
            with self._lock:
                self._n_jobs -= 1
                is_last = self._n_jobs == 0
            if is_last:
                self._finish()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self._fail(error)

    def _place(
        self,
        source: Source,
        views: list[NDArray[Any]],
        scratch: NDArray[Any] | None,
        body: bytes | memoryview | None,
    ) -> NDArray[Any] | None:
        """One chunk to its place; returns a scratch buffer the next one of the same capture may use."""
        reader, lane = source.reader, source.lane
        before = perf_counter()
        at = (lane.layer_index, source.chunk)
        out = scratch if scratch is not None and scratch.shape == reader.shape else None
        rows = reader.read(*at, out) if body is None else reader.decode(*at, body, out)
        decoded = perf_counter()
        target = views[lane.buffer][self.head :]
        if rows.shape[1] != target.shape[1]:
            target = target[:, lane.column : lane.column + rows.shape[1]]
        target[source.slots] = rows if len(source.rows) == len(rows) else rows[source.rows]
        self._counters.add(
            decode_s=decoded - before,
            scatter_s=perf_counter() - decoded,
            read_bytes=int(reader.chunks.length[lane.layer_index, source.chunk]),
            row_bytes=len(source.rows) * rows.shape[1] * rows.itemsize,
        )
        return rows if rows.flags.writeable else None

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self._finish()

    def _finish(self) -> None:
        self._views = None  # the tensors alone keep the buffers from now on
        self._wake()

    def _wake(self) -> None:
        self._done.set()
        if self._fetching is not None:
            self._fetching.room.give(0)

    def cancel(self, reason: str) -> None:
        """Make running jobs stop at their next chunk."""
        self.error = self.error or ActcacheError(reason)
        self._wake()

    def wait(self) -> Layout:
        """Wait until the window is whole."""
        while not self._done.wait(_LIVENESS_S):
            if self._pool._shutdown:
                raise ActcacheError("the stream was closed while its consumer was waiting for a window")
        if self.error is not None:
            raise self.error
        assert self.layout is not None
        return self.layout


def _jobs(sources: list[Source], *, by_request: bool) -> list[tuple[int, list[Source]]]:
    """Handfuls of sources with the number of each one's first; by request, those of a shard that lie side by side."""
    if not by_request:
        starts = range(0, len(sources), _CHUNKS_PER_JOB)
        return [(start, sources[start : start + _CHUNKS_PER_JOB]) for start in starts]
    of_shard: dict[int, list[Source]] = {}
    for source in sources:
        of_shard.setdefault(id(source.reader), []).append(source)
    return [
        (0, [found[i] for i in parts])
        for found in of_shard.values()
        for parts in found[0].reader.requests([(one.lane.layer_index, one.chunk) for one in found])
    ]


def lay_out(
    members: Members,
    arrangement: Arrangement,
    selected: Sequence[NDArray[np.int64]],
    *,
    lanes: Sequence[Sequence[Lane]],
    readers: Callable[[int, int], ShardReader],
    shard: NDArray[np.int64],
    chunk: NDArray[np.int64],
    layer: NDArray[np.int64],
    first_row: NDArray[np.int64],
    is_mine: NDArray[np.bool_],
) -> Layout:
    """Turn an arrangement into work for the threads.

    selected   per member, the selected rows within its chunk.    lanes  per order lane, what a member of it reads.
    readers    (buffer, shard) -> the reader of that shard of the buffer's capture.
    shard, chunk, layer, first_row  [m] of each member: its shard, chunk, model layer, and row number of its first row.
    is_mine    [P] which partitions this rank reads.
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
        sources += [
            Source(readers(lane.buffer, int(shard[m])), lane, int(chunk[m]), rows, slots)
            for lane in lanes[members.layer_i[m]]
        ]
    return Layout(sources, out_layer, out_row, arrangement.partition)
