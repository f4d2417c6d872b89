"""What training minimises. Every loss is a sum over rows divided by the batch's rows, so parts of a batch add up.

Axes: b rows, d width, l layers.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def row_weights(
    scale: Tensor, layer_i: Tensor, var_layer: Tensor, width: int, space: Literal["raw", "standardised"]
) -> Tensor:
    """What a row's squared error in z-space counts: ||x - xhat||^2 / (d Var_layer) = weight * ||z - zhat||^2.

    x = z * scale + mean and xhat = zhat * scale + mean, so x - xhat = scale * (z - zhat) exactly.

    Args:
        scale: [b, 1] s + eps of the row.
        layer_i: [b] int64, index of the row's layer in the run's layers.
        var_layer: [l] variance per dimension of that layer's rows, in the same space as the loss.
        width: d.
        space: `raw`: scale^2 / (d Var_layer); `standardised`: 1 / (d Var_layer).

    Returns:
        [b].
    """
    weights = (width * var_layer[layer_i]).reciprocal()
    return weights * scale.squeeze(1).square() if space == "raw" else weights


def reconstruction_loss(squared_error: Tensor, weights: Tensor, batch_rows: int) -> Tensor:
    """(1/B) sum_rows ||x - xhat||^2 / (d Var_layer).

    For rows distributed as the first window, the mean over one layer's rows is that layer's FVU.

    Args:
        squared_error: [b] ||z - zhat||^2.
        weights: [b] of `row_weights`.
        batch_rows: B, rows of the whole batch, of which these b are a part.
    """
    return (squared_error * weights).sum() / batch_rows


def auxk_loss(
    aux_decoded: Tensor, residual: Tensor, squared_error: Tensor, coef: float, batch_rows: int
) -> Tensor:
    """Dead latents learn to explain what the live ones leave: coef / B * sum_rows ||ehat - e||^2 / ||e||^2.

    In z-space. e and its norm are constants here: the live latents are not pushed. A row without residual counts 0.

    Args:
        aux_decoded: [b, d] ehat = W_dec^T a_aux, without b.
        residual: [b, d] e = z - zhat.
        squared_error: [b] ||e||^2.
        coef: weight of this loss.
        batch_rows: B.

    Source: Gao et al. (arXiv 2406.04093), appendix A.2; openai train.py:754-760.
    """
    size = squared_error.detach()
    ratio = (aux_decoded - residual.detach()).square().sum(1) / size.where(size > 0, 1)
    return coef * ratio.where(size > 0, 0).sum() / batch_rows
