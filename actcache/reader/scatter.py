"""Rows of a chunk to their places in a window: the one copy that no reader can do without.

A window is far larger than the caches, so an ordinary store first fetches the line it is about to overwrite. Stores that
go around the caches ("non-temporal") do not, and the copy takes about a third of the time. NumPy has none, so where
llvmlite is installed (`pip install 'actcache[fast]'`) the loop below is compiled for this processor, in some
milliseconds, once per process. Both ways write the same bytes.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
"""Bytes of a cache line: what a window has to begin at, and a row to be a multiple of, for the compiled loop."""

_IR = """
define void @scatter(ptr %window, i64 %stride, ptr %slots, ptr %rows, i64 %row_bytes, ptr %chosen, i64 %n) {
entry:
  %is_empty = icmp eq i64 %n, 0
  %takes_first = icmp eq ptr %chosen, null
  br i1 %is_empty, label %done, label %row
row:
  %i = phi i64 [ 0, %entry ], [ %i.next, %row.end ]
  br i1 %takes_first, label %known, label %look
look:
  %chosen.at = getelementptr i64, ptr %chosen, i64 %i
  %looked = load i64, ptr %chosen.at
  br label %known
known:
  %from = phi i64 [ %i, %row ], [ %looked, %look ]
  %slot.at = getelementptr i64, ptr %slots, i64 %i
  %slot = load i64, ptr %slot.at
  %target.offset = mul i64 %slot, %stride
  %target = getelementptr i8, ptr %window, i64 %target.offset
  %source.offset = mul i64 %from, %row_bytes
  %source = getelementptr i8, ptr %rows, i64 %source.offset
  br label %line
line:
  %at = phi i64 [ 0, %known ], [ %at.next, %line ]
  %source.line = getelementptr i8, ptr %source, i64 %at
  %value = load <8 x i64>, ptr %source.line, align 1
  %target.line = getelementptr i8, ptr %target, i64 %at
  store <8 x i64> %value, ptr %target.line, align 64, !nontemporal !0
  %at.next = add i64 %at, 64
  %more.lines = icmp ult i64 %at.next, %row_bytes
  br i1 %more.lines, label %line, label %row.end
row.end:
  %i.next = add i64 %i, 1
  %more.rows = icmp ult i64 %i.next, %n
  br i1 %more.rows, label %row, label %done
done:
  fence seq_cst
  ret void
}
!0 = !{i32 1}
"""


def scatter(
    window: NDArray[Any],
    slots: NDArray[np.int64],
    rows: NDArray[Any],
    chosen: NDArray[np.int64] | None = None,
) -> None:
    """window[slots] = rows[chosen], for slots that differ; chosen None: the first rows, as many as there are slots.

    window  [n, d], each row contiguous.  rows  [r, d], contiguous, of the same dtype.
    """
    row_bytes, stride, start = rows.shape[1] * rows.itemsize, window.strides[0], window.ctypes.data
    run = None if (row_bytes | stride | start) % ALIGNMENT else compiled()
    if run is None:
        item = np.dtype((np.void, row_bytes))  # a row at a time, not a number at a time
        numbers = rows[: len(slots)] if chosen is None else rows[chosen]
        window.view(item)[:, 0][slots] = numbers.view(item)[:, 0]
        return
    assert slots.strides == (8,), slots.strides
    assert rows.flags.c_contiguous, rows.strides
    of_chosen = None if chosen is None else chosen.ctypes.data
    run(start, stride, slots.ctypes.data, rows.ctypes.data, row_bytes, of_chosen, len(slots))


def aligned_empty(shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised array that begins at a cache line."""
    n_bytes = shape[0] * shape[1] * dtype.itemsize
    raw = np.empty(n_bytes + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + n_bytes].view(dtype).reshape(shape)


@cache
def compiled() -> Callable[..., None] | None:
    """The compiled loop, which lets other Python threads run; None where llvmlite is not installed."""
    try:
        from llvmlite import binding
    except ImportError:
        return None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=2
    )
    engine = binding.create_mcjit_compiler(binding.parse_assembly(_IR), machine)
    engine.finalize_object()
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    kind = ctypes.CFUNCTYPE(None, pointer, integer, pointer, pointer, integer, pointer, integer)
    function = kind(engine.get_function_address("scatter"))
    function.engine = engine  # type: ignore[attr-defined]  # it owns the code
    return function
