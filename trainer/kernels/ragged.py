"""As many latents per row as pass a threshold: what batch top-k trains on, and what it and ReLU are evaluated with.

Selecting and differentiating are apart, since batch top-k knows its threshold only when the whole batch has been looked at:
`Candidates` takes rows part by part and holds what may still be chosen, without gradients; `attach` then gives the chosen
activations the gradient they have as functions of rows and weights; `decode` sums them up. `select_dense` and
`decode_dense` are the same in plain torch, the oracle.

Axes: b rows, d width, f latents, n chosen activations over all rows, m auxiliary latents per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trainer.kernels.sparse import largest

TILE_VALUES = 2**22
"""Pre-activations in one tile: 16 MiB of float32, which a last-level cache holds."""

TILE_ROWS_MIN = 128
"""Fewer rows than this make the product itself slow."""

DIGITS = ((20, 11), (9, 11), (0, 9))
"""Bits of a positive float32, highest first, as (shift, count): its order is that of these bits."""


AddUp = Callable[[Tensor], None]
"""Adds up a histogram over all who hold values, in place."""


def alone(_counts: Tensor) -> None:
    """The `AddUp` of one who holds all values."""


class Ragged(NamedTuple):
    """Chosen activations, sorted by row.

    values   [n] > 0.
    rows     [n] int64, ascending.
    latents  [n] int64, ascending within a row.
    """

    values: Tensor
    rows: Tensor
    latents: Tensor

    def at_least(self, bound: float) -> Ragged:
        """Those that are not below `bound`; NaN is not."""
        which = ~(self.values.to(torch.float32) < bound)
        return Ragged(self.values[which], self.rows[which], self.latents[which])


def nth_largest(values: Tensor, n: int, add_up: AddUp = alone) -> float:
    """The n-th largest of positive values, exactly, in float32; 0 where there are fewer than n.

    A radix selection: three histograms, so that values spread over several processes need not be brought together.

    Args:
        values: [m], positive.
        n: counted from 1.
        add_up: over all who hold values.
    """
    bits = values.to(torch.float32).view(torch.int32)
    found, left = 0, n
    for shift, count in DIGITS:
        digit = (bits >> shift) & ((1 << count) - 1)
        counts = torch.bincount(digit, minlength=1 << count).cpu()
        add_up(counts)
        at_least = counts.flip(0).cumsum(0).flip(0)
        if int(at_least[0]) < left:
            return 0.0
        chosen = int((at_least >= left).nonzero()[-1])
        left -= int(at_least[chosen] - counts[chosen])
        found = (found << count) | chosen
        bits = bits[digit == chosen]
    return float(torch.tensor(found, dtype=torch.int32).view(torch.float32))


class Candidates:
    """What may still be among the n largest activations of a batch, collected part by part in bounded memory.

    n        how many are wanted over all parts and processes.
    parts    per part, its candidates; the bound they were selected with may have been lower than the final one.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.parts: list[Ragged] = []
        self.aux: list[tuple[Tensor, Tensor]] = []
        self._bound = 0.0
        self._held = self._held_after_pruning = 0

    def add(self, z: Tensor, w_enc: Tensor, bias: Tensor, dead: Tensor, n_aux: int) -> None:
        """Look at one more part: rows z [b, d]; see `Kernels.encode` for the rest.

        A row that is not finite is a candidate of value NaN, so that the loss shows it.
        """
        bad = (~torch.isfinite(z).all(1)).nonzero().squeeze(1)
        if len(bad):
            z = z.index_fill(0, bad, 0.0)
        pieces = [Ragged(z.new_full((len(bad),), torch.nan), bad, torch.zeros_like(bad))] if len(bad) else []
        aux: list[tuple[Tensor, Tensor]] = []
        for start, pre in _tiles(z, w_enc, bias):
            piece = _above(pre, self._bound, start, z.dtype)
            pieces.append(piece)
            if n_aux:
                values, chosen = largest(pre[:, dead], n_aux)
                aux.append((values.to(z.dtype).relu_(), dead[chosen]))
            self._held += len(piece.values)
            if self._held > self._held_after_pruning + self.n:
                self._prune(pieces)
        found = _join(pieces, z)
        if len(bad):
            order = torch.sort(found.rows, stable=True).indices
            found = Ragged(*(part[order] for part in found))
        self.parts.append(found)
        if n_aux:
            self.aux.append((torch.cat([v for v, _ in aux]), torch.cat([i for _, i in aux])))

    def threshold(self, add_up: AddUp = alone) -> float:
        """The smallest of the n largest over all parts and processes; 0 where fewer than n are positive."""
        held = [part.values for part in self.parts]
        return nth_largest(torch.cat(held) if held else torch.zeros(0), self.n, add_up)

    def _prune(self, pieces: list[Ragged]) -> None:
        """Raise the bound to the n-th largest so far: nothing below it can be among the n largest of all."""
        held = torch.cat([part.values for part in (*self.parts, *pieces)])
        self._bound = nth_largest(held, self.n)
        for group in (self.parts, pieces):
            group[:] = [part.at_least(self._bound) for part in group]
        self._held = self._held_after_pruning = sum(len(p.values) for p in (*self.parts, *pieces))


def select(z: Tensor, w_enc: Tensor, bias: Tensor, threshold: float) -> Ragged:
    """All activations of rows z [b, d] that are positive and at least `threshold`. Holds one tile of pre-activations."""
    return _join([_above(pre, threshold, start, z.dtype) for start, pre in _tiles(z, w_enc, bias)], z)


