"""The multi-layer SAEs of arXiv 2409.04185 as they are published: config.json and model.safetensors.

    encoder.weight [f, d], decoder.weight [d, f], pre_encoder_bias [d]; of a repository whose name ends in -tfm, the same
    with "autoencoder." before it, beside the language model's weights

With `standardize` rows are restored there with std instead of std + 1e-5: 1e-5 / std from ours, relatively.

Source: tim-lawson/mlsae ba90c51, model/autoencoder.py and model/lightning.py; later commits, model/autoencoders/topk.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actcache.errors import UsageError
from trainer import durable
from trainer.export.files import Tensors, read_count, read_json, read_safetensors, write_json
from trainer.export.portable import NOTE, Portable, read_note, write_note

CONFIG, WEIGHTS = "config.json", "model.safetensors"
WITH_MODEL = "autoencoder."

DEAD_STEPS = 76
"""What every published configuration has. It says when a latent is dead while training, so it changes nothing here."""


def recognises(folder: Path) -> bool:
    """Whether these are such files."""
    if not ((folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()):
        return False
    config = read_json(folder / CONFIG)
    return "k" in config and ("n_latents" in config or "expansion_factor" in config)


def write(sae: Portable, folder: Path) -> None:
    """Write an SAE.

    Raises:
        UsageError: the format has no such SAE.
    """
    has_place = sae.is_autoencoder and sae.activation == "topk"
    if not has_place or bool(sae.folded_b_enc(sae.b_out).any()):
        raise UsageError(
            "the mlsae format has top-k autoencoders without a bias of latents only; export this SAE for SAELens"
        )
    tensors = {
        "encoder.weight": sae.w_enc,
        "decoder.weight": sae.w_dec.T.contiguous(),
        "pre_encoder_bias": sae.b_out,
    }
    durable.write_tensors(folder / WEIGHTS, tensors)
    is_carried = sae.rows == "row"
    write_json(
        folder / CONFIG,
        {
            "n_inputs": sae.width,
            "n_latents": sae.n_latents,
            "k": sae.k,
            "auxk": sae.about.get("config", {}).get("auxk", 256) or None,
            "dead_steps_threshold": DEAD_STEPS,
            "dead_threshold": 1e-3,
            "standardize": is_carried,
            NOTE: write_note(sae, carries_rows=is_carried),
        },
    )


def read(folder: Path) -> Portable:
    """Read an SAE, with or without a language model around it.

    Raises:
        NotFoundError: a file is missing.
        DamageError: a file is not what it should be.
        UsageError: its rows went through a tuned lens.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("tuned_lens"):
        raise UsageError(
            f"{path}: it was trained on rows that a tuned lens had changed, which stores do not hold"
        )
    weights = Tensors(folder / WEIGHTS, _without_prefix(read_safetensors(folder / WEIGHTS)))
    w_enc = weights.take("encoder.weight", None, None)
    n_latents, width = w_enc.shape
    bias = weights.take("pre_encoder_bias", width)
    known = read_note(config)
    if config.get("standardize", True):
        known["rows"] = "row"
    if not known["layers"] and config.get("layers"):
        known["layers"] = tuple(config["layers"])
    known["hooks"] = known["hooks"] or ("resid_post",)
    known["about"].setdefault("config", {k: v for k, v in config.items() if k != NOTE})
    if "model_name" in config:
        known["about"].setdefault("provenance", {"model": {"name": config["model_name"]}})
    return Portable(
        w_enc=w_enc,
        w_dec=weights.take("decoder.weight", width, n_latents).T.contiguous(),
        b_in=bias,
        b_out=bias,
        activation="topk",
        k=read_count(path, config, "k"),
        **known,
    )


def _without_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    if not any(name.startswith(WITH_MODEL) for name in tensors):
        return tensors
    return {n.removeprefix(WITH_MODEL): x for n, x in tensors.items() if n.startswith(WITH_MODEL)}
