"""What training minimises. Every loss is a sum over rows divided by the batch's rows, so parts of a batch add up.

Axes: b rows, s slices of a row (layers side by side), d width, l layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def slice_weights(
    scale: Tensor, layer_i: Tensor, var_layer: Tensor, width: int, space: Literal["raw", "standardised"]
) -> Tensor:
    """What a slice's squared error in z-space counts: (1/s) ||x - xhat||^2 / (d Var_layer) = weight * ||z - zhat||^2.

    x = z * scale + mean and xhat = zhat * scale + mean, so x - xhat = scale * (z - zhat) exactly.

    Args:
        scale: [b or 1, s, 1] of the target.
        layer_i: [b or 1, s] int64, index of the slice's layer in the run's layers.
        var_layer: [l] variance per dimension of that layer's targets, in the same space as the loss.
        width: d.
        space: `raw`: scale^2 / (s d Var_layer); `standardised`: 1 / (s d Var_layer).

    Returns:
        [b or 1, s].
    """
    weights = (layer_i.shape[1] * width * var_layer[layer_i]).reciprocal()
    return weights * scale.squeeze(-1).square() if space == "raw" else weights


def errors(z: Tensor, zhat: Tensor) -> tuple[Tensor, Tensor]:
    """The error e = z - zhat [b, s, d], and ||e||^2 of each slice [b, s]."""
    error = z - zhat
    return error, torch.linalg.vecdot(error, error)


def distances(targets: Tensor, mean_layer: Tensor, layer_i: Tensor) -> Tensor:
    """||x - mean_l||^2 of slices x [b, s, d] of layers layer_i [b or 1, s], mean_l [l, d]; float32 [b, s]."""
    return (targets.to(torch.float32) - mean_layer[layer_i]).square().sum(2)


def reconstruction_loss(squared_error: Tensor, weights: Tensor, batch_rows: int) -> Tensor:
    """(1/B) sum over rows of the mean over their slices of ||x - xhat||^2 / (d Var_layer).

    For rows distributed as the first window, the mean over one layer's rows is that layer's FVU.

    Args:
        squared_error: [b, s] ||z - zhat||^2.
        weights: [b or 1, s] of `slice_weights`.
        batch_rows: B, rows of the whole batch, of which these b are a part.
    """
    return (squared_error * weights).sum() / batch_rows


def auxk_loss(
    aux_decoded: Tensor, residual: Tensor, squared_error: Tensor, coef: float, batch_rows: int
) -> Tensor:
    """Dead latents learn to explain what the live ones leave: coef / B * sum_rows ||ehat - e||^2 / ||e||^2.

    In z-space, over all slices of a row. e and its norm are constants here: the live latents are not pushed. A row without
    residual counts 0.

    Args:
        aux_decoded: [b, s * d] ehat = W_dec^T a_aux, without b.
        residual: [b, s * d] e = z - zhat.
        squared_error: [b] ||e||^2.
        coef: weight of this loss.
        batch_rows: B.

    Source: Gao et al. (arXiv 2406.04093), appendix A.2; openai train.py:754-760.
    """
    size = squared_error.detach()
    ratio = (aux_decoded - residual.detach()).square().sum(1) / size.where(size > 0, 1)
    return coef * ratio.where(size > 0, 0).sum() / batch_rows


def l1_loss(l1: Tensor, coef: float, batch_rows: int) -> Tensor:
    """Coef / B * sum over rows of sum_f a_f, in standardised units; decoder rows have norm 1. l1: [b] sums of a row.

    Source: Anthropic, Circuits Updates, April 2024.
    """
    return coef * l1.sum() / batch_rows


def prefixes(shares: tuple[float, ...], n_latents: int) -> list[int]:
    """How many latents each prefix of Matryoshka groups holds: shares are rounded, the last prefix holds all.

    Raises:
        ValueError: a group would be empty.
    """
    ends, total = [], 0.0
    for share in shares:
        total += share
        ends.append(round(total * n_latents))
    ends[-1] = n_latents
    if any(stop <= start for start, stop in zip([0, *ends], ends, strict=False)):
        raise ValueError(f"matryoshka={shares} of {n_latents} latents leaves a group empty")
    return ends
