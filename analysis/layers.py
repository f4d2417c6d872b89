"""Over which layers each latent is active: counts, totals, and what follows from them. Exact over any number of rows.

Axes: l layers, f latents. Layers are the model's layer numbers, so distances between them mean blocks.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from trainer.dead import ACTIVE_ABOVE

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayers:
    """The distribution over layers of every latent; NaN for latents that were never active.

    layers        [l] the model's layer numbers.
    n_rows        [l] rows looked at.
    counts        [l, f] rows on which a latent is active (a > 1e-3).
    totals        [l, f] its activations summed over them.
    p             [l, f] P(layer | latent) = totals / sum over layers of totals.
    mean, var     [f] of the layer under p.
    std           [f] sqrt(var).
    entropy       [f] -sum p log p / log(number of layers): 0 one layer, 1 all alike.
    n_layers      [f] layers with `min_count` or more active rows.
    bimodality    [f] (skewness^2 + 1) / kurtosis of p: 5/9 for a uniform law, 1 for two equal points; NaN for one point.
    """

    layers: I64
    n_rows: I64
    counts: I64
    totals: F64
    p: F64
    mean: F64
    var: F64
    std: F64
    entropy: F64
    n_layers: I64
    bimodality: F64

    @property
    def count(self) -> I64:
        """[f] active rows over all layers."""
        return self.counts.sum(0)

    @property
    def total(self) -> F64:
        """[f] summed activation over all layers."""
        return self.totals.sum(0)

    @property
    def is_alive(self) -> NDArray[np.bool_]:
        """[f] active at least once."""
        return self.counts.sum(0) > 0

    def by_mean_layer(self) -> I64:
        """Alive latents, by mean layer; of equal ones the lower number first."""
        alive = np.flatnonzero(self.is_alive)
        return alive[np.argsort(self.mean[alive], kind="stable")]


class Histogram(NamedTuple):
    """counts [x] int64 of the values in [edges[i], edges[i + 1]), the last bin closed; edges [x + 1]."""

    counts: I64
    edges: F64

    @property
    def density(self) -> F64:
        """[x] counts / (their sum * width of the bin)."""
        return self.counts / (max(int(self.counts.sum()), 1) * np.diff(self.edges))


def histogram_of_means(latents: LatentLayers) -> Histogram:
    """Mean layers of alive latents, 16 bins per layer, from the first layer to the last."""
    first, last = int(latents.layers[0]), int(latents.layers[-1])
    found, edges = np.histogram(
        latents.mean[latents.is_alive], 16 * len(latents.layers), (first, max(last, first + 1))
    )
    return Histogram(found, edges)


def histogram_of_distances(latents: LatentLayers) -> Histogram:
    """Distances of alive latents' mean layers to the nearest layer that was looked at: 24 bins from 0 to the largest there can be."""
    gaps = np.diff(latents.layers)
    distances = distance_to_layer(latents.mean[latents.is_alive], latents.layers)
    found, edges = np.histogram(distances, 24, (0, float(gaps.max(initial=1)) / 2))
    return Histogram(found, edges)


def distance_to_layer(means: F64, layers: I64) -> F64:
    """How far each mean layer is from the nearest layer that was looked at."""
    return np.abs(means[:, None] - layers).min(1)


class Spread(NamedTuple):
    """A mean over latents. n; mean; var, std with divisor n - 1; sem = std / sqrt(n). NaN where n is too small."""

    n: int
    mean: float
    var: float
    std: float
    sem: float


class LayerCounts:
    """Accumulates counts [l, f] int64 and totals [l, f] float64."""

    def __init__(self, layers: tuple[int, ...], n_latents: int) -> None:
        self.layers = layers
        self.n_rows = np.zeros(len(layers), np.int64)
        self.counts = np.zeros((len(layers), n_latents), np.int64)
        self.totals = np.zeros((len(layers), n_latents))

    def update(self, layer: int, values: NDArray[np.floating], latents: I64) -> None:
        """Add rows of one layer: activations [b, k], 0 in slots that are not used, and latents [b, k]."""
        i, n_latents = self.layers.index(layer), self.counts.shape[1]
        is_active = values > ACTIVE_ABOVE
        active = latents[is_active]
        self.counts[i] += np.bincount(active, minlength=n_latents)
        self.totals[i] += np.bincount(active, values[is_active], minlength=n_latents)
        self.n_rows[i] += len(values)

    def merge(self, other: Self) -> None:
        """Add what another accumulator has seen."""
        self.counts += other.counts
        self.totals += other.totals
        self.n_rows += other.n_rows

    def compute(self, min_count: int = 1) -> LatentLayers:
        """What was seen so far. min_count: rows from which a latent counts as active on a layer."""
        numbers = np.array(self.layers, np.float64)
        total = self.totals.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            p = self.totals / total
            mean = numbers @ p
            from_mean = numbers[:, None] - mean
            var, third, fourth = ((from_mean**power * p).sum(0) for power in (2, 3, 4))
            entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(0) / np.log(max(len(numbers), 2))
            bimodality = (third**2 / var**3 + 1) / (fourth / var**2)
        return LatentLayers(
            layers=np.array(self.layers, np.int64),
            n_rows=self.n_rows.copy(),
            counts=self.counts.copy(),
            totals=self.totals.copy(),
            p=p,
            mean=mean,
            var=var,
            std=np.sqrt(var),
            entropy=entropy,
            n_layers=(self.counts >= min_count).sum(0),
            bimodality=bimodality,
        )


def spread(values: NDArray[np.floating] | I64) -> Spread:
    """Mean, variance, standard deviation and standard error of the values that are numbers."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    n = len(known)
    mean = float(known.mean()) if n else float("nan")
    var = float(known.var(ddof=1)) if n > 1 else float("nan")
    std = var**0.5 if n > 1 else float("nan")
    return Spread(n, mean, var, std, std / n**0.5 if n > 1 else float("nan"))
