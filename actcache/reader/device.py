"""Windows and batches on a GPU: copies run beside the consumer's work, in a queue of their own.

    chunk --decode--> pinned staging --copy--> device --index_copy--> window on the device --slice--> batch
    chunk --scatter--> pinned window --slice, copy--> batch                       (where windows find no room there)

Everything a device does goes through `Side`: a queue of work beside the consumer's own. A `Mark` in that queue says when
what was put before it is done. Host memory is used again only behind its mark; the consumer's work waits for the mark of
a batch on the device itself, so no thread of the host waits for a copy to hand a batch out.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from actcache.errors import UnreachableError, UsageError
from actcache.reader.buffers import RowsOf, Shape
from actcache.reader.layout import Source

BATCHES_AHEAD = 1
"""Batches whose copies are started before they are asked for."""
_PATIENCE_S = 120.0
_POLL_S = 0.0001
_BITS = {2: torch.int16, 4: torch.int32}


class Mark(Protocol):
    """A place in a queue of work."""

    def is_past(self) -> bool:
        """Whether everything before it is done. Does not wait."""
        ...


class Side(Protocol):
    """A queue of work on a device, beside the one the consumer uses. `submit` may be called by any thread."""

    device: torch.device
    n_bytes: int
    """Memory of the device."""

    def pinned(self, n_bytes: int) -> Tensor:
        """Host memory [n_bytes] uint8 that the device copies from without help."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the device, for use in `submit`."""
        ...

    def submit(self, work: Callable[[], None]) -> Mark:
        """Queue what `work` does to tensors; the mark is behind it."""
        ...

    def hand_over(self, mark: Mark, tensors: Sequence[Tensor]) -> None:
        """What the consumer queues from now on is done after `mark`; its use of `tensors` is known to their owner."""
        ...

    def consumer_mark(self) -> Mark:
        """A mark behind what the consumer has queued so far."""
        ...


class CudaSide:
    """A CUDA stream of its own. See `Side`.

    Its work is short, so it goes before the kernels of the consumer that have not begun.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.n_bytes = int(torch.cuda.get_device_properties(self.device).total_memory)
        self._stream = torch.cuda.Stream(self.device, priority=-1)

    def pinned(self, n_bytes: int) -> Tensor:
        """Page-locked memory."""
        with torch.cuda.device(self.device):
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory that belongs to the stream: freed, it is used again in the order of the stream's work."""
        with torch.cuda.stream(self._stream):
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def submit(self, work: Callable[[], None]) -> "CudaMark":
        """Run `work` with the stream as the current one."""
        with torch.cuda.stream(self._stream):
            work()
            return CudaMark(self._stream)

    def hand_over(self, mark: Mark, tensors: Sequence[Tensor]) -> None:
        """The consumer's current stream waits for the mark; freed, the tensors' memory waits for that stream."""
        assert isinstance(mark, CudaMark)
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_event(mark.event)
        for tensor in tensors:
            tensor.record_stream(consumer)

    def consumer_mark(self) -> "CudaMark":
        """On the consumer's current stream."""
        return CudaMark(torch.cuda.current_stream(self.device))


