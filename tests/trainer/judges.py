"""SAEs as two projects define them that no package index has, written anew from the layout and formulas they document.

openai/sparse_autoencoder 4965b94 model.py, and tim-lawson/mlsae ba90c51 model/autoencoder.py; neither's code is here.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def normalised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / (std + 1e-5), mean and std; divisor d - 1."""
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    return (x - mean) / (std + 1e-5), mean, std


def top(pre: Tensor, k: int) -> Tensor:
    """Dense: the k largest of each row through ReLU, the rest 0."""
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def openai(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and restored rows of a state dictionary, whose names must be exactly those its module has."""
    state = torch.load(path, weights_only=True)
    n_latents, width = state["encoder.weight"].shape
    shapes = {
        "pre_bias": (width,),
        "latent_bias": (n_latents,),
        "encoder.weight": (n_latents, width),
        "decoder.weight": (width, n_latents),
        "stats_last_nonzero": (n_latents,),
        "latents_activation_frequency": (n_latents,),
        "latents_mean_square": (n_latents,),
    }
    activation, inner = state.pop("activation", "ReLU"), state.pop("activation_state_dict", {})
    assert {name: tuple(t.shape) for name, t in state.items()} == shapes
    assert state["stats_last_nonzero"].dtype == torch.int64
    is_topk = activation == "TopK"  # which is also what turns normalisation on
    if is_topk:
        assert inner["postact_fn"] == "ReLU"
        x, mean, std = normalised(x)
    pre = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    acts = top(pre, inner["k"]) if is_topk else pre.relu()
    out = acts @ state["decoder.weight"].T + state["pre_bias"]
    return acts, out * std + mean if is_topk else out


def mlsae(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and restored rows of a published checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    wanted = ("n_inputs", "n_latents", "k", "dead_steps_threshold", "dead_threshold", "auxk", "standardize")
    options = {name: config[name] for name in wanted}
    assert set(state) == {"encoder.weight", "decoder.weight", "pre_encoder_bias"}
    assert state["encoder.weight"].shape == (options["n_latents"], options["n_inputs"])
    if options["standardize"]:
        x, mean, std = normalised(x)
    acts = top((x - state["pre_encoder_bias"]) @ state["encoder.weight"].T, options["k"])
    out = acts @ state["decoder.weight"].T + state["pre_encoder_bias"]
    return acts, out * std + mean if options["standardize"] else out
