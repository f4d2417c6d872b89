"""How alike the residual stream is from layer to layer: norms, and cosines of a token's centred vectors.

Axes: b tokens, d width, l layers.
"""

import itertools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from analysis.layers import Spread
from analysis.moments import Moments


class ScalarSpread:
    """Accumulates mean and spread of numbers."""

    def __init__(self) -> None:
        self._moments = Moments(1)

    def update(self, values: Tensor) -> None:
        """Add numbers [b]."""
        self._moments.update(values[:, None])

    def merge(self, other: Self) -> None:
        """Add what another accumulator has seen."""
        self._moments.merge(other._moments)

    def compute(self) -> Spread:
        """What was seen so far."""
        m = self._moments
        var = float(m.variance)
        std = var**0.5
        mean = float(m.mean) if m.n else float("nan")
        return Spread(m.n, mean, var, std, std / m.n**0.5 if m.n else float("nan"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSimilarity:
    """Per layer and per pair of neighbouring layers.

    norms        of rows, per layer.
    mean_norms   norm of the mean row, per layer.
    cosines      of (x_l - mean_l, x_m - mean_m) over tokens, per pair (l, m) of neighbouring layers.
    """

    norms: dict[int, Spread]
    mean_norms: dict[int, float]
    cosines: dict[tuple[int, int], Spread]


class LayerMeans:
    """First pass: the mean row and the norms of each layer, over rows that pass the filters."""

    def __init__(self, layers: tuple[int, ...], width: int) -> None:
        self.rows = {layer: Moments(width) for layer in layers}
        self.norms = {layer: ScalarSpread() for layer in layers}

    def update(self, layer: int, x_bd: Tensor) -> None:
        """Add rows of one layer."""
        self.rows[layer].update(x_bd)
        self.norms[layer].update(torch.linalg.vector_norm(x_bd.double(), dim=1))

    def merge(self, other: Self) -> None:
        """Add what another accumulator has seen."""
        for layer, moments in self.rows.items():
            moments.merge(other.rows[layer])
            self.norms[layer].merge(other.norms[layer])


class NeighbourCosines:
    """Second pass: cosines of neighbouring layers, about the means of the first."""

    def __init__(self, means: LayerMeans) -> None:
        self._means = means
        layers = tuple(means.rows)
        self.cosines = {pair: ScalarSpread() for pair in itertools.pairwise(layers)}

    def update(self, pair: tuple[int, int], x_bd: Tensor, y_bd: Tensor) -> None:
        """Add tokens whose rows pass at both layers. A centred row of norm 0 has no direction and is left out."""
        x, y = (
            rows.double().cpu() - self._means.rows[layer].mean
            for layer, rows in zip(pair, (x_bd, y_bd), strict=True)
        )
        norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
        has_direction = norms > 0
        self.cosines[pair].update(torch.linalg.vecdot(x, y)[has_direction] / norms[has_direction])

    def merge(self, other: Self) -> None:
        """Add what another accumulator, of the same means, has seen."""
        for pair, found in self.cosines.items():
            found.merge(other.cosines[pair])

    def compute(self) -> StreamSimilarity:
        """Both passes together."""
        return StreamSimilarity(
            norms={layer: norms.compute() for layer, norms in self._means.norms.items()},
            mean_norms={
                layer: float(torch.linalg.vector_norm(m.mean)) for layer, m in self._means.rows.items()
            },
            cosines={pair: found.compute() for pair, found in self.cosines.items()},
        )
