"""Pictures of an evaluation."""

from pathlib import Path

from actcache.errors import UsageError
from analysis.metrics import Evaluation, layer_distribution


def save_overview(evaluation: Evaluation, title: str, path: Path) -> None:
    """FVU per layer beside its k = 0 baseline, and how the activation of each latent spreads over layers.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install 'actcache[figures]'") from error
    layers = list(evaluation.layers)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    bars, heat = figure.subplots(1, 2, width_ratios=(1, 1.45))
    places = range(len(layers))
    fvu = [evaluation.layers[layer].fvu for layer in layers]
    baseline = [evaluation.layers[layer].fvu_k0 for layer in layers]
    bars.bar(places, fvu, color="#3b6fb6", label="SAE")
    bars.plot(places, baseline, "o", color="#c44e52", label="k = 0: row mean, scale and bias only")
    for place, value in zip(places, fvu, strict=True):
        bars.annotate(f"{value:.2f}", (place, value), ha="center", va="bottom", fontsize=8)
    bars.set_xticks(list(places), [str(layer) for layer in layers])
    bars.set_xlabel("layer")
    bars.set_ylabel("fraction of variance unexplained, held out")
    bars.set_ylim(0, max(1.05, 1.05 * max(baseline)))
    bars.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.97))
    p, alive = layer_distribution(evaluation.totals)
    image = heat.imshow(
        p.numpy(), aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest", origin="lower"
    )
    heat.set_yticks(list(places), [str(layer) for layer in layers])
    heat.set_ylabel("layer")
    heat.set_xlabel(f"{len(alive):,} alive latents of {evaluation.n_latents:,}, by mean layer")
    figure.colorbar(image, ax=heat, label="share of the latent's activation")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
