"""What `actcache eval` finds out about a run of any form: scores on held-out rows, and, where asked, losses and the matrix.

Axes: b rows, l layers, f latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actcache.patching import Patcher
from analysis.cross import Matrix, cross_layers, cross_losses
from analysis.layers import LatentLayers
from analysis.loss import LossScores
from analysis.metrics import evaluate
from analysis.models import Model
from analysis.patched import PatchedScores, Positions, evaluate_patched
from analysis.reporter import Reporter
from analysis.subject import check_run, filters_of, find_runs, load_subject
from trainer import heldout
from trainer.checkpoint import load_sae
from trainer.heldout import HeldOut
from trainer.lens import LensSource
from trainer.trained import TrainedSAE

if TYPE_CHECKING:
    from actcache.flow import BatchSource
    from actcache.reader.access import Split, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked for beside scores.

    split         "holdout" or "train".
    loss          run the model with patches.
    matrix        the SAE of each layer on the rows of every layer.
    model_tokens  kept tokens the model is run on.
    positions     ways to patch.
    """

    split: Split = "holdout"
    loss: bool = False
    matrix: bool = False
    model_tokens: int = 1000
    positions: tuple[Positions, ...] = ("kept",)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """What was found; None or empty where it was not asked for or cannot be.

    scores         per layer, raw space.
    latents        over which layers latents are active; None where a row holds several layers.
    norms          relative decoder norm per layer, where a row holds several.
    in_lens        scores in the space of the run's lens.
    conditions     condition number of the lens's matrices.
    losses         per way of patching.
    matrix         scores by the layer trained on, then the layer looked at.
    matrix_losses  likewise.
    """

    scores: HeldOut
    latents: LatentLayers | None
    norms: dict[int, float] | None
    in_lens: HeldOut | None
    conditions: dict[int, float] | None
    losses: list[PatchedScores]
    matrix: Matrix | None
    matrix_losses: dict[int, dict[int, LossScores]] | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, without those per latent."""
        mean = self.scores.mean
        found: dict[str, Any] = {
            **self.scores.as_json(),
            "n_latents": mean.n_alive + mean.n_dead,
            "relative_norms": self.norms,
        }
        if self.in_lens is not None:
            found["lens_space"] = {**self.in_lens.as_json(), "condition": self.conditions}
        if self.losses:
            found["loss"] = [scores.as_json() for scores in self.losses]
        if self.matrix is not None:
            found["matrix"] = {
                str(i): {str(j): self._cell(i, j, scores._asdict()) for j, scores in of_layer.items()}
                for i, of_layer in self.matrix.items()
            }
        return found

    def _cell(self, i: int, j: int, scores: dict[str, Any]) -> dict[str, Any]:
        if self.matrix_losses is None:
            return scores
        return {**scores, "loss": self.matrix_losses[i][j].as_json()}


def evaluate_run(
    run: Path,
    store: Store,
    wanted: Wanted,
    load_model: Callable[[], Model] | None = None,
    device: str = "cpu",
    reporter: Reporter | None = None,
) -> EvalReport:
    """Evaluate a finished run of any form on rows such as it was trained on.

    Args:
        run: its folder, or one that holds a run for each layer.
        store: of the same model.
        wanted: what is asked for.
        load_model: called where the model is needed: for losses.
        device: where SAEs run.
        reporter: hears of progress.

    Raises:
        UsageError: the run is not of this store's model, or what is asked for does not fit its form.
    """
    said = reporter or Reporter()
    saes = {folder: load_sae(folder, device=device) for folder in find_runs(run)}
    for folder, sae in saes.items():
        check_run(folder, sae, store)
    first = next(iter(saes.values()))
    latents, norms = None, None
    with _rows_for(list(saes.values()), store, wanted.split, device) as source:
        said.on_stage("evaluate", source.n_rows, "rows")
        if first.form.is_joint:
            scores = heldout.evaluate({"": first}, source, on_rows=said.on_advance)[""]
            norms = dict(zip(first.layers, first.relative_norms().mean(0).tolist(), strict=True))
        else:
            found = evaluate(list(saes.values()), source, said.on_advance)
            scores, latents = found.scores, found.latents
    in_lens = (
        _in_lens(list(saes.values()), store, wanted.split, device, said) if first.lens is not None else None
    )
    losses: list[PatchedScores] = []
    matrix, matrix_losses = None, None
    if wanted.matrix:
        subject = load_subject(run, store, device)
        said.on_stage("matrix", source.n_rows, "rows")
        matrix = cross_layers(subject, wanted.split, on_rows=said.on_advance)
    if wanted.loss:
        assert load_model is not None
        subject, patcher = load_subject(run, store, device), Patcher(load_model().decoder)
        n, split = wanted.model_tokens, wanted.split
        said.on_stage("model with patches", n, "tok")
        losses = evaluate_patched(
            subject, patcher, n_tokens=n, split=split, positions=wanted.positions, on_tokens=said.on_advance
        )
        if wanted.matrix:
            said.on_stage("matrix with patches", n * len(subject.layers), "tok")
            matrix_losses = cross_losses(subject, patcher, n_tokens=n, split=split, on_tokens=said.on_advance)
    return EvalReport(
        scores=scores,
        latents=latents,
        norms=norms,
        in_lens=in_lens,
        conditions=None if first.lens is None else first.lens.conditions(),
        losses=losses,
        matrix=matrix,
        matrix_losses=matrix_losses,
    )


def _rows_for(saes: list[TrainedSAE], store: Store, split: Split, device: str) -> Any:
    """A stream of rows such as the run was trained on."""
    selection = saes[0].provenance["selection"]
    chosen = {name: selection[name] for name in ("hook", "window_rows") if selection.get(name) is not None}
    layers = sorted({layer for sae in saes for layer in sae.layers})
    return store.stream(
        batch_size=4096,
        layers=layers,
        stack=saes[0].form.stack,
        split=split,
        device=device,
        dtype=torch.float32,
        **chosen,
        **filters_of(selection, layers),
    )


def _in_lens(saes: list[TrainedSAE], store: Store, split: Split, device: str, said: Reporter) -> HeldOut:
    lens = saes[0].lens
    assert lens is not None
    with _rows_for(saes, store, split, device) as source:
        said.on_stage("evaluate in lens space", source.n_rows, "rows")
        seen: BatchSource = LensSource(source, lens, device)
        return evaluate([replace(sae, lens=None) for sae in saes], seen, said.on_advance).scores
