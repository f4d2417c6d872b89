"""Rows in a byte a number: in each chunk `value = offset + scale * code` per column, and rows that do not fit kept exactly.

Scale and offset come from the chunk's ordinary rows: those that are kept and no longer than `OUTLIER_NORM_RATIO` times the
median norm of its kept rows. A language model has a few rows a hundred times longer than all others; a range that had
to hold them would leave the others a handful of codes. Such rows, and excluded ones outside the range, are stored
exactly; code 255 in every column says so. Real activations, 256 rows a chunk: the error is 3e-5 to 1e-4 of the
variance of ordinary rows, of the worst dimension at most 2e-4 (docs/explanation/quantised.md).

A scale has at most 16 significant bits, so `scale * code` is exact in float32 and the sum is rounded once: a device
that fuses multiplication and addition finds the same bits as one that does not.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.store.dtypes import as_float32, disk_dtype, row_fill, scratch
from actcache.store.statistics import row_norms

EXACT = 255
"""The code, in every column, of a row that is stored exactly; of rows that are not there, too."""
N_STEPS = 254
OUTLIER_NORM_RATIO = 5.0

_LARGEST = np.float32(2.0**125)  # what is larger is stored exactly: ranges stay finite in float32
_LEAST_SCALE = np.float32(
    2.0**-118
)  # products stay clear of subnormal numbers, which devices may take for zero
_LOW_BITS = np.uint32(0xFF)

F32 = NDArray[np.float32]


class Quantised(NamedTuple):
    """One chunk in codes.

    codes          [r, d] uint8; a row stored exactly, or not there at all, is 255 throughout.
    scale, offset  [d] float32.
    exact_rows     [n] uint32, ascending: which rows are stored exactly.
    exact          [n, d] those, in the dtype on disk of the logical dtype.
    """

    codes: NDArray[np.uint8]
    scale: F32
    offset: F32
    exact_rows: NDArray[np.uint32]
    exact: NDArray[Any]

    def block(self) -> bytes:
        """All but the codes, as it lies behind them in a shard."""
        return b"".join(
            part.tobytes()
            for part in (
                self.scale.astype("<f4", copy=False),
                self.offset.astype("<f4", copy=False),
                self.exact_rows.astype("<u4", copy=False),
                self.exact,
            )
        )


def parse(codes: NDArray[np.uint8], block: bytes | memoryview, dtype: np.dtype[Any]) -> Quantised:
    """A chunk from its codes [r, d] and its block (copied, so aligned); ValueError where the block cannot be one."""
    n_rows, width = codes.shape
    n_exact, rest = divmod(len(block) - 8 * width, 4 + dtype.itemsize * width)
    if n_exact < 0 or rest or n_exact > n_rows:
        raise ValueError(f"a block of scales of {len(block)} bytes for {n_rows} rows of {width}")
    scale, offset = np.frombuffer(block, "<f4", 2 * width).reshape(2, width).copy()
    exact_rows = np.frombuffer(block, "<u4", n_exact, 8 * width).copy()
    exact = (
        np.frombuffer(block, dtype, n_exact * width, 8 * width + 4 * n_exact).reshape(n_exact, width).copy()
    )
    if n_exact and int(exact_rows.max()) >= n_rows:
        raise ValueError(f"exact row {int(exact_rows.max())} in a chunk of {n_rows}")
    return Quantised(codes, scale, offset, exact_rows, exact)


def quantise(rows: NDArray[Any], logical: str, kept: int) -> tuple[Quantised, NDArray[Any], F32]:
    """Rows [r, d] on disk dtype in codes, of which the first `kept` are kept.

    Returns:
        The chunk in codes; what it is read back as, in the dtype on disk; and the rows as float32 (scratch memory).
    """
    x = as_float32(rows, logical, scratch("rows", rows.shape))
    fits = _ordinary(x, kept)
    scale, offset = _range(x if fits.all() else x[fits])
    codes = _codes(x, scale, offset, kept, fits)
    found = _in_codes(codes, fits, scale, offset, rows)
    said = dequantise(found, logical)
    return found, said, x


def _in_codes(
    codes: NDArray[np.uint8], fits: NDArray[np.bool_], scale: F32, offset: F32, rows: NDArray[Any]
) -> Quantised:
    exact_rows = np.flatnonzero(~fits).astype(np.uint32)
    codes[exact_rows] = EXACT
    return Quantised(codes, scale, offset, exact_rows, rows[exact_rows])


def _ordinary(x: F32, kept: int) -> NDArray[np.bool_]:
    """[r] bool: kept rows of finite numbers within the outlier limit."""
    found = np.zeros(len(x), np.bool_)
    norm = row_norms(x[:kept])
    is_usable = norm < _LARGEST  # false for NaN
    if is_usable.any():
        found[:kept] = is_usable & (norm <= OUTLIER_NORM_RATIO * np.median(norm[is_usable]))
    return found


def _range(x: F32) -> tuple[F32, F32]:
    """Scale and offset [d] with which codes 0 to 254 span the rows [r, d]; a column of one value has scale 0."""
    if not len(x):
        return np.zeros(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)
    least, greatest = x.min(0), x.max(0)
    step = ((greatest.astype(np.float64) - least) / N_STEPS).astype(np.float32)
    bits = (step.view(np.uint32) + _LOW_BITS) & ~_LOW_BITS  # up to 16 significant bits
    return np.where(greatest > least, np.maximum(bits.view(np.float32), _LEAST_SCALE), np.float32(0)), least


def _codes(x: F32, scale: F32, offset: F32, kept: int, fits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Nearest codes [r, d]; excluded rows within half a step of the range in every column are added to `fits`."""
    has_range = scale > 0
    with np.errstate(over="ignore", invalid="ignore"):
        t = np.subtract(x, offset, out=scratch("codes", x.shape))
        t /= np.where(has_range, scale, np.float32(1))
        least, greatest = np.where(has_range, [[-0.5], [N_STEPS + 0.5]], 0).astype(np.float32)
        fits[kept:] = ((t[kept:] >= least) & (t[kept:] <= greatest)).all(1)
    t[~fits] = 0
    return np.rint(t, out=t).astype(np.uint8)


def dequantise(q: Quantised, logical: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Rows [r, d] in the dtype on disk: float32 `offset + scale * code`, rounded to nearest, ties to even.

    Rows that are not there are holes: the fill value of the logical dtype.
    """
    x = scratch("decoded", q.codes.shape)
    np.copyto(x, q.codes)
    x *= q.scale
    x += q.offset
    if logical == "bfloat16":
        bits = x.view(np.uint32)
        tie = np.right_shift(bits, np.uint32(16), out=scratch("tie", x.shape, np.uint32))
        tie &= np.uint32(1)
        tie += np.uint32(0x7FFF)
        bits += tie
        bits >>= np.uint32(16)
        rows = bits
    else:
        rows = x
    if out is None:
        out = np.empty(x.shape, disk_dtype(logical))
    with np.errstate(over="ignore"):
        np.copyto(out, rows, casting="unsafe")
    out[q.codes[:, 0] == EXACT] = row_fill(logical)
    out[q.exact_rows] = q.exact
    return out
