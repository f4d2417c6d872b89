"""The pictures of an analysis. Each function draws what it is given; captions with formulas stand in `report`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.cross import Matrix
from analysis.dictionary import CosineByDistance
from analysis.layers import LatentLayers, histogram_of_distances, histogram_of_means
from analysis.metrics import Evaluation
from analysis.patched import PatchedScores
from analysis.prompts import PromptLatents
from analysis.similarity import StreamSimilarity
from analysis.svg import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, average_columns, drawing, new_figure, ramp
from analysis.trace import TracePoint
from analysis.variance import VarianceShares
from trainer.heldout import HeldOut


def _layer_axis(axis: Any, layers: Sequence[object], label: str = "layer") -> range:
    """Ticks for layers at places 0, 1, ...; every one where there is room."""
    places = range(len(layers))
    step = -(-len(layers) // 16)
    axis.set_ticks(list(places)[::step], [str(layer) for layer in layers][::step])
    axis.set_label_text(label)
    return places


@drawing
def reconstruction(evaluation: Evaluation) -> Any:
    """FVU per layer beside its k = 0 baseline, and in the scalar convention."""
    figure, axes = new_figure()
    scores = list(evaluation.layers.values())
    places = np.array(_layer_axis(axes.xaxis, list(evaluation.layers)))
    for shift, name, label, colour in (
        (-0.2, "fvu", "FVU", BLUE),
        (0.2, "fvu_scalar", "FVU, one scalar mean", GREEN),
    ):
        bars = axes.bar(places + shift, [getattr(s, name) for s in scores], 0.4, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
        nothing = [getattr(s, f"{name}_k0") for s in scores]
        axes.plot(
            places + shift,
            nothing,
            "_",
            ms=9,
            mew=1.2,
            color=ORANGE,
            label="the same at k = 0" if shift > 0 else None,
        )
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_ylim(0, max(1.0, *(s.fvu_k0 for s in scores)) * 1.25)
    axes.legend(loc="upper left", ncols=3)
    return figure


@drawing
def losses(scores: PatchedScores) -> Any:
    """Change of cross-entropy with reconstructions, and loss recovered, with standard errors."""
    figure, (left, right) = new_figure(columns=2)
    items = [*scores.layers.values(), scores.together]
    labels = [*(str(layer) for layer in scores.layers), "all"]
    for axes in (left, right):
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("layer patched")
    colours = [BLUE] * len(scores.layers) + [PURPLE]
    left.bar(range(len(items)), [s.change.value for s in items], color=colours)
    left.errorbar(
        range(len(items)),
        [s.change.value for s in items],
        [s.change.se for s in items],
        fmt="none",
        ecolor=INK,
        lw=0.8,
    )
    left.set_ylabel("change of loss, nats / token")
    for i, (name, colour) in enumerate((("recovered_zero", BLUE), ("recovered_mean", ORANGE))):
        found = [getattr(s, name) for s in items]
        places = np.arange(len(items)) + 0.2 * (i - 0.5)
        label = "against zeros" if name == "recovered_zero" else "against the mean"
        right.errorbar(
            places,
            [f.value for f in found],
            [f.se for f in found],
            fmt="o",
            ms=3,
            color=colour,
            lw=0.8,
            label=label,
        )
    right.set_ylabel("loss recovered")
    right.axhline(1, color=FAINT, lw=0.6)
    right.legend(loc="lower left")
    return figure


@drawing
def layer_heatmap(
    latents: LatentLayers, values: NDArray[Any], label: str, gamma: float = 1.0, colour: str = BLUE
) -> Any:
    """Values [l, f] of alive latents by mean layer."""
    from matplotlib.colors import PowerNorm

    order = latents.by_mean_layer()
    figure, axes = new_figure(height=1.9)
    shown = average_columns(values[:, order])
    highest = float(np.nanmax(shown, initial=0.0)) or 1.0
    image = axes.imshow(
        shown,
        aspect="auto",
        cmap=ramp(colour),
        norm=PowerNorm(gamma, 0, highest),
        interpolation="none",
        origin="lower",
    )
    _layer_axis(axes.yaxis, latents.layers.tolist())
    axes.set_xticks([])
    axes.set_xlabel(f"{len(order):,} latents, by mean layer")
    figure.colorbar(image, ax=axes, label=label).outline.set_visible(False)
    return figure


@drawing
def mean_layers(latents: LatentLayers) -> Any:
    """Density of mean layers, 16 bins per layer, and of their distance to the nearest layer there is."""
    figure, axes = new_figure(columns=2, width_ratios=(2, 1))
    for at, found, colour, label in (
        (axes[0], histogram_of_means(latents), BLUE, "mean layer of a latent"),
        (axes[1], histogram_of_distances(latents), ORANGE, "distance to nearest layer"),
    ):
        at.hist(found.edges[:-1], found.edges, weights=found.density, color=colour)
        at.set_xlabel(label)
    axes[0].set_ylabel("density")
    return figure


@drawing
def layer_spread(latents: LatentLayers, trace: list[TracePoint]) -> Any:
    """Standard deviation over layers, per latent, and how its mean settled with more tokens."""
    figure, (left, right) = new_figure(columns=2)
    left.hist(latents.std[latents.is_alive], bins=48, color=BLUE)
    left.set_xlabel("std of the layer, per latent")
    left.set_ylabel("latents")
    tokens = [point.n_tokens for point in trace]
    right.errorbar(
        tokens,
        [p.layer_std.mean for p in trace],
        [p.layer_std.sem for p in trace],
        fmt="o-",
        ms=3,
        lw=0.8,
        color=ORANGE,
    )
    right.set_xlabel("tokens")
    right.set_ylabel("mean std")
    right.set_ylim(0, None)
    return figure


@drawing
def layers_active(latents: LatentLayers, pairs: NDArray[np.int64]) -> Any:
    """On how many layers a latent is active: over all tokens, and on one token."""
    figure, axes = new_figure()
    alive = latents.is_alive
    numbers = np.arange(1, len(latents.layers) + 1)
    aggregate = np.bincount(latents.n_layers[alive], minlength=len(numbers) + 1)[1:] / max(
        int(alive.sum()), 1
    )
    single = pairs[1:] / max(int(pairs.sum()), 1)
    axes.bar(numbers - 0.2, aggregate, 0.4, color=BLUE, label="latents, over all tokens")
    axes.bar(numbers + 0.2, single, 0.4, color=ORANGE, label="(token, latent) pairs, on that token")
    axes.set_xticks(numbers)
    axes.set_xlabel("layers active")
    axes.set_ylabel("share")
    axes.legend()
    return figure


@drawing
def shapes(latents: LatentLayers) -> Any:
    """Entropy and bimodality of the distributions over layers."""
    figure, (left, right) = new_figure(columns=2)
    alive = latents.is_alive
    left.hist(latents.entropy[alive], bins=48, range=(0, 1), color=BLUE)
    left.set_xlabel("entropy / log(layers)")
    left.set_ylabel("latents")
    known = latents.bimodality[alive]
    right.hist(known[~np.isnan(known)], bins=48, range=(0, 1), color=ORANGE)
    right.axvline(5 / 9, color=INK, lw=0.6, ls=":")
    right.set_xlabel("bimodality coefficient")
    return figure


@drawing
def variance_shares(shares: list[VarianceShares]) -> Any:
    """Var(L) in three parts, under both weightings."""
    figure, axes = new_figure(height=1.5)
    places = range(len(shares))
    start = np.zeros(len(shares))
    for name, label, colour in (
        ("var_l_tf", "within a token", BLUE),
        ("between_t", "between tokens of a latent", ORANGE),
        ("between_f", "between latents", GREEN),
    ):
        part = np.array([getattr(s, name) / s.var_l if s.var_l else np.nan for s in shares])
        bars = axes.barh(places, part, left=start, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", label_type="center", fontsize=7)
        start += part
    axes.set_yticks(list(places), [s.weighting for s in shares])
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of Var(L)")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


@drawing
def stream(found: StreamSimilarity) -> Any:
    """Norms per layer and centred cosines of neighbouring layers."""
    figure, (left, right) = new_figure(columns=2)
    places = _layer_axis(left.xaxis, list(found.norms))
    left.errorbar(
        places,
        [s.mean for s in found.norms.values()],
        [s.std for s in found.norms.values()],
        fmt="o-",
        ms=3,
        lw=0.8,
        color=BLUE,
        label="rows, ± std",
    )
    left.plot(places, list(found.mean_norms.values()), "_", ms=8, color=ORANGE, label="mean row")
    left.set_ylabel("L2 norm")
    left.set_ylim(0, None)
    left.legend()
    pairs = [f"{a}, {b}" for a, b in found.cosines]
    places = _layer_axis(right.xaxis, pairs, "neighbouring layers")
    right.errorbar(
        places,
        [s.mean for s in found.cosines.values()],
        [s.std for s in found.cosines.values()],
        fmt="o",
        ms=3,
        lw=0.8,
        color=GREEN,
    )
    right.set_ylabel("cosine of centred rows, ± std")
    right.set_ylim(min(0.0, *(s.mean - s.std for s in found.cosines.values())) if found.cosines else 0, 1.02)
    return figure


@drawing
def cosine_distance(found: CosineByDistance) -> Any:
    """Pairs of latents by distance of mean layers and cosine of decoder rows; the line is the mean."""
    from matplotlib.colors import PowerNorm

    figure, axes = new_figure()
    counts = found.counts.astype(np.float64)
    columns = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    used = np.flatnonzero(found.counts.sum(0))
    low, high = (
        (max(int(used[0]) - 1, 0), min(int(used[-1]) + 2, counts.shape[1]))
        if len(used)
        else (0, counts.shape[1])
    )
    x, y = found.distance_edges, found.cosine_edges
    image = axes.imshow(
        columns[:, low:high].T, aspect="auto", origin="lower", interpolation="none", cmap=ramp(),
        norm=PowerNorm(0.4, 0, columns.max(initial=0) or 1.0), extent=(x[0], x[-1], y[low], y[high]),
    )  # fmt: skip
    axes.plot((x[1:] + x[:-1]) / 2, found.mean, color=ORANGE, lw=1)
    axes.set_xlabel("distance of mean layers")
    axes.set_ylabel("cosine")
    figure.colorbar(image, ax=axes, label="share of pairs at that distance").outline.set_visible(False)
    return figure


@drawing
def directions(
    max_cosine: NDArray[np.floating], density: NDArray[np.floating], norm: NDArray[np.floating]
) -> Any:
    """Largest cosine with another latent, share of rows on which a latent is active, decoder norm."""
    figure, axes = new_figure(columns=3)
    axes[0].hist(max_cosine, bins=48, color=BLUE)
    axes[0].set_xlabel("largest cosine with another")
    axes[0].set_ylabel("latents")
    alive = density > 0
    axes[1].hist(np.log10(density[alive]), bins=48, color=ORANGE)
    axes[1].set_xlabel("log10 density, alive latents")
    spread = float(np.ptp(norm))
    edges = (float(norm.min()) - 0.01, float(norm.max()) + 0.01) if spread < 0.01 else None
    axes[2].hist(norm, bins=48, range=edges, color=GREEN)
    axes[2].set_xlabel("decoder norm")
    return figure


@drawing
def prompt_heatmap(prompt: PromptLatents) -> Any:
    """P(layer | latent) over the kept tokens of one text, latents by mean layer."""
    return layer_heatmap(prompt.latents, prompt.latents.p, "share of activation", colour=PURPLE)


@drawing
def matrix(found: Matrix) -> Any:
    """FVU of the SAE of each layer on the rows of every layer; values above 1 are shown as 1."""
    figure, axes = new_figure(width=3.6, height=2.8)
    layers = list(found)
    values = np.array([[found[i][j].fvu for j in layers] for i in layers])
    image = axes.imshow(np.minimum(values, 1), cmap=ramp(ORANGE), vmin=0, vmax=1, interpolation="none")
    _layer_axis(axes.xaxis, layers, "rows of layer")
    _layer_axis(axes.yaxis, layers, "SAE of layer")
    if len(layers) <= 12:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6)
    figure.colorbar(image, ax=axes, label="FVU").outline.set_visible(False)
    return figure


@drawing
def sweep(x: list[float], series: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> Any:
    """One number of several runs against what differs between them."""
    figure, axes = new_figure(width=2.6, height=2.0)
    order = np.argsort(x)
    for (label, values), colour in zip(series.items(), (BLUE, ORANGE, GREEN, PURPLE), strict=False):
        means = np.array(values, np.float64)
        axes.plot(np.array(x)[order], means[order], "o-", ms=3, lw=0.8, color=colour, label=label)
    if len(series) > 1:
        axes.legend()
    if min(x) > 0 and max(x) / min(x) >= 4:
        axes.set_xscale("log", base=2)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure


def save_overview(scores: HeldOut, latents: LatentLayers, title: str, path: Path) -> None:
    """FVU per layer beside its k = 0 baseline, and how the activation of each latent spreads over layers, as a file.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure, (bars, heat) = drawing(new_figure)(11, 4.2, columns=2, width_ratios=(1, 1.45))
    layers = list(scores.layers)
    places = range(len(layers))
    fvu = [scores.layers[layer].fvu for layer in layers]
    baseline = [scores.layers[layer].fvu_k0 for layer in layers]
    bars.bar(places, fvu, color="#3b6fb6", label="SAE")
    bars.plot(places, baseline, "o", color="#c44e52", label="k = 0: row mean, scale and bias only")
    for place, value in zip(places, fvu, strict=True):
        bars.annotate(f"{value:.2f}", (place, value), ha="center", va="bottom", fontsize=8)
    bars.set_xticks(list(places), [str(layer) for layer in layers])
    bars.set_xlabel("layer")
    bars.set_ylabel("fraction of variance unexplained, held out")
    bars.set_ylim(0, max(1.05, 1.05 * max(baseline)))
    bars.legend(loc="upper left", bbox_to_anchor=(0, 0.97))
    order = latents.by_mean_layer()
    image = heat.imshow(
        latents.p[:, order],
        aspect="auto",
        cmap="magma_r",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        origin="lower",
    )
    heat.set_yticks(list(places), [str(layer) for layer in layers])
    heat.set_ylabel("layer")
    heat.set_xlabel(f"{len(order):,} alive latents of {len(latents.mean):,}, by mean layer")
    figure.colorbar(image, ax=heat, label="share of the latent's activation")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
