"""Statistics of a shard's kept rows, and their exact merging.

Sums run in float32 over 32 rows at a time and in float64 over these, of rows centred on the mean of every fourth. That this
is not the mean of all is corrected by the sum of the residuals: by Cauchy and Schwarz the correction is at most four
times what it corrects, so it costs less than a digit, massive rows or not. Sets of rows are merged in float64 by the
pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances",
1979). Everything here is a function of the numbers as stored, so whoever adopts a shard finds the same values.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.loops.of_rows import RowLoops, row_loops_for
from actcache.store.dtypes import as_float32, scratch

SUM_ROWS = 32
"""Summed in float32 before they are added up in float64."""
_CENTRE_OF = 4
_SAFE = (1e-12, 1e17)
"""Between these the squares of float32 numbers, summed over a block, keep their digits."""

F64 = NDArray[np.float64]


def row_norms(rows: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Euclidean norm of each row [r, d] of a logical dtype; a float32 overflow is computed again in float64."""
    loops = row_loops_for(rows, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        if loops is None:
            x = as_float32(rows, dtype)
            norm = np.sqrt(np.vecdot(x, x))
        else:
            norm = np.empty(len(rows), np.float32)
            loops.norms(_address(rows), *rows.shape, _address(norm))
        odd = ~np.isfinite(norm)
        if odd.any():
            norm[odd] = np.sqrt((as_float32(rows[odd], dtype).astype(np.float64) ** 2).sum(1))
    return norm


class Moments(NamedTuple):
    """Count, and per dimension: mean, sum of squared deviations from it, least and greatest value."""

    n: int
    mean: F64
    m2: F64
    least: F64
    greatest: F64


def no_moments(width: int) -> Moments:
    """Those of no rows: the mean is 0 and the extremes are NaN."""
    return Moments(0, np.zeros(width), np.zeros(width), np.full(width, np.nan), np.full(width, np.nan))


def extremes(rows: NDArray[Any], dtype: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and greatest number of each column of finite rows [r, d] of a logical dtype; r at least 1."""
    loops = row_loops_for(rows, dtype)
    if loops is None:
        x = as_float32(rows, dtype)
        return x.min(0), x.max(0)
    least, greatest = _no_extremes(rows.shape[1])
    loops.extremes(_address(rows), *rows.shape, _address(least), _address(greatest))
    return least, greatest


def squared_errors(rows: NDArray[Any], said: NDArray[Any], dtype: str, exact_rows: NDArray[np.uint32]) -> F64:
    """Sums over rows of the squared differences of each column of rows [r, d] and `said`; those of exact rows are 0."""
    loops = row_loops_for(rows, dtype)
    if loops is not None:
        squares = np.zeros(rows.shape[1])
        loops.errors(_address(rows), _address(said), *rows.shape, SUM_ROWS, _address(squares))
        if np.isfinite(squares).all():  # rows stored exactly differ by nothing, but may hold anything
            return squares
    with np.errstate(invalid="ignore"):
        error = np.subtract(
            as_float32(rows, dtype), as_float32(said, dtype), out=scratch("error", rows.shape)
        )
    error[exact_rows] = 0
    return _sums_of_squares(error)


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data


class _Sums(NamedTuple):
    """Of rows: centres [d] float32, sums and sums of squares of deviations from these in float64, extremes in float32."""

    centre: NDArray[np.float32]
    deviation: F64
    squares: F64
    least: NDArray[np.float32]
    greatest: NDArray[np.float32]

    @property
    def is_safe(self) -> bool:
        """Whether squares of float32 lost no digits."""
        largest = np.maximum(self.greatest - self.centre, self.centre - self.least)
        return bool(((largest == 0) | ((largest > _SAFE[0]) & (largest < _SAFE[1]))).all())


def moments_of(rows: NDArray[Any], dtype: str) -> Moments:
    """Moments of finite rows [r, d] of a logical dtype."""
    n = len(rows)
    if not n:
        return no_moments(rows.shape[1])
    loops = row_loops_for(rows, dtype)
    sums = None if loops is None else _compiled_sums(rows, loops)
    if sums is None or not sums.is_safe:
        sums = _sums(as_float32(rows, dtype))
    return Moments(
        n,
        sums.centre.astype(np.float64) + sums.deviation / n,
        sums.squares - sums.deviation**2 / n,
        sums.least.astype(np.float64),
        sums.greatest.astype(np.float64),
    )


def _compiled_sums(rows: NDArray[Any], loops: RowLoops) -> _Sums:
    some = _pass(rows, _CENTRE_OF, np.zeros(rows.shape[1], np.float32), loops)
    centre = (some.deviation / -(-len(rows) // _CENTRE_OF)).astype(np.float32)
    return _pass(rows, 1, centre, loops)


def _pass(rows: NDArray[Any], of: int, centre: NDArray[np.float32], loops: RowLoops) -> _Sums:
    """Through every `of`-th row."""
    n, d = rows.shape
    deviation, squares = np.zeros((2, d))
    least, greatest = _no_extremes(d)
    arrays = [_address(array) for array in (centre, deviation, squares, least, greatest)]
    loops.moments(_address(rows), of * d, -(-n // of), d, SUM_ROWS, *arrays)
    return _Sums(centre, deviation, squares, least, greatest)


def _no_extremes(d: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return np.full(d, np.inf, np.float32), np.full(d, -np.inf, np.float32)


def _sums(x: NDArray[np.float32]) -> _Sums:
    some = x[::_CENTRE_OF]
    centre = (column_sums(some) / len(some)).astype(np.float32)
    found = _Sums(centre, np.empty(0), np.empty(0), x.min(0), x.max(0))
    deviation = np.subtract(x, centre, out=scratch("deviation", x.shape))
    if not found.is_safe:
        deviation = deviation.astype(np.float64)
    return found._replace(deviation=column_sums(deviation), squares=_sums_of_squares(deviation))


def column_sums(x: NDArray[np.floating]) -> F64:
    """Sums of columns [d] in float64, of float32 sums of `SUM_ROWS` rows at a time."""
    whole = len(x) // SUM_ROWS * SUM_ROWS
    parts = np.add.reduce(x[:whole].reshape(-1, SUM_ROWS, x.shape[1]), axis=1)
    return parts.sum(0, dtype=np.float64) + np.add.reduce(x[whole:], axis=0).astype(np.float64)


def _sums_of_squares(x: NDArray[np.floating]) -> F64:
    """Likewise of the squares."""
    whole = len(x) // SUM_ROWS * SUM_ROWS
    blocks, rest = x[:whole].reshape(-1, SUM_ROWS, x.shape[1]), x[whole:]
    parts = np.einsum("brd,brd->bd", blocks, blocks)
    return parts.sum(0, dtype=np.float64) + np.einsum("rd,rd->d", rest, rest).astype(np.float64)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of rows together: M2 = M2a + M2b + delta^2 * na * nb / (na + nb)."""
    if a.n == 0 or b.n == 0:
        return b if a.n == 0 else a
    n = a.n + b.n
    delta = b.mean - a.mean
    return Moments(
        n,
        a.mean + delta * (b.n / n),
        a.m2 + b.m2 + delta**2 * (a.n * b.n / n),
        np.fmin(a.least, b.least),
        np.fmax(a.greatest, b.greatest),
    )


class RowStatistics(NamedTuple):
    """Of some rows of one layer.

    norm       [r] float32, of every stored row.
    moments    of the kept rows of finite numbers.
    ordinary   of those among them that are in codes, where rows are quantised.
    is_finite  [r] bool.
    """

    norm: NDArray[np.float32]
    moments: Moments
    ordinary: Moments
    is_finite: NDArray[np.bool_]


def row_statistics(
    rows: NDArray[Any], dtype: str, kept: int, exact_rows: NDArray[np.uint32] | None = None
) -> RowStatistics:
    """Statistics of stored rows [r, d] of a logical dtype, of which the first `kept` are kept; exact_rows: not in codes."""
    if row_loops_for(rows, dtype) is None and dtype != "float32":
        rows, dtype = as_float32(rows, dtype, scratch("widened", rows.shape)), "float32"
    norm = row_norms(rows, dtype)
    is_finite = np.isfinite(norm)
    for row in np.flatnonzero(~is_finite):  # a norm may overflow where no number does
        is_finite[row] = np.isfinite(as_float32(rows[row], dtype)).all()
    with np.errstate(over="ignore", invalid="ignore"):
        moments = ordinary = moments_of(_chosen(rows[:kept], is_finite[:kept]), dtype)
        if exact_rows is not None and (exact_rows < kept).any():
            in_codes = is_finite[:kept].copy()
            in_codes[exact_rows[exact_rows < kept]] = False
            ordinary = moments_of(_chosen(rows[:kept], in_codes), dtype)
    return RowStatistics(norm, moments, ordinary, is_finite)


def _chosen(rows: NDArray[Any], which: NDArray[np.bool_]) -> NDArray[Any]:
    return rows if which.all() else rows[which]


class QuantisationError(NamedTuple):
    """What quantising cost one layer, over the kept rows of some shards.

    FVU, the fraction of variance unexplained, is `sum (x - y)^2 / sum (y - mean y)^2` over rows and dimensions, with x
    the rows as the model gave them and y as they are read back. A dimension without variance counts as 0.

    n_rows     kept rows.     n_exact  those of them that are stored exactly.
    fvu        over the others: ordinary rows, whose variance no massive row inflates.
    worst      the same of the worst dimension.     worst_dimension  which one that is.
    fvu_kept, worst_kept  over all kept rows.
    """

    n_rows: int
    n_exact: int
    fvu: float
    worst: float
    worst_dimension: int
    fvu_kept: float
    worst_kept: float


def quantisation_error(kept: Moments, ordinary: Moments, squared_errors: F64) -> QuantisationError:
    """From moments of kept and of ordinary rows and the squared errors [d] of the latter (those of others are 0)."""
    of_ordinary, of_kept = (
        np.divide(squared_errors, m.m2, out=np.zeros_like(squared_errors), where=m.m2 > 0)
        for m in (ordinary, kept)
    )
    total = float(squared_errors.sum())
    worst = int(of_ordinary.argmax())
    return QuantisationError(
        n_rows=kept.n,
        n_exact=kept.n - ordinary.n,
        fvu=total / float(ordinary.m2.sum()) if total else 0.0,
        worst=float(of_ordinary[worst]),
        worst_dimension=worst,
        fvu_kept=total / float(kept.m2.sum()) if total else 0.0,
        worst_kept=float(of_kept.max()),
    )
