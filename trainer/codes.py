"""Which latents are active on some rows, and how much: three representations with the same few operations.

Axes: b rows, d width, f latents, s slots per row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.dead import ACTIVE_ABOVE, mark_active
from trainer.kernels import Kernels, ragged


class Code(Protocol):
    """Activations of b rows, with gradients."""

    def decode(self, w_dec: Tensor) -> Tensor:
        """What the active latents add up to, [b, d]; w_dec [f, d]."""
        ...

    def first(self, n_latents: int) -> Code:
        """The same with only the first `n_latents` latents active."""
        ...

    def l1(self) -> Tensor:
        """[b] sum of activations."""
        ...

    def n_active(self) -> Tensor:
        """[b] int64, activations above `ACTIVE_ABOVE`."""
        ...

    def mark(self, active: Tensor) -> None:
        """Set `active` [f] bool where some row's activation exceeds `ACTIVE_ABOVE`."""
        ...


class Fixed(NamedTuple):
    """As many slots in every row: values [b, s] (0: not active) and latents [b, s] int64, all among `candidates` if given."""

    values: Tensor
    latents: Tensor
    kernels: Kernels
    candidates: Tensor | None = None

    def decode(self, w_dec: Tensor) -> Tensor:
        """See `Code`."""
        return self.kernels.decode(self.values, self.latents, w_dec, candidates=self.candidates)

    def first(self, n_latents: int) -> Fixed:
        """See `Code`."""
        return self._replace(values=self.values * (self.latents < n_latents))

    def l1(self) -> Tensor:
        """See `Code`."""
        return self.values.sum(1)

    def n_active(self) -> Tensor:
        """See `Code`."""
        return (self.values > ACTIVE_ABOVE).sum(1)

    def mark(self, active: Tensor) -> None:
        """See `Code`."""
        mark_active(active, self.values, self.latents)


class Listed(NamedTuple):
    """One entry per active latent, see `ragged.Ragged`."""

    code: ragged.Ragged
    n_rows: int

    def decode(self, w_dec: Tensor) -> Tensor:
        """See `Code`."""
        return ragged.decode(self.code, self.n_rows, w_dec)

    def first(self, n_latents: int) -> Listed:
        """See `Code`."""
        values = self.code.values * (self.code.latents < n_latents)
        return self._replace(code=self.code._replace(values=values))

    def l1(self) -> Tensor:
        """See `Code`."""
        return self.code.values.new_zeros(self.n_rows).index_add_(0, self.code.rows, self.code.values)

    def n_active(self) -> Tensor:
        """See `Code`."""
        is_active = self.code.values > ACTIVE_ABOVE
        return torch.bincount(self.code.rows[is_active], minlength=self.n_rows)

    def mark(self, active: Tensor) -> None:
        """See `Code`."""
        mark_active(active, self.code.values, self.code.latents)


class Dense(NamedTuple):
    """Every latent's activation: values [b, f]."""

    values: Tensor

    def decode(self, w_dec: Tensor) -> Tensor:
        """See `Code`."""
        return self.values @ w_dec

    def first(self, n_latents: int) -> Dense:
        """See `Code`."""
        is_first = torch.arange(self.values.shape[1], device=self.values.device) < n_latents
        return Dense(self.values * is_first)

    def l1(self) -> Tensor:
        """See `Code`."""
        return self.values.sum(1)

    def n_active(self) -> Tensor:
        """See `Code`."""
        return (self.values > ACTIVE_ABOVE).sum(1)

    def mark(self, active: Tensor) -> None:
        """See `Code`."""
        active |= (self.values > ACTIVE_ABOVE).any(0)
