"""Windows in this machine's memory: buffers that are used again, filled by scattering, cut into batches without a copy."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.reader.layout import Kind, Piece
from actcache.reader.scatter import Target, aligned_empty
from actcache.store.quantise import Quantised


class Decoded(Protocol):
    """The chunks of a job by their number in it, each to be asked for once, in order, and used before the next."""

    def bring(self, target: Target) -> int:
        """Bring the rows of the first ones to their slots; says of how many. The others are to be asked for."""
        ...

    def rows_of(self, number: int, out: NDArray[Any] | None) -> NDArray[Any]:
        """Rows [r, d]: in `out`, which the next one may overwrite, where they had to be decoded."""
        ...

    def codes_of(self, number: int) -> Quantised:
        """Of a quantised capture, the chunk in codes."""
        ...


_memory = threading.local()
MOST_WINDOWS = 3
FEWEST_WINDOWS = 2


class Shape(NamedTuple):
    """Of the buffer of one hook: a window's rows with room for a batch in front, and their dtype on disk."""

    n_rows: int
    width: int
    dtype: np.dtype[Any]

    @property
    def n_bytes(self) -> int:
        """Bytes of one buffer."""
        return self.n_rows * self.width * self.dtype.itemsize


class Window(Protocol):
    """Where the rows of one window land.

    tensors  per hook, [head + n, columns]; the rows are in them once `land` was called for all chunks.
    """

    tensors: list[Tensor]

    def land(self, job: Sequence[Piece], decoded: Decoded) -> None:
        """Bring the rows of some chunks of one lane's buffer and columns to their slots; called by several threads."""
        ...

    def carry(self, left: list[Tensor]) -> None:
        """Put rows that were left over from the window before in front of this one's."""
        ...

    def seal(self) -> None:
        """No more rows come: whoever holds the tensors decides how long the buffers are taken."""
        ...


class Windows(Protocol):
    """Takes and gives back windows.

    most  how many the memory bound allows.
    """

    most: int

    @property
    def has_room(self) -> bool:
        """Whether another window fits the bound now."""
        ...

    def wait_for_room(self) -> None:
        """Wait for windows that nobody refers to any more and a device is still busy with; for no others."""
        ...

    def take(self, head: int) -> Window:
        """A window with `head` spare rows in front, beyond the bound if need be: the consumer keeps what is not free."""
        ...


class BufferPool:
    """Row buffers [n, d] that are used again once every tensor made from them is gone.

    allocate  makes one; it begins at a cache line.
    """

    def __init__(self, allocate: Callable[[], NDArray[Any]]) -> None:
        self._allocate = allocate
        self._free: list[NDArray[Any]] = []
        self._lock = threading.RLock()  # the collector may give a buffer back in the middle of `take`
        self.n_allocated = 0

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
                raw = self._allocate()
                self.n_allocated += 1
        view = raw[:]
        weakref.finalize(view, self._give_back, raw).atexit = False
        return view

    def _give_back(self, raw: NDArray[Any]) -> None:
        with self._lock:
            self._free.append(raw)


class HostWindow:
    """A `Window` in buffers of this machine. See there.

    views  one buffer per hook.
    """

    def __init__(self, views: list[NDArray[Any]], head: int) -> None:
        self.tensors = [torch.from_numpy(view) for view in views]
        self._views: list[NDArray[Any]] | None = views
        self._head = head

    def land(self, job: Sequence[Piece], decoded: Decoded) -> None:
        """Scatter each chunk as it is decoded: its rows are still in the processor's cache."""
        views = self._views
        if views is None or not job:
            return
        kind, lane = job[0].reader, job[0].lane
        target = Target(views[lane.buffer][self._head :, lane.column : lane.column + kind.shape[1]])
        n_brought = decoded.bring(target)
        if n_brought == len(job):
            return
        scratch = self._scratch(kind)
        for i, source in enumerate(job[n_brought:], n_brought):
            target.put(source.slots, decoded.rows_of(i, scratch), source.chosen)

    def _scratch(self, kind: Kind) -> NDArray[Any]:
        """Memory of this thread for a decoded chunk, which begins at a cache line: rows are loaded a line at a time."""
        found = getattr(_memory, "chunk", None)
        if found is None or (found.shape, found.dtype) != (kind.shape, kind.dtype):
            found = _memory.chunk = aligned_empty(kind.shape, kind.dtype)
        return found

    def carry(self, left: list[Tensor]) -> None:
        """Copy rows into the spare ones in front."""
        for tensor, rows in zip(self.tensors, left, strict=True):
            tensor[self._head - len(rows) : self._head] = rows

    def seal(self) -> None:
        """The tensors alone keep the buffers from now on."""
        self._views = None


class HostWindows:
    """`Windows` in this machine's memory.

    shapes    of the buffers, one per hook.    most  windows that the memory bound allows.
    allocate  makes a buffer; the default is ordinary memory.
    """

    def __init__(
        self, shapes: Sequence[Shape], most: int, allocate: Callable[[Shape], NDArray[Any]] | None = None
    ) -> None:
        make = allocate or (lambda shape: aligned_empty(shape[:2], shape.dtype))
        self.pools = [BufferPool(lambda shape=shape: make(shape)) for shape in shapes]
        self.most = most

    @property
    def has_room(self) -> bool:
        """Whether another window fits the bound now."""
        return all(pool.n_free or pool.n_allocated < self.most for pool in self.pools)

    def wait_for_room(self) -> None:
        """Nothing to wait for: a buffer is free as soon as nobody refers to it."""

    def take(self, head: int) -> HostWindow:
        """A window with `head` spare rows in front."""
        return HostWindow([pool.take() for pool in self.pools], head)
