"""The numbers by which runs are compared: what `analyze` writes to summary.json, and reads back for --compare."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import DamageError, NotFoundError, UsageError
from analysis.layers import spread
from analysis.run import Findings
from analysis.tables import Table, table_of

FORMAT = 1
FILE = "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One analysed run.

    name     of the run.
    facts    what it is: model, width, n_layers, n_latents, expansion, k ...
    scores   what was found, numbers by name; None where it was not measured.
    """

    name: str
    facts: Mapping[str, Any]
    scores: Mapping[str, float | int | None]

    def as_json(self) -> dict[str, Any]:
        """For summary.json: NaN becomes null."""
        scores = {
            key: None if value is None or value != value else value for key, value in self.scores.items()
        }
        return {"format": FORMAT, "name": self.name, "facts": dict(self.facts), "scores": scores}


def summarise(found: Findings) -> Summary:
    """The headline numbers of an analysis."""
    subject, latents = found.subject, found.evaluation.latents
    model = subject.store.plan.request.model
    mean, alive = found.evaluation.mean, latents.is_alive
    std, number = spread(latents.std), spread(latents.n_layers[alive])
    mmcs = spread(found.max_cosine)
    scores: dict[str, float | int | None] = {
        "fvu": mean.fvu,
        "fvu_scalar": mean.fvu_scalar,
        "mse": mean.mse,
        "l0": mean.l0,
        "l1": mean.l1,
        "alive_frac": mean.n_alive / max(len(alive), 1),
        "layer_std": std.mean,
        "layer_std_sem": std.sem,
        "n_layers_active": number.mean,
        "one_layer_frac": float((latents.n_layers[alive] == 1).mean()) if alive.any() else None,
        "all_layers_frac": float((latents.n_layers[alive] == len(subject.layers)).mean())
        if alive.any()
        else None,
        "one_layer_per_token_frac": float(found.pairs[1] / found.pairs.sum()) if found.pairs.sum() else None,
        "entropy": spread(latents.entropy).mean,
        "mmcs": mmcs.mean,
        "neighbour_cosine": float(np.mean([s.mean for s in found.stream.cosines.values()]))
        if found.stream.cosines
        else None,
    }
    for weighting, shares in found.variance.items():
        scores |= {f"rel_f_{weighting}": shares.rel_f, f"rel_t_{weighting}": shares.rel_t}
    if found.model is not None:
        patched = found.model.patched[0]
        for name in ("change", "recovered_zero", "recovered_mean", "kl", "logit_mse"):
            values = [getattr(s, name).value for s in patched.layers.values()]
            scores[f"loss_{name}"] = float(np.mean(values))
            scores[f"loss_{name}_together"] = getattr(patched.together, name).value
        scores["loss_tokens"] = patched.together.n_tokens
        if found.model.prompts:
            on_one = found.model.prompts[0].latents
            scores["one_layer_per_prompt_frac"] = float((on_one.n_layers[on_one.is_alive] == 1).mean())
    return Summary(
        name=subject.name,
        facts={
            "model": model.name,
            "width": subject.out_width,
            "layers": list(subject.layers),
            "hook": subject.hook,
            "n_latents": subject.n_latents,
            "expansion": subject.n_latents / subject.out_width,
            "k": subject.k,
            "split": found.request.split,
            "n_tokens": found.n_tokens,
            "sae": subject.digest,
        },
        scores=scores,
    )


def write_summary(summary: Summary, folder: Path) -> None:
    """Write summary.json."""
    text = json.dumps(summary.as_json(), indent=2, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_summary(folder: Path) -> Summary:
    """What `analyze` wrote in a folder.

    Raises:
        NotFoundError: it wrote nothing there.
        DamageError: it cannot be read.
        UsageError: it is of another format.
    """
    path = folder / FILE
    if not path.exists():
        raise NotFoundError(
            f"no analysis in {folder} (no {FILE}); 'actcache analyze RUN STORE --out {folder}' makes one"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = Summary(name=document["name"], facts=document["facts"], scores=document["scores"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{path} cannot be read: {error}; run 'actcache analyze' again") from error
    if document.get("format") != FORMAT:
        raise UsageError(
            f"{path} is of format {document.get('format')!r}; this actcache reads format {FORMAT}"
        )
    return found


def comparison_table(summaries: Sequence[Summary]) -> Table:
    """Runs side by side: what they are, then what was found."""
    facts = ("model", "n_latents", "expansion", "k", "n_tokens")
    names = list(dict.fromkeys(name for s in summaries for name in s.scores))
    rows = [
        {
            "run": s.name,
            **{name: s.facts.get(name) for name in facts},
            "layers": len(s.facts["layers"]),
            **{name: s.scores.get(name) for name in names},
        }
        for s in summaries
    ]
    return table_of(
        "comparison",
        "Runs side by side",
        "Means over layers (fvu ... l1), over latents (layer_std, n_layers_active, entropy, mmcs), over layers patched alone (loss_...; "
        "_together: all at once). Each run on its own store's held-out rows.",
        rows,
    )
