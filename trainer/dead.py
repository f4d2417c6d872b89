"""Which latents are dead: counted in rows, moved on once per optimiser step."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVE_ABOVE = 1e-3
"""A latent is active in a row when its activation exceeds this. Source: openai train.py, mlsae lightning.py `dead_threshold`."""


class DeadCounter:
    """Rows since each latent was last active.

    rows_since  [f] int64. Only `update` changes it, so evaluation never does.
    after_rows  a latent is dead once its count reaches this: `dead_after_tokens` x layers.
    """

    def __init__(self, n_latents: int, *, after_rows: int, device: torch.device) -> None:
        self.after_rows = after_rows
        self.rows_since = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def dead(self) -> Tensor:
        """[n_dead] int64, the dead latents, ascending."""
        return (self.rows_since >= self.after_rows).nonzero().squeeze(1)

    def update(self, active: Tensor, n_rows: int) -> None:
        """After one optimiser step over `n_rows` rows in which the latents `active` [f] bool were active."""
        self.rows_since += n_rows
        self.rows_since.masked_fill_(active, 0)


def mark_active(active: Tensor, values: Tensor, indices: Tensor) -> None:
    """Set `active` [f] bool where some row's activation [b, k] exceeds `ACTIVE_ABOVE`."""
    active[indices[values > ACTIVE_ABOVE]] = True
