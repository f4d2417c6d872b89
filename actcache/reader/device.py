"""Windows in the memory of a GPU: chunks cross the bus as they were decoded, and are scattered there.

    chunk --decode, or codes as they are--> pinned piece --copy--> (values of codes) --index_copy--> window --slice--> batch

Quantised chunks cross in codes, half the bytes; what they stand for is worked out on the device, to the same bits.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from actcache.reader.buffers import Decoded, Shape
from actcache.reader.layout import Piece
from actcache.reader.side import Mark, Side, wait_for

_ALIGNMENT = 8
_BITS = {2: torch.int16, 4: torch.int32}
_TORCH = {"|u1": torch.uint8, "<i8": torch.int64, "<f4": torch.float32}
_LOGICAL = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

RowsOn = Callable[[Tensor], Tensor]
"""What was copied [bytes] -> the rows of its chunks [k * r, d], as bits of their dtype."""


class Chunk(NamedTuple):
    """Of the largest chunks of a stream, decoded: rows, numbers in a row, bytes of a number; whether some are quantised."""

    n_rows: int
    width: int
    itemsize: int
    is_quantised: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of its rows."""
        return self.n_rows * self.width * self.itemsize

    @property
    def packed_bytes(self) -> int:
        """The most it takes in a piece: rows, slots and which rows; where quantised, codes and scales, all rows exact."""
        codes = self.n_rows * (self.width + 8) + 8 * self.width if self.is_quantised else 0
        return self.n_bytes + 16 * self.n_rows + codes + 6 * _ALIGNMENT

    @property
    def device_bytes(self) -> int:
        """What it takes on the device on its way to its place, beside the piece."""
        return (
            self.n_bytes * (2 if self.is_quantised else 1) + 4 * self.n_rows * self.width * self.is_quantised
        )


class _Section(NamedTuple):
    """Part of a piece."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def on(self, there: Tensor) -> Tensor:
        """The same part of the piece's copy: integers of its size where PyTorch has no such dtype, or few operations."""
        stop = self.start + int(np.prod(self.shape)) * self.dtype.itemsize
        dtype = _TORCH.get(self.dtype.str) or _BITS[self.dtype.itemsize]
        return there[self.start : stop].view(dtype).view(self.shape)


class _Piece:
    """Pinned memory that is packed from its front and crosses in one copy.

    mark  what must be past before it is used again.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._numpy = memory, memory.numpy()
        self._used = 0
        self.mark: Mark | None = None

    def clear(self) -> None:
        """Begin again at the front."""
        self._used = 0

    def room(self, shape: tuple[int, ...], dtype: Any) -> tuple[NDArray[Any], _Section]:
        """The next part, to be filled."""
        kind = np.dtype(dtype)
        section = _Section(-(-self._used // _ALIGNMENT) * _ALIGNMENT, shape, kind)
        self._used = section.start + int(np.prod(shape)) * kind.itemsize
        return self._numpy[section.start : self._used].view(kind).reshape(shape), section

    def pack(self, values: NDArray[Any]) -> _Section:
        """The next part, a copy of `values`."""
        room, section = self.room(values.shape, values.dtype)
        room[...] = values
        return section

    @property
    def packed(self) -> Tensor:
        """[n] uint8, all parts."""
        return self._memory[: self._used]


class Staging:
    """Two pieces of pinned memory for each thread, of `n_chunks` chunks: one is filled while the other is copied."""

    def __init__(self, side: Side, chunk: Chunk, n_chunks: int) -> None:
        self._side, self.n_chunks = side, n_chunks
        self._piece_bytes = n_chunks * chunk.packed_bytes
        self.host_bytes_per_thread = 2 * self._piece_bytes
        self.device_bytes_per_thread = self._piece_bytes + n_chunks * chunk.device_bytes
        self._local = threading.local()

    def take(self) -> _Piece:
        """This thread's piece that was used less recently, empty, once its copy is done."""
        own: deque[_Piece] | None = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = deque(_Piece(self._side.pinned(self._piece_bytes)) for _ in range(2))
        own.rotate()
        piece = own[0]
        if piece.mark is not None:
            wait_for(piece.mark, "copying chunks")
        piece.clear()
        return piece


