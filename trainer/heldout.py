"""Rows past an SAE: how well it restores them. What `actcache eval` reports and what is watched while training.

Axes: b rows, s slices of a row, d width, l layers, f latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from actcache.errors import NonFiniteError, UsageError
from actcache.flow import Batch, BatchSource
from trainer.dead import ACTIVE_ABOVE
from trainer.forms import pick_layers
from trainer.provenance import describe_non_finite
from trainer.ranks import ALONE, Ranks
from trainer.scores import LayerScores, Scores
from trainer.trained import Reconstruction, TrainedSAE

Watch = Callable[[str, Reconstruction], None]


class HeldOut(NamedTuple):
    """Scores per model layer, and their mean."""

    layers: dict[int, LayerScores]
    mean: LayerScores

    def as_json(self) -> dict[str, Any]:
        """By name."""
        return {
            "layers": {str(layer): scores._asdict() for layer, scores in self.layers.items()},
            "mean": self.mean._asdict(),
        }


def evaluate(
    saes: Mapping[str, TrainedSAE],
    source: BatchSource,
    *,
    ranks: Ranks = ALONE,
    n_rows: int | None = None,
    watch: Watch = lambda _name, _found: None,
    on_rows: Callable[[int], None] = lambda _n: None,
) -> dict[str, HeldOut]:
    """Scores of SAEs on the same rows, each on those of its own layers.

    Args:
        saes: by name, all of one form.
        source: made for that form; read from its cursor on. Over several ranks, this one's share.
        ranks: who reads the other shares.
        n_rows: stop with the batch that reaches so many rows over all ranks; None: at the source's end.
        watch: called with an SAE's name and what it made of a batch.
        on_rows: called with the rows of every batch.

    Raises:
        UsageError: the rows are of another width or other layers, or too few or too alike to judge by.
        NonFiniteError: a row holds NaN or infinity.
    """
    scores = {name: _nothing_yet(sae) for name, sae in saes.items()}
    n_seen = 0
    for batch in source:
        for name, sae in saes.items():
            mine = pick_layers(batch, sae.layers, sae.form)
            if len(mine):
                _check_fit(sae, mine, source)
                found = sae.reconstruct(mine)
                _check_finite(found, mine)
                _add(scores[name], found)
                watch(name, found)
        on_rows(len(batch))
        if n_rows is not None:
            n_seen += int(ranks.table([len(batch)]).sum())
            if n_seen >= n_rows:
                break
    for one in scores.values():
        one.together(ranks)
    return {name: HeldOut(one.by_layer(), one.mean()) for name, one in scores.items()}


def _nothing_yet(sae: TrainedSAE) -> Scores:
    w_dec = sae.sae.w_dec
    return Scores(sae.layers, w_dec.shape[1] // sae.n_slices, sae.sae.n_latents, w_dec.device)


def _add(scores: Scores, found: Reconstruction) -> None:
    n_slices = found.target.shape[1]
    values, indices = (x.repeat_interleave(n_slices, dim=0) for x in (found.code.values, found.code.indices))
    scores.add(
        found.target.flatten(0, 1),
        found.restored.flatten(0, 1),
        found.nothing.flatten(0, 1),
        values,
        indices,
        values > ACTIVE_ABOVE,
        found.layer_i.flatten(),
    )


def _check_fit(sae: TrainedSAE, batch: Batch, source: BatchSource) -> None:
    if not set(sae.layers) <= set(source.layers):
        raise UsageError(
            f"the SAE is of layers {list(sae.layers)}, the rows of layers {list(source.layers)}; give it rows of its layers"
        )
    width = batch.rows.shape[1:].numel()
    if width != sae.sae.width:
        raise UsageError(
            f"rows are {width} wide and the SAE {sae.sae.width}: it was trained on another model or hook"
        )


def _check_finite(found: Reconstruction, batch: Batch) -> None:
    if not bool(torch.isfinite(found.target).all()):
        raise NonFiniteError(f"rows to evaluate on cannot be used: {describe_non_finite(batch)}")
