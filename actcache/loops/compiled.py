"""The inner loops of reading: rows to their slots, where slots are, checksums. Compiled once per process.

Without them NumPy does the same work, with the same result.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.loops.engine import INTEGER, POINTER, Engine, features, text_of

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
    """Compiled loops. Arguments are addresses and numbers, as in loops.ll.

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
    able = features()
    if able is None:
        return None
    is_direct = able.get("sse4.2", False) and hasattr(os, "preadv")
    engine = Engine("".join(text_of(name) for name in ("loops.ll", "loops_x86.ll")[: 1 + is_direct]))
    direct = None
    if is_direct:
        direct = Direct(
            engine.loop("crc32c", ctypes.c_uint32, POINTER, INTEGER, POINTER),
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
