"""From a run's folder to its SAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from actcache.errors import DamageError, NotFoundError
from trainer.config import TrainConfig
from trainer.forms import FORMS
from trainer.lens import LENS, load_lens
from trainer.run_folder import RunFolder, check_same
from trainer.sae import dictionary_of
from trainer.trained import TrainedSAE
from trainer.transform import make_transforms

Which = int | Literal["best", "last"] | None


def load_sae(
    run_dir: Path | str, *, device: torch.device | str = "cpu", checkpoint: Which = None
) -> TrainedSAE:
    """The SAE of a run.

    Args:
        run_dir: the run's folder.
        device: where its weights are wanted.
        checkpoint: None: the result of a finished run. Else a checkpoint that was kept, of a run in any state: its step,
            "last", or "best" on held-out rows.

    Raises:
        NotFoundError: no finished run, or no such checkpoint, is there.
        PlanMismatchError: it was trained with other transforms than this version has.
        DamageError: the weights are not those that were written.
    """
    folder, where = RunFolder(Path(run_dir)), torch.device(device)
    if checkpoint is not None:
        return _with_lens(_from_checkpoint(folder, step_of(folder, checkpoint), where), folder, where)
    if folder.finished() is None:
        raise NotFoundError(
            f"no finished run in {folder.root} (no sae.json); train it to its end, resuming if it was stopped, "
            "or ask for one of its checkpoints"
        )
    found = folder.load_result(where)
    trained = make_trained(found.model, found.transforms, found.description, where=str(folder.root))
    return _with_lens(trained, folder, where)


def _with_lens(trained: TrainedSAE, folder: RunFolder, device: torch.device) -> TrainedSAE:
    """The SAE with the lens its rows were seen through, which stands beside it."""
    known = trained.provenance.get("lens")
    if known is None:
        return trained
    path = folder.root / LENS
    lens = load_lens(path)
    if lens.digest != known["digest"]:
        raise DamageError(
            f"{path} is not the lens this SAE was trained through ({lens.digest} for {known['digest']})"
        )
    return replace(trained, lens=lens.to(device))


def make_trained(
    weights: dict[str, Tensor], fixed: dict[str, Tensor], description: dict[str, Any], *, where: str
) -> TrainedSAE:
    """An SAE out of its weights, the fixed numbers of its transforms and what is known of it.

    Raises:
        PlanMismatchError: its transforms are not those this version has; `where` says whose.
    """
    config = TrainConfig.model_validate(description["config"])
    layers = tuple(description["layers"])
    form = FORMS[config.form]
    transforms = make_transforms(
        by_row=config.standardise == "row", predicts=not form.is_autoencoder, tensors=fixed
    )
    check_same({"transform": (description["transform"], transforms.digest)}, where)
    sae = dictionary_of(weights, config, layers)
    return TrainedSAE(
        sae=sae.eval().requires_grad_(requires_grad=False),
        config=config,
        layers=layers,
        var_layer={int(layer): value for layer, value in description["var_layer"].items()},
        source=description["source"],
        provenance=description["provenance"],
        transforms=transforms,
    )


def _from_checkpoint(folder: RunFolder, step: int, device: torch.device) -> TrainedSAE:
    snapshot = folder.load(step, device)
    average, fixed = (
        {n.removeprefix(prefix): x for n, x in snapshot.training.items() if n.startswith(prefix)}
        for prefix in ("ema.", "transforms.")
    )
    trained = make_trained(
        {**snapshot.model, **average}, fixed, snapshot.state["description"], where=str(folder.root)
    )
    if average:
        trained.sae.fold_norms()
    return trained


def step_of(folder: RunFolder, checkpoint: int | Literal["best", "last"]) -> int:
    """The step of a checkpoint that was kept.

    Raises:
        NotFoundError: there is no such checkpoint.
    """
    steps = folder.steps()
    if checkpoint == "best":
        best = folder.best()
        if best is None:
            raise NotFoundError(
                f"{folder.root} has no best checkpoint: it was not evaluated while it was trained"
            )
        return best["step"]
    step = steps[-1] if checkpoint == "last" and steps else checkpoint
    if step not in steps:
        raise NotFoundError(f"no checkpoint {checkpoint} in {folder.root}; it has those of steps {steps}")
    return int(step)
