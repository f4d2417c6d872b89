"""Plain torch, dense only where it must be: in the encoder's product, and over few candidates.

All sums over chosen latents are embedding bags: the decoder's forward (a bag of latents per row), and both weight gradients
(a bag of rows per latent, entries sorted by latent). A bag is summed by one thread in a fixed order, hence deterministic on
a CPU.

The pre-activations are made and searched tile by tile while they are in cache: a [b, f] tensor never exists.
Measured with d=512 f=8192 k=32 b=4096 float32 on two cores: product 0.20 s alone, 0.24 s with selection in tiles of 16 MiB;
searching the whole [b, f] instead costs 0.05 s and its 134 MB of fresh memory another 0.07 s. Bounding the k-th largest by
maxima of groups first gained nothing over `topk` on a tile in cache.

Axes: b rows, d width, f latents, k active latents, m auxiliary latents, s chosen latents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trainer.kernels import Selected
from trainer.kernels.gradients import (
    Sums,
    encoder_gradients,
    full_precision,
    is_dense,
    product_dtype,
    spread,
)

TILE_VALUES = 2**22
"""Pre-activations in one tile: 16 MiB of float32, which a last-level cache holds."""

TILE_ROWS_MIN = 128
"""Fewer rows than this make the product itself slow."""


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
    """See `Kernels.encode`. Holds one tile of pre-activations."""
    return Selected(*_Encode.apply(z, w_enc, bias, k, dead, n_aux, latent_bias))


@full_precision
def decode(values: Tensor, indices: Tensor, w_dec: Tensor, *, candidates: Tensor | None = None) -> Tensor:
    """See `Kernels.decode`."""
    if candidates is not None and is_dense(indices.shape[1], len(candidates)):
        return spread(values, indices, candidates, w_dec.shape[0]) @ w_dec[candidates]
    out = F.embedding_bag(indices, w_dec.detach(), per_sample_weights=values, mode="sum")
    return _DecoderGradient.apply(out, w_dec, values.detach(), indices)


class _Encode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        w_enc: Tensor,
        bias: Tensor,
        k: int,
        dead: Tensor,
        n_aux: int,
        latent_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n_rows, n_latents = z.shape[0], w_enc.shape[0]
        centred = z - bias
        dtype = product_dtype(z)
        left, right = centred.to(dtype), w_enc.to(dtype)
        values, indices = z.new_empty(n_rows, k), dead.new_empty(n_rows, k)
        aux_values, aux_indices = z.new_empty(n_rows, n_aux), dead.new_empty(n_rows, n_aux)
        tile_rows = min(n_rows, max(TILE_ROWS_MIN, TILE_VALUES // n_latents))
        tile = left.new_empty(tile_rows, n_latents)
        for start in range(0, n_rows, tile_rows):
            rows = slice(start, min(start + tile_rows, n_rows))
            pre = torch.mm(left[rows], right.T, out=tile[: rows.stop - start])
            if latent_bias is not None:
                pre += latent_bias
            values[rows], indices[rows] = largest(pre, k)
            if n_aux == len(dead):
                aux_values[rows], aux_indices[rows] = pre[:, dead], dead
            elif n_aux:
                among_dead = pre.gather(1, dead.expand(len(pre), -1))
                aux_values[rows], chosen = largest(among_dead, n_aux, ordered=False)
                aux_indices[rows] = dead[chosen]
        values.relu_()
        aux_values.relu_()
        ctx.mark_non_differentiable(indices, aux_indices)
        ctx.save_for_backward(centred, w_enc, values, indices, aux_values, aux_indices, dead)
        return values, indices, aux_values, aux_indices

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        sums = Sums(bags=_bags, by_latent=sum_by_latent)
        g = encoder_gradients(ctx.saved_tensors, grads[0], grads[2], sums, of_z=ctx.needs_input_grad[0])
        return g.z, g.w_enc, g.bias, None, None, None, g.latent_bias if ctx.needs_input_grad[6] else None


class _DecoderGradient(Function):
    """The identity on a decoded row, whose backward is the gradient of the decoder's weights."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, w_dec: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.n_latents = w_dec.shape[0]
        ctx.save_for_backward(values, indices)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        values, indices = ctx.saved_tensors
        return grads[0], sum_by_latent(values, indices, grads[0], ctx.n_latents)[0], None, None


def largest(pre: Tensor, count: int, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and where they are; of equal positive ones at the edge, the lowest indices.

    `torch.topk` does not say which of several equal values it takes. It matters only where the last value taken equals
    the first one left out; those rows are done over. (They are rare in float32, one in ten in bfloat16.)

    Returns:
        values [b, count], largest first if `ordered`, and indices [b, count] int64.
    """
    n = pre.shape[1]
    if count == n:
        return pre.topk(n, dim=1)
    if ordered:
        values, indices = pre.topk(count + 1, dim=1)
        edge, left_out = values[:, count - 1], values[:, count]
        is_tied = edge == left_out
        values, indices = values[:, :count], indices[:, :count].contiguous()
    else:
        values, indices = pre.topk(count, dim=1, sorted=False)
        edge = values.amin(1)
        is_tied = (pre == edge[:, None]).sum(1) > (values == edge[:, None]).sum(1)
    tied = (is_tied & (edge > 0)).nonzero().squeeze(1)
    if len(tied):
        indices[tied] = _largest_of_tied(pre[tied], edge[tied].unsqueeze(1), count)
        values = pre.gather(1, indices)
    return values, indices


def _largest_of_tied(pre: Tensor, edge: Tensor, count: int) -> Tensor:
    """Indices [t, count] of the largest in rows pre [t, n] whose `count`-th largest is edge [t, 1], largest first."""
    above = ~(pre <= edge)  # NaN as well: `topk` takes it for the largest
    equal = pre == edge
    taken = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    indices = taken.nonzero()[:, 1].view(-1, count)
    order = pre.gather(1, indices).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, order)


def sum_by_latent(weights: Tensor, indices: Tensor, rows: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """See `Sums.by_latent`; latents that occur nowhere are 0."""
    flat, weight = indices.flatten(), weights.flatten()
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=n_latents)
    sums = F.embedding_bag(
        order // indices.shape[1],
        rows,
        offsets=counts.cumsum(0) - counts,
        per_sample_weights=weight[order],
        mode="sum",
    )
    return sums, weight.new_zeros(n_latents).index_add_(0, flat, weight)


def _bags(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")
