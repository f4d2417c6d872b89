"""One optimiser step: gradients of a whole batch in parts, then one change of the weights.

Axes: b rows, s slices of a row (layers side by side), d width, f latents, l layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actcache.errors import NonFiniteError
from actcache.flow import Batch
from trainer import loss
from trainer.compiled import fused
from trainer.forms import Rows
from trainer.provenance import describe_non_finite
from trainer.ranks import Ranks
from trainer.sae import Dictionary
from trainer.selection import Found, Wanted
from trainer.task import Task

WIDE_WEIGHT = 1 / 8
"""Of Multi-TopK's second loss. Source: EleutherAI/sparsify trainer.py:444-446."""


@dataclass(slots=True, kw_only=True)
class StepSums:
    """What one batch adds to the metrics, over all ranks.

    loss        reconstruction loss of the batch.
    aux_loss    auxiliary loss of the batch; 0 when nothing is dead.
    extra_loss  everything else that was minimised: L1 penalty, Multi-TopK, smaller prefixes of Matryoshka groups.
    rows        rows of the batch.
    n_rows      [l] int64, slices of each layer; where a row is one layer's, rows.
    residual    [l] float64, sum of ||x - xhat||^2, raw space.
    total       [l] float64, sum of ||x - mean_l||^2, mean_l of the first window.
    n_active    [l] int64, activations above `ACTIVE_ABOVE` of rows with that layer.
    l1          [l] float64, their sum.
    active      [f] bool, latents with such an activation.
    threshold   smallest activation that batch top-k selected, else None.
    """

    loss: float
    aux_loss: float
    extra_loss: float
    rows: int
    n_rows: Tensor
    residual: Tensor
    total: Tensor
    n_active: Tensor
    l1: Tensor
    active: Tensor
    threshold: float | None = None


class _Sums:
    """What the parts of a batch add up to on this rank."""

    def __init__(self, n_layers: int, n_latents: int, device: torch.device) -> None:
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)
        self.by_layer = torch.zeros(5, n_layers, dtype=torch.float64, device=device)
        self.active = torch.zeros(n_latents, dtype=torch.bool, device=device)

    @torch.no_grad()
    def add(self, layer_i: Tensor, *columns: Tensor) -> None:
        """Add numbers [b, s] or [b] of slices to their layers."""
        flat = layer_i.flatten()
        for row, values in zip(self.by_layer, columns, strict=True):
            row.index_add_(0, flat, values.reshape(len(layer_i), -1).expand(layer_i.shape).flatten().double())

    def over(self, ranks: Ranks, rows: int, threshold: float | None) -> StepSums:
        """The sums over all ranks."""
        if ranks.size > 1:
            active = self.active.to(torch.uint8)
            ranks.largest_(active)
            self.active = active.bool()
            ranks.sum_([self.losses, self.by_layer])
        total_loss, extra_loss, aux_loss = self.losses.tolist()
        counted, residual, total, n_active, l1 = self.by_layer
        return StepSums(
            loss=total_loss,
            extra_loss=extra_loss,
            aux_loss=aux_loss,
            rows=rows,
            n_rows=counted.long(),
            residual=residual,
            total=total,
            n_active=n_active.long(),
            l1=l1,
            active=self.active,
            threshold=threshold,
        )


def accumulate_gradients(task: Task, rows: Rows, wanted: Wanted, l1_coef: float = 0.0) -> StepSums:
    """Add the gradient of the batch's loss to the parameters' `grad`, `micro_rows` at a time.

    Over several ranks every one calls this with its own rows; the gradients are those of the whole batch afterwards.

    Args:
        task: what is to be done.
        rows: those of this rank; the batch has `wanted.n_rows` in all.
        wanted: how many latents, which are dead, whose batch it is.
        l1_coef: weight of the L1 penalty now.
    """
    model, n_rows = task.model, wanted.n_rows
    parts = rows.split(task.config.micro_rows or max(1, len(rows.inputs)))
    sums = _Sums(len(task.layers), model.n_latents, task.device)
    prepared = model.selection.prepare(model, (task.see(part)[0] for part in parts), wanted)
    is_compiled = task.config.compile
    errors = fused(loss.errors, is_wanted=is_compiled)
    distances = fused(loss.distances, is_wanted=is_compiled)
    for i, part in enumerate(parts):
        z, target = task.see(part)
        layer_i = part.layer_i.to(task.device)
        weights = task.weights(target, layer_i)
        found = prepared.encode(i, z)
        made = _reconstructions(task, found, z)
        error, squared_error = errors(target.z, made[0][1].view_as(target.z))
        main = loss.reconstruction_loss(squared_error, weights, n_rows)
        objective = main if len(made) == 1 else made[0][0] * main
        for weight, zhat in made[1:]:
            _, other = errors(target.z, zhat.view_as(target.z))
            objective = objective + weight * loss.reconstruction_loss(other, weights, n_rows)
        if l1_coef:
            objective = objective + loss.l1_loss(found.code.l1(), l1_coef, n_rows)
        aux = main.new_zeros(())
        if found.aux is not None:
            decoded, size = model.directions(found.aux), squared_error.sum(1)
            aux = loss.auxk_loss(decoded, error.flatten(1), size, task.config.auxk_coef, n_rows)
        (objective + aux).backward()
        with torch.no_grad():
            sums.losses += torch.stack([main, objective - main, aux])
            away = distances(part.targets.to(task.device), task.window.mean_layer, layer_i)
            sums.add(
                layer_i.expand(away.shape),
                torch.ones_like(away),
                squared_error * target.scale.squeeze(-1).square(),
                away,
                found.code.n_active(),
                found.code.l1(),
            )
            found.code.mark(sums.active)
    if wanted.ranks.size > 1:
        wanted.ranks.sum_(_gradients(model))
    return sums.over(wanted.ranks, n_rows, prepared.threshold)


def _reconstructions(task: Task, found: Found, z: Tensor) -> list[tuple[float, Tensor]]:
    """Rows zhat [b, s * d] that are to be like the target, with their weights in the loss; the full code's first."""
    model, shares = task.model, task.config.matryoshka
    best = model.reconstruct(found.code, z)
    if found.wide is not None:
        return [(1.0, best), (WIDE_WEIGHT, model.reconstruct(found.wide, z))]
    if shares is None:
        return [(1.0, best)]
    smaller = loss.prefixes(shares, model.n_latents)[:-1]
    weight = 1 / (len(smaller) + 1)
    return [
        (weight, best),
        *((weight, model.reconstruct(found.code.first(n_latents), z)) for n_latents in smaller),
    ]


def _gradients(model: nn.Module) -> list[Tensor]:
    """The gradient of every parameter; zeros where this rank had no rows."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def apply_gradients(model: Dictionary, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> float:
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
