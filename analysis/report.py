"""The report of an analysis: one self-contained page, every figure with its formula and its n."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis import figures, html
from analysis.findings_tables import (
    cosines_table,
    layer_std_table,
    lens_table,
    losses_table,
    mmcs_table,
    reconstruction_table,
    variance_table,
)
from analysis.layers import spread
from analysis.present import LOSS_COLUMNS
from analysis.report_examples import examples_section
from analysis.run import Findings
from analysis.summary import Summary, comparison_table
from analysis.svg import to_svg


def report(found: Findings, others: Sequence[Summary], own: Summary) -> tuple[str, dict[str, str]]:
    """The page, and its figures as SVG by name.

    Args:
        found: of the run.
        others: of the runs it is compared with.
        own: its own summary.
    """
    drawn = _Drawn()
    parts = [
        _reconstruction(found, drawn),
        _matrix(found, drawn),
        _lens(found, drawn),
        _loss(found, drawn),
        _layers(found, drawn),
        _variance(found, drawn),
        _stream(found, drawn),
        _dictionary(found, drawn),
        examples_section(found),
        _prompts(found, drawn),
        _comparison([own, *others], drawn) if others else "",
        _method(found),
    ]
    model = found.subject.store.plan.request.model.name
    body = "\n".join(parts)
    page = html.page(f"{found.subject.name}: {model}", _head(found) + html.navigation(body) + body)
    return page, drawn.svgs


class _Drawn:
    """Figures as they are put on the page, kept by name."""

    def __init__(self) -> None:
        self.svgs: dict[str, str] = {}

    def figure(self, name: str, drawing: Any, caption: str) -> str:
        self.svgs[name] = to_svg(drawing, name)
        return html.figure(self.svgs[name], caption, name.replace("_", " "))


def _head(found: Findings) -> str:
    subject, evaluation = found.subject, found.evaluation
    request = subject.store.plan.request
    mean, n_latents = evaluation.mean, subject.n_latents
    facts = [
        ("FVU, mean of layers", f"{mean.fvu:.3f}"),
        ("latents active per row", f"{mean.l0:.1f}"),
        ("alive latents here", f"{mean.n_alive:,} of {n_latents:,}"),
        (
            "layers per latent",
            f"{spread(evaluation.latents.n_layers[evaluation.latents.is_alive]).mean:.2f} of {len(subject.layers)}",
        ),
        ("layers per latent on one token", f"{_mean_layers(found.pairs):.2f}"),
    ]
    if found.model is not None:
        together = found.model.patched[0].together
        single = np.mean([s.recovered_zero.value for s in found.model.patched[0].layers.values()])
        facts.append(("loss recovered, one layer", f"{single:.3f}"))
        facts.append(("loss recovered, all at once", f"{together.recovered_zero.value:.3f}"))
    what = "one SAE on" if subject.is_shared else "an SAE for each of"
    hooks = (
        subject.hook if subject.hook == subject.target_hook else f"{subject.hook} to {subject.target_hook}"
    )
    return (
        f"<header><h1>{html.escape(subject.name)}: {what} {len(subject.layers)} layers of {html.escape(request.model.name)}</h1>"
        f'<p class="soft">{n_latents:,} latents, k = {subject.k}, hook {html.escape(hooks)}, layers {_listed(subject.layers)}. '
        f"{found.n_tokens:,} kept {html.escape(found.request.split)} tokens of {html.escape(request.corpus.name)}, {mean.n_rows:,} rows "
        f"after the run's row filter ({_filters(found)}).</p>"
        f"{html.facts(facts)}</header>"
    )


def _listed(layers: Sequence[int]) -> str:
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _filters(found: Findings) -> str:
    said = [f"{name.replace('_', ' ')} {value}" for name, value in found.subject.filters.items()]
    return html.escape(", ".join(said) or "none")


def _mean_layers(pairs: np.ndarray) -> float:
    return float(np.arange(len(pairs)) @ pairs / max(int(pairs.sum()), 1))


def _reconstruction(found: Findings, drawn: _Drawn) -> str:
    n = f"n = {found.evaluation.mean.n_rows:,} rows"
    return html.section(
        "reconstruction",
        "Reconstruction",
        drawn.figure(
            "fvu",
            figures.reconstruction(found.evaluation),
            "Fraction of variance unexplained: sum (x &minus; x&#770;)&sup2; / sum (x &minus; mean)&sup2;, the mean of each dimension; beside it about one mean for all "
            f"dimensions, which counts a constant vector as explained. Lines: the same of decoding no latent (k = 0), from the row's own mean and scale with the bias. {n}.",
        ),
        html.table(reconstruction_table(found)),
    )


def _matrix(found: Findings, drawn: _Drawn) -> str:
    if found.matrix is None:
        return ""
    return html.section(
        "matrix",
        "Layer by layer",
        drawn.figure(
            "matrix",
            figures.matrix(found.matrix),
            "FVU of the SAE trained on one layer (down) on rows of another (across), about the mean of the layer looked at; more than 1 is shown as 1. "
            f"n = {found.evaluation.mean.n_rows:,} rows.",
        ),
    )


def _lens(found: Findings, drawn: _Drawn) -> str:
    if found.in_lens is None:
        return ""
    about = found.subject.lens.about if found.subject.lens is not None else {}
    return html.section(
        "lens",
        "Through the lens",
        f'<p class="soft">The run was trained on rows seen through a lens ({html.escape(about.get("kind", "?"))}): y = (x &minus; centre) A&#7488; + offset, one map '
        "per layer. Everything else on this page is of raw rows, the lens undone.</p>",
        drawn.figure(
            "stream_lens",
            figures.stream(found.in_lens.stream),
            "Norms and neighbouring layers' centred cosines of rows seen through the lens: to be compared with those of raw rows below. "
            f"n = {found.in_lens.scores.mean.n_rows:,} rows.",
        ),
        html.table(lens_table(found.in_lens)),
    )


def _loss(found: Findings, drawn: _Drawn) -> str:
    if found.model is None:
        return html.section(
            "loss",
            "Loss",
            '<p class="soft">Not measured: the model was not at hand. Run with <code>--model</code>.</p>',
        )
    parts = []
    for scores in found.model.patched:
        way = (
            "rows that the run's filter lets pass"
            if scores.positions == "kept"
            else "all positions, filtered ones too"
        )
        parts.append(f"<h3>Patched: {way}</h3>")
        parts.append(
            drawn.figure(
                f"loss_{scores.positions}",
                figures.losses(scores),
                "Left: cross-entropy with reconstructions minus cross-entropy of the model. Right: loss recovered = (ablated &minus; reconstructed) / "
                "(ablated &minus; clean), a ratio of means. Bars: standard errors over sequences. &ldquo;all&rdquo;: every layer at once, each "
                f"re-encoded from the stream as earlier patches left it. n = {scores.together.n_tokens:,} scored tokens of "
                f"{scores.together.n_sequences} sequences.",
            )
        )
    return html.section("loss", "Loss", *parts, html.table(losses_table(found.model.patched), LOSS_COLUMNS))


def _layers(found: Findings, drawn: _Drawn) -> str:
    latents = found.evaluation.latents
    n_alive = int(latents.is_alive.sum())
    n = f"n = {n_alive:,} latents alive on {found.evaluation.mean.n_rows:,} rows"
    single = found.pairs[1] / max(int(found.pairs.sum()), 1)
    return html.section(
        "layers",
        "Latents over layers",
        drawn.figure(
            "heatmap_probs", figures.layer_heatmap(latents, latents.p, "P(layer | latent)"),
            f"P(l | f) = sum of a at layer l / sum of a over layers, latents by mean layer; neighbours averaged to what a screen can show. {n}.",
        ),
        drawn.figure(
            "heatmap_counts", figures.layer_heatmap(latents, latents.counts, "rows active", gamma=0.25),
            f"Rows on which each latent is active (a &gt; 0.001), opacity to the power 1/4. {n}.",
        ),
        drawn.figure(
            "layers_active", figures.layers_active(latents, found.pairs),
            f"On how many layers a latent is active: over all tokens (n = {n_alive:,} latents), and on a single token (n = {int(found.pairs.sum()):,} "
            f"pairs of a token and a latent active on it; {single:.0%} of them at one layer only).",
        ),
        drawn.figure(
            "mean_layers", figures.mean_layers(latents),
            f"Mean layer sum l P(l | f), 16 bins per layer, and its distance to the nearest layer that was analysed. {n}.",
        ),
        drawn.figure(
            "layer_std", figures.layer_spread(latents, found.trace),
            f"Standard deviation of the layer under P(l | f); right: its mean over latents, &plusmn; standard error, as tokens were added. {n}.",
        ),
        drawn.figure(
            "shapes", figures.shapes(latents),
            "Entropy &minus;sum p log p / log(layers): 0 at one layer, 1 at all alike. Bimodality (skewness&sup2; + 1) / kurtosis: 5/9 for a uniform "
            f"distribution (dotted), 1 for two points. {n}.",
        ),
        html.table(layer_std_table(found)),
    )  # fmt: skip


def _variance(found: Findings, drawn: _Drawn) -> str:
    shares = list(found.variance.values())
    return html.section(
        "variance",
        "Where the spread over layers comes from",
        drawn.figure(
            "variance",
            figures.variance_shares(shares),
            "Law of total variance of the layer L: within a token E[Var(L | T, F)], between tokens of a latent E[Var(E[L | T, F] | F)], between latents "
            "Var(E[L | F]). Mass: a latent counts by its activation. Latent: every latent counts alike. "
            f"n = {shares[0].n_pairs:,} pairs of {shares[0].n_latents:,} latents and {shares[0].n_tokens:,} tokens kept at all layers.",
        ),
        html.table(variance_table(found)),
    )


def _stream(found: Findings, drawn: _Drawn) -> str:
    n = min((s.n for s in found.stream.norms.values()), default=0)
    return html.section(
        "stream",
        "The rows themselves",
        drawn.figure(
            "stream",
            figures.stream(found.stream),
            "L2 norm of rows per layer, and of their mean; cosine of a token's rows at neighbouring layers after the layer's mean is taken off. "
            f"n = {n:,} rows a layer.",
        ),
        html.table(cosines_table(found.stream)),
    )


def _dictionary(found: Findings, drawn: _Drawn) -> str:
    latents = found.evaluation.latents
    density = latents.count / max(int(latents.n_rows.sum()), 1)
    alive = int(latents.is_alive.sum())
    parts = [
        drawn.figure(
            "directions", figures.directions(found.max_cosine, density, found.decoder_norm),
            "Largest cosine of each latent's decoder row with any other's (its mean is the MMCS), share of rows on which a latent is active, and the norm of "
            f"its decoder row. n = {found.subject.n_latents:,} latents.",
        ),
        drawn.figure(
            "cosine_distance", figures.cosine_distance(found.by_distance),
            "Cosine of the decoder rows of two latents against the distance of their mean layers; each column sums to 1, opacity to the power 0.4; the line "
            f"is the mean. n = {alive * (alive - 1) // 2:,} pairs of alive latents.",
        ),
        html.table(mmcs_table(found)),
    ]  # fmt: skip
    return html.section("dictionary", "The dictionary", *parts)


def _prompts(found: Findings, drawn: _Drawn) -> str:
    if found.model is None or not found.model.prompts:
        return ""
    parts = []
    for i, prompt in enumerate(found.model.prompts):
        alive = prompt.latents.is_alive
        active = prompt.latents.n_layers[alive]
        parts.append(
            drawn.figure(
                f"prompt_{i}", figures.prompt_heatmap(prompt),
                f"&ldquo;{html.escape(prompt.text)}&rdquo;: share of each latent's summed activation by layer, over {int(prompt.is_kept.sum())} kept tokens. "
                f"n = {int(alive.sum()):,} latents active on it, {float((active == 1).mean()):.0%} of them at one layer only, {active.mean():.2f} layers on average.",
            )
        )  # fmt: skip
    return html.section("prompts", "Single texts", *parts)


def _comparison(summaries: Sequence[Summary], drawn: _Drawn) -> str:
    table = comparison_table(summaries)
    pictures = []
    for x in ("n_latents", "k", "expansion", "width"):
        values = [s.facts.get(x) for s in summaries]
        if len({v for v in values if v is not None}) < 2:
            continue
        for names, label in (
            (("fvu", "fvu_scalar"), "FVU"),
            (("loss_change", "loss_change_together"), "change of loss"),
            (("layer_std",), "std over layers"),
            (("n_layers_active",), "layers per latent"),
            (("rel_t_mass", "rel_t_latent"), "rel_t"),
            (("mmcs",), "MMCS"),
        ):
            shown = [
                s
                for s in summaries
                if s.facts.get(x) is not None and all(s.scores.get(n) is not None for n in names)
            ]
            if len(shown) < 2:
                continue
            series = {name: [float(s.scores[name] or 0.0) for s in shown] for name in names}
            drawing = figures.sweep([float(s.facts[x]) for s in shown], series, x, label)
            pictures.append(
                drawn.figure(f"sweep_{x}_{names[0]}", drawing, f"{label} against {x}, n = {len(shown)} runs.")
            )
    grid = f'<div class="grid">{"".join(pictures)}</div>' if pictures else ""
    return html.section("comparison", "Runs side by side", grid, html.table(table))


def _method(found: Findings) -> str:
    subject = found.subject
    plan = subject.store.plan
    lines = [
        f"Run {subject.name}, sae.json {subject.digest[:16]}; store plan {plan.digest[:16]}; model {plan.request.model.name}, weights {plan.request.model.digest[:16]}.",
        "A latent is active where its activation exceeds 0.001 in standardised units. Rows outside the store's keep mask or the run's filter are nowhere counted.",
        "Sums are float64 and counts int64, exact over any number of rows; every accumulator merges.",
        "Tables stand beside this page as CSV and Parquet, figures as SVG.",
    ]
    return html.section("method", "Method", *(f'<p class="soft">{html.escape(line)}</p>' for line in lines))
