"""saprmarks' dictionary_learning: ae.pt and config.json, as `load_dictionary` and `from_pretrained` read them.

    AutoEncoderTopK, BatchTopKSAE   encoder.weight [f, d], encoder.bias [f], decoder.weight [d, f], b_dec [d], k, threshold
    AutoEncoder (ReLU)              encoder.weight, encoder.bias, decoder.weight, bias [d]

It knows no standardised rows: config.json says what has to be done to them, in a field of its own.

Source: dictionary_learning 0.1.0, dictionary.py, utils.py, trainers/top_k.py and trainers/batch_top_k.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actcache.errors import UsageError
from trainer.export.files import Tensors, read_count, read_json, read_torch, write_json, write_torch
from trainer.export.portable import NOTE, Portable, inclusive_threshold, read_note, write_note

CONFIG, WEIGHTS = "config.json", "ae.pt"
TOPK, BATCH_TOPK, RELU = "AutoEncoderTopK", "BatchTopKSAE", "AutoEncoder"


def recognises(folder: Path) -> bool:
    """Whether these are such files."""
    return (folder / WEIGHTS).is_file()


def write(sae: Portable, folder: Path) -> None:
    """Write an SAE.

    Raises:
        UsageError: dictionary_learning has no such dictionary.
    """
    if not sae.is_autoencoder:
        raise UsageError("dictionary_learning has no transcoders; export this one for sparsify or SAELens")
    kind = TOPK if sae.activation == "topk" else RELU if sae.is_relu else BATCH_TOPK
    w_enc, b_enc, w_dec = sae.w_enc, sae.folded_b_enc(sae.b_out), sae.w_dec
    if kind == RELU:  # its loader wants decoder norms of 1, and moves them into the encoder otherwise
        norms = w_dec.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        w_enc, b_enc, w_dec = w_enc * norms[:, None], b_enc * norms, w_dec / norms[:, None]
    state: dict[str, Any] = {
        "encoder.weight": w_enc,
        "encoder.bias": b_enc,
        "decoder.weight": w_dec.T.contiguous(),
        "bias" if kind == RELU else "b_dec": sae.b_out,
    }
    if kind != RELU:
        threshold = sae.exclusive_threshold if kind == BATCH_TOPK else -1.0
        state["k"] = torch.tensor(sae.k or 1, dtype=torch.int32)
        state["threshold"] = torch.tensor(threshold, dtype=torch.float32)
    write_torch(folder / WEIGHTS, {name: tensor.clone() for name, tensor in state.items()})
    model = sae.about.get("provenance", {}).get("model", {})
    trainer = {
        "dict_class": kind,
        "trainer_class": "actcache",
        "activation_dim": sae.width,
        "dict_size": sae.n_latents,
        "k": sae.k,
        "layer": sae.layers[0] if len(sae.layers) == 1 else None,
        "lm_name": model.get("name"),
    }
    write_json(folder / CONFIG, {"trainer": trainer, NOTE: write_note(sae)})


def read(folder: Path) -> Portable:
    """Read an SAE; without a config.json what the weights say suffices.

    Raises:
        NotFoundError: a file is missing.
        DamageError: a file is not what it should be.
        UsageError: it is of a class that we have not.
    """
    path = folder / WEIGHTS
    weights = Tensors(path, read_torch(path))
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    trainer = config.get("trainer", {})
    kind = trainer.get("dict_class") or (RELU if "bias" in weights else TOPK)
    if kind not in (TOPK, BATCH_TOPK, RELU):
        raise UsageError(
            f"{folder}: class {kind!r} is none that can be imported: {TOPK}, {BATCH_TOPK}, {RELU}"
        )
    w_enc = weights.take("encoder.weight", None, None)
    n_latents, width = w_enc.shape
    b_enc = weights.take("encoder.bias", n_latents)
    bias = weights.take("bias" if kind == RELU else "b_dec", width)
    threshold = 0.0
    if kind == BATCH_TOPK:
        threshold = inclusive_threshold(float(weights.take("threshold")))
    known = read_note(config)
    layer = trainer.get("layer")
    if not known["layers"] and isinstance(layer, int):
        known["layers"] = (layer,)
    known["about"].setdefault("config", trainer)
    return Portable(
        w_enc=w_enc,
        w_dec=weights.take("decoder.weight", width, n_latents).T.contiguous(),
        b_in=bias,
        b_out=bias,
        b_enc=b_enc if bool(b_enc.any()) else None,
        activation="topk" if kind == TOPK else "threshold",
        k=None if kind == RELU else read_count(path, {"k": int(weights.take("k"))}, "k"),
        threshold=threshold,
        **known,
    )
