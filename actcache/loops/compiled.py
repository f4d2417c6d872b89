"""The inner loops of reading: rows to their slots, where slots are, checksums. Compiled once per process.

Without them NumPy does the same work, with the same result.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.loops.engine import INTEGER, POINTER, Engine, features, text_of

_memory = threading.local()
PART_BYTES = 1344
"""Of data, that crc32c in crc32c.ll takes three of at once."""
_MOST_BUCKET_BITS = 18
_PER_BUCKET_BITS = 2
"""About so many bits' worth of rows come into a bucket, where they are sorted by insertion."""


class Direct(NamedTuple):
    """Loops for processors with an instruction for crc32c.

    crc32c  (data, n, shift, before): of n bytes behind those whose crc32c is `before`.
    bring   (work, n, memory, window, stride, row_bytes, shift, cycles): chunks from files to their slots; says how many.
    shift   [4, 256] uint32, what both need: how zeros behind it change a crc.
    """

    crc32c: Callable[..., int]
    bring: Callable[..., int]
    shift: NDArray[np.uint32]


class Loops(NamedTuple):
    """Compiled loops. Arguments are addresses and numbers, as in loops.ll.

    scatter  (window, stride, slots, rows, row_bytes, chosen, n): rows to their slots, around the caches.
    permute  see `permuted`.
    tell     see `told`.
    direct   where this processor has what they need.
    """

    scatter: Callable[..., None]
    permute: Callable[..., None]
    tell: Callable[..., None]
    direct: Direct | None


@cache
def compiled() -> Loops | None:
    """The loops; None where llvmlite is not installed."""
    able = features()
    if able is None:
        return None
    is_direct = able.get("sse4.2", False) and hasattr(os, "preadv")
    names = ["loops.ll"]
    if is_direct:
        is_wide = able.get("vpclmulqdq", False) and able.get("avx512f", False)
        names += ["crc32c_wide.ll" if is_wide else "crc32c.ll", "loops_x86.ll"]
    engine = Engine("".join(map(text_of, names)))
    direct = None
    if is_direct:
        direct = Direct(
            engine.loop("crc32c", ctypes.c_uint32, POINTER, INTEGER, POINTER, ctypes.c_uint32),
            engine.loop(
                *("bring", INTEGER, POINTER, INTEGER),
                *(POINTER, POINTER, INTEGER, INTEGER, POINTER, POINTER),
            ),
            _shift(),
        )
    return Loops(
        engine.loop("scatter", None, POINTER, INTEGER, POINTER, POINTER, INTEGER, POINTER, INTEGER),
        engine.loop(
            *("permute", None, INTEGER, POINTER, POINTER, INTEGER, INTEGER, INTEGER),
            *(POINTER, POINTER, POINTER, INTEGER, INTEGER, POINTER, POINTER),
        ),
        engine.loop("tell", None, *[POINTER] * 3, INTEGER, *[POINTER] * 3),
        direct,
    )


def _shift() -> NDArray[np.uint32]:
    """[4, 256] what a crc, a byte of it at a time, becomes behind a part of zeros: crc32c without its two inversions."""
    zeros, inverted = bytes(PART_BYTES), 0xFFFFFFFF
    found = [
        [crc32c.crc32c(zeros, value << (8 * byte) ^ inverted) ^ inverted for value in range(256)]
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
    slot = np.empty(len(place), np.int64)
    bucket_bits = min(_MOST_BUCKET_BITS, max(1, len(place).bit_length() - _PER_BUCKET_BITS))
    ends = np.zeros(1 << bucket_bits, np.int64)
    of_members = [np.ascontiguousarray(array, np.int64) for array in (n_rows, partition)]
    loops.permute(
        ctypes.c_int64(key),
        *(array.ctypes.data for array in of_members),
        len(n_rows),
        *bits,
        *(array.ctypes.data for array in (*_two_arrays(len(place)), ends)),
        len(ends),
        64 - bucket_bits,
        place.ctypes.data,
        slot.ctypes.data,
    )
    return slot


def _two_arrays(n: int) -> NDArray[np.int64]:
    """[2, n] of this thread, good until the next call: fresh memory takes longer to get than to sort in."""
    found = getattr(_memory, "arrays", None)
    if found is None or found.shape[1] < n:
        found = _memory.arrays = np.empty((2, n), np.int64)
    return found


def told(
    loops: Loops,
    n_rows: NDArray[np.int64],
    first: NDArray[np.int64],
    layer: NDArray[np.int64],
    slot: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row number and layer in each slot [n]; members [m] have `n_rows` each, of one layer, numbered from `first` on.

    slot  [n] of each row, member after member; a permutation.
    """
    rows, layers = np.empty((2, len(slot)), np.int64)
    of_members = [np.ascontiguousarray(array, np.int64) for array in (n_rows, first, layer)]
    loops.tell(
        *(array.ctypes.data for array in of_members),
        len(n_rows),
        *(array.ctypes.data for array in (slot, rows, layers)),
    )
    return rows, layers
