"""Where windows live, and how many of them the bounds on memory allow."""

from collections.abc import Sequence
from typing import NamedTuple

from actcache.errors import MemoryBoundError
from actcache.loops.compiled import compiled
from actcache.reader.buffers import FEWEST_WINDOWS, MOST_WINDOWS, HostWindows, Shape, Windows
from actcache.reader.courier import Courier, pinned_allocator
from actcache.reader.device import Chunk, DeviceWindows, Staging
from actcache.reader.selection import Delivery
from actcache.reader.side import Side, open_side

STAGED_BYTES = 4 << 20
"""Of decoded chunks, in each piece of memory that crosses to a device."""
_ORDER_BYTES_PER_ROW = 160
"""Of a window: while it is laid out, and what is kept of two."""
_COMPILER_BYTES = 72 << 20
"""Of the compiler behind `compiled`, which stays in memory once it was used (68 MB measured)."""
_DEVICE_SHARE = 10


class Placement(NamedTuple):
    """Windows, and who takes batches from them to a device; None where they need not be taken."""

    windows: Windows
    courier: Courier | None


def place(
    shapes: Sequence[Shape], chunk: Chunk, delivery: Delivery, *, fetched_bytes: int, side: Side | None = None
) -> Placement:
    """Windows on the device where it has room, else in this machine's memory, pinned where a device copies from it.

    fetched_bytes  what may have been fetched and not be decoded yet.    side  of the device; None: opened here.

    Raises:
        MemoryBoundError: two windows do not fit a bound; says what would do.
        UsageError: there is no such device.
    """
    side = side or open_side(delivery.device)
    besides = shapes[0].n_rows * _ORDER_BYTES_PER_ROW + fetched_bytes
    besides += 0 if compiled() is None else _COMPILER_BYTES
    window_bytes = sum(shape.n_bytes for shape in shapes)
    if side is not None:
        staging = Staging(side, chunk, max(1, STAGED_BYTES // chunk.n_bytes))
        on_device = _fitting(delivery, side, window_bytes, delivery.threads * staging.device_bytes_per_thread)
        if on_device:
            staged = delivery.threads * staging.host_bytes_per_thread
            _windows_within(delivery.memory_bytes, 0, besides + staged, "memory")
            windows = DeviceWindows(side, shapes, on_device, staging)
            return Placement(windows, Courier(side, rows_are_there=True))
    besides += delivery.threads * chunk.n_bytes * 4
    most = _windows_within(delivery.memory_bytes, window_bytes, besides, "memory")
    if side is None:
        return Placement(HostWindows(shapes, most), None)
    pinned = HostWindows(shapes, most, pinned_allocator(side))
    return Placement(pinned, Courier(side, rows_are_there=False))


def _fitting(delivery: Delivery, side: Side, window_bytes: int, staged: int) -> int:
    """Windows that fit on the device; 0: they are to live elsewhere."""
    bound = delivery.device_memory_bytes
    if bound == 0:
        return 0
    if bound is None:
        fitting = (side.n_bytes // _DEVICE_SHARE - staged) // window_bytes
        return min(fitting, MOST_WINDOWS) if fitting >= FEWEST_WINDOWS else 0
    return _windows_within(bound, window_bytes, staged, "device_memory")


def _windows_within(bound: int | None, window_bytes: int, besides: int, name: str) -> int:
    """How many windows a bound allows; MemoryBoundError states the least that would do."""
    if bound is None:
        return MOST_WINDOWS
    least = FEWEST_WINDOWS * window_bytes + besides
    if bound < least:
        raise MemoryBoundError(
            f"{name}={bound:,} bytes is too little for windows of this stream: two windows take {least:,} bytes. Give "
            f"that much, or a smaller window_rows= (another order, less mixed)."
        )
    return min((bound - besides) // window_bytes, MOST_WINDOWS) if window_bytes else MOST_WINDOWS
