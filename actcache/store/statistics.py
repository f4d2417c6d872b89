"""Statistics of a shard's kept rows, and their exact merging.

Sums run in float32 over 32 rows at a time and in float64 over these, of rows centred on the mean of every fourth. That this
is not the mean of all is corrected by the sum of the residuals: by Cauchy and Schwarz the correction is at most four
times what it corrects, so it costs less than a digit, massive rows or not. Sets of rows are merged in float64 by the
pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances",
1979). Everything here is a function of the numbers as stored, so whoever adopts a shard finds the same values.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.store.dtypes import scratch

_SUM_ROWS = 32
_CENTRE_OF = 4
_SAFE = (1e-12, 1e17)
"""Between these the squares of float32 numbers, summed over a block, keep their digits."""

F64 = NDArray[np.float64]


def row_norms(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean norm of each row [r, d]; a float32 overflow is computed again in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        norm = np.sqrt(np.vecdot(x, x))
        odd = ~np.isfinite(norm)
        if odd.any():
            norm[odd] = np.sqrt((x[odd].astype(np.float64) ** 2).sum(1)).astype(np.float32)
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


def moments_of(x: NDArray[np.float32]) -> Moments:
    """Moments of rows [r, d]."""
    n = len(x)
    if not n:
        return no_moments(x.shape[1])
    least, greatest = x.min(0), x.max(0)
    some = x[::_CENTRE_OF]
    centre = (column_sums(some) / len(some)).astype(np.float32)
    deviation = np.subtract(x, centre, out=scratch("deviation", x.shape))
    largest = np.maximum(greatest - centre, centre - least)
    is_safe = (largest == 0) | ((largest > _SAFE[0]) & (largest < _SAFE[1]))
    if not is_safe.all():
        deviation = deviation.astype(np.float64)
    residual = column_sums(deviation)
    return Moments(
        n,
        centre.astype(np.float64) + residual / n,
        _sums_of_squares(deviation) - residual**2 / n,
        least.astype(np.float64),
        greatest.astype(np.float64),
    )


def column_sums(x: NDArray[np.floating]) -> F64:
    """Sums of columns [d] in float64, of float32 sums of `_SUM_ROWS` rows at a time."""
    whole = len(x) // _SUM_ROWS * _SUM_ROWS
    parts = np.add.reduce(x[:whole].reshape(-1, _SUM_ROWS, x.shape[1]), axis=1)
    return parts.sum(0, dtype=np.float64) + np.add.reduce(x[whole:], axis=0).astype(np.float64)


def _sums_of_squares(x: NDArray[np.floating]) -> F64:
    """Likewise of the squares."""
    whole = len(x) // _SUM_ROWS * _SUM_ROWS
    blocks, rest = x[:whole].reshape(-1, _SUM_ROWS, x.shape[1]), x[whole:]
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
    x: NDArray[np.float32], kept: int, exact_rows: NDArray[np.uint32] | None = None
) -> RowStatistics:
    """Statistics of stored rows [r, d], of which the first `kept` are kept; exact_rows: those not in codes."""
    norm = row_norms(x)
    is_finite = np.isfinite(norm)
    for row in np.flatnonzero(~is_finite):  # a norm may overflow where no number does
        is_finite[row] = np.isfinite(x[row]).all()
    with np.errstate(over="ignore", invalid="ignore"):
        moments = ordinary = moments_of(_chosen(x[:kept], is_finite[:kept]))
        if exact_rows is not None and (exact_rows < kept).any():
            in_codes = is_finite[:kept].copy()
            in_codes[exact_rows[exact_rows < kept]] = False
            ordinary = moments_of(_chosen(x[:kept], in_codes))
    return RowStatistics(norm, moments, ordinary, is_finite)


def _chosen(x: NDArray[np.float32], which: NDArray[np.bool_]) -> NDArray[np.float32]:
    return x if which.all() else x[which]


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
