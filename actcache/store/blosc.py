"""Blosc chunks of numbers, shuffled and compressed with zstd: what `numcodecs.Blosc` would write, found in half the time.

Level 1 of zstd, the least that Blosc knows, spends most of its time on matches. Shuffled activations have none but those
by chance, and these cost more bits than they save: with next to no table to find them in, zstd codes literals, in half
the time and fewer bytes. Only the encoder differs; any Blosc decodes it (format 2, one block, not split).
"""

import struct
import threading
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from actcache.loops.planes import STEP, plane_loops
from actcache.store.dtypes import scratch

_HASH_LOG = 6
"""Of the entries in the table of matches; the least there is."""
_HEADER = struct.Struct("<4B3I2i")
_VERSION, _ZSTD_VERSION, _SHUFFLED_NOT_SPLIT_ZSTD = 2, 1, 0x91
_local = threading.local()


def shuffled_zstd(values: NDArray[Any]) -> bytes | None:
    """One Blosc chunk of one block from contiguous numbers [n]; None where they do not get smaller."""
    frame = _compressor().compress(planes(values).data)
    if len(frame) + _HEADER.size >= values.nbytes:
        return None
    header = _HEADER.pack(
        *(_VERSION, _ZSTD_VERSION, _SHUFFLED_NOT_SPLIT_ZSTD, values.itemsize),
        *(values.nbytes, values.nbytes, len(frame) + _HEADER.size),
        *(_HEADER.size - 4, len(frame)),
    )
    return header + frame


def planes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Bytes of numbers [n], those of equal significance side by side: scratch memory of this thread."""
    out = scratch("planes", (values.itemsize, len(values)), np.uint8)
    loop = None if len(values) % STEP else plane_loops().get(values.itemsize)
    if loop is None:
        np.copyto(out, values.view(np.uint8).reshape(-1, values.itemsize).T)
    else:
        loop.planes(values.ctypes.data, out.ctypes.data, len(values))
    return out


def planes_of(data: memoryview, n: int, itemsize: int) -> NDArray[np.uint8] | None:
    """Bytes [itemsize, n] of a chunk as `planes` lays them, in scratch memory of this thread; None: it was not made so.

    Raises:
        ValueError: it says that it was, and cannot be decompressed.
    """
    start = _HEADER.size
    if len(data) < start or data[2] != _SHUFFLED_NOT_SPLIT_ZSTD or data[3] != itemsize:
        return None
    *_kind, n_bytes, block, length, first, n_frame = _HEADER.unpack(data[:start])
    if (n_bytes, block, length, first, n_frame) != (
        n * itemsize,
        n_bytes,
        len(data),
        start - 4,
        length - start,
    ):
        return None
    out = scratch("planes", (itemsize, n), np.uint8)
    try:
        got = _decompressor().stream_reader(data[start:]).readinto(out.reshape(-1).data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if got != n_bytes:
        raise ValueError(f"{got} bytes where {n_bytes} were expected")
    return out


def _decompressor() -> zstandard.ZstdDecompressor:
    found = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return found


def _compressor() -> zstandard.ZstdCompressor:
    """Of this thread: it keeps its tables from chunk to chunk."""
    found = getattr(_local, "compressor", None)
    if found is None:
        chosen = zstandard.ZstdCompressionParameters.from_level(1, hash_log=_HASH_LOG)
        found = _local.compressor = zstandard.ZstdCompressor(compression_params=chosen)
    return found
