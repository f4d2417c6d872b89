"""SAEs of one layer each, looked at on every other layer's rows: does a dictionary of layer i say anything about layer j?

Axes: i layers trained on, j layers looked at, b rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from actcache.errors import UsageError
from actcache.patching import Patcher
from analysis.latents import ENCODE_ROWS
from analysis.loss import LossScores
from analysis.patched import evaluate_patched
from analysis.subject import Subject
from trainer.dead import ACTIVE_ABOVE
from trainer.scores import LayerScores, Scores

if TYPE_CHECKING:
    from actcache.reader.access import Split

Matrix = dict[int, dict[int, LayerScores]]
"""Scores by the layer trained on, then the layer looked at."""


def cross_layers(
    subject: Subject,
    split: Split,
    n_tokens: int | None = None,
    on_rows: Callable[[int], None] = lambda _n: None,
) -> Matrix:
    """Scores of the SAE of every layer i on the rows of every layer j, each FVU about the mean of layer j.

    Fixed numbers of a standardisation are those of layer i; a lens is that of layer j, which is what brings j where i was
    trained. Memory: one layer of one shard.

    Raises:
        UsageError: one SAE serves all layers, so there is no matrix; or too few rows.
    """
    _check(subject)
    device = subject.directions.device
    found = {
        i: Scores(subject.layers, subject.out_width, sae.sae.n_latents, device)
        for i, sae in subject.saes.items()
    }
    for shard in subject.shards(split, n_tokens):
        for j, layer in enumerate(subject.layers):
            passes = torch.from_numpy(shard.passes[j])
            into = shard.rows(layer, subject.hook, torch.float32)[passes]
            target = shard.rows(layer, subject.target_hook, torch.float32)[passes]
            for at in torch.arange(len(into)).split(ENCODE_ROWS):
                of_layer = torch.full((len(at),), layer)
                for i, sae in subject.saes.items():
                    code = sae.encode(into[at], of_layer)
                    nothing = sae.decode(code._replace(values=torch.zeros_like(code.values)))
                    is_active = code.values > ACTIVE_ABOVE
                    found[i].add(
                        target[at].to(device),
                        sae.decode(code),
                        nothing,
                        code.values,
                        code.indices,
                        is_active,
                        torch.full((len(at),), j, device=device),
                    )
            on_rows(len(shard))
    return {i: scores.by_layer() for i, scores in found.items()}


def cross_losses(
    subject: Subject,
    patcher: Patcher,
    *,
    n_tokens: int,
    split: Split,
    on_tokens: Callable[[int], None] = lambda _n: None,
) -> dict[int, dict[int, LossScores]]:
    """What the model loses with layer j reconstructed by the SAE of layer i.

    Every layer gets the SAE of the layer `shift` places on, for every shift: so each pair is met once.

    Raises:
        UsageError: one SAE serves all layers; or the model is not the store's.
    """
    _check(subject)
    layers = subject.layers
    found: dict[int, dict[int, LossScores]] = {layer: {} for layer in layers}
    for shift in range(len(layers)):
        trained_on = {layer: layers[(place + shift) % len(layers)] for place, layer in enumerate(layers)}
        shifted = replace(subject, saes={layer: subject.saes[i] for layer, i in trained_on.items()})
        (scores,) = evaluate_patched(shifted, patcher, n_tokens=n_tokens, split=split, on_tokens=on_tokens)
        for layer, i in trained_on.items():
            found[i][layer] = scores.layers[layer]
    return {i: dict(sorted(of_layer.items())) for i, of_layer in found.items()}


def _check(subject: Subject) -> None:
    if subject.is_shared:
        raise UsageError(
            f"{subject.name} is one SAE for layers {list(subject.layers)}; a matrix of layers needs one for each "
            f"(actcache train --per-layer)"
        )
