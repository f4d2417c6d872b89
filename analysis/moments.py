"""Means and squared deviations of vectors, merged batch by batch without cancellation (Chan, Golub and LeVeque 1979).

Axes: b rows, d width.
"""

from typing import Self

import torch
from torch import Tensor


class Moments:
    """Count, mean [d] and sum of squared deviations [d] from it, float64."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.mean, self.m2 = (torch.zeros(width, dtype=torch.float64) for _ in range(2))

    def update(self, x_bd: Tensor) -> None:
        """Add rows."""
        x = x_bd.double().cpu()
        if len(x):
            mean = x.mean(0)
            self._add(len(x), mean, ((x - mean) ** 2).sum(0))

    def merge(self, other: Self) -> None:
        """Add what another accumulator has seen."""
        if other.n:
            self._add(other.n, other.mean, other.m2)

    def _add(self, n: int, mean: Tensor, m2: Tensor) -> None:
        delta, total = mean - self.mean, self.n + n
        self.m2 = self.m2 + m2 + delta**2 * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    @property
    def variance(self) -> Tensor:
        """[d], divisor n - 1; NaN for fewer than two rows."""
        return self.m2 / (self.n - 1) if self.n > 1 else torch.full_like(self.m2, torch.nan)

    @property
    def about_each_mean(self) -> float:
        """Sum over rows and dimensions of (x - mean of the dimension)^2."""
        return float(self.m2.sum())

    @property
    def about_one_mean(self) -> float:
        """Sum over rows and dimensions of (x - mean of everything)^2."""
        return float(self.m2.sum() + self.n * ((self.mean - self.mean.mean()) ** 2).sum())
