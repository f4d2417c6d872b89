"""Active latents as parallel arrays: what every analysis of activations takes in, block after block.

Axes: e active (token, layer, latent) triples, n tokens, l layers, f latents.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """The activations of a block of tokens, in no particular order; no triple occurs twice.

    token       [e] int64, index of the token within the block.
    layer_i     [e] int64, index of the layer among those analysed.
    latent      [e] int64.
    activation  [e] float64, > 0, in standardised units.
    """

    token: NDArray[np.int64]
    layer_i: NDArray[np.int64]
    latent: NDArray[np.int64]
    activation: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.token)

    def where(self, chosen: NDArray[np.bool_]) -> "Entries":
        """Those for which `chosen` [e] is true."""
        return Entries(
            token=self.token[chosen],
            layer_i=self.layer_i[chosen],
            latent=self.latent[chosen],
            activation=self.activation[chosen],
        )


def sum_by(index: NDArray[np.int64], weights: NDArray[np.floating], n: int) -> NDArray[np.float64]:
    """[n] float64: the weights summed by index."""
    return np.asarray(np.bincount(index, weights, minlength=n), np.float64)


def segments(sorted_keys: NDArray[Any]) -> NDArray[np.int64]:
    """Where each run of equal keys starts; empty for no keys."""
    if not len(sorted_keys):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]]))