class CudaMark:
    """An event, recorded now."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def is_past(self) -> bool:
        """Whether the event was reached."""
        return self.event.query()


def open_side(device: str) -> Side | None:
    """The side queue of a CUDA device; None where there is none to have (a CPU, another kind of device)."""
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return None
    if not torch.cuda.is_available():
        raise UsageError(f"device={device!r}: this PyTorch sees no CUDA device; use device='cpu'")
    return CudaSide(chosen)


def wait_for(mark: Mark, what: str) -> None:
    """Wait on the host until a mark is past.

    Raises:
        UnreachableError: the device has not come so far within two minutes.
    """
    deadline = time.perf_counter() + _PATIENCE_S
    while not mark.is_past():
        if time.perf_counter() > deadline:
            raise UnreachableError(
                f"the device has not finished {what} within {_PATIENCE_S:.0f} s. Is another process keeping it busy, or "
                f"has it failed (nvidia-smi)?"
            )
        time.sleep(_POLL_S)


class Parcel(NamedTuple):
    """Tensors of one batch on their way: good for work queued after `mark`."""

    tensors: list[Tensor]
    mark: Mark


class Courier:
    """Takes batches to a device. One thread's, the consumer's.

    What is copied from is kept until its copy is done, and so is not used again before.

    rows_are_there  windows live on the device: their rows need no copy, unless another dtype is asked for.
    """

    def __init__(self, side: Side, *, rows_are_there: bool) -> None:
        self.side, self.rows_are_there = side, rows_are_there
        self._moving: deque[tuple[Mark, list[Tensor]]] = deque()

    def send(
        self, rows: Sequence[Tensor], dtypes: Sequence[torch.dtype], numbers: NDArray[np.int64]
    ) -> Parcel:
        """Start taking rows, in the given dtypes, and integers that go with them, which come last in the parcel."""
        steps: list[tuple[Tensor, Tensor]] = []
        arriving: list[Tensor] = []
        for tensor, dtype in zip(rows, dtypes, strict=True):
            there = tensor if self.rows_are_there else self._sent(tensor, steps)
            if dtype != there.dtype:  # on the device: the host would be slower
                converted = self.side.empty(there.shape, dtype)
                steps.append((converted, there))
                there = converted
            arriving.append(there)
        staged = self.side.pinned(numbers.nbytes).view(torch.int64).view(numbers.shape)
        staged.numpy()[...] = numbers
        arriving.append(self._sent(staged, steps))

        def work() -> None:
            for to, source in steps:
                to.copy_(source, non_blocking=True)

        mark = self.side.submit(work)
        self._moving.append((mark, [*rows, staged]))
        self.settle()
        return Parcel(arriving, mark)

    def _sent(self, tensor: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
        there = self.side.empty(tensor.shape, tensor.dtype)
        steps.append((there, tensor))
        return there

    def hand_over(self, parcel: Parcel) -> list[Tensor]:
        """The tensors, for what the consumer does from now on."""
        self.side.hand_over(parcel.mark, parcel.tensors)
        return parcel.tensors

    def settle(self, *, wait: bool = False) -> None:
        """Let go of what has arrived; with `wait`, of everything."""
        while self._moving and (wait or self._moving[0][0].is_past()):
            if wait:
                wait_for(self._moving[0][0], "copying a batch")
            self._moving.popleft()


@dataclass(slots=True)
class _Staged:
    """Pinned memory that one thread decodes chunks into.

    rows  bytes.  numbers  [2 n] int64, slots and rows chosen.  mark  what must be past before it is used again.
    """

    rows: Tensor
    numbers: Tensor
    mark: Mark | None = None


class Staging:
    """Two pieces of pinned memory for each thread: one is filled while the other is copied.

    chunk_bytes, rows_per_chunk  of one decoded chunk.  n_chunks  in one piece.
    """

    def __init__(self, side: Side, chunk_bytes: int, rows_per_chunk: int, n_chunks: int) -> None:
        self._side, self.n_chunks = side, n_chunks
        self._n_bytes, self._n_rows = chunk_bytes * n_chunks, rows_per_chunk * n_chunks
        self._local = threading.local()

    @staticmethod
    def bytes_for(chunk_bytes: int, rows_per_chunk: int, n_chunks: int) -> int:
        """Pinned bytes of one thread; while they are copied, as many on the device."""
        return 2 * n_chunks * (chunk_bytes + 16 * rows_per_chunk)

    def take(self) -> _Staged:
        """This thread's piece that was used less recently, once its copy is done."""
        own: deque[_Staged] | None = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = deque(self._make() for _ in range(2))
        own.rotate()
        if own[0].mark is not None:
            wait_for(own[0].mark, "copying chunks")
        return own[0]

    def _make(self) -> _Staged:
        numbers = self._side.pinned(16 * self._n_rows).view(torch.int64)
        return _Staged(self._side.pinned(self._n_bytes), numbers)


