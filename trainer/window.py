"""What is measured once, on the run's first window, and then fixed: loss weights, baselines, and the first bias.

Axes: n rows of the window, d width, l layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actcache.errors import NonFiniteError, UsageError
from actcache.flow import Batch
from trainer.provenance import describe_non_finite, layer_index
from trainer.transform import standardise

FIRST_WINDOW_ROWS = 131_072
"""Rows measured. The default window of a store's stream, so peeking reads nothing that is not needed anyway."""

BLOCK_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstWindow:
    """Fixed for the whole run, and saved with it.

    mean_layer  [l, d] float32, mean raw row of each layer: the baseline of the training FVU.
    var_layer   [l] float32, (1/(n_l d)) sum_rows ||x - mean_l||^2, in the space of the loss. About the mean of each
                dimension, so a constant vector does not count as something to explain.
    """

    mean_layer: Tensor
    var_layer: Tensor


def measure_window(
    batch: Batch, layers: tuple[int, ...], space: Literal["raw", "standardised"], device: torch.device
) -> FirstWindow:
    """Mean and variance of each layer's rows: float32 in blocks, centred, summed in float64.

    Raises:
        UsageError: a layer has fewer than two rows, or rows that are all alike.
        NonFiniteError: a row holds NaN or infinity.
    """
    layer_i = layer_index(batch.layer, layers)
    means, variances = [], []
    for i, layer in enumerate(layers):
        ids = (layer_i == i).nonzero().squeeze(1)
        if len(ids) < 2:
            raise UsageError(
                f"{len(ids)} of the first {len(batch)} rows are of layer {layer}: its variance cannot be measured. "
                "Use more rows, or a window in which all layers occur"
            )
        blocks = [batch.rows[block].to(device) for block in ids.split(BLOCK_ROWS)]
        mean, variance = _moments(blocks)
        if space == "standardised":
            _, variance = _moments([standardise(block).z for block in blocks])
        if not torch.isfinite(variance):
            raise NonFiniteError(
                f"the variance of layer {layer} over the first {len(batch)} rows is {float(variance)}; "
                f"{describe_non_finite(batch)}"
            )
        if variance <= 0:
            raise UsageError(
                f"all {len(ids)} rows of layer {layer} in the first window are alike: nothing to learn"
            )
        means.append(mean)
        variances.append(variance)
    return FirstWindow(mean_layer=torch.stack(means).float(), var_layer=torch.stack(variances).float())


def _moments(blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean [d] and variance per dimension (a scalar, divisor n d) of all rows, float64."""
    n_rows = sum(len(block) for block in blocks)
    mean = torch.stack([block.sum(0, dtype=torch.float64) for block in blocks]).sum(0) / n_rows
    centre = mean.float()
    squares = [(block.float() - centre).square_().sum(dtype=torch.float64) for block in blocks]
    return mean, torch.stack(squares).sum() / (n_rows * len(mean))
