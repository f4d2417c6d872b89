"""Findings as tables: one function for each file in tables/."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.cross import Matrix
from analysis.layers import histogram_of_distances, histogram_of_means, spread
from analysis.loss import Estimate, LossScores
from analysis.patched import PatchedScores
from analysis.run import Findings, InLens
from analysis.similarity import StreamSimilarity
from analysis.tables import Table, table_of


def findings_tables(found: Findings) -> list[Table]:
    """Every table of an analysis but the examples, which are written as they are found."""
    tables = [
        reconstruction_table(found),
        latents_table(found),
        layer_std_table(found),
        mean_layers_table(found),
        trace_table(found),
        variance_table(found),
        pairs_table(found),
        stream_table(found),
        cosines_table(found.stream),
        mmcs_table(found),
        distance_table(found),
    ]
    if found.matrix is not None:
        tables.append(matrix_table(found.matrix))
    if found.in_lens is not None:
        tables += [lens_table(found.in_lens), cosines_table(found.in_lens.stream, "neighbour_cosines_lens")]
    if found.model is not None:
        tables.append(losses_table(found.model.patched))
        tables.append(nearest_table(found))
        tables.append(prompts_table(found))
    return tables


def matrix_table(matrix: Matrix, losses: Mapping[int, Mapping[int, LossScores]] | None = None) -> Table:
    """Every pair of a layer trained on and a layer looked at."""
    rows = [
        {
            "trained_on": i,
            "looked_at": j,
            "fvu": scores.fvu,
            "fvu_scalar": scores.fvu_scalar,
            "fvu_k0": scores.fvu_k0,
            "l0": scores.l0,
            **(
                {}
                if losses is None
                else {"loss_change": losses[i][j].change.value, "loss_change_se": losses[i][j].change.se}
            ),
        }
        for i, of_layer in matrix.items()
        for j, scores in of_layer.items()
    ]
    return table_of(
        "matrix",
        "The SAE of each layer on the rows of every layer",
        "fvu of the SAE trained on layer trained_on, on rows of layer looked_at, about that layer's own mean.",
        rows,
    )


def reconstruction_table(found: Findings) -> Table:
    """Scores per layer, then their mean."""
    rows: list[dict[str, Any]] = [
        {"layer": str(layer), **scores._asdict()}
        for layer, scores in [*found.evaluation.layers.items(), ("mean", found.evaluation.mean)]
    ]
    return table_of(
        "reconstruction",
        "Reconstruction per layer",
        "fvu = sum (x - xhat)^2 / sum (x - mean)^2, the mean of each dimension; fvu_scalar: one mean for all dimensions; "
        "fvu_k0, fvu_scalar_k0: of decoding no latents (the row's own mean and scale with the bias); explained_variance = 1 - fvu; "
        "mse per dimension; l0 = latents with a > 1e-3 per row; l1 = sum of a per row, standardised units; n_dead: never active here.",
        rows,
    )


def losses_table(patched: list[PatchedScores]) -> Table:
    """What the model loses, per way to patch and layer; every estimate with its standard error."""
    rows = [
        {"positions": scores.positions, "layer": str(layer), **_estimates(found)}
        for scores in patched
        for layer, found in [*scores.layers.items(), ("all", scores.together)]
    ]
    return table_of(
        "loss",
        "What the model loses",
        "change = cross-entropy with reconstructions - cross-entropy, nats per token; zero, mean: with zeros, or with the layer's mean over kept "
        "training rows; recovered = (ablated - reconstructed) / (ablated - clean), a ratio of means; kl = sum_v p (log p - log p_patched); "
        "logit_mse over the vocabulary. _se: standard error of a ratio of sums over sequences. positions kept: rows the run's filter lets pass are "
        "patched; all: every position is. Scored in all conditions: tokens whose row and next row pass.",
        rows,
    )


def _estimates(scores: LossScores) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name in LossScores.__dataclass_fields__:
        value = getattr(scores, name)
        if isinstance(value, Estimate):
            flat |= {name: value.value, f"{name}_se": value.se}
        else:
            flat[name] = value
    return flat


def latents_table(found: Findings) -> Table:
    """One row per latent: the dataset that is published."""
    latents = found.evaluation.latents
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = latents.total / latents.count
        means = latents.totals / latents.counts
    return Table(
        name="latents",
        title="Latents over layers",
        note="count: rows with a > 1e-3; total: their a summed; mean = total / count; density = count / rows; p = totals / total; layer_mean = sum_l l p; "
        "layer_var = sum_l (l - layer_mean)^2 p; layer_std its root; entropy = -sum p log p / log(layers); n_layers: layers with count >= 1; "
        "bimodality = (skewness^2 + 1) / kurtosis of p; max_cosine: largest cosine of its decoder row with another's; counts, totals, probs: per layer.",
        columns={
            "latent": np.arange(len(latents.mean)),
            "count": latents.count,
            "total": latents.total,
            "mean": mean,
            "density": latents.count / max(int(latents.n_rows.sum()), 1),
            "layer_mean": latents.mean,
            "layer_var": latents.var,
            "layer_std": latents.std,
            "entropy": latents.entropy,
            "n_layers": latents.n_layers,
            "bimodality": latents.bimodality,
            "max_cosine": found.max_cosine,
            "decoder_norm": found.decoder_norm,
            "counts": latents.counts.T,
            "totals": latents.totals.T,
            "means": means.T,
            "probs": latents.p.T,
        },
    )


def layer_std_table(found: Findings) -> Table:
    """How spread latents are, over alive latents."""
    latents = found.evaluation.latents
    span = float(latents.layers[-1] - latents.layers[0]) or 1.0
    rows = [
        {"quantity": name, **spread(values)._asdict()}
        for name, values in (
            ("layer_std", latents.std),
            ("layer_std / span", latents.std / span),
            ("layer_mean", latents.mean),
            ("entropy", latents.entropy),
            ("n_layers", latents.n_layers[latents.is_alive]),
            ("n_layers / layers", latents.n_layers[latents.is_alive] / len(latents.layers)),
            ("bimodality", latents.bimodality),
        )
    ]
    return table_of(
        "layer_std",
        "Spread over layers, over alive latents",
        "n; mean; var and std with divisor n - 1; sem = std / sqrt(n). span = last layer - first layer. Latents active at one layer only have no bimodality.",
        rows,
    )


def mean_layers_table(found: Findings) -> Table:
    """Histograms of alive latents' mean layers, and of their distance to the nearest layer."""
    latents = found.evaluation.latents
    rows = [
        {"quantity": name, "from": start, "to": stop, "n_latents": count, "density": density}
        for name, h in (
            ("layer_mean", histogram_of_means(latents)),
            ("distance", histogram_of_distances(latents)),
        )
        for start, stop, count, density in zip(
            h.edges[:-1].tolist(), h.edges[1:].tolist(), h.counts.tolist(), h.density.tolist(), strict=True
        )
    ]
    return table_of(
        "mean_layers",
        "Mean layers of alive latents",
        "layer_mean = sum_l l p, 16 bins per layer; distance: |layer_mean - nearest layer analysed|. density = n_latents / (their sum * width of the bin).",
        rows,
    )


