"""Logical dtypes and the numbers on disk that stand for them; buffers for working on them."""

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

BF16_HOLE = 0x7FC1
"""Fill value of bfloat16 bits: a NaN no arithmetic produces, so that a hole can never pass for data."""

_scratch = threading.local()


def disk_dtype(logical: str) -> np.dtype[Any]:
    """The dtype on disk of a logical dtype: bfloat16 is its bits."""
    return np.dtype({"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}[logical])


def row_fill(logical: str) -> Any:
    """What stands on disk where there is no row."""
    return BF16_HOLE if logical == "bfloat16" else float("nan")


def scratch(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    """A buffer of this thread, good until the next one of the same name is asked for.

    Fresh memory for every chunk would be given back to the system and faulted in again each time, which takes longer
    than the arithmetic on it.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = getattr(_scratch, name, None)
    if buffer is None or buffer.nbytes < n_bytes:
        buffer = np.empty(n_bytes, np.uint8)
        setattr(_scratch, name, buffer)
    return buffer[:n_bytes].view(dtype).reshape(shape)


def as_float32(
    rows: NDArray[Any], logical: str, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Numbers on disk as float32, exactly; bfloat16 bits are the upper half of a float32."""
    if logical == "float32" and out is None:
        return rows
    x = np.empty(rows.shape, np.float32) if out is None else out
    if logical == "bfloat16":
        bits = x.view(np.uint32)
        np.copyto(bits, rows)
        np.left_shift(bits, np.uint32(16), out=bits)
    else:
        np.copyto(x, rows)
    return x
