"""The part of the report that shows contexts: a few latents, the rows on which they are most active, the tokens they are nearest to."""

from typing import Any

import numpy as np
import pyarrow.parquet as pq

from analysis import html
from analysis.run import Findings

_SHOWN_EXAMPLES = 3


def examples_section(found: Findings) -> str:
    """A few latents: the most spread, the most local, and the most active, with their contexts."""
    latents = found.evaluation.latents
    chosen = _interesting(found)
    if not chosen:
        return ""
    columns = [
        "latent",
        "layer",
        "rank",
        "activation",
        "document",
        "context_tokens",
        "context_activations",
        "context_at",
    ]
    rows = pq.read_table(
        found.examples_path, columns=columns, filters=[("latent", "in", [f for f, _why in chosen]), ("rank", "<", _SHOWN_EXAMPLES)]
    ).to_pylist()  # fmt: skip
    pieces = found.pieces
    parts = []
    for latent, why in chosen:
        mine = sorted((r for r in rows if r["latent"] == latent), key=lambda r: (r["layer"], r["rank"]))
        shares = ", ".join(
            f"{layer}: {p:.0%}"
            for layer, p in zip(latents.layers.tolist(), latents.p[:, latent], strict=True)
            if p >= 0.005
        )
        parts.append(
            f'<details{" open" * (not parts)}><summary>Latent {latent} <span class="soft">{why}; by layer {shares}</span></summary>'
        )
        for layer, of_layer in _grouped(mine).items():
            parts.append(f'<p class="soft">layer {layer}</p>')
            for row in of_layer:
                highest = max(row["activation"], 1e-9)
                shown = [
                    (pieces(token), min(max(a if a == a else 0.0, 0.0) / highest, 1.0))
                    for token, a in zip(row["context_tokens"], row["context_activations"], strict=True)
                ]
                parts.append(html.example(shown, row["context_at"]))
        parts.append(_nearest(found, latent) + "</details>")
    return html.section(
        "examples",
        "Most active rows",
        f'<p class="soft">The {_SHOWN_EXAMPLES} rows with the largest activation at each layer; underlined: the row, shaded: the same latent at the same layer. '
        f"All latents: <code>{found.examples_path.name}</code>, {len(found.examples):,} examples.</p>",
        *parts,
    )


def _grouped(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["layer"], []).append(row)
    return groups


def _interesting(found: Findings, n: int = 3) -> list[tuple[int, str]]:
    """Some latents to look at, of those active on at least 50 rows (or half the median)."""
    latents = found.evaluation.latents
    count = latents.count
    often = np.flatnonzero(
        count >= min(50, np.median(count[latents.is_alive]) / 2 if latents.is_alive.any() else 0)
    )
    often = often[latents.is_alive[often]]
    picks = (
        ("most evenly over layers", -latents.entropy[often]),
        ("most at one layer", latents.entropy[often]),
        ("largest summed activation", -latents.total[often]),
    )
    chosen: dict[int, str] = {}
    for why, order in picks:
        fresh = [int(f) for f in often[np.argsort(order, kind="stable")] if int(f) not in chosen]
        chosen |= dict.fromkeys(fresh[:n], why)
    return list(chosen.items())


def _nearest(found: Findings, latent: int) -> str:
    if found.model is None:
        return ""
    names: dict[str, list[str]] = {}
    for name, nearest in found.model.nearest.items():
        pairs = zip(nearest.tokens[latent].tolist(), nearest.cosines[latent].tolist(), strict=True)
        tokens = ", ".join(f"{found.pieces(token)!r} {cosine:.2f}" for token, cosine in pairs)
        names.setdefault(tokens, []).append(name)  # one line where they are tied
    lines = "; ".join(f"nearest in the {' and '.join(of)}: {tokens}" for tokens, of in names.items())
    return f'<p class="note">{html.escape(lines)}</p>'