def trace_table(found: Findings) -> Table:
    """How the mean spread settled."""
    return table_of(
        "convergence",
        "Convergence of layer_std",
        "Spread of layer_std over the latents alive so far, as tokens are added.",
        [{"n_tokens": point.n_tokens, **point.layer_std._asdict()} for point in found.trace],
    )


def variance_table(found: Findings) -> Table:
    """The decomposition under both weightings."""
    rows = [
        {name: getattr(shares, name) for name in type(shares).__dataclass_fields__}
        for shares in found.variance.values()
    ]
    return table_of(
        "variance",
        "Variance of the layer: within tokens, between tokens, between latents",
        "P(l, t, f) proportional to w_f a(l, t, f). mass: w_f = 1; latent: w_f = 1 / sum a(., ., f). Var(L) = E[Var(L|F)] + Var(E[L|F]); "
        "E[Var(L|F)] = E[Var(L|T,F)] + E[Var(E[L|T,F] | F)]. rel_f = var_l_f / var_l, rel_t = var_l_tf / var_l_f. Tokens kept at all layers; latents "
        "active on min_tokens or more of them. identity: what rounding leaves of the two equations, over var_l.",
        rows,
    )


def pairs_table(found: Findings) -> Table:
    """(token, latent) pairs by the number of layers."""
    total = max(int(found.pairs.sum()), 1)
    return table_of(
        "layers_per_token",
        "Layers on which a latent is active, on one token",
        "(token, latent) pairs with a > 1e-3 at some layer, over tokens kept at all layers.",
        [
            {"n_layers": n, "n_pairs": count, "share": count / total}
            for n, count in enumerate(found.pairs.tolist())
            if n
        ],
    )


