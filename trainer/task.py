"""What a dictionary is trained to do: which rows it is fed, which it is to give, and what errors weigh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.compiled import fused
from trainer.config import TrainConfig
from trainer.forms import FORMS, Form, Rows
from trainer.loss import slice_weights
from trainer.sae import Dictionary
from trainer.transform import Standardised, Transforms, apply
from trainer.window import FirstWindow


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Everything about a run that no step changes, and the dictionary that steps change.

    config      resolved.
    layers      the model's layer numbers of the rows, ascending.
    model       the dictionary.
    window      what the first window fixed.
    transforms  from raw rows to what the dictionary sees, and back.
    """

    config: TrainConfig
    layers: tuple[int, ...]
    model: Dictionary
    window: FirstWindow
    transforms: Transforms

    @property
    def form(self) -> Form:
        """What a row is."""
        return FORMS[self.config.form]

    @property
    def device(self) -> torch.device:
        """Where the dictionary lives."""
        return self.window.var_layer.device

    def see(self, rows: Rows) -> tuple[Tensor, Standardised]:
        """Standardised inputs [b, s * d] and targets, on the dictionary's device and in its dtype."""
        dtype = self.model.w_enc.dtype
        see = fused(apply, is_wanted=self.config.compile)
        z, target = see(self.transforms, *rows.to(self.device))
        return z.to(dtype), Standardised(*(x.to(dtype) for x in target))

    def weights(self, target: Standardised, layer_i: Tensor) -> Tensor:
        """What each slice's squared error in z-space counts, [b or 1, s]."""
        var_layer = self.window.var_layer.to(target.z.dtype)
        return slice_weights(target.scale, layer_i, var_layer, target.z.shape[2], self.config.loss_space)