def select_dense(z: Tensor, w_enc: Tensor, bias: Tensor, threshold: float) -> Tensor:
    """The oracle of `select`: dense activations [b, f], 0 where not selected, with gradients."""
    pre = (z - bias) @ w_enc.T
    return torch.where((pre > 0) & (pre.to(torch.float32) >= threshold), pre, 0)


def attach(values: Tensor, rows: Tensor, latents: Tensor, z: Tensor, w_enc: Tensor, bias: Tensor) -> Tensor:
    """`values` [n] with their gradient as values[i] = max(0, w_enc[latents[i]] . (z[rows[i]] - bias)).

    Args:
        values: [n], computed before; a value of 0 has no gradient.
        rows: [n] int64.
        latents: [n] int64.
        z: [b, d].
        w_enc: [f, d].
        bias: [d].
    """
    return _Attach.apply(values, rows, latents, z, w_enc, bias)


def decode(code: Ragged, n_rows: int, w_dec: Tensor) -> Tensor:
    """Row b: sum of values[i] * w_dec[latents[i]] over the i with rows[i] = b. Returns [n_rows, d]."""
    counts = torch.bincount(code.rows, minlength=n_rows)
    out = F.embedding_bag(
        code.latents,
        w_dec.detach(),
        offsets=counts.cumsum(0) - counts,
        per_sample_weights=code.values,
        mode="sum",
    )
    return _DecoderGradient.apply(out, w_dec, code.values.detach(), code.rows, code.latents)


def decode_dense(dense: Tensor, w_dec: Tensor) -> Tensor:
    """The oracle of `decode`: dense activations [b, f] to [b, d]."""
    return dense @ w_dec


def pad(code: Ragged, n_rows: int) -> tuple[Tensor, Tensor]:
    """The same with as many slots in every row as the fullest has: values [b, k], largest first, and latents [b, k].

    A slot of value 0 is not active.
    """
    counts = torch.bincount(code.rows, minlength=n_rows)
    width = int(counts.max()) if n_rows else 0
    slot = torch.arange(len(code.rows), device=code.rows.device) - (counts.cumsum(0) - counts)[code.rows]
    values = code.values.new_zeros(n_rows, width)
    latents = code.latents.new_zeros(n_rows, width)
    values[code.rows, slot], latents[code.rows, slot] = code.values, code.latents
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, latents.gather(1, order)


def _tiles(z: Tensor, w_enc: Tensor, bias: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Pre-activations of z, some rows at a time, with the number of the first; in autocast's dtype where that is on."""
    kind, n_latents = z.device.type, w_enc.shape[0]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else z.dtype
    left, right = (z - bias).to(dtype), w_enc.to(dtype)
    n_rows = min(len(z), max(TILE_ROWS_MIN, TILE_VALUES // n_latents))
    tile = left.new_empty(n_rows, n_latents)
    for start in range(0, len(z), max(1, n_rows)):
        stop = min(start + n_rows, len(z))
        yield start, torch.mm(left[start:stop], right.T, out=tile[: stop - start])


def _above(pre: Tensor, bound: float, first_row: int, dtype: torch.dtype) -> Ragged:
    """Of pre-activations [b, f]: those that are positive and at least `bound`."""
    is_chosen = pre.to(torch.float32) >= bound if bound > 0 else pre > 0
    rows, latents = is_chosen.nonzero(as_tuple=True)
    return Ragged(pre[rows, latents].to(dtype), rows + first_row, latents)


def _join(pieces: list[Ragged], like: Tensor) -> Ragged:
    if not pieces:
        nothing = torch.zeros(0, dtype=torch.int64, device=like.device)
        return Ragged(like.new_zeros(0), nothing, nothing)
    return Ragged(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _sum_by_latent(weights: Tensor, rows: Tensor, latents: Tensor, source: Tensor, n_latents: int) -> Tensor:
    """out[j] = sum of weights[i] * source[rows[i]] over the i with latents[i] == j. [f, d], in a fixed order."""
    order = torch.sort(latents, stable=True).indices
    counts = torch.bincount(latents, minlength=n_latents)
    return F.embedding_bag(
        rows[order],
        source,
        offsets=counts.cumsum(0) - counts,
        per_sample_weights=weights[order],
        mode="sum",
    )


class _Attach(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, rows: Tensor, latents: Tensor, z: Tensor, w_enc: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, rows, latents, z - bias, w_enc)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        values, rows, latents, centred, w_enc = ctx.saved_tensors
        g = grads[0] * (values > 0)
        g_z = None
        if ctx.needs_input_grad[3]:
            g_z = torch.zeros_like(centred).index_add_(0, rows, g.unsqueeze(1) * w_enc[latents])
        g_w = _sum_by_latent(g, rows, latents, centred, w_enc.shape[0])
        # the bias enters every pre-activation through -W_enc b: its gradient needs only each latent's total
        totals = g.new_zeros(w_enc.shape[0]).index_add_(0, latents, g)
        return None, None, None, g_z, g_w, -(totals @ w_enc)


class _DecoderGradient(Function):
    """The identity on decoded rows, whose backward is the gradient of the decoder's weights."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, w_dec: Tensor, values: Tensor, rows: Tensor, latents: Tensor
    ) -> Tensor:
        ctx.n_latents = w_dec.shape[0]
        ctx.save_for_backward(values, rows, latents)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        values, rows, latents = ctx.saved_tensors
        g_w = _sum_by_latent(values, rows, latents, grads[0], ctx.n_latents)
        return grads[0], g_w, None, None, None
