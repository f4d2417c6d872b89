"""CUDA: the product by cuBLAS, tile by tile, everything sparse by kernels of its own.

A tile of pre-activations stays in the last-level cache while one program per row searches it; a [b, f] tensor never exists.
The search has no sort of f values: of LANES interleaved subsets the maxima are taken; the k-th largest of those is a bound
that at least k values reach, and little more than k do; only they are written out and sorted. Values and latent numbers
travel as one integer, so the lowest of equal latents is taken and the result does not depend on timing.

Sums are in float32 (float64 for float64) whatever the inputs are. Every output has one writer that adds in a fixed order: no
atomics, hence the same bits every time on the same device. The price is that a latent active in every row is summed by the
programs of one latent.

Runs on tensors of the CPU where triton interprets its kernels (TRITON_INTERPRET=1 before it is imported): for tests.

Axes: b rows, d width, f latents, k active latents, m auxiliary latents, s chosen latents, c candidates.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from triton import knobs

from actcache.errors import UsageError
from trainer.kernels import Selected, programs
from trainer.kernels.gradients import (
    Sums,
    encoder_gradients,
    full_precision,
    is_dense,
    product_dtype,
    spread,
)

TILE_VALUES = 2**24
"""Pre-activations in one tile: 32 MiB of bfloat16, which the L2 cache of a large GPU holds."""

TILE_ROWS_MIN = 128
"""Fewer rows than this leave processors idle in the product."""

LANES = 1024
"""Subsets of a row whose maxima bound its k-th largest value. More give a better bound and take longer to sort."""

SLACK = 2
"""Room for values that reach the bound, as a multiple of the latents wanted; a row with more is searched the slow way."""


def check_device(kind: str) -> None:
    """Raises UsageError unless triton can run on tensors of devices of this `kind`."""
    if kind != "cuda" and not knobs.runtime.interpret:
        raise UsageError(f"kernels 'triton' need a CUDA device, these tensors are on {kind!r}; use 'sparse'")


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
    return _Decode.apply(values, indices, w_dec)  # type: ignore[no-any-return]


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
        left, right = centred.to(dtype), w_enc.to(dtype).T
        search, search_dead = _Search(n_rows, k, n_latents, z), _Search(n_rows, n_aux, len(dead), z, dead)
        tile_rows = min(n_rows, max(TILE_ROWS_MIN, TILE_VALUES // n_latents))
        tile = left.new_empty(tile_rows, n_latents)
        for start in range(0, n_rows, tile_rows):
            pre = torch.mm(left[start : start + tile_rows], right, out=tile[: n_rows - start])
            if latent_bias is not None:
                pre += latent_bias
            search.take(pre, start)
            search_dead.take(pre, start)
        values, indices = search.found()
        aux_values, aux_indices = search_dead.found()
        if z.dtype == torch.float64:  # found at float32's resolution
            values, aux_values = (
                _pre_activations(centred, w_enc, latent_bias, i) for i in (indices, aux_indices)
            )
        values, aux_values = values.to(z.dtype).relu_(), aux_values.to(z.dtype).relu_()
        ctx.mark_non_differentiable(indices, aux_indices)
        ctx.save_for_backward(centred, w_enc, values, indices, aux_values, aux_indices, dead)
        return values, indices, aux_values, aux_indices

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        sums = Sums(bags=bags, by_latent=sum_by_latent)
        g = encoder_gradients(ctx.saved_tensors, grads[0], grads[2], sums, of_z=ctx.needs_input_grad[0])
        return g.z, g.w_enc, g.bias, None, None, None, g.latent_bias if ctx.needs_input_grad[6] else None


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, w_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, w_dec)
        return bags(values, indices, w_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        values, indices, w_dec = ctx.saved_tensors
        g_values = dots(grads[0], indices, w_dec) if ctx.needs_input_grad[0] else None
        g_w = sum_by_latent(values, indices, grads[0], w_dec.shape[0])[0] if ctx.needs_input_grad[2] else None
        return g_values, None, g_w


class _Search:
    """The `count` largest of each row of pre-activations [b, f], or of their columns `among`, as they come tile by tile."""

    def __init__(self, n_rows: int, count: int, n: int, z: Tensor, among: Tensor | None = None) -> None:
        self.count, self.n, self.among = count, n, among
        self.padded = max(2, triton.next_power_of_2(count))
        room = max(SLACK * self.padded, 16) if count else 0
        self.keys = torch.full((n_rows, room), programs.NONE.value, dtype=torch.int64, device=z.device)

    def take(self, pre: Tensor, start: int) -> None:
        """Search the pre-activations of rows from `start`."""
        if self.count:
            keys = self.keys[start : start + len(pre)]
            _launch(
                programs.search,
                (len(pre),),
                (pre, pre if self.among is None else self.among, keys, self.n, pre.shape[1]),
                LANES=max(LANES, self.padded),
                PADDED=self.padded,
                ROOM=keys.shape[1],
                IS_AMONG=self.among is not None,
                num_warps=8,
            )

    def found(self) -> tuple[Tensor, Tensor]:
        """Values [b, count] float32, largest first, and latent numbers [b, count]."""
        keys = self.keys.topk(self.count, dim=1).values
        ordered = keys >> 32
        values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
        indices = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
        return values, indices if self.among is None else self.among[indices]


def _pre_activations(centred: Tensor, w_enc: Tensor, latent_bias: Tensor | None, indices: Tensor) -> Tensor:
    values = dots(centred, indices, w_enc)
    return values if latent_bias is None else values + latent_bias[indices]


def bags(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """See `Sums.bags`."""
    (n_rows, n_chosen), width = indices.shape, table.shape[1]
    out = table.new_empty(n_rows, width)
    sizes = _sizes(table)
    grid = (n_rows, triton.cdiv(width, sizes["BLOCK"]))
    read = (weights.contiguous(), indices.contiguous(), table.contiguous())
    _launch(programs.bags, grid, (*read, out, n_chosen, width), **sizes)
    return out


def dots(rows: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """[b, s]: the product of rows[b] with table[indices[b, j]]."""
    (n_rows, n_chosen), width = indices.shape, table.shape[1]
    out = table.new_empty(n_rows, n_chosen)
    grid = (n_rows, triton.cdiv(n_chosen, CHOSEN))
    read = (rows.contiguous(), indices.contiguous(), table.contiguous())
    _launch(programs.dots, grid, (*read, out, n_chosen, width), **_sizes(table))
    return out


def sum_by_latent(weights: Tensor, indices: Tensor, rows: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """See `Sums.by_latent`; latents that occur nowhere are 0."""
    n_chosen, width = indices.shape[1], rows.shape[1]
    latents, order = torch.sort(indices.flatten(), stable=True)
    ends = torch.searchsorted(latents, torch.arange(n_latents, device=latents.device), right=True)
    out, totals = rows.new_empty(n_latents, width), rows.new_empty(n_latents)
    sizes = _sizes(rows)
    grid = (n_latents, triton.cdiv(width, sizes["BLOCK"]))
    read = (weights.contiguous(), order, ends, rows.contiguous())
    _launch(programs.by_latent, grid, (*read, out, totals, n_chosen, width), **sizes)
    return out, totals


CHOSEN = 16
"""Chosen latents that a program has in hand at once."""


def _sizes(like: Tensor) -> dict[str, Any]:
    exact = tl.float64 if like.dtype == torch.float64 else tl.float32
    return {
        "BLOCK": min(512, triton.next_power_of_2(like.shape[1])),
        "CHOSEN": CHOSEN,
        "EXACT": exact,
        "num_warps": 4,
    }


def _launch(program: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **sizes: Any) -> None:
    """Run `program` on the device of the first argument; tensors must be contiguous."""
    assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device_of(arguments[0]):
        program[grid](
            *arguments, enable_fp_fusion=True, **sizes
        )  # said: triton is about to change its default
