"""The oracle: every tensor dense, every gradient by autograd, the selection by a stable sort of all latents.

Axes: b rows, d width, f latents, k active latents, m auxiliary latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.kernels import Selected
from trainer.kernels.gradients import full_precision


def encode(
    z: Tensor,
    w_enc: Tensor,
    bias: Tensor,
    k: int,
    dead: Tensor,
    n_aux: int,
    *,
    latent_bias: Tensor | None = None,
) -> Selected:
    """See `Kernels.encode`. Holds several [b, f] tensors."""
    pre = ((z - bias) @ w_enc.T).to(z.dtype)
    if latent_bias is not None:
        pre = pre + latent_bias
    indices = _largest(pre, k)
    aux_indices = dead[_largest(pre[:, dead], n_aux)]
    return Selected(
        torch.relu(pre.gather(1, indices)), indices, torch.relu(pre.gather(1, aux_indices)), aux_indices
    )


@full_precision
def decode(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    *,
    candidates: Tensor | None = None,  # noqa: ARG001 (every latent is summed over)
) -> Tensor:
    """See `Kernels.decode`. Holds a dense [b, f]."""
    dense = values.new_zeros(values.shape[0], w_dec.shape[0]).scatter_add(1, indices, values)
    return dense @ w_dec


def _largest(pre: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest per row, equal ones in order of index. [b, count]."""
    return torch.sort(pre, dim=1, descending=True, stable=True).indices[:, :count]
