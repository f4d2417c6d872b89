"""The inner loops of reading: rows to their slots, where slots are, checksums. Compiled once per process.

Without them NumPy does the same work, with the same result.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.loops.engine import INTEGER, POINTER, Engine, features, text_of

_memory = threading.local()
PART_BYTES = 1344
"""Of data, that crc32c in crc32c.ll takes three of at once."""
_MOST_BUCKET_BITS = 14
_PER_BUCKET_BITS = 8
"""About so many bits' worth of rows come into a bucket, which is sorted in the processor's first cache."""
_WITHIN, _BLOCK_ROWS = 512, 64
"""Parts of a bucket, and rows of a block, in loops.ll."""


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
            *(POINTER, POINTER, POINTER, INTEGER, INTEGER, POINTER, POINTER, POINTER, *[POINTER] * 5),
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


class Told(NamedTuple):
    """What slots are told: the global number of the row in each, [n] int64, and its layer, [n] int16."""

    row: NDArray[np.int64]
    layer: NDArray[np.int16]


def permuted(
    loops: Loops,
    key: int,
    n_rows: NDArray[np.int64],
    partition: NDArray[np.int64],
    bits: tuple[int, int],
    place: NDArray[np.int64],
    tell: Told | None = None,
) -> tuple[NDArray[np.int64], Told | None]:
    """The slot of each row of a window: what `order.arrange` says, without its arrays in between.

    n_rows, partition  [m] of each member.    bits  of a row's number, and of a partition.
    place  [n] the slot of the i-th row in order of partition and hash.
    tell   of each member, the number of its first row, and its layer: then slots are told those of their rows.
    """
    n = len(place)
    bucket_bits = min(_MOST_BUCKET_BITS, max(1, n.bit_length() - _PER_BUCKET_BITS))
    memory = _scratch(2 * n + (1 << bucket_bits) + _WITHIN + n // _BLOCK_ROWS + 1)
    keys, ordered, ends, within, of_block = np.split(memory, np.cumsum([n, n, 1 << bucket_bits, _WITHIN]))
    ends[:] = 0
    end = np.cumsum(n_rows)
    told, of_members, of_slots = None, [0, 0], [0, 0]
    if tell is not None:
        told = Told(np.empty(n, np.int64), np.empty(n, np.int16))
        less, layer = tell.row - (end - n_rows), np.ascontiguousarray(tell.layer, np.int16)
        of_members, of_slots = [_address(less), _address(layer)], [_address(told.row), _address(told.layer)]
    slot, partition = np.empty(n, np.int64), np.ascontiguousarray(partition, np.int64)
    loops.permute(
        *(ctypes.c_int64(key), _address(end), _address(partition), len(n_rows), *bits),
        *(_address(keys), _address(ordered), _address(ends), len(ends), 64 - bucket_bits, _address(within)),
        *(_address(place), _address(slot), *of_members, _address(of_block), *of_slots),
    )
    return slot, told


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data


def _scratch(n: int) -> NDArray[np.int64]:
    """[n] of this thread, good until the next call: fresh memory takes longer to get than to sort in."""
    found = getattr(_memory, "array", None)
    if found is None or len(found) < n:
        found = _memory.array = np.empty(n, np.int64)
    return found[:n]
