"""EleutherAI's sparsify: cfg.json and sae.safetensors, as `SparseCoder.load_from_disk` reads them.

    encoder.weight [f, d], encoder.bias [f], W_dec [f, e], b_dec [e], W_skip [e, d] where it has a skip connection

It knows no standardised rows: cfg.json says what has to be done to them, in a field that sparsify passes over.

Source: eai-sparsify 1.3.3, sparse_coder.py and config.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from actcache.errors import UsageError
from trainer import durable
from trainer.export.files import Tensors, read_count, read_json, read_safetensors, write_json
from trainer.export.portable import NOTE, Portable, read_note, write_note

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def recognises(folder: Path) -> bool:
    """Whether these are such files."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def write(sae: Portable, folder: Path) -> None:
    """Write an SAE or transcoder.

    Raises:
        UsageError: sparsify selects otherwise, or has no such shape.
    """
    if sae.activation != "topk":
        raise UsageError(
            "sparsify has top-k of every row only; export this SAE for SAELens or dictionary_learning"
        )
    if sae.w_dec.shape[1] != sae.width:
        raise UsageError(
            f"sparsify has one width; this transcoder reads {sae.width} numbers and writes {sae.w_dec.shape[1]}"
        )
    b_in = sae.b_out if sae.is_autoencoder else torch.zeros_like(sae.b_in)
    tensors = {
        "encoder.weight": sae.w_enc,
        "encoder.bias": sae.folded_b_enc(b_in),
        "W_dec": sae.w_dec,
        "b_dec": sae.b_out,
    }
    if sae.w_skip is not None:
        tensors["W_skip"] = sae.w_skip
    durable.write_tensors(folder / WEIGHTS, tensors)
    write_json(
        folder / CONFIG,
        {
            "activation": "topk",
            "expansion_factor": max(1, sae.n_latents // sae.width),
            "normalize_decoder": True,
            "num_latents": sae.n_latents,
            "k": sae.k,
            "multi_topk": False,
            "skip_connection": sae.w_skip is not None,
            "transcode": not sae.is_autoencoder,
            "d_in": sae.width,
            NOTE: write_note(sae),
        },
    )


def read(folder: Path) -> Portable:
    """Read an SAE or transcoder; the layer from the folder's name, such as layers.3.

    Raises:
        NotFoundError: a file is missing.
        DamageError: a file is not what it should be.
        UsageError: it selects in a way that we have not.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("activation", "topk") != "topk":
        raise UsageError(f"{path}: activation {config['activation']!r}; only topk can be imported")
    weights = Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS))
    w_enc = weights.take("encoder.weight", None, None)
    n_latents, width = w_enc.shape
    w_dec, b_enc = weights.take("W_dec", n_latents, width), weights.take("encoder.bias", n_latents)
    b_out = weights.take("b_dec", width)
    is_autoencoder = not config.get("transcode", False)
    known = read_note(config)
    if not known["layers"]:
        known |= _place(folder.name, is_autoencoder=is_autoencoder)
    return Portable(
        w_enc=w_enc,
        w_dec=w_dec,
        b_in=b_out if is_autoencoder else torch.zeros(width),
        b_out=b_out,
        b_enc=b_enc if bool(b_enc.any()) else None,
        w_skip=weights.take("W_skip", width, width) if config.get("skip_connection") else None,
        activation="topk",
        k=read_count(path, config, "k"),
        is_autoencoder=is_autoencoder,
        **known,
    )


def _place(name: str, *, is_autoencoder: bool) -> dict[str, Any]:
    """Layer and hooks out of a folder's name, which is that of a module in the language model: layers.3, h.3.mlp."""
    found = re.fullmatch(r"(?:[\w.]+\.)?(?:layers|layer|h|blocks)\.(\d+)(?:\.(\w+))?", name)
    if found is None:
        return {}
    layer, module = int(found[1]), found[2]
    hook = {
        None: "resid_post",
        "mlp": "mlp_out",
        "attention": "attn_out",
        "attn": "attn_out",
        "self_attn": "attn_out",
    }
    if is_autoencoder:
        return {"layers": (layer,), "hooks": (hook.get(module, name),)}
    return {"layers": (layer,), "hooks": ("mlp_in", "mlp_out") if module == "mlp" else (name, name)}
