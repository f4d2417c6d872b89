"""The model card: what an SAE computes, and how it was made."""

from __future__ import annotations

from typing import Any

from actcache.version import __version__
from trainer.export.portable import hooks_of, rows_of, treatment
from trainer.trained import TrainedSAE

LOADING = {
    "actcache": """from trainer.checkpoint import load_sae

sae = load_sae("FOLDER")
code = sae.encode(rows)  # rows [b, d], raw
restored = sae.decode(code)""",
    "saelens": """from sae_lens import SAE

sae = SAE.load_from_disk("FOLDER")
code = sae.encode(rows)
restored = sae.decode(code)""",
    "sparsify": """from sparsify import SparseCoder

sae = SparseCoder.load_from_disk("FOLDER")
restored = sae(rows).sae_out""",
    "dictionary_learning": """from dictionary_learning.utils import load_dictionary

sae, config = load_dictionary("FOLDER", device="cpu")
code = sae.encode(rows)
restored = sae.decode(code)""",
    "openai": """import torch
from sparse_autoencoder import Autoencoder

sae = Autoencoder.from_state_dict(torch.load("FOLDER/autoencoder.pt"))
code, info = sae.encode(rows)
restored = sae.decode(code, info)""",
    "mlsae": """from mlsae.model import MLSAE

sae = MLSAE.from_pretrained("FOLDER")
restored = sae(rows).recons""",
}
"""How each project loads what is written for it."""

CARRIES_ROWS = ("saelens", "openai", "mlsae")
"""Formats in which rows standardised by themselves are the loader's business."""


