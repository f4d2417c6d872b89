"""The two operations an SAE is made of, in several implementations that agree.

`reference` is plain torch, dense, and the oracle; `sparse` is what trains.

Axes: b rows, d width, f latents, k active latents, m auxiliary latents.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Selected(NamedTuple):
    """The latents chosen for each row.

    values       [b, k] activations max(pre, 0), largest first. A slot whose value is 0 is not active and its index means
                 nothing, so add to a dense array (`scatter_add_`), never assign.
    indices      [b, k] int64, distinct within a row.
    aux_values   [b, m] the same for the best m of the dead latents, in any order; m = 0 unless asked for.
    aux_indices  [b, m] int64, latent numbers.
    """

    values: Tensor
    indices: Tensor
    aux_values: Tensor
    aux_indices: Tensor


class Kernels(Protocol):
    """An implementation of both operations, with gradients."""

    def encode(self, z: Tensor, w_enc: Tensor, bias: Tensor, k: int, dead: Tensor, n_aux: int) -> Selected:
        """The k largest of pre = W_enc (z - b), and the n_aux largest among the latents `dead`, both through ReLU.

        Of equal pre-activations at the edge of the selection the lowest index is taken.

        Args:
            z: [b, d].
            w_enc: [f, d].
            bias: [d].
            k: at most f.
            dead: [n_dead] int64, ascending latent numbers.
            n_aux: at most n_dead.
        """
        ...

    def decode(self, values: Tensor, indices: Tensor, w_dec: Tensor) -> Tensor:
        """sum_j values[b, j] * w_dec[indices[b, j]], with w_dec [f, d]. Returns [b, d]."""
        ...
