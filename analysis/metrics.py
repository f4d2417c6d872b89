"""How well SAEs reconstruct held-out rows, layer by layer, and over which layers their latents are active.

Scores are those of `trainer.scores`: one definition per quantity, sums in float64 and int64, exact over any number of batches.

Axes: b rows, d width, l layers, f latents, k active latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actcache.flow import BatchSource
from analysis.layers import LatentLayers, LayerCounts
from trainer import heldout
from trainer.dead import ACTIVE_ABOVE
from trainer.heldout import HeldOut
from trainer.scores import LayerScores, Scores
from trainer.trained import Reconstruction as Restored
from trainer.trained import TrainedSAE


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """SAEs on held-out rows.

    scores   per model layer, and their mean (n_alive, n_dead: over all layers).
    latents  over which layers each latent was active.
    """

    scores: HeldOut
    latents: LatentLayers

    @property
    def layers(self) -> dict[int, LayerScores]:
        """Scores per model layer."""
        return self.scores.layers

    @property
    def mean(self) -> LayerScores:
        """Their mean."""
        return self.scores.mean

    def as_json(self) -> dict[str, Any]:
        """Plain values, without those per latent."""
        return {**self.scores.as_json(), "n_latents": self.mean.n_alive + self.mean.n_dead}


class Reconstruction:
    """Accumulates an evaluation, rows of one layer at a time."""

    def __init__(self, layers: tuple[int, ...], width: int, n_latents: int, device: str = "cpu") -> None:
        self.scores = Scores(layers, width, n_latents, torch.device(device))
        self.latents = LayerCounts(layers, n_latents)

    def update(
        self, layer: int, x: Tensor, xhat: Tensor, nothing: Tensor, values: Tensor, latents: Tensor
    ) -> None:
        """Add rows of one layer.

        Args:
            layer: the model's layer number.
            x: [b, d] raw rows.
            xhat: [b, d] their reconstructions.
            nothing: [b, d] what decoding no latents gives.
            values: [b, k] activations, 0 in slots that are not used.
            latents: [b, k] int64, their latents.
        """
        if not len(x):
            return
        layer_i = torch.full((len(x),), self.latents.layers.index(layer), device=xhat.device)
        x, nothing, chosen = (part.to(xhat.device) for part in (x, nothing, latents))
        active = values.to(xhat.device)
        self.scores.add(x, xhat, nothing, active, chosen, active > ACTIVE_ABOVE, layer_i)
        self.latents.update(layer, values.cpu().numpy(), latents.cpu().numpy())

    def merge(self, other: Reconstruction) -> None:
        """Add what another accumulator has seen."""
        self.scores.merge(other.scores)
        self.latents.merge(other.latents)

    def compute(self) -> Evaluation:
        """The scores of what was seen so far.

        Raises:
            UsageError: a layer has fewer than two rows, or rows that are all alike.
        """
        return Evaluation(
            scores=HeldOut(self.scores.by_layer(), self.scores.mean()), latents=self.latents.compute()
        )


def evaluate(
    saes: TrainedSAE | Sequence[TrainedSAE],
    source: BatchSource,
    on_rows: Callable[[int], None] = lambda _n: None,
) -> Evaluation:
    """Run SAEs over every row of a source (the holdout of a store, filtered as the run was).

    Args:
        saes: one; or one for each layer, by layer: their latents are numbered one dictionary after the other. Rows are of one
            layer each: where they hold several (`trainer.heldout` evaluates those), latents are active at none of them.
        source: made for their form.
        on_rows: called with the rows of every batch.

    Raises:
        UsageError: the rows are of another width or other layers, too few, or all alike.
        NonFiniteError: a row holds NaN or infinity.
    """
    named = {str(i): sae for i, sae in enumerate([saes] if isinstance(saes, TrainedSAE) else saes)}
    sizes = [sae.sae.n_latents for sae in named.values()]
    first = dict(zip(named, [0, *itertools.accumulate(sizes)], strict=False))
    layers = tuple(sorted(layer for sae in named.values() for layer in sae.layers))
    counts = LayerCounts(layers, sum(sizes))

    def count(name: str, found: Restored) -> None:
        layer_of = torch.tensor(named[name].layers)[found.layer_i[:, 0].cpu()]
        values, latents = found.code.values.cpu(), found.code.indices.cpu() + first[name]
        for layer in layer_of.unique().tolist():
            at = layer_of == layer
            counts.update(layer, values[at].numpy(), latents[at].numpy())

    found = heldout.evaluate(named, source, watch=count, on_rows=on_rows)
    by_layer = dict(sorted({layer: s for one in found.values() for layer, s in one.layers.items()}.items()))
    latents = counts.compute()
    return Evaluation(scores=HeldOut(by_layer, _mean(list(by_layer.values()), latents)), latents=latents)


def _mean(scores: list[LayerScores], latents: LatentLayers) -> LayerScores:
    means: dict[str, Any] = {
        name: sum(getattr(s, name) for s in scores) / len(scores) for name in LayerScores._fields
    }
    n_alive = int(latents.is_alive.sum())
    return LayerScores(**means)._replace(
        n_rows=sum(s.n_rows for s in scores), n_alive=n_alive, n_dead=len(latents.is_alive) - n_alive
    )