def make_card(trained: TrainedSAE, name: str, facts: dict[str, Any], layer: int | None = None) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        trained: the SAE.
        name: the format it is written in.
        facts: steps and rows it was trained for, held-out scores, where they are known.
        layer: whose rows it is written for, where that was said.
    """
    parts = [_front(trained, name), _title(trained, layer), "## Made from", _made_from(trained, facts)]
    if facts.get("scores"):
        parts += ["## Held-out rows", _scores(facts["scores"])]
    parts += ["## Load", f"```python\n{LOADING[name]}\n```{_rows(trained, name)}{_model(trained)}"]
    parts += ["## What it computes", _formulas(trained), "## Settings", _settings(trained)]
    return "\n\n".join(parts) + "\n"


def _front(trained: TrainedSAE, name: str) -> str:
    library = {"saelens": "saelens", "sparsify": "sparsify", "mlsae": "mlsae"}.get(name, "actcache")
    lines = [f"library_name: {library}", "tags:", "- sparse-autoencoder", "- interpretability", "- actcache"]
    model = trained.provenance.get("model", {}).get("name")
    if _is_hub_name(model):
        lines.append(f"base_model: {model}")
    return "\n".join(["---", *lines, "---"])


def _title(trained: TrainedSAE, layer: int | None) -> str:
    kinds = {
        "stacked": "Sparse autoencoder" if len(trained.layers) == 1 else "Multi-layer sparse autoencoder",
        "feature": "Sparse autoencoder of all layers side by side",
        "crosscoder": "Crosscoder",
        "transcoder": "Transcoder",
    }
    kind = kinds[trained.config.form]
    active = {
        "topk": f"{trained.sae.k} active in every row",
        "batchtopk": f"{trained.sae.k} active in a row on average",
        "relu": "as many active as are positive",
    }[trained.config.activation]
    one = "" if layer is None else f" What is here is for rows of layer {layer}."
    return (
        f"# {kind}\n\n{trained.sae.n_latents:,} latents, {active}; rows of width {trained.sae.width // trained.n_slices} of "
        f"layers {', '.join(map(str, trained.layers))}.{one}"
    )


def _made_from(trained: TrainedSAE, facts: dict[str, Any]) -> str:
    known = trained.provenance
    model, chosen = known.get("model", {}), known.get("selection", {})
    rows = {
        "language model": model.get("name"),
        "its revision": model.get("revision"),
        "SHA-256 of its weights": model.get("digest"),
        "where in a block": " to ".join(hooks_of(trained)) or None,
        "text": known.get("corpus"),
        "store": known.get("store"),
        "digest of the store's plan": known.get("plan"),
        "fingerprint of rows and order": trained.source,
        "rows left out": f"norm above {chosen['outlier_norm_ratio']:g} x the layer's median"
        if chosen.get("outlier_norm_ratio")
        else None,
        "optimiser steps": f"{facts['step']:,}" if facts.get("step") else None,
        "rows trained on": f"{facts['rows']:,}" if facts.get("rows") else None,
        "checkpoint": facts.get("checkpoint"),
        "imported from": known.get("imported", {}).get("format"),
        "made with": f"actcache {known.get('actcache_version', __version__)}, torch {facts.get('torch', 'unknown')}",
    }
    lines = ["| what | which |", "|---|---|"]
    return "\n".join(
        [*lines, *(f"| {name} | {value} |" for name, value in rows.items() if value is not None)]
    )


def _scores(scores: dict[str, Any]) -> str:
    names = ("fvu", "fvu_k0", "fvu_scalar", "l0")
    lines = ["| layer | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for layer, score in {**scores.get("layers", {}), "mean": scores["mean"]}.items():
        shown = " | ".join(f"{score[name]:.4g}" if score.get(name) is not None else "" for name in names)
        lines.append(f"| {layer} | {shown} |")
    return "\n".join(
        [
            *lines,
            "",
            "fvu: share of variance unexplained, about each dimension's mean; fvu_scalar: about one mean for all; k0: with no "
            "latent active.",
        ]
    )


def _rows(trained: TrainedSAE, name: str) -> str:
    """What else a user of the format has to know about rows."""
    rows = rows_of(trained)
    if name == "actcache" or (name in CARRIES_ROWS and rows == "row"):
        return ""
    if rows == "raw":
        return (
            "\n\nThe fixed means and scales below are folded into the weights: raw rows go in and come out."
        )
    done = treatment(rows, is_autoencoder=trained.sae.is_autoencoder)
    return f"\n\nThis format does not standardise rows by itself: {done}."


def _model(trained: TrainedSAE) -> str:
    """How to get the language model the rows come from."""
    model = trained.provenance.get("model", {})
    if not _is_hub_name(model.get("name")):
        return ""
    revision = "" if model.get("revision") is None else f', revision="{model["revision"]}"'
    code = (
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model["name"]}"{revision})'
    )
    return f"\n\nThe rows come from this language model:\n\n```python\n{code}\n```"


def _is_hub_name(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not name.startswith((".", "/"))


def _formulas(trained: TrainedSAE) -> str:
    sae, selects = trained.sae, "max(pre, 0)"
    if trained.config.activation == "topk":
        selects = f"the {sae.k} largest of pre, through ReLU; of equal ones the lowest index"
    elif trained.config.activation == "batchtopk":
        selects = f"pre where pre >= {float(sae.get_buffer('threshold')):.9g} and positive, else 0"
    bias = " + b_enc" if sae.latent_bias is not None else ""
    skip = " + W_skip z" if sae.w_skip is not None else ""
    layer = trained.config.standardise == "layer"
    into = (
        "(x - mean_l) / scale_l      mean and scale of the layer, fixed"
        if layer
        else "(x - mean) / (std + 1e-5)"
    )
    back = "scale_l + mean_l" if layer else "(std + 1e-5) + mean"
    if not sae.is_autoencoder:
        back = "scale_l + mean_l      mean and scale of the layer's targets, fixed"
    lines = [
        f"z    = {into}",
        f"pre  = W_enc (z - b){bias}",
        f"a    = {selects}",
        f"zhat = W_dec^T a + {'b' if sae.is_autoencoder else 'b_out'}{skip}",
        f"xhat = zhat * {back}",
    ]
    return "```text\n" + "\n".join(lines) + "\n```"


def _settings(trained: TrainedSAE) -> str:
    chosen = trained.config.model_dump(mode="json", exclude_defaults=True)
    lines = ["| setting | value |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in sorted(chosen.items()))])
