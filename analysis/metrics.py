"""How well an SAE reconstructs held-out rows, layer by layer, and over which layers its latents are active.

One definition per quantity; sums in float64 and int64, exact over any number of batches.
Axes: b rows, d width, l layers, f latents, k active latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actcache.errors import UsageError
from actcache.flow import BatchSource
from trainer.dead import ACTIVE_ABOVE
from trainer.trained import TrainedSAE


class LayerScores(NamedTuple):
    """One layer (or all: sums over layers) of an evaluation.

    n_rows          rows evaluated.
    fvu             sum ||x - xhat||^2 / sum ||x - mean||^2, mean per dimension (Gao et al., arXiv 2406.04093).
    fvu_scalar      the same error over sum (x_i - m)^2, m one number for all dimensions (the MLSAE code's convention).
    fvu_k0          fvu of decoding nothing: the row's own mean and scale with the bias, which come for free.
    fvu_scalar_k0   the same in the scalar convention.
    mse             mean squared error per dimension.
    l0              latents active (a > 1e-3) per row.
    l1              sum of activations per row, in standardised units.
    n_alive         latents active at least once.
    """

    n_rows: int
    fvu: float
    fvu_scalar: float
    fvu_k0: float
    fvu_scalar_k0: float
    mse: float
    l0: float
    l1: float
    n_alive: int

    @property
    def explained_variance(self) -> float:
        """1 - fvu."""
        return 1.0 - self.fvu


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An SAE on held-out rows.

    layers     scores per model layer.
    mean       mean over layers of every score (n_rows: total; n_alive: latents alive on any layer).
    n_latents  f.
    counts     [l, f] int64, rows on which each latent is active, per layer in the order of `layers`.
    totals     [l, f] float64, summed activations likewise.
    """

    layers: dict[int, LayerScores]
    mean: LayerScores
    n_latents: int
    counts: Tensor
    totals: Tensor

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the per-latent tensors."""
        return {
            "layers": {str(layer): scores._asdict() for layer, scores in self.layers.items()},
            "mean": self.mean._asdict(),
            "n_latents": self.n_latents,
        }


class _Spread:
    """Count, mean and summed squared deviation per dimension, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.mean, self.m2 = (torch.zeros(width, dtype=torch.float64) for _ in range(2))

    def update(self, x_bd: Tensor) -> None:
        n, mean = len(x_bd), x_bd.mean(0)
        delta, total = mean - self.mean, self.n + n
        self.m2 += ((x_bd - mean) ** 2).sum(0) + delta**2 * (self.n * n / total)
        self.mean += delta * (n / total)
        self.n = total

    @property
    def per_dimension(self) -> float:
        """Sum over rows and dimensions of (x - mean of the dimension)^2."""
        return float(self.m2.sum())

    @property
    def scalar(self) -> float:
        """Sum over rows and dimensions of (x - mean of everything)^2."""
        return float(self.m2.sum() + self.n * ((self.mean - self.mean.mean()) ** 2).sum())


class _LayerSums:
    """What one layer has seen."""

    def __init__(self, width: int) -> None:
        self.spread = _Spread(width)
        self.error = self.error_k0 = self.l1 = 0.0

    def scores(self, width: int, counts_f: Tensor) -> LayerScores:
        n = self.spread.n
        per_dimension, scalar = self.spread.per_dimension, self.spread.scalar
        return LayerScores(
            n_rows=n,
            fvu=self.error / per_dimension,
            fvu_scalar=self.error / scalar,
            fvu_k0=self.error_k0 / per_dimension,
            fvu_scalar_k0=self.error_k0 / scalar,
            mse=self.error / (n * width),
            l0=int(counts_f.sum()) / n,
            l1=self.l1 / n,
            n_alive=int((counts_f > 0).sum()),
        )


def evaluate(
    sae: TrainedSAE, source: BatchSource, on_rows: Callable[[int], None] = lambda _n: None
) -> Evaluation:
    """Run an SAE over every row of a source (the holdout of a store, filtered as the run was).

    Raises:
        UsageError: the rows are of another width, or a layer has fewer than two rows to measure a variance on.
    """
    if source.width != sae.sae.width:
        raise UsageError(
            f"rows are {source.width} wide and the SAE {sae.sae.width}: it was trained on another model or hook"
        )
    width, n_latents = source.width, sae.sae.n_latents
    sums = {layer: _LayerSums(width) for layer in source.layers}
    counts = torch.zeros(len(source.layers), n_latents, dtype=torch.int64)
    totals = torch.zeros(len(source.layers), n_latents, dtype=torch.float64)
    for batch in source:
        code = sae.encode(batch.rows)
        xhat = sae.decode(code).double().cpu()
        nothing = sae.decode(code._replace(values=torch.zeros_like(code.values))).double().cpu()
        x, layer_of = batch.rows.double().cpu(), batch.layer.cpu()
        values, indices = code.values.double().cpu(), code.indices.cpu()
        for i, layer in enumerate(source.layers):
            at = layer_of == layer
            if not at.any():
                continue
            mine = sums[layer]
            mine.spread.update(x[at])
            mine.error += float(((x[at] - xhat[at]) ** 2).sum())
            mine.error_k0 += float(((x[at] - nothing[at]) ** 2).sum())
            mine.l1 += float(values[at].sum())
            is_active = values[at] > ACTIVE_ABOVE
            active = indices[at][is_active]
            counts[i] += torch.bincount(active, minlength=n_latents)
            totals[i].index_add_(0, active, values[at][is_active])
        on_rows(len(batch))
    few = [layer for layer, mine in sums.items() if mine.spread.n < 2]
    if few:
        raise UsageError(
            f"layers {few} have fewer than two rows to evaluate; build the store with a larger --holdout"
        )
    scores = {layer: sums[layer].scores(width, counts[i]) for i, layer in enumerate(source.layers)}
    return Evaluation(
        layers=scores,
        mean=_mean(list(scores.values()), counts),
        n_latents=n_latents,
        counts=counts,
        totals=totals,
    )


def _mean(scores: list[LayerScores], counts: Tensor) -> LayerScores:
    means = {name: sum(getattr(s, name) for s in scores) / len(scores) for name in LayerScores._fields}
    return LayerScores(
        **{**means, "n_rows": sum(s.n_rows for s in scores), "n_alive": int((counts.sum(0) > 0).sum())}
    )


def layer_distribution(totals: Tensor) -> tuple[Tensor, Tensor]:
    """P(layer | latent) of alive latents, sorted by mean layer.

    totals  [l, f] summed activations.
    Returns p [l, g] (columns sum to 1; g alive latents) and the latents [g] they belong to. The mean layer is
    sum_l i_l p[l], i_l the index of the layer among those given.
    """
    mass = totals.sum(0)
    alive = torch.nonzero(mass > 0).reshape(-1)
    p = totals[:, alive] / mass[alive]
    order = torch.argsort(torch.arange(len(p), dtype=p.dtype) @ p, stable=True)
    return p[:, order], alive[order]