class DeviceWindow:
    """A `Window` on a device: decoded chunks cross the bus in their own order, and are scattered there.

    tensors  per hook, [head + n, columns], the bits of the numbers.
    """

    def __init__(self, side: Side, staging: Staging, tensors: list[Tensor], head: int) -> None:
        self.tensors = tensors
        self._side, self._staging, self._head = side, staging, head

    def land(self, job: Sequence[Source], rows_of: RowsOf) -> None:
        """Decode into pinned memory, as many chunks as it holds, and queue their copy and their scattering."""
        for start in range(0, len(job), self._staging.n_chunks):
            self._land(job[start : start + self._staging.n_chunks], start, rows_of)

    def _land(self, job: Sequence[Source], start: int, rows_of: RowsOf) -> None:
        staged = self._staging.take()
        (rows_per_chunk, width), dtype = job[0].reader.shape, job[0].reader.dtype
        n_rows, row_bytes = len(job) * rows_per_chunk, width * dtype.itemsize
        rows = staged.rows[: n_rows * row_bytes]
        decoded = rows.numpy().view(dtype).reshape(len(job), rows_per_chunk, width)
        chosen: list[NDArray[np.int64]] = []
        for i, source in enumerate(job):
            found = rows_of(start + i, decoded[i])
            if found.ctypes.data != decoded[i].ctypes.data:
                decoded[i] = found
            own = np.arange(len(source.slots)) if source.chosen is None else source.chosen
            chosen.append(i * rows_per_chunk + own)
        n = sum(len(own) for own in chosen)
        numbers = staged.numbers[: 2 * n].view(2, n)
        numbers.numpy()[:] = np.concatenate([source.slots for source in job]), np.concatenate(chosen)
        lane, device = job[0].lane, self._side.device
        unit = torch.int64 if row_bytes % 8 == 0 else _BITS[dtype.itemsize]  # few large moves
        first = lane.column * dtype.itemsize // unit.itemsize
        target = self.tensors[lane.buffer].view(unit)[
            self._head :, first : first + row_bytes // unit.itemsize
        ]

        def work() -> None:
            there = rows.to(device, non_blocking=True).view(unit).view(n_rows, -1)
            slots, picked = numbers.to(device, non_blocking=True)
            target.index_copy_(0, slots, there if n == n_rows else there.index_select(0, picked))

        staged.mark = self._side.submit(work)

    def carry(self, left: list[Tensor]) -> None:
        """Queue copies into the spare rows in front."""

        def work() -> None:
            for tensor, rows in zip(self.tensors, left, strict=True):
                tensor[self._head - len(rows) : self._head].copy_(rows)

        self._side.submit(work)

    def seal(self) -> None:
        """Nothing to do: a batch's mark is behind all that was queued before it."""


@dataclass(slots=True)
class _Lent:
    """A window's memory: taken until no tensor refers to it, and the consumer's work on it is done."""

    storages: list[StorageWeakRef]
    behind: Mark | None = field(default=None)


class DeviceWindows:
    """`Windows` on a device.

    shapes  of the buffers, one per hook.    most  windows that the memory bound allows.
    """

    def __init__(self, side: Side, shapes: Sequence[Shape], most: int, staging: Staging) -> None:
        self._side, self._shapes, self.most, self._staging = side, shapes, most, staging
        self._lent: list[_Lent] = []

    @property
    def has_room(self) -> bool:
        """Whether another window fits the bound now."""
        for lent in self._lent:
            if lent.behind is None and all(storage.expired() for storage in lent.storages):
                lent.behind = self._side.consumer_mark()
        self._lent = [lent for lent in self._lent if lent.behind is None or not lent.behind.is_past()]
        return len(self._lent) < self.most

    def wait_for_room(self) -> None:
        """Wait for what the consumer has queued on windows that it let go of."""
        while not self.has_room:
            busy = [lent.behind for lent in self._lent if lent.behind is not None]
            if not busy:  # it keeps the others
                return
            wait_for(busy[0], "the consumer's work on a window")

    def take(self, head: int) -> DeviceWindow:
        """A window with `head` spare rows in front."""
        tensors = [self._side.empty(shape[:2], _BITS[shape.dtype.itemsize]) for shape in self._shapes]
        self._lent.append(_Lent([StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]))
        return DeviceWindow(self._side, self._staging, tensors, head)


def pinned_allocator(side: Side) -> Callable[[Shape], NDArray[Any]]:
    """Makes buffers of pinned memory for `HostWindows`."""

    def allocate(shape: Shape) -> NDArray[Any]:
        return side.pinned(shape.n_bytes).numpy().view(shape.dtype).reshape(shape[:2])

    return allocate
