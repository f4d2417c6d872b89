"""Everything that changes from step to step, and how it becomes a snapshot and back."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import asdict
from typing import Any

import torch

from actcache.errors import UsageError
from actcache.flow import Batch, BatchSource
from trainer.checkpoint import Snapshot
from trainer.config import TrainConfig
from trainer.dead import DeadCounter
from trainer.metrics import Interval
from trainer.sae import TopKSAE, geometric_median
from trainer.step import StepSums, accumulate_gradients, apply_gradients, check_finite
from trainer.transform import standardise
from trainer.window import FIRST_WINDOW_ROWS, FirstWindow, measure_window


class TrainState:
    """A run between two steps.

    config       resolved.
    layers       the rows' layer numbers, ascending.
    model        the SAE.
    window       what the first window fixed.
    dead         dead counters.
    interval     metric sums since the last line.
    step         optimiser steps done.
    rows         rows trained on.
    logged_step  step of the last metrics line.
    """

    def __init__(
        self,
        config: TrainConfig,
        layers: tuple[int, ...],
        model: TopKSAE,
        window: FirstWindow,
        total_steps: int | None,
    ) -> None:
        device = window.var_layer.device
        self.config = config
        self.layers = layers
        self.model = model.to(device)
        self.window = window
        self.dead = DeadCounter(
            model.n_latents, after_rows=config.dead_after_tokens * len(layers), device=device
        )
        # fused: 4 ms against 15 ms (foreach) for 8.4M parameters on two cores
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=config.lr or 0.0, betas=config.adam_betas, eps=config.adam_eps, fused=True
        )
        self.interval = Interval(len(layers))
        self.step = 0
        self.rows = 0
        self.logged_step = 0
        self._total_steps = total_steps

    @classmethod
    def start(cls, source: BatchSource, config: TrainConfig, device: torch.device) -> TrainState:
        """A new run: weights from the seed, bias and variances from the first window. The cursor is not moved."""
        total_steps = count_steps(source, config)
        first = source.peek(FIRST_WINDOW_ROWS)
        window = measure_window(first, source.layers, config.loss_space, device)
        model = _make_model(source.width, config).to(device)
        median = geometric_median(standardise(first.rows.to(device)).z)
        with torch.no_grad():
            model.bias.copy_(median)
        return cls(config, source.layers, model, window, total_steps)

    @classmethod
    def restore(cls, source: BatchSource, config: TrainConfig, snapshot: Snapshot) -> TrainState:
        """Go on where `snapshot` was taken; moves the source's cursor there."""
        training, state = snapshot.training, snapshot.state
        window = FirstWindow(mean_layer=training["window.mean_layer"], var_layer=training["window.var_layer"])
        model = _make_model(source.width, config)
        model.load_state_dict(snapshot.model)
        run = cls(config, source.layers, model, window, count_steps(source, config))
        run.dead.rows_since = training["dead.rows_since"]
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in training.items():
            if key.startswith("adam."):
                _, name, moment = key.split(".")
                moments.setdefault(name, {})[moment] = tensor
        for name, parameter in run.model.named_parameters():
            if name in moments:
                run.optimizer.state[parameter] = moments[name]
        run.interval = Interval(**state["interval"])
        run.step, run.rows, run.logged_step = state["step"], state["rows"], state["logged_step"]
        source.load_state_dict(state["cursor"])
        return run

    def snapshot(self, source: BatchSource) -> Snapshot:
        """This state, with the source's cursor."""
        training = {
            "window.mean_layer": self.window.mean_layer,
            "window.var_layer": self.window.var_layer,
            "dead.rows_since": self.dead.rows_since,
        }
        for name, parameter in self.model.named_parameters():
            for moment, tensor in self.optimizer.state[parameter].items():
                training[f"adam.{name}.{moment}"] = tensor
        state: dict[str, Any] = {
            "step": self.step,
            "rows": self.rows,
            "logged_step": self.logged_step,
            "interval": asdict(self.interval),
            "cursor": source.state_dict(),
            "total_steps": self._total_steps,
            "source": source.fingerprint,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        return Snapshot(model=self.model.state_dict(), training=training, state=state)

    def advance(self, batch: Batch, after_failure: str) -> tuple[StepSums, float]:
        """One optimiser step on `batch`. Returns its sums and the gradient's norm.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; the weights are unchanged.
        """
        number = self.step + 1
        sums = accumulate_gradients(
            self.model, batch, self.layers, self.window, self.dead.dead(), self.config
        )
        check_finite(sums.loss + sums.aux_loss, "the loss", number, batch, after_failure)
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = apply_gradients(self.model, self.optimizer, self.config.clip_norm)
        check_finite(norm, "the gradient's norm", number, batch, after_failure)
        self.dead.update(sums.active, len(batch))
        self.interval.add(sums, grad_norm=norm, lr=lr)
        self.step = number
        self.rows += len(batch)
        return sums, norm

    def close_interval(self) -> dict[str, Any]:
        """The metrics since the last line; the next interval begins."""
        line = self.interval.line(self.layers)
        self.interval = Interval(len(self.layers))
        self.logged_step = self.step
        return line

    def learning_rate(self) -> float:
        """Of the next step: lr * min(1, (step + 1) / warmup_steps) * min(1, (1 - progress) / decay_frac).

        progress is rows / all rows where the run's length is given in rows, else steps / all steps.

        Raises:
            UsageError: the source has handed out more batches than it has.
        """
        config = self.config
        factor = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.decay_frac > 0:
            if config.rows is not None:
                progress = self.rows / config.rows
            else:
                progress = self.step / (self._total_steps or 1)
            if progress >= 1:
                raise UsageError(
                    f"step {self.step + 1} is beyond the source's length of {self._total_steps} batches; "
                    "a source's length counts the batches of its whole order, wherever its cursor stands"
                )
            factor *= min(1.0, (1 - progress) / config.decay_frac)
        return (config.lr or 0.0) * factor


def count_steps(source: BatchSource, config: TrainConfig) -> int | None:
    """Batches in the source's whole order, wherever its cursor stands; None when the run is measured in rows or endless.

    Raises:
        UsageError: the learning rate decays towards an end that cannot be known.
    """
    if config.rows is not None:
        return None
    if isinstance(source, Sized):
        return len(source)
    if config.decay_frac > 0:
        raise UsageError(
            f"decay_frac={config.decay_frac} lets the learning rate fall towards the end of the run, but this source "
            "does not say how long it is; give rows=, or decay_frac=0"
        )
    return None


def _make_model(width: int, config: TrainConfig) -> TopKSAE:
    generator = torch.Generator().manual_seed(config.seed)
    return TopKSAE(width, config.n_latents or 0, config.k, generator=generator)