def stream_table(found: Findings) -> Table:
    """Norms per layer."""
    return table_of(
        "norms",
        "L2 norms of rows",
        "Over rows that the run's filter lets pass. mean_row: norm of the mean row.",
        [
            {"layer": layer, **norms._asdict(), "mean_row": found.stream.mean_norms[layer]}
            for layer, norms in found.stream.norms.items()
        ],
    )


def lens_table(found: InLens) -> Table:
    """Scores per layer in the space of the lens, with the condition of its matrices."""
    rows = [
        {"layer": str(layer), "condition": found.condition.get(layer), **scores._asdict()}
        for layer, scores in found.scores.layers.items()
    ]
    mean = {"layer": "mean", "condition": None, **found.scores.mean._asdict()}
    return table_of(
        "reconstruction_lens",
        "Reconstruction per layer in the space of the lens",
        "The columns of the table of raw rows, of rows y = (x - centre) A^T + offset and what the SAE makes of them before the lens is undone. "
        "condition: largest over smallest singular value of A.",
        [*rows, mean],
    )


def cosines_table(stream: StreamSimilarity, name: str = "neighbour_cosines") -> Table:
    """Centred cosines of neighbouring layers."""
    return table_of(
        name,
        "Cosines of neighbouring layers",
        "cos(x_l - mean_l, x_m - mean_m) of the same token, means over the same rows; tokens whose rows pass at both layers.",
        [{"layer": a, "next_layer": b, **s._asdict()} for (a, b), s in stream.cosines.items()],
    )


def mmcs_table(found: Findings) -> Table:
    """Mean max cosine similarity within the dictionary, and with others."""
    alive = found.evaluation.latents.is_alive
    within = [("all latents", found.max_cosine), ("alive latents", found.max_cosine[alive])]
    return table_of(
        "mmcs",
        "Mean max cosine similarity of decoder rows",
        "Within: max over g != f of cos(w_f, w_g). With another dictionary: max over all its g. Mean, and spread over f.",
        [{"of": name, "with": "each other", **spread(values)._asdict()} for name, values in within]
        + [{"of": b.of, "with": b.other, **b.cosine._asdict()} for b in found.between],
    )


def distance_table(found: Findings) -> Table:
    """Decoder cosine against layer distance."""
    edges = found.by_distance.distance_edges
    return Table(
        name="cosine_by_distance",
        title="Decoder cosine by distance of mean layers",
        note="Pairs f < g of alive latents; distance = |layer_mean_f - layer_mean_g|; counts per cosine bin of width 0.025 from -1 to 1.",
        columns={
            "distance_from": edges[:-1],
            "distance_to": edges[1:],
            "n_pairs": found.by_distance.counts.sum(1),
            "mean_cosine": found.by_distance.mean,
            "counts": found.by_distance.counts,
        },
    )


def nearest_table(found: Findings) -> Table:
    """Tokens whose embedding or unembedding a latent's direction is nearest to."""
    assert found.model is not None
    columns: dict[str, Any] = {"latent": np.arange(found.subject.n_latents)}
    for name, nearest in found.model.nearest.items():
        columns[f"{name}_tokens"] = nearest.tokens.cpu().numpy()
        columns[f"{name}_cosines"] = nearest.cosines.cpu().numpy()
    return Table(
        name="nearest_tokens",
        title="Nearest tokens of each latent",
        note="Largest cos(w_f, e_v) over the vocabulary, e_v a row of the token embedding or unembedding, without the final norm's weights.",
        columns=columns,
    )


def prompts_table(found: Findings) -> Table:
    """Active latents of the prompts, token by token."""
    assert found.model is not None
    layers = np.array(found.subject.layers)
    parts = [(i, prompt) for i, prompt in enumerate(found.model.prompts)]
    names = ("prompt", "position", "token", "text", "is_kept", "layer", "latent", "activation")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for i, prompt in parts:
        at = prompt.entries.token
        columns["prompt"] += [i] * len(at)
        columns["position"] += at.tolist()
        columns["token"] += prompt.tokens[at].tolist()
        columns["text"] += [prompt.pieces[t] for t in at.tolist()]
        columns["is_kept"] += prompt.is_kept[at].tolist()
        columns["layer"] += layers[prompt.entries.layer_i].tolist()
        columns["latent"] += prompt.entries.latent.tolist()
        columns["activation"] += prompt.entries.activation.tolist()
    return Table(
        name="prompts",
        title="Active latents of the prompts",
        note="a > 1e-3, standardised units, by token and layer. "
        + "; ".join(f"prompt {i}: {p.text!r}" for i, p in parts),
        columns=columns,
    )
