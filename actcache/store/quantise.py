"""Rows in a byte a number: in each chunk `value = offset + scale * code` per column, and rows that do not fit kept exactly.

Scale and offset come from the chunk's ordinary rows: those that are kept and no longer than `OUTLIER_NORM_RATIO` times the
median norm of its kept rows. A language model has a few rows a hundred times longer than all others; a range that had
to hold them would leave the others a handful of codes. Such rows, and excluded ones outside the range, are stored
exactly; code 255 in every column says so. Real activations, 256 rows a chunk: the error is 3e-5 to 1e-4 of the
variance of ordinary rows, of the worst dimension at most 2e-4 (docs/how-to/quantise.md).

A scale has at most 16 significant bits, so `scale * code` is exact in float32 and the sum is rounded once: a device
that fuses multiplication and addition finds the same bits as one that does not.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.loops.of_rows import row_loops_for
from actcache.store.dtypes import as_float32, disk_dtype, row_fill, scratch
from actcache.store.statistics import SUM_ROWS, extremes, row_norms, squared_errors

EXACT = 255
"""The code, in every column, of a row that is stored exactly; of rows that are not there, too."""
N_STEPS = 254
OUTLIER_NORM_RATIO = 5.0

_LARGEST = np.float32(2.0**125)  # what is larger is stored exactly: ranges stay finite in float32
_LEAST_SCALE = np.float32(2.0**-118)  # products stay clear of subnormal numbers: devices may take those for 0
_LOW_BITS = np.uint32(0xFF)
_HALF_A_STEP_BEYOND = np.array([[-0.5], [N_STEPS + 0.5]], np.float32)

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


class QuantisedRun(NamedTuple):
    """Several chunks of equal length in codes.

    chunks  each of them.
    said    [k * r, d] what they are read back as, in the dtype on disk: good until this thread quantises again.
    errors  [d] float64, squares of the differences between rows and `said`, summed over kept rows.
    """

    chunks: list[Quantised]
    said: NDArray[Any]
    errors: NDArray[np.float64]

    @property
    def exact_rows(self) -> NDArray[np.uint32]:
        """Rows of the run that are stored exactly, ascending."""
        r = len(self.chunks[0].codes)
        return np.concatenate([q.exact_rows + np.uint32(i * r) for i, q in enumerate(self.chunks)])


def quantise(rows: NDArray[Any], n_chunks: int, logical: str, kept: int) -> QuantisedRun:
    """Rows [k * r, d] of k chunks, in the dtype on disk, of which the first `kept` are kept, in codes.

    The chunks do not depend on each other. Together they take fewer and longer steps, which threads can take side by side.
    """
    rows_krd = rows.reshape(n_chunks, -1, rows.shape[1])
    fits = _ordinary(row_norms(rows[:kept], logical), rows_krd.shape[:2])
    scale, offset = _ranges(rows_krd, logical, fits)
    inverse = np.where(scale > 0, np.float32(1) / np.where(scale > 0, scale, np.float32(1)), np.float32(1))
    said = scratch("said", rows_krd.shape, disk_dtype(logical))
    found = None
    if kept == len(rows):
        found = _coded(rows_krd, logical, fits, (inverse, scale, offset), said)
    if found is None:
        codes = _codes(rows_krd, logical, scale > 0, inverse, offset, kept, fits)
        codes[~fits] = EXACT
        _decode(codes, scale, offset, logical, said)
        said[~fits] = rows_krd[~fits]
        exact_rows = np.flatnonzero(~fits.reshape(-1)[:kept]).astype(np.uint32)
        found = codes, squared_errors(rows[:kept], said.reshape(rows.shape)[:kept], logical, exact_rows)
    codes, errors = found
    chunks = []
    for i, (of_chunk, fit) in enumerate(zip(rows_krd, fits, strict=True)):
        exact_rows = np.flatnonzero(~fit).astype(np.uint32)
        chunks.append(Quantised(codes[i], scale[i], offset[i], exact_rows, of_chunk[exact_rows]))
    return QuantisedRun(chunks, said.reshape(rows.shape), errors)


def _ordinary(norms: F32, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """[k, r] bool: kept rows, of these norms, of finite numbers within the outlier limit of their chunk."""
    k, r = shape
    norm = np.full(k * r, np.nan, np.float32)
    norm[: len(norms)] = norms
    norm = norm.reshape(k, r)
    is_usable = norm < _LARGEST  # false for NaN
    if is_usable.all():
        median = np.median(norm, axis=1, keepdims=True)
    else:
        median = np.zeros((k, 1), np.float32)
        for i in np.flatnonzero(is_usable.any(1)):
            median[i] = np.median(norm[i, is_usable[i]])
    limit = np.float32(OUTLIER_NORM_RATIO) * median
    return is_usable & (norm <= limit)


def _ranges(rows_krd: NDArray[Any], logical: str, fits: NDArray[np.bool_]) -> tuple[F32, F32]:
    """Scale and offset [k, d] with which codes 0 to 254 span the rows that fit; a column of one value has scale 0."""
    least, greatest = np.zeros((2, len(rows_krd), rows_krd.shape[2]), np.float32)
    for i, (rows, fit) in enumerate(zip(rows_krd, fits, strict=True)):
        if fit.any():
            least[i], greatest[i] = extremes(rows if fit.all() else rows[fit], logical)
    step = ((greatest.astype(np.float64) - least) / N_STEPS).astype(np.float32)
    bits = (step.view(np.uint32) + _LOW_BITS) & ~_LOW_BITS  # up to 16 significant bits
    return np.where(greatest > least, np.maximum(bits.view(np.float32), _LEAST_SCALE), np.float32(0)), least


def _coded(
    rows_krd: NDArray[Any],
    logical: str,
    fits: NDArray[np.bool_],
    ranges: tuple[F32, F32, F32],
    said: NDArray[Any],
) -> tuple[NDArray[np.uint8], NDArray[np.float64]] | None:
    """Codes [k, r, d] and squared errors [d] by a compiled loop, and `said` on the way; None where there is none that can be used.

    ranges  inverse of the scale, scale, offset, [k, d] each.
    """
    loops = row_loops_for(rows_krd[0], logical)
    if loops is None:
        return None
    codes, errors = np.empty(rows_krd.shape, np.uint8), np.zeros(rows_krd.shape[2])
    for rows, *arrays in zip(rows_krd, fits, *ranges, codes, said, strict=True):
        loops.coded(
            rows.ctypes.data,
            *(*rows.shape, SUM_ROWS),
            *(array.ctypes.data for array in arrays),
            errors.ctypes.data,
        )
    return (codes, errors) if np.isfinite(errors).all() else None


def _codes(
    rows_krd: NDArray[Any],
    logical: str,
    has_range: NDArray[np.bool_],
    inverse: F32,
    offset: F32,
    kept: int,
    fits: NDArray[np.bool_],
) -> NDArray[np.uint8]:
    """Nearest codes [k, r, d]; excluded rows within half a step of the range in every column are added to `fits`."""
    r = rows_krd.shape[1]
    x_krd = as_float32(rows_krd, logical)
    with np.errstate(over="ignore", invalid="ignore"):
        t = np.subtract(x_krd, offset[:, None], out=scratch("codes", x_krd.shape))
        t *= inverse[:, None]
        for i, rest in enumerate(fits):
            first = max(0, kept - i * r)
            if first < r:
                least, greatest = np.where(has_range[i], _HALF_A_STEP_BEYOND, np.float32(0))
                rest[first:] = ((t[i, first:] >= least) & (t[i, first:] <= greatest)).all(1)
    t[~fits] = 0
    return np.rint(t, out=t).astype(np.uint8)


def dequantise(q: Quantised, logical: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Rows [r, d] in the dtype on disk: float32 `offset + scale * code`, rounded to nearest, ties to even.

    Rows that are not there are holes: the fill value of the logical dtype.
    """
    rows = np.empty(q.codes.shape, disk_dtype(logical)) if out is None else out
    _decode(q.codes[None], q.scale[None], q.offset[None], logical, rows[None])
    rows[q.codes[:, 0] == EXACT] = row_fill(logical)
    rows[q.exact_rows] = q.exact
    return rows


def _decode(codes: NDArray[np.uint8], scale: F32, offset: F32, logical: str, out: NDArray[Any]) -> None:
    """`out` [k, r, d] from codes and scales [k, d], whatever code 255 stands for."""
    loops = row_loops_for(out[0], logical)
    if loops is not None and codes.flags.c_contiguous:
        for of_codes, *arrays in zip(codes, scale, offset, out, strict=True):
            loops.said(of_codes.ctypes.data, *of_codes.shape, *(array.ctypes.data for array in arrays))
        return
    x = scratch("decoded", codes.shape)
    np.copyto(x, codes)
    x *= scale[:, None]
    x += offset[:, None]
    rows: NDArray[Any] = x
    if logical == "bfloat16":
        rows = x.view(np.uint32)
        tie = np.right_shift(rows, np.uint32(16), out=scratch("tie", x.shape, np.uint32))
        tie &= np.uint32(1)
        tie += np.uint32(0x7FFF)
        rows += tie
        rows >>= np.uint32(16)
    with np.errstate(over="ignore"):
        np.copyto(out, rows, casting="unsafe")
