"""Rows of a chunk to their places in a window: the one copy that no reader can do without.

A window is far larger than the caches, so an ordinary store first fetches the line it is about to overwrite. Stores that
go around the caches ("non-temporal") do not, and the copy takes about a third of the time. NumPy has none, so the loop is
a compiled one where there is a compiler (`actcache.loops.compiled`). Both ways write the same bytes.
"""

from ctypes import addressof, c_char
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.loops.compiled import compiled
from actcache.loops.planes import STEP, plane_loops

ALIGNMENT = 64
"""Bytes of a cache line: what a window has to begin at, and a row to be a multiple of, for the compiled loop."""


class Target:
    """Rows of a window, [n, d], each contiguous, as a place for rows of chunks."""

    def __init__(self, window: NDArray[Any]) -> None:
        self._window, self._row_bytes = window, window.shape[1] * window.itemsize
        self.place = (window.ctypes.data, window.strides[0], self._row_bytes)
        """Address of the first row, bytes from one to the next, bytes of one."""
        is_aligned = not any(n % ALIGNMENT for n in self.place)
        self.loops = compiled() if is_aligned else None
        """What can be used here."""
        self._woven = None
        if self.loops is not None and window.shape[1] % STEP == 0 and window.itemsize in plane_loops():
            self._woven = plane_loops()[window.itemsize].woven

    @property
    def takes_planes(self) -> bool:
        """Whether there is a loop for `put_planes`."""
        return self._woven is not None

    def put_planes(
        self, slots: NDArray[np.int64], planes: NDArray[np.uint8], chosen: NDArray[np.int64] | None = None
    ) -> None:
        """As `put`, of rows whose bytes of equal significance are side by side in `planes` [itemsize, r * d]."""
        assert self._woven is not None
        start, stride, row_bytes = self.place
        of_chosen = None if chosen is None else address(chosen)
        itemsize, n = planes.shape
        self._woven(
            *(address(planes), n, row_bytes // itemsize),
            *(address(slots), of_chosen, len(slots), start, stride),
        )

    def put(
        self, slots: NDArray[np.int64], rows: NDArray[Any], chosen: NDArray[np.int64] | None = None
    ) -> None:
        """window[slots] = rows[chosen], for slots that differ; chosen None: the first rows, as many as there are slots.

        rows  [r, d], contiguous, of the window's dtype.
        """
        if self.loops is None:
            item = np.dtype((np.void, self._row_bytes))  # a row at a time, not a number at a time
            numbers = rows[: len(slots)] if chosen is None else rows[chosen]
            self._window.view(item)[:, 0][slots] = numbers.view(item)[:, 0]
            return
        assert slots.strides == (8,), slots.strides
        assert rows.flags.c_contiguous, rows.strides
        of_chosen = None if chosen is None else address(chosen)
        start, stride, row_bytes = self.place
        self.loops.scatter(start, stride, address(slots), address(rows), row_bytes, of_chosen, len(slots))


def address(array: Any) -> int:
    """Of the first number of an array; `array.ctypes.data` takes twice as long."""
    if array.size and array.flags.writeable:
        return addressof(c_char.from_buffer(array))
    return array.ctypes.data


def aligned_empty(shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised array that begins at a cache line."""
    n_bytes = shape[0] * shape[1] * dtype.itemsize
    raw = np.empty(n_bytes + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + n_bytes].view(dtype).reshape(shape)