class DeviceWindow:
    """A `Window` on a device.

    tensors  per hook, [head + n, columns], the bits of the numbers.
    """

    def __init__(self, side: Side, staging: Staging, tensors: list[Tensor], head: int) -> None:
        self.tensors = tensors
        self._side, self._staging, self._head = side, staging, head

    def land(self, job: Sequence[Piece], decoded: Decoded) -> None:
        """Pack as many chunks as a piece holds, and queue its copy and what happens to it there."""
        for start in range(0, len(job), self._staging.n_chunks):
            self._land(job[start : start + self._staging.n_chunks], start, decoded)

    def _land(self, job: Sequence[Piece], start: int, decoded: Decoded) -> None:
        piece, reader, lane = self._staging.take(), job[0].reader, job[0].lane
        rows_on = (_pack_rows if reader.quantised is None else _pack_codes)(piece, job, start, decoded)
        r, n_rows = reader.shape[0], len(job) * reader.shape[0]
        chosen = [np.arange(len(s.slots)) if s.chosen is None else s.chosen for s in job]
        picked = np.concatenate([i * r + own for i, own in enumerate(chosen)])
        slots_at = piece.pack(np.concatenate([source.slots for source in job]))
        picked_at = None if len(picked) == n_rows else piece.pack(picked)
        itemsize, row_bytes = reader.dtype.itemsize, reader.shape[1] * reader.dtype.itemsize
        unit = torch.int64 if row_bytes % 8 == 0 else _BITS[itemsize]  # few large moves
        first = lane.column * itemsize // unit.itemsize
        columns = slice(first, first + row_bytes // unit.itemsize)
        target, packed = self.tensors[lane.buffer].view(unit)[self._head :, columns], piece.packed

        def work() -> None:
            there = packed.to(self._side.device, non_blocking=True)
            rows = rows_on(there).view(unit)
            chosen = rows if picked_at is None else rows.index_select(0, picked_at.on(there))
            target.index_copy_(0, slots_at.on(there), chosen)

        piece.mark = self._side.submit(work)

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


def _pack_rows(piece: _Piece, job: Sequence[Piece], start: int, decoded: Decoded) -> RowsOn:
    """Decode chunks into a piece."""
    r, width = job[0].reader.shape
    room, section = piece.room((len(job), r, width), job[0].reader.dtype)
    for i in range(len(job)):
        rows = decoded.rows_of(start + i, room[i])
        if rows.ctypes.data != room[i].ctypes.data:  # nothing had to be decoded
            room[i] = rows
    return lambda there: section.on(there).view(len(job) * r, width)


def _pack_codes(piece: _Piece, job: Sequence[Piece], start: int, decoded: Decoded) -> RowsOn:
    """Pack quantised chunks as they are: codes, scales and offsets, and the rows that are stored exactly."""
    reader = job[0].reader
    r, width = reader.shape
    codes, codes_at = piece.room((len(job), r, width), np.uint8)
    scales, scales_at = piece.room((2, len(job), 1, width), np.float32)
    exact, numbers = [], []
    for i in range(len(job)):
        found = decoded.codes_of(start + i)
        codes[i], scales[0, i, 0], scales[1, i, 0] = found.codes, found.scale, found.offset
        exact.append(found.exact)
        numbers.append(i * r + found.exact_rows.astype(np.int64))
    exact_at, numbers_at = piece.pack(np.concatenate(exact)), piece.pack(np.concatenate(numbers))
    logical, bits = _LOGICAL[reader.quantised or ""], _BITS[reader.dtype.itemsize]

    def rows_on(there: Tensor) -> Tensor:
        scale, offset = scales_at.on(there)
        values = codes_at.on(there).to(torch.float32).mul_(scale).add_(offset)
        rows = values.to(logical).view(bits).view(len(job) * r, width)
        if exact_at.shape[0]:
            rows.index_copy_(0, numbers_at.on(there), exact_at.on(there).view(bits))
        return rows

    return rows_on
