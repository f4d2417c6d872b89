"""One optimiser step: gradients of a whole batch in parts, then one change of the weights.

Axes: b rows, d width, f latents, l layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actcache.errors import NonFiniteError
from actcache.flow import Batch
from trainer import loss
from trainer.config import TrainConfig
from trainer.dead import ACTIVE_ABOVE, mark_active
from trainer.provenance import describe_non_finite, layer_index
from trainer.sae import TopKSAE
from trainer.transform import standardise
from trainer.window import FirstWindow


@dataclass(slots=True, kw_only=True)
class StepSums:
    """What one batch adds to the metrics.

    loss        reconstruction loss of the batch.
    aux_loss    auxiliary loss of the batch; 0 when nothing is dead.
    n_rows      [l] int64, rows of each layer.
    residual    [l] float64, sum of ||x - xhat||^2, raw space.
    total       [l] float64, sum of ||x - mean_l||^2, mean_l of the first window.
    n_active    number of activations above `ACTIVE_ABOVE`.
    active      [f] bool, latents with such an activation.
    """

    loss: float
    aux_loss: float
    n_rows: Tensor
    residual: Tensor
    total: Tensor
    n_active: int
    active: Tensor


def accumulate_gradients(
    model: TopKSAE,
    batch: Batch,
    layers: tuple[int, ...],
    window: FirstWindow,
    dead: Tensor,
    config: TrainConfig,
) -> StepSums:
    """Add the gradient of the batch's loss to the parameters' `grad`, `micro_rows` at a time.

    Args:
        model: on the window's device; the rows are brought there.
        batch: B rows.
        layers: the run's layers, ascending.
        window: what is fixed for the run.
        dead: [n_dead] the latents that are dead before this step.
        config: resolved.
    """
    device, dtype = window.var_layer.device, model.w_enc.dtype
    layer_i = layer_index(batch.layer, layers).to(device)
    n_aux = min(config.auxk or 0, len(dead))
    losses = torch.zeros(2, dtype=torch.float64, device=device)
    residual = torch.zeros(len(layers), dtype=torch.float64, device=device)
    total = torch.zeros_like(residual)
    active = torch.zeros(model.n_latents, dtype=torch.bool, device=device)
    n_active = 0
    micro_rows = config.micro_rows or len(batch)
    for rows, rows_layer_i in zip(batch.rows.split(micro_rows), layer_i.split(micro_rows), strict=True):
        x = rows.to(device, torch.float32)
        standardised = standardise(x)
        z, scale = standardised.z.to(dtype), standardised.scale.to(dtype)
        weights = loss.row_weights(
            scale, rows_layer_i, window.var_layer.to(dtype), model.width, config.loss_space
        )
        code = model.encode(z, dead=dead, n_aux=n_aux)
        error = z - model.decode(code.values, code.indices)
        squared_error = torch.linalg.vecdot(error, error)
        objective = loss.reconstruction_loss(squared_error, weights, len(batch))
        losses[0] += objective.detach()
        if n_aux:
            aux_decoded = model.decode_directions(code.aux_values, code.aux_indices, candidates=dead)
            aux = loss.auxk_loss(aux_decoded, error, squared_error, config.auxk_coef, len(batch))
            losses[1] += aux.detach()
            objective = objective + aux
        objective.backward()
        with torch.no_grad():
            raw_error = squared_error * scale.squeeze(1).square()
            residual.index_add_(0, rows_layer_i, raw_error.double())
            total.index_add_(0, rows_layer_i, (x - window.mean_layer[rows_layer_i]).square_().sum(1).double())
            mark_active(active, code.values, code.indices)
            n_active += int((code.values > ACTIVE_ABOVE).sum())
    return StepSums(
        loss=float(losses[0]),
        aux_loss=float(losses[1]),
        n_rows=torch.bincount(layer_i, minlength=len(layers)),
        residual=residual,
        total=total,
        n_active=n_active,
        active=active,
    )


def apply_gradients(model: TopKSAE, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> float:
    """Project, clip, step, renormalise; the gradients are gone afterwards.

    Returns:
        The norm of the whole gradient after projection, before clipping. If it is not finite nothing has been changed.
    """
    model.project_decoder_gradient()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))
    if norm < float("inf"):
        if clip_norm is not None and norm > clip_norm:
            for grad in grads:
                grad.mul_(clip_norm / norm)
        optimizer.step()
        model.normalise_decoder()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(value: float, what: str, step: int, batch: Batch, after: str) -> None:
    """Raises NonFiniteError unless `value` is finite, naming the step and the batch's rows.

    Args:
        value: a loss or a gradient's norm.
        what: its name.
        step: the step it belongs to.
        batch: the rows it was computed from.
        after: what is left of the run.
    """
    if not float("-inf") < value < float("inf"):
        raise NonFiniteError(f"step {step}: {what} is {value}; {describe_non_finite(batch)}. {after}")
