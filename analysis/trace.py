"""How a statistic settles as tokens are added: a snapshot at every share of all tokens."""

from typing import NamedTuple

import numpy as np

from analysis.latents import Codes
from analysis.layers import LayerCounts, Spread, spread

N_POINTS = 16


class TracePoint(NamedTuple):
    """Spread of the latents' standard deviations over layers after so many tokens."""

    n_tokens: int
    layer_std: Spread


class Trace:
    """Counts shards of latents in the order of the text and looks at `N_POINTS` evenly spaced places.

    counts    an empty accumulator.
    n_tokens  there will be.
    """

    def __init__(self, counts: LayerCounts, n_tokens: int) -> None:
        self.points: list[TracePoint] = []
        self._counts, self._seen = counts, 0
        self._places = np.unique(np.linspace(0, n_tokens, N_POINTS + 1).round().astype(int)[1:])

    def update(self, codes: Codes) -> None:
        """Add a shard's rows that pass."""
        padded = [codes.padded(i) for i in range(len(codes.layers))]
        ends = (
            self._places[(self._places > self._seen) & (self._places <= self._seen + len(codes))] - self._seen
        )
        start = 0
        for end in np.unique([*ends, len(codes)]).tolist():
            for i, layer in enumerate(codes.layers):
                passes = codes.passes[start:end, i]
                values, latents = padded[i]
                self._counts.update(layer, values[start:end][passes], latents[start:end][passes])
            if end in ends:
                self.points.append(TracePoint(self._seen + end, spread(self._counts.compute().std)))
            start = end
        self._seen += len(codes)
