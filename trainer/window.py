"""What is measured once, on the run's first window, and then fixed: loss weights, baselines, and the first bias.

Over several processes each measures its own rows of the window, and the sums are added, so the numbers are those of the
whole window whatever the number of processes.

Axes: n rows of the window, s slices, d width, l layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from actcache.errors import NonFiniteError, UsageError
from actcache.flow import Batch, BatchSource
from trainer.config import TrainConfig
from trainer.forms import FORMS, Form, Rows
from trainer.provenance import describe_non_finite
from trainer.ranks import ALONE, Ranks
from trainer.transform import Transforms, make_transforms

BLOCK_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstWindow:
    """Fixed for the whole run, and saved with it; of targets.

    mean_layer  [l, d] float32, mean raw row of each layer: the baseline of the training FVU.
    var_layer   [l] float32, (1/(n_l d)) sum_rows ||x - mean_l||^2, in the space of the loss. About the mean of each
                dimension, so a constant vector does not count as something to explain.
    """

    mean_layer: Tensor
    var_layer: Tensor


class Moments(NamedTuple):
    """Per layer: mean of each dimension [l, d] and variance per dimension [l] (divisor n d), float64."""

    mean: Tensor
    variance: Tensor


def read_first_window(source: BatchSource, config: TrainConfig) -> Batch:
    """This process's rows of the first whole batches that hold `first_window_rows` vectors (fewer if there are fewer).

    The cursor is where it was afterwards.
    """
    begin = source.state_dict()
    n_batches = first_batches(config, len(source.layers))
    batches = list(islice(iter(source), n_batches))
    source.load_state_dict(begin)
    if not batches:
        raise UsageError("the source hands out no batch: there is nothing to train on")
    return _join(batches, FORMS[config.form])


def first_batches(config: TrainConfig, n_layers: int) -> int:
    """Whole batches that hold `first_window_rows` vectors."""
    per_row = FORMS[config.form].n_slices(tuple(range(n_layers)))
    return -(-config.first_window_rows // (per_row * config.batch_rows))


def _join(batches: list[Batch], form: Form) -> Batch:
    parts = batches

    def look_up(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in parts])

    return Batch(
        torch.cat([batch.rows for batch in batches]),
        batches[0].layer if form.is_joint else torch.cat([batch.layer for batch in batches]),
        lookup=look_up,
        hooks={name: torch.cat([batch.hooks[name] for batch in batches]) for name in batches[0].hooks},
    )


def measure(
    batch: Batch,
    rows: Rows,
    layers: tuple[int, ...],
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> tuple[FirstWindow, Transforms]:
    """Mean and variance of each layer's targets, and the transforms with the numbers they need.

    Args:
        batch: the first window, for saying what is wrong with it.
        rows: the same, as the form sees it.
        layers: the run's layers.
        config: resolved.
        device: where the result is wanted.
        ranks: whose windows belong together.

    Raises:
        UsageError: a layer has fewer than two rows, or rows that are all alike.
        NonFiniteError: a row holds NaN or infinity.
    """
    form = FORMS[config.form]
    find = _Finder(batch, layers, device, ranks)
    targets = find.moments(rows.targets, rows.layer_i)
    by_row = config.standardise == "row"
    tensors: dict[str, Tensor] = {}
    if not by_row:
        inputs = targets if form.is_autoencoder else find.moments(rows.inputs, rows.layer_i)
        tensors |= {"into.mean": inputs.mean.float(), "into.scale": inputs.variance.sqrt().float()}
    if not form.is_autoencoder:
        tensors |= {"out.mean": targets.mean.float(), "out.scale": targets.variance.sqrt().float()}
    transforms = make_transforms(by_row=by_row, predicts=not form.is_autoencoder, tensors=tensors)
    variance = targets.variance
    if config.loss_space == "standardised":
        standardise = transforms.out or transforms.into
        variance = find.moments(rows.targets, rows.layer_i, lambda x, i: standardise(x, i).z).variance
    return FirstWindow(mean_layer=targets.mean.float(), var_layer=variance.float()), transforms


class _Finder:
    """Moments over the rows of all ranks, in float32 blocks, centred, summed in float64."""

    def __init__(self, batch: Batch, layers: tuple[int, ...], device: torch.device, ranks: Ranks) -> None:
        self._batch, self._layers, self._device, self._ranks = batch, layers, device, ranks

    def moments(
        self, slices: Tensor, layer_i: Tensor, through: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Moments:
        """Of slices [n, s, d] of layers layer_i [n or 1, s], or of what `through` makes of blocks [m, 1, d] of them."""
        flat, of = slices.flatten(0, 1), layer_i.expand(slices.shape[:2]).flatten()
        ids = [(of == i).nonzero().squeeze(1) for i in range(len(self._layers))]

        def blocks(i: int) -> Iterator[Tensor]:
            for block in ids[i].split(BLOCK_ROWS):
                x = flat[block].to(self._device, torch.float32)
                if through is not None:
                    x = through(x.unsqueeze(1), torch.full((1, 1), i, device=self._device)).squeeze(1)
                yield x

        width, n_layers = flat.shape[1], len(self._layers)
        count = torch.tensor([len(mine) for mine in ids], dtype=torch.float64, device=self._device)
        total = torch.zeros(n_layers, width, dtype=torch.float64, device=self._device)
        for i in range(n_layers):
            for x in blocks(i):
                total[i] += x.sum(0, dtype=torch.float64)
        self._ranks.sum_([count, total])
        self._check_counts(count)
        mean = total / count.unsqueeze(1)
        squares = torch.zeros(n_layers, dtype=torch.float64, device=self._device)
        for i in range(n_layers):
            for x in blocks(i):
                squares[i] += (x - mean[i].float()).square_().sum(dtype=torch.float64)
        self._ranks.sum_([squares])
        variance = squares / (count * width)
        self._check_variance(variance)
        return Moments(mean, variance)

    def _check_counts(self, count: Tensor) -> None:
        for layer, n in zip(self._layers, count.tolist(), strict=True):
            if n < 2:
                raise UsageError(
                    f"{n:.0f} of the first {len(self._batch)} rows are of layer {layer}: its variance cannot be measured. "
                    "Use more rows, or a window in which all layers occur"
                )

    def _check_variance(self, variance: Tensor) -> None:
        for layer, value in zip(self._layers, variance.tolist(), strict=True):
            if not value < float("inf"):
                raise NonFiniteError(
                    f"the variance of layer {layer} over the first {len(self._batch)} rows is {value}; "
                    f"{describe_non_finite(self._batch)}"
                )
            if value <= 0:
                raise UsageError(f"all rows of layer {layer} in the first window are alike: nothing to learn")
