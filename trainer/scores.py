"""How well rows are restored, layer by layer: one definition of each quantity, sums in float64, exact over any batches.

Axes: n slices (rows, where a row is one layer's), d width, l layers, f latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from actcache.errors import UsageError
from trainer.ranks import ALONE, Ranks


class LayerScores(NamedTuple):
    """One layer (or all: sums over layers) of an evaluation.

    n_rows          rows evaluated.
    fvu             sum ||x - xhat||^2 / sum ||x - mean||^2, mean per dimension (Gao et al., arXiv 2406.04093).
    fvu_scalar      the same error over sum (x_i - m)^2, m one number for all dimensions (the MLSAE code's convention).
    fvu_k0          fvu of decoding nothing: the standardisation's mean and scale with the bias, which come for free.
    fvu_scalar_k0   the same in the scalar convention.
    mse             mean squared error per dimension.
    l0              latents active (a > 1e-3) per row.
    l1              sum of activations per row, in standardised units.
    explained_variance  1 - fvu.
    n_alive         latents active at least once.
    n_dead          latents that never were.
    """

    n_rows: int
    fvu: float
    fvu_scalar: float
    fvu_k0: float
    fvu_scalar_k0: float
    explained_variance: float
    mse: float
    l0: float
    l1: float
    n_alive: int
    n_dead: int


class Scores:
    """What has been seen of every layer. Add batches, bring ranks together, then ask for `by_layer`."""

    def __init__(self, layers: tuple[int, ...], width: int, n_latents: int, device: torch.device) -> None:
        self.layers = layers
        n_layers = len(layers)
        self._n = torch.zeros(n_layers, dtype=torch.float64, device=device)
        self._mean, self._m2 = (
            torch.zeros(n_layers, width, dtype=torch.float64, device=device) for _ in range(2)
        )
        self._sums = torch.zeros(n_layers, 4, dtype=torch.float64, device=device)
        self._alive = torch.zeros(n_layers, n_latents, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def add(
        self,
        target: Tensor,
        restored: Tensor,
        nothing: Tensor,
        values: Tensor,
        indices: Tensor,
        is_active: Tensor,
        layer_i: Tensor,
    ) -> None:
        """Count slices.

        Args:
            target: [n, d] raw.
            restored: [n, d] raw, by the SAE.
            nothing: [n, d] raw, by the SAE with no latent active.
            values: [n, s] activations of the slice's row.
            indices: [n, s] their latents.
            is_active: [n, s] bool, which count as active.
            layer_i: [n] int64, index of the slice's layer.
        """
        error, error_k0 = ((target - x).square_().sum(1, dtype=torch.float64) for x in (restored, nothing))
        columns = [error, error_k0, is_active.sum(1).double(), values.sum(1, dtype=torch.float64)]
        self._sums.index_add_(0, layer_i, torch.stack(columns, 1))
        for i in range(len(self.layers)):
            at = layer_i == i
            if at.any():
                self._spread(i, target[at].double())
                self._alive[i, indices[at][is_active[at]]] = 1

    def _spread(self, i: int, x: Tensor) -> None:
        """Mean and squared deviation per dimension of layer i, merged with those of x [n, d] (Chan et al. 1979)."""
        n, mean = len(x), x.mean(0)
        before, total = self._n[i].clone(), self._n[i] + n
        delta = mean - self._mean[i]
        self._m2[i] += (x - mean).square_().sum(0) + delta.square() * (before * n / total)
        self._mean[i] += delta * (n / total)
        self._n[i] = total

    def merge(self, other: Scores) -> None:
        """Add what other scores, of other rows of the same layers, have seen."""
        total = self._n + other._n
        share = other._n / total.clamp_min(1)
        delta = other._mean - self._mean
        self._m2 += other._m2 + delta.square() * (self._n * share).unsqueeze(1)
        self._mean += delta * share.unsqueeze(1)
        self._n = total
        self._sums += other._sums
        self._alive |= other._alive

    def together(self, ranks: Ranks = ALONE) -> None:
        """Replace this rank's sums by those of all."""
        if ranks.size == 1:
            return
        n, weighted = self._n.clone(), self._mean * self._n.unsqueeze(1)
        ranks.sum_([n, weighted, self._sums])
        mean = weighted / n.clamp_min(1).unsqueeze(1)
        self._m2 += self._n.unsqueeze(1) * (self._mean - mean).square()
        ranks.sum_([self._m2])
        ranks.largest_(self._alive)
        self._n, self._mean = n, mean

    def by_layer(self) -> dict[int, LayerScores]:
        """The scores of every layer.

        Raises:
            UsageError: a layer has fewer than two rows, or rows that are all alike, so there is nothing to compare with.
        """
        few = [layer for layer, n in zip(self.layers, self._n.tolist(), strict=True) if n < 2]
        if few:
            raise UsageError(
                f"layers {few} have fewer than two rows to evaluate; build the store with a larger --holdout"
            )
        alike = [layer for layer, m2 in zip(self.layers, self._m2.sum(1).tolist(), strict=True) if m2 == 0]
        if alike:
            raise UsageError(f"all rows of layers {alike} that were to be evaluated are alike")
        return {layer: self._scores(i) for i, layer in enumerate(self.layers)}

    def _scores(self, i: int) -> LayerScores:
        n, width = float(self._n[i]), self._mean.shape[1]
        error, error_k0, n_active, l1 = self._sums[i].tolist()
        per_dimension = float(self._m2[i].sum())
        scalar = per_dimension + n * float((self._mean[i] - self._mean[i].mean()).square().sum())
        return LayerScores(
            n_rows=int(n),
            fvu=error / per_dimension,
            fvu_scalar=error / scalar,
            fvu_k0=error_k0 / per_dimension,
            fvu_scalar_k0=error_k0 / scalar,
            explained_variance=1 - error / per_dimension,
            mse=error / (n * width),
            l0=n_active / n,
            l1=l1 / n,
            n_alive=int(self._alive[i].sum()),
            n_dead=int((self._alive[i] == 0).sum()),
        )

    def mean(self) -> LayerScores:
        """The mean over layers of every score; n_rows is the total, n_alive and n_dead are those over all layers."""
        scores = list(self.by_layer().values())
        means = {name: sum(getattr(s, name) for s in scores) / len(scores) for name in LayerScores._fields}
        n_alive = int(self._alive.amax(0).sum())
        n_dead = self._alive.shape[1] - n_alive
        totals = {"n_rows": sum(s.n_rows for s in scores), "n_alive": n_alive, "n_dead": n_dead}
        return LayerScores(**{**means, **totals})
