"""The rows on which each latent is most active, per layer: kept while blocks go by, then shown with their context.

Axes: e entries, c candidates kept, l layers, f latents.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from analysis.entries import Entries, segments

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The top rows of every (latent, layer), by latent, layer and rank.

    latent, layer_i     [c] int64.
    rank                [c] int64, 0 is the most active.
    activation          [c] float64, standardised units.
    sequence, position  [c] int64, where in the store.
    token, document     [c] int64.
    """

    latent: I64
    layer_i: I64
    rank: I64
    activation: NDArray[np.float64]
    sequence: I64
    position: I64
    token: I64
    document: I64

    def __len__(self) -> int:
        return len(self.latent)

    def of(self, latent: int, layer_i: int) -> "Examples":
        """Those of one latent at one layer."""
        chosen = (self.latent == latent) & (self.layer_i == layer_i)
        return Examples(**{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})


class TopExamples:
    """Accumulates the `n` largest activations of every (latent, layer).

    Of equal activations the earlier sequence, then position, wins, so the result depends on no order of blocks.
    """

    def __init__(self, n_layers: int, n_latents: int, n: int) -> None:
        self.n, self.n_latents = n, n_latents
        self._threshold = np.zeros(n_layers * n_latents)  # below it nothing gets in any more
        self._columns: dict[str, NDArray[Any]] = {
            name: np.empty(0, np.float64 if name == "activation" else np.int64)
            for name in ("key", "activation", "sequence", "position", "token", "document")
        }

    def update(self, entries: Entries, sequence: I64, position: I64, token: I64, document: I64) -> None:
        """Add a block; `sequence`, `position`, `token` and `document` are of the block's tokens."""
        key = entries.layer_i * self.n_latents + entries.latent
        chosen = np.flatnonzero(entries.activation >= self._threshold[key])
        at = entries.token[chosen]
        self._add(
            {
                "key": key[chosen],
                "activation": entries.activation[chosen],
                "sequence": sequence[at],
                "position": position[at],
                "token": token[at],
                "document": document[at],
            }
        )

    def merge(self, other: Self) -> None:
        """Add what another accumulator has kept."""
        self._add(other._columns)

    def _add(self, columns: dict[str, NDArray[Any]]) -> None:
        both = {name: np.concatenate([kept, columns[name]]) for name, kept in self._columns.items()}
        order = np.lexsort((both["position"], both["sequence"], -both["activation"], both["key"]))
        key = both["key"][order]
        starts = segments(key)
        sizes = np.diff(np.append(starts, len(key)))
        rank = np.arange(len(key)) - np.repeat(starts, sizes)
        stays = rank < self.n
        self._columns = {name: values[order][stays] for name, values in both.items()}
        is_full = sizes >= self.n
        last = starts[is_full] + self.n - 1
        self._threshold[key[last]] = both["activation"][order][last]

    def compute(self) -> Examples:
        """The top rows, by latent, layer and rank."""
        kept = self._columns
        layer_i, latent = np.divmod(kept["key"], self.n_latents)
        starts = segments(kept["key"])
        rank = np.arange(len(latent)) - np.repeat(starts, np.diff(np.append(starts, len(latent))))
        order = np.lexsort((rank, layer_i, latent))
        return Examples(
            latent=latent[order],
            layer_i=layer_i[order],
            rank=rank[order],
            activation=kept["activation"][order],
            sequence=kept["sequence"][order],
            position=kept["position"][order],
            token=kept["token"][order],
            document=kept["document"][order],
        )
