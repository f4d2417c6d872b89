"""A finished SAE: raw rows in, raw rows out, always through the transform it was trained with.

Axes: b rows, d width, k active latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.sae import TopKSAE
from trainer.transform import restore, standardise


class Code(NamedTuple):
    """Rows as the SAE holds them.

    values   [b, k] float32 activations >= 0, in standardised units. A slot of value 0 is not active.
    indices  [b, k] int64 latents.
    mean     [b, 1] and
    scale    [b, 1] float32: what standardising took from each row, kept to give it back.
    """

    values: Tensor
    indices: Tensor
    mean: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSAE:
    """An SAE with all that decides what it computes.

    sae         the module, in evaluation mode and without gradients.
    config      of its run, resolved.
    layers      the model's layer numbers it was trained on.
    var_layer   per layer, the variance that weighed the loss.
    source      fingerprint of the rows and their order.
    provenance  what the caller of the run knew: model, store, versions.
    """

    sae: TopKSAE
    config: TrainConfig
    layers: tuple[int, ...]
    var_layer: dict[int, float]
    source: str
    provenance: dict[str, Any]

    @torch.no_grad()
    def encode(self, rows: Tensor) -> Code:
        """Raw rows [b, d], of any float dtype, to their active latents."""
        standardised = standardise(rows.to(self.sae.w_enc.device))
        selected = self.sae.encode(standardised.z)
        return Code(selected.values, selected.indices, standardised.mean, standardised.scale)

    @torch.no_grad()
    def decode(self, code: Code) -> Tensor:
        """Raw rows xhat [b, d] float32. Change `code.values` first (`code._replace`) to ablate or steer."""
        return restore(self.sae.decode(code.values, code.indices), code.mean, code.scale)

    def __repr__(self) -> str:
        return f"TrainedSAE(width={self.sae.width}, n_latents={self.sae.n_latents}, k={self.sae.k}, layers={self.layers})"
