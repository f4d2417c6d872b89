"""A portable SAE as a finished run, which everything else of ours can use.

Rows that need nothing done to them are standardised by numbers that do nothing: mean 0, scale 1.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from actcache.errors import NotFoundError, UsageError
from trainer import durable
from trainer.config import TrainConfig
from trainer.export.portable import Portable
from trainer.run_folder import Finished, RunFolder
from trainer.trained import TrainedSAE
from trainer.transform import make_transforms


def make_finished(sae: Portable, layers: tuple[int, ...], provenance: dict[str, Any]) -> Finished:
    """An SAE as the result of a run that somebody else made.

    Args:
        sae: what it computes.
        layers: the model's layer numbers its rows are of.
        provenance: JSON that is kept with it.

    Raises:
        UsageError: it does not fit these layers, or has more active latents than latents.
    """
    if not layers or sae.n_slices not in (1, len(layers)) or sae.width % sae.n_slices:
        raise UsageError(
            f"rows of this SAE are {sae.n_slices} layers side by side, {sae.width} numbers; layers {list(layers)} do not fit"
        )
    config = _config(sae, layers)
    width, out_width = sae.width // sae.n_slices, sae.w_dec.shape[1] // sae.n_slices
    tensors: dict[str, Tensor] = {}
    for end, numbers in (("into", width), ("out", out_width)):
        if (end == "into" and sae.rows == "raw") or (end == "out" and not sae.is_autoencoder):
            tensors[f"{end}.mean"] = torch.zeros(len(layers), numbers)
            tensors[f"{end}.scale"] = torch.ones(len(layers))
    transforms = make_transforms(by_row=sae.rows != "raw", predicts=not sae.is_autoencoder, tensors=tensors)
    description = {
        "step": 0,
        "rows": 0,
        "transform": transforms.digest,
        "layers": list(layers),
        "var_layer": {},
        "config": json.loads(config.model_dump_json()),
        "source": "imported",
        "provenance": provenance,
        "torch": torch.__version__,
    }
    return Finished(_weights(sae, config), tensors, description)


def form_of(sae: Portable) -> str:
    """What the form is called in a run's configuration."""
    if not sae.is_autoencoder:
        return "transcoder"
    return "stacked" if sae.n_slices == 1 else "feature" if sae.rows == "slices" else "crosscoder"


def _config(sae: Portable, layers: tuple[int, ...]) -> TrainConfig:
    activation = "topk" if sae.activation == "topk" else "relu" if sae.is_relu else "batchtopk"
    chosen = {
        "form": form_of(sae),
        "standardise": "layer" if sae.rows == "raw" else "row",
        "layers": layers,
        "n_latents": sae.n_latents,
        "activation": activation,
        "latent_bias": _latent_bias(sae) is not None,
        "skip": sae.w_skip is not None,
        "epochs": 1,
        **({} if sae.k is None else {"k": sae.k}),
    }
    try:
        if activation == "batchtopk" and sae.k is None:  # others save it as a threshold, without its k
            chosen["k"] = min(sae.n_latents, TrainConfig.model_fields["k"].default)
        return TrainConfig(**chosen).resolve(sae.width // sae.n_slices)
    except ValidationError as error:
        raise UsageError(f"this SAE cannot be a run of ours: {error}") from error


def _latent_bias(sae: Portable) -> Tensor | None:
    bias = sae.folded_b_enc(sae.b_out if sae.is_autoencoder else sae.b_in)
    return bias if bool(bias.any()) else None


def _weights(sae: Portable, config: TrainConfig) -> dict[str, Tensor]:
    found = {
        "w_enc": sae.w_enc,
        "w_dec": sae.w_dec,
        "bias": sae.b_out if sae.is_autoencoder else sae.b_in,
        "out_bias": None if sae.is_autoencoder else sae.b_out,
        "latent_bias": _latent_bias(sae),
        "w_skip": sae.w_skip,
        "threshold": torch.tensor(sae.threshold) if config.activation == "batchtopk" else None,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def finished_again(trained: TrainedSAE, facts: dict[str, Any]) -> Finished:
    """An SAE of ours as the result of a run, bit for bit; `facts`: what its sae.json said besides."""
    description = {
        "step": 0,
        "rows": 0,
        **facts,
        "transform": trained.transforms.digest,
        "layers": list(trained.layers),
        "var_layer": {str(layer): value for layer, value in trained.var_layer.items()},
        "config": json.loads(trained.config.model_dump_json()),
        "source": trained.source,
        "provenance": trained.provenance,
    }
    return Finished(trained.sae.state_dict(), trained.transforms.tensors, description)


def find_runs(root: Path) -> dict[str, Path]:
    """The run in `root`, called ""; or those in its folders, as a sweep leaves them, by name.

    Raises:
        NotFoundError: there is none.
    """
    if (root / "config.json").is_file() or (root / "sae.json").is_file():
        return {"": root}
    found = {path.parent.name: path.parent for path in sorted(root.glob("*/config.json"))}
    if not found:
        raise NotFoundError(f"no run in {root}, nor in its folders (no config.json)")
    return found


def write_run(finished: Finished, out: Path) -> None:
    """Make `out` a finished run, at once.

    Raises:
        UsageError: something is there.
    """
    check_free(out)
    temporary = out.with_name(durable.TEMPORARY + out.name)
    shutil.rmtree(temporary, ignore_errors=True)
    folder = RunFolder(temporary)
    folder.prepare(TrainConfig.model_validate(finished.description["config"]), resume=False)
    folder.finish(finished)
    folder.release()
    durable.put_in_place(temporary, out)


def check_free(out: Path) -> None:
    """Raises UsageError unless `out` is new, or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there already; choose another folder, or remove it")
