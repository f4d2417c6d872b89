"""The inner loops that NumPy has no fast way for, compiled for this processor, in some milliseconds, once per process.

Where llvmlite is not installed (`pip install 'actcache[fast]'`) NumPy does the same work, with the same result.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.store.codec import extend_crc32c

PART_BYTES = 1344
"""Of data, that crc32c in loops_x86.ll takes three of at once."""
_MOST_BUCKET_BITS = 18
_PER_BUCKET_BITS = 2
"""About so many bits' worth of rows come into a bucket, where they are sorted by insertion."""


class Direct(NamedTuple):
    """Loops for processors with an instruction for crc32c.

    crc32c  (data, n, shift): of n bytes.
    bring   (work, n, memory, window, stride, row_bytes, shift, cycles): chunks from files to their slots; says how many.
    shift   [4, 256] uint32, what both need: how zeros behind it change a crc.
    """

    crc32c: Callable[..., int]
    bring: Callable[..., int]
    shift: NDArray[np.uint32]


class Loops(NamedTuple):
    """Compiled loops; other Python threads run meanwhile. Arguments are addresses and numbers, as in loops.ll.

    scatter  (window, stride, slots, rows, row_bytes, chosen, n): rows to their slots, around the caches.
    permute  see `permuted`.
    direct   where this processor has what they need.
    """

    scatter: Callable[..., None]
    permute: Callable[..., None]
    direct: Direct | None


@cache
def compiled() -> Loops | None:
    """The loops; None where llvmlite is not installed."""
    try:
        from llvmlite import binding
    except ImportError:
        return None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=2
    )
    is_direct = features.get("sse4.2", False) and hasattr(os, "preadv")
    text = "".join(_text(name) for name in ("loops.ll", "loops_x86.ll")[: 1 + is_direct])
    if is_direct:
        binding.add_symbol("pread", ctypes.cast(ctypes.CDLL(None).pread, ctypes.c_void_p).value)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(text), machine)
    engine.finalize_object()
    integer, pointer = ctypes.c_int64, ctypes.c_void_p

    def loop(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        found = ctypes.CFUNCTYPE(result, *arguments)(engine.get_function_address(name))
        found.engine = engine  # type: ignore[attr-defined]  # it owns the code
        return found

    direct = None
    if is_direct:
        direct = Direct(
            loop("crc32c", ctypes.c_uint32, pointer, integer, pointer),
            loop("bring", integer, pointer, integer, pointer, pointer, integer, integer, pointer, pointer),
            _shift(),
        )
    return Loops(
        loop("scatter", None, pointer, integer, pointer, pointer, integer, pointer, integer),
        loop(
            "permute",
            None,
            *(integer, pointer, pointer, integer, integer, integer),
            *(pointer, pointer, pointer, integer, integer, pointer, pointer),
        ),
        direct,
    )


def _text(name: str) -> str:
    return files("actcache.reader").joinpath(name).read_text()


def _shift() -> NDArray[np.uint32]:
    """[4, 256] what a crc, a byte of it at a time, becomes behind a part of zeros: crc32c without its two inversions."""
    zeros, inverted = bytes(PART_BYTES), 0xFFFFFFFF
    found = [
        [extend_crc32c(zeros, value << (8 * byte) ^ inverted) ^ inverted for value in range(256)]
        for byte in range(4)
    ]
    return np.array(found, np.uint32)


def permuted(
    loops: Loops,
    key: int,
    n_rows: NDArray[np.int64],
    partition: NDArray[np.int64],
    bits: tuple[int, int],
    place: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The slot of each row of a window: what `order.arrange` says, without its arrays in between.

    n_rows, partition  [m] of each member.    bits  of a row's number, and of a partition.
    place  [n] the slot of the i-th row in order of partition and hash.
    """
    keys, ordered, slot = np.empty((3, len(place)), np.int64)
    bucket_bits = min(_MOST_BUCKET_BITS, max(1, len(place).bit_length() - _PER_BUCKET_BITS))
    ends = np.zeros(1 << bucket_bits, np.int64)
    of_members = [np.ascontiguousarray(array, np.int64) for array in (n_rows, partition)]
    loops.permute(
        ctypes.c_int64(key),
        *(array.ctypes.data for array in of_members),
        len(n_rows),
        *bits,
        *(array.ctypes.data for array in (keys, ordered, ends)),
        len(ends),
        64 - bucket_bits,
        place.ctypes.data,
        slot.ctypes.data,
    )
    return slot
