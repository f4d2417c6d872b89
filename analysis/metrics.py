"""How well an SAE reconstructs held-out rows, layer by layer, and over which layers its latents are active.

One definition per quantity; sums in float64 and int64, exact over any number of batches.
Axes: b rows, d width, l layers, f latents, k active latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import UsageError
from actcache.flow import BatchSource
from analysis.layers import LatentLayers, LayerCounts
from analysis.moments import Moments
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An SAE on held-out rows.

    layers     scores per model layer.
    mean       mean over layers of every score (n_rows: total; n_alive, n_dead: over all layers).
    latents    over which layers each latent was active.
    """

    layers: dict[int, LayerScores]
    mean: LayerScores
    latents: LatentLayers

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the per-latent tensors."""
        return {
            "layers": {str(layer): scores._asdict() for layer, scores in self.layers.items()},
            "mean": self.mean._asdict(),
            "n_latents": len(self.latents.mean),
        }


@dataclass(slots=True)
class _LayerSums:
    """What one layer has seen: moments of its rows, and sums over rows of errors and activations."""

    rows: Moments
    error: float = 0.0
    error_k0: float = 0.0
    l1: float = 0.0

    def scores(self, counts_f: NDArray[np.int64]) -> LayerScores:
        n, width = self.rows.n, len(self.rows.mean)
        each, one = self.rows.about_each_mean, self.rows.about_one_mean
        n_alive = int((counts_f > 0).sum())
        return LayerScores(
            n_rows=n,
            fvu=_ratio(self.error, each),
            fvu_scalar=_ratio(self.error, one),
            fvu_k0=_ratio(self.error_k0, each),
            fvu_scalar_k0=_ratio(self.error_k0, one),
            explained_variance=1 - _ratio(self.error, each),
            mse=self.error / (n * width),
            l0=int(counts_f.sum()) / n,
            l1=self.l1 / n,
            n_alive=n_alive,
            n_dead=len(counts_f) - n_alive,
        )


class Reconstruction:
    """Accumulates an evaluation: float64 sums and int64 counts, per layer."""

    def __init__(self, layers: tuple[int, ...], width: int, n_latents: int) -> None:
        self.sums = {layer: _LayerSums(Moments(width)) for layer in layers}
        self.latents = LayerCounts(layers, n_latents)

    def update(
        self, layer: int, x: Tensor, xhat: Tensor, nothing: Tensor, values: Tensor, indices: Tensor
    ) -> None:
        """Add rows of one layer.

        Args:
            layer: the model's layer number.
            x: [b, d] raw rows.
            xhat: [b, d] their reconstructions.
            nothing: [b, d] what decoding no latents gives.
            values: [b, k] activations, 0 in slots that are not used.
            indices: [b, k] int64 latents.
        """
        mine = self.sums[layer]
        x, values = x.double().cpu(), values.double().cpu()
        mine.rows.update(x)
        mine.error += float(((x - xhat.double().cpu()) ** 2).sum())
        mine.error_k0 += float(((x - nothing.double().cpu()) ** 2).sum())
        mine.l1 += float(values.sum())
        self.latents.update(layer, values.numpy(), indices.cpu().numpy())

    def merge(self, other: Self) -> None:
        """Add what another accumulator has seen."""
        for layer, mine in self.sums.items():
            theirs = other.sums[layer]
            mine.rows.merge(theirs.rows)
            mine.error += theirs.error
            mine.error_k0 += theirs.error_k0
            mine.l1 += theirs.l1
        self.latents.merge(other.latents)

    def compute(self) -> Evaluation:
        """The scores of what was seen so far.

        Raises:
            UsageError: a layer has fewer than two rows to measure a variance on.
        """
        few = [layer for layer, mine in self.sums.items() if mine.rows.n < 2]
        if few:
            raise UsageError(
                f"layers {few} have fewer than two rows to evaluate; build the store with a larger --holdout"
            )
        latents = self.latents.compute()
        scores = {
            layer: mine.scores(counts)
            for (layer, mine), counts in zip(self.sums.items(), latents.counts, strict=True)
        }
        return Evaluation(layers=scores, mean=_mean(list(scores.values()), latents), latents=latents)


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
    found = Reconstruction(source.layers, source.width, sae.sae.n_latents)
    for batch in source:
        code = sae.encode(batch.rows)
        xhat = sae.decode(code)
        nothing = sae.decode(code._replace(values=torch.zeros_like(code.values)))
        for layer in source.layers:
            at = batch.layer == layer
            if at.any():
                found.update(layer, batch.rows[at], xhat[at], nothing[at], code.values[at], code.indices[at])
        on_rows(len(batch))
    return found.compute()


def _ratio(error: float, variance: float) -> float:
    """NaN where all rows are alike: there is no variance to explain."""
    return error / variance if variance > 0 else float("nan")


def _mean(scores: list[LayerScores], latents: LatentLayers) -> LayerScores:
    means: dict[str, Any] = {
        name: sum(getattr(s, name) for s in scores) / len(scores) for name in LayerScores._fields
    }
    n_alive = int(latents.is_alive.sum())
    exact = {
        "n_rows": sum(s.n_rows for s in scores),
        "n_alive": n_alive,
        "n_dead": len(latents.is_alive) - n_alive,
    }
    return LayerScores(**means)._replace(**exact)
