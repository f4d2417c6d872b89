"""SAELens: cfg.json and sae_weights.safetensors of an inference SAE, as `SAE.load_from_disk` reads them.

    W_enc [d, f], b_enc [f], W_dec [f, e], b_dec [e]; threshold [f] of jumprelu; W_skip [e, d] of skip transcoders

What standardises rows is called layer_norm there: it divides by std + 1e-5 and restores with std, so its output differs from
ours by 1e-5 / std, relatively.

Source: sae_lens 6.54.12, saes/*.py and loading/pretrained_sae_loaders.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.errors import UsageError
from trainer import durable
from trainer.export.files import Tensors, read_count, read_json, read_safetensors, write_json
from trainer.export.portable import NOTE, Portable, inclusive_threshold, read_note, write_note

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

VERSION = "6.0.0"
"""Of SAELens' configuration: the first with this layout."""

HOOKS = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}
"""TransformerLens' names; it has none for what goes into an MLP after its norm."""


def recognises(folder: Path) -> bool:
    """Whether these are such files."""
    return (folder / WEIGHTS).is_file()


def write(sae: Portable, folder: Path) -> None:
    """Write an SAE.

    Raises:
        UsageError: SAELens has no such architecture.
    """
    if sae.is_autoencoder:
        names = {"topk": "topk", "threshold": "standard" if sae.is_relu else "jumprelu"}
        architecture, b_in = names[sae.activation], sae.b_out
    else:
        if sae.activation == "topk":
            raise UsageError(
                "SAELens has transcoders with ReLU or JumpReLU only, this one has top-k: export it for sparsify"
            )
        architecture = "transcoder" if sae.is_relu else "jumprelu_transcoder"
        if sae.w_skip is not None:
            architecture = architecture.replace("transcoder", "skip_transcoder")
        b_in = torch.zeros_like(sae.b_in)
    tensors = {
        "W_enc": sae.w_enc.T,
        "b_enc": sae.folded_b_enc(b_in),
        "W_dec": sae.w_dec,
        "b_dec": sae.b_out,
    }
    if "jumprelu" in architecture:
        tensors["threshold"] = torch.full_like(tensors["b_enc"], sae.exclusive_threshold)
    if sae.w_skip is not None:
        tensors["W_skip"] = sae.w_skip
    durable.write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, _config(sae, architecture))


def _config(sae: Portable, architecture: str) -> dict[str, Any]:
    # a skip connection is fed raw rows there, so its input cannot be standardised by layer_norm
    is_carried = sae.rows == "row" and sae.w_skip is None
    model = sae.about.get("provenance", {}).get("model", {})
    metadata: dict[str, Any] = {
        "sae_lens_version": VERSION,
        "model_name": model.get("name"),
        "hook_name": hook_name(sae, 0),
        NOTE: write_note(sae, carries_rows=is_carried),
    }
    if not sae.is_autoencoder:
        metadata["hook_name_out"] = hook_name(sae, 1)
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.width,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.is_autoencoder,
        "normalize_activations": "layer_norm" if is_carried else "none",
        "reshape_activations": "none",
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }
    if architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if not sae.is_autoencoder:
        config["d_out"] = sae.w_dec.shape[1]
    return config


def hook_name(sae: Portable, i: int) -> str | None:
    """TransformerLens' name of the i-th hook, where the SAE is of one layer."""
    if len(sae.layers) != 1 or i >= len(sae.hooks) or sae.hooks[i] not in HOOKS:
        return None
    return f"blocks.{sae.layers[0]}.{HOOKS[sae.hooks[i]]}"


def read(folder: Path) -> Portable:
    """Read an SAE.

    Raises:
        NotFoundError: a file is missing.
        DamageError: a file is not what it should be.
        UsageError: it is of an architecture that we have not.
    """
    path = folder / CONFIG
    config = read_json(path)
    architecture = config.get("architecture", "standard")
    if config.get("activation_fn_str", config.get("activation_fn")) == "topk":  # before version 6
        architecture = "topk"
        config.setdefault("k", config.get("activation_fn_kwargs", {}).get("k"))
    known = re.fullmatch(r"standard|topk|jumprelu|(jumprelu_)?(skip_)?transcoder", architecture)
    if known is None:
        raise UsageError(f"{path}: architecture {architecture!r} is not one that can be imported")
    known = read_note(config.get("metadata", {}))
    if _standardises(path, config):
        known["rows"] = "row"
    is_autoencoder = "transcoder" not in architecture
    weights = Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS))
    w_enc = weights.take("W_enc", None, None).T.contiguous()
    n_latents, width = w_enc.shape
    w_dec, b_enc = weights.take("W_dec", n_latents, None), weights.take("b_enc", n_latents)
    b_out = weights.take("b_dec", w_dec.shape[1])
    if config.get(
        "rescale_acts_by_decoder_norm"
    ):  # it selects by what latents add to the row: norms into the encoder
        norms = w_dec.norm(dim=1)
        w_enc, b_enc, w_dec = w_enc * norms[:, None], b_enc * norms, w_dec / norms[:, None]
    subtracts = is_autoencoder and config.get("apply_b_dec_to_input", True)
    layers, hooks = _place(config)
    known |= {"layers": known["layers"] or layers, "hooks": known["hooks"] or hooks}
    return Portable(
        w_enc=w_enc,
        w_dec=w_dec,
        b_in=b_out if subtracts else torch.zeros(width),
        b_out=b_out,
        b_enc=b_enc if bool(b_enc.any()) else None,
        w_skip=weights.take("W_skip", w_dec.shape[1], width) if "skip" in architecture else None,
        activation="topk" if architecture == "topk" else "threshold",
        k=read_count(path, config, "k") if architecture == "topk" else None,
        threshold=_threshold(path, weights.take("threshold", n_latents))
        if "jumprelu" in architecture
        else 0.0,
        is_autoencoder=is_autoencoder,
        **known,
    )


def _standardises(path: Path, config: dict[str, Any]) -> bool:
    if config.get("reshape_activations", "none") != "none":
        raise UsageError(
            f"{path}: it reads heads side by side ({config['reshape_activations']}), which stores have not"
        )
    way = config.get("normalize_activations") or "none"
    if way not in ("none", "layer_norm"):
        raise UsageError(
            f"{path}: normalize_activations is {way!r}, with a factor that the files do not hold; "
            "save it with SAELens' save_inference_model, which folds it into the weights"
        )
    return way == "layer_norm"


def _threshold(path: Path, thresholds: Tensor) -> float:
    lowest, highest = float(thresholds.min()), float(thresholds.max())
    if lowest != highest:
        raise UsageError(
            f"{path}: every latent has a threshold of its own ({lowest:g} to {highest:g}); ours have one for all, as "
            "batch top-k leaves it"
        )
    return inclusive_threshold(lowest)


def _place(config: dict[str, Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Layer and hooks out of TransformerLens' names; a hook that we have not keeps the name it has there."""
    metadata = {**config, **config.get("metadata", {})}
    layers, hooks = [], []
    ours = {theirs: name for name, theirs in HOOKS.items()}
    for key in ("hook_name", "hook_name_out"):
        name = metadata.get(key) or ""
        found = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", name)
        if found is not None:
            layers.append(int(found[1]))
        if name:
            hooks.append(ours.get(found[2], name) if found is not None else name)
    return tuple(dict.fromkeys(layers))[:1], tuple(hooks)
