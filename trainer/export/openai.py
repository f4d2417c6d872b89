"""openai/sparse_autoencoder: one file of tensors, as `Autoencoder.from_state_dict` reads it.

    pre_bias [d], latent_bias [f], encoder.weight [f, d], decoder.weight [d, f], three statistics of training, which are not
    known here and written as it starts with them, and the activation by name with its own state

TopK always standardises rows there (layer normalisation with std + 1e-5, restored with std: 1e-5 / std from ours, relatively);
ReLU never does.

Source: openai/sparse_autoencoder 4965b94, model.py and train.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actcache.errors import UsageError
from trainer.export.files import Tensors, read_count, read_json, read_torch, write_json, write_torch
from trainer.export.portable import NOTE, Portable, read_note, write_note

WEIGHTS, CONFIG = "autoencoder.pt", "actcache.json"


def recognises(folder: Path) -> bool:
    """Whether these are such files: a folder with one .pt file in it that is none of the others'."""
    return _file(folder) is not None and not (folder / "ae.pt").exists()


def _file(folder: Path) -> Path | None:
    if folder.is_file():
        return folder if folder.suffix == ".pt" else None
    found = sorted(folder.glob("*.pt")) if folder.is_dir() else []
    return found[0] if len(found) == 1 else None


def write(sae: Portable, folder: Path) -> None:
    """Write an SAE, and beside it what the format has no place for.

    Raises:
        UsageError: the format has no such activation, or would treat rows otherwise.
    """
    is_topk = sae.activation == "topk"
    if not sae.is_autoencoder:
        raise UsageError("openai's format has no transcoders; export this one for sparsify or SAELens")
    if not is_topk and not sae.is_relu:
        raise UsageError("openai's format has TopK and ReLU, no threshold; export this SAE for SAELens")
    if is_topk and sae.rows != "row":
        raise UsageError(
            "openai's TopK always standardises rows, this SAE was not trained on rows standardised so; export it for SAELens"
        )
    state: dict[str, Any] = {
        "pre_bias": sae.b_out.clone(),
        "latent_bias": sae.folded_b_enc(sae.b_out).clone(),
        "encoder.weight": sae.w_enc.clone(),
        "decoder.weight": sae.w_dec.T.contiguous(),
        "stats_last_nonzero": torch.zeros(sae.n_latents, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(sae.n_latents),
        "latents_mean_square": torch.zeros(sae.n_latents),
        "activation": "TopK" if is_topk else "ReLU",
    }
    if is_topk:
        state["activation_state_dict"] = {"k": sae.k, "postact_fn": "ReLU"}
    write_torch(folder / WEIGHTS, state)
    write_json(folder / CONFIG, {NOTE: write_note(sae, carries_rows=is_topk)})


def read(folder: Path) -> Portable:
    """Read an SAE; of a folder, its only .pt file.

    Raises:
        NotFoundError: no file is there.
        DamageError: the file is not what it should be.
        UsageError: it has an activation that we have not.
    """
    path = _file(folder) or folder / WEIGHTS
    state = read_torch(path)
    weights = Tensors(path, state)
    activation = state.get("activation", "ReLU")
    inner = state.get("activation_state_dict") or {}
    if activation not in ("TopK", "ReLU") or inner.get("postact_fn", "ReLU") != "ReLU":
        raise UsageError(
            f"{path}: activation {activation} {inner or ''} cannot be imported: only TopK with ReLU, and ReLU"
        )
    w_enc = weights.take("encoder.weight", None, None)
    n_latents, width = w_enc.shape
    bias, b_enc = weights.take("pre_bias", width), weights.take("latent_bias", n_latents)
    beside = path.with_name(CONFIG)
    known = read_note(read_json(beside) if beside.exists() else {})
    if activation == "TopK":
        known["rows"] = "row"
    return Portable(
        w_enc=w_enc,
        w_dec=weights.take("decoder.weight", width, n_latents).T.contiguous(),
        b_in=bias,
        b_out=bias,
        b_enc=b_enc if bool(b_enc.any()) else None,
        activation="topk" if activation == "TopK" else "threshold",
        k=read_count(path, inner, "k") if activation == "TopK" else None,
        **known,
    )
