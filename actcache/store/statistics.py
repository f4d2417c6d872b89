"""Statistics of a shard's kept rows, and their exact merging.

Sums run in float32 over blocks of at most 256 rows, centred on the block's own mean, and are merged in float64 by
the pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample
variances", 1979). The rounding of a block's mean is corrected by the residual sum, so massive rows do no harm.
Everything here is a function of the numbers as stored, so whoever adopts a shard finds the same values.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK_ROWS = 256
_SAFE = (1e-12, 1e17)
"""Between these the squares of float32 numbers, summed over a block, keep their digits."""

F64 = NDArray[np.float64]


def as_float32(rows: NDArray[Any], logical_dtype: str) -> NDArray[np.float32]:
    """Numbers on disk as float32, exactly; bfloat16 bits are the upper half of a float32."""
    if logical_dtype == "bfloat16":
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32, copy=False)


def row_norms(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean norm of each row [r, d]; a float32 overflow is computed again in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        norm = np.sqrt(np.einsum("rd,rd->r", x, x))
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


def moments_of(x: NDArray[np.float32]) -> Moments:
    """Moments of rows [r, d]. With no rows the mean is 0 and the extremes are NaN."""
    width = x.shape[1]
    total = Moments(0, np.zeros(width), np.zeros(width), np.full(width, np.nan), np.full(width, np.nan))
    for start in range(0, len(x), _BLOCK_ROWS):
        block = x[start : start + _BLOCK_ROWS]
        centre = block.mean(0, dtype=np.float32)
        deviation = _squarable(block - centre)
        residual = deviation.sum(0).astype(np.float64)
        n = len(block)
        total = merge(
            total,
            Moments(
                n,
                centre.astype(np.float64) + residual / n,
                np.einsum("rd,rd->d", deviation, deviation).astype(np.float64) - residual**2 / n,
                block.min(0).astype(np.float64),
                block.max(0).astype(np.float64),
            ),
        )
    return total


def _squarable(deviation: NDArray[np.float32]) -> NDArray[np.floating]:
    """The same numbers, in float64 where some dimension's squares would leave the range of float32."""
    largest = np.abs(deviation).max(0)
    is_safe = (largest == 0) | ((largest > _SAFE[0]) & (largest < _SAFE[1]))
    return deviation if is_safe.all() else deviation.astype(np.float64)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of rows together: M2 = M2a + M2b + delta^2 * na * nb / (na + nb)."""
    n = a.n + b.n
    if n == 0:
        return a
    delta = b.mean - a.mean
    return Moments(
        n,
        a.mean + delta * (b.n / n),
        a.m2 + b.m2 + delta**2 * (a.n * b.n / n),
        np.fmin(a.least, b.least),
        np.fmax(a.greatest, b.greatest),
    )


@dataclass(frozen=True, slots=True)
class ShardStatistics:
    """What the side arrays of one shard hold.

    norm     [l, rows_per_shard] float32, NaN for padding; excluded rows have theirs.
    moments  [l, 4, d] float64 over kept rows, named by `arrays.MOMENTS`.
    totals   [l, 4] float64 over kept rows, named by `arrays.TOTALS`.
    """

    norm: NDArray[np.float32]
    moments: F64
    totals: F64


def shard_statistics(
    rows: NDArray[Any], logical_dtype: str, kept: int, rows_per_shard: int
) -> ShardStatistics:
    """Statistics of stored rows [l, stored, d], of which the first `kept` are kept."""
    n_layers, stored, width = rows.shape
    norm = np.full((n_layers, rows_per_shard), np.nan, np.float32)
    moments, totals = np.empty((n_layers, 4, width)), np.empty((n_layers, 4))
    for i in range(n_layers):
        x = as_float32(rows[i], logical_dtype)
        norm[i, :stored] = row_norms(x)
        with np.errstate(over="ignore", invalid="ignore"):
            m = moments_of(x[:kept])
        moments[i] = m.mean, m.m2, m.least, m.greatest
        kept_norm = norm[i, :kept].astype(np.float64)
        totals[i] = kept, kept_norm.sum(), (kept_norm**2).sum(), kept_norm.max(initial=0.0)
    return ShardStatistics(norm, moments, totals)
