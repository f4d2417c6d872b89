"""Tuned lenses as the package tuned-lens saves them, read as lenses for blocks.

There translator i acts on hidden_states[i], and hidden_states[0] are the embeddings; so the output of block l, which is
hidden_states[l + 1], goes through translator l + 1, and the last block's through none.
"""

import json
import pickle  # noqa: TID251 - for its error only
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from actcache.errors import DamageError, NotFoundError, UsageError
from trainer.lens import Lens


def import_tuned_lens(folder: Path, layers: tuple[int, ...], n_layers: int, width: int) -> Lens:
    """A lens for the outputs of some blocks.

    Args:
        folder: with `config.json`, and `params.pt` or `params.safetensors` of translators "0.weight", "0.bias", ...
        layers: the model's layer numbers wanted.
        n_layers: blocks of the model.
        width: d of the model.

    Raises:
        NotFoundError: the folder or its files are not there.
        UsageError: it is for a model of other depth or width.
        DamageError: the files cannot be read.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    named = {name.removeprefix("layer_translators."): tensor for name, tensor in tensors.items()}
    n_translators = len({name.split(".")[0] for name in named if name.endswith(".weight")})
    if n_translators != n_layers or named.get("0.weight", torch.empty(0, 0)).shape != (width, width):
        shape = list(named["0.weight"].shape) if "0.weight" in named else "no translator 0"
        raise UsageError(
            f"{folder} has {n_translators} translators ({shape}); this model has {n_layers} blocks of width {width}, so expected "
            f"{n_layers} of [{width}, {width}]: one for the embeddings and each block but the last"
        )
    weight = torch.eye(width).repeat(len(layers), 1, 1)
    offset = torch.zeros(len(layers), width)
    for i, layer in enumerate(layers):
        if layer + 1 < n_layers:
            weight[i] += named[f"{layer + 1}.weight"].float()
            offset[i] = named.get(f"{layer + 1}.bias", torch.zeros(width)).float()
    about = {"kind": "tuned", "imported": folder.name, "model": config.get("base_model_name_or_path")}
    return Lens(layers=layers, centre=torch.zeros_like(offset), weight=weight, offset=offset, about=about)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise NotFoundError(
            f"no tuned lens in {folder} (no config.json); expected what tuned-lens saves for a model"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamageError(f"{path} cannot be read: {error}") from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    for name in ("params.safetensors", "params.pt"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - tensors only; nothing is executed
        except (
            SafetensorError,
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            ValueError,
            OSError,
        ) as error:
            raise DamageError(f"{path} cannot be read: {error}") from error
    raise NotFoundError(f"no params.pt or params.safetensors in {folder}")
