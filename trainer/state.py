"""Everything that changes from step to step, and how it becomes a snapshot and back."""

from __future__ import annotations

import json
from collections.abc import Sized
from dataclasses import asdict
from typing import Any

import torch

from actcache.errors import NonFiniteError, UsageError
from actcache.flow import Batch, BatchSource
from trainer import schedule
from trainer.config import TrainConfig
from trainer.dead import DeadCounter
from trainer.forms import FORMS, Arrived, pick_layers
from trainer.kernels import Kernels, sparse
from trainer.median import geometric_median
from trainer.metrics import Interval
from trainer.ranks import ALONE, Ranks
from trainer.run_folder import Finished, Snapshot
from trainer.sae import Dictionary, dictionary_of, make_dictionary
from trainer.selection import Wanted
from trainer.step import StepSums, accumulate_gradients, apply_gradients, check_finite
from trainer.task import Task
from trainer.trained import TrainedSAE
from trainer.transform import make_transforms
from trainer.warm_start import take_weights
from trainer.window import FirstWindow, measure, read_first_window


class TrainState:
    """A run between two steps.

    task         what is trained, and what no step changes.
    dead         dead counters.
    average      moving average of the weights by name; empty without one.
    interval     metric sums since the last line.
    step         optimiser steps done.
    rows         rows of the source handed out so far, over all ranks; those of layers passed over count too.
    logged_step  step of the last metrics line.
    """

    def __init__(self, task: Task, total_steps: int | None, ranks: Ranks = ALONE) -> None:
        self.task = task
        config, model = task.config, task.model.to(task.device)
        per_token = task.form.rows_per_token(task.layers)
        self.dead = DeadCounter(
            model.n_latents, after_rows=config.dead_after_tokens * per_token, device=task.device
        )
        # fused: 4 ms against 15 ms (foreach) for 8.4M parameters on two cores
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=config.lr or 0.0, betas=config.adam_betas, eps=config.adam_eps, fused=True
        )
        averages = config.ema_decay is not None
        self.average = {n: p.detach().clone() for n, p in model.named_parameters()} if averages else {}
        self.interval = Interval(len(task.layers))
        self.step = 0
        self.rows = 0
        self.logged_step = 0
        self._total_steps = total_steps
        self._ranks = ranks

    @property
    def config(self) -> TrainConfig:
        """Resolved."""
        return self.task.config

    @property
    def layers(self) -> tuple[int, ...]:
        """The rows' layer numbers, ascending."""
        return self.task.layers

    @property
    def model(self) -> Dictionary:
        """The dictionary."""
        return self.task.model

    @classmethod
    def start(
        cls,
        source: BatchSource,
        config: TrainConfig,
        device: torch.device,
        *,
        first: Batch | None = None,
        init: TrainedSAE | None = None,
        kernels: Kernels = sparse,
        ranks: Ranks = ALONE,
    ) -> TrainState:
        """A new run: weights from the seed or from `init`, the rest from the first window. The cursor is not moved.

        Args:
            source: of the rows.
            config: resolved.
            device: where the dictionary lives.
            first: the first window, where it has been read already.
            init: weights to start from.
            kernels: what computes products and sums.
            ranks: who else trains.

        Raises:
            PlanMismatchError: `init` is of another shape or form; names what differs.
        """
        total_steps = count_steps(source, config)
        layers, form = config.layers or tuple(source.layers), FORMS[config.form]
        batch = pick_layers(read_first_window(source, config) if first is None else first, layers, form)
        rows = form.view(batch, layers)
        window, transforms = measure(batch, rows, layers, config, device, ranks)
        if init is not None and init.layers == layers:
            transforms = init.transforms
        widths = rows.inputs.shape[2], rows.targets.shape[2]
        model = make_dictionary(config, *widths, n_slices=rows.inputs.shape[1], kernels=kernels).to(device)
        task = Task(config=config, layers=layers, model=model, window=window, transforms=transforms)
        with torch.no_grad():
            if init is None:
                model.bias.copy_(geometric_median(task.see(rows)[0], ranks=ranks))
            else:
                take_weights(model, init, config)
        return cls(task, total_steps, ranks)

    @classmethod
    def restore(
        cls,
        source: BatchSource,
        config: TrainConfig,
        snapshot: Snapshot,
        *,
        kernels: Kernels = sparse,
        ranks: Ranks = ALONE,
    ) -> TrainState:
        """Go on where `snapshot` was taken. The source's cursor has to be moved to `snapshot.state["cursor"]` as well."""
        training, state = snapshot.training, snapshot.state
        layers, form = config.layers or tuple(source.layers), FORMS[config.form]
        fixed = {n.removeprefix("transforms."): x for n, x in training.items() if n.startswith("transforms.")}
        transforms = make_transforms(
            by_row=config.standardise == "row", predicts=not form.is_autoencoder, tensors=fixed
        )
        window = FirstWindow(mean_layer=training["window.mean_layer"], var_layer=training["window.var_layer"])
        model = dictionary_of(snapshot.model, config, layers)
        model.kernels = kernels
        task = Task(config=config, layers=layers, model=model, window=window, transforms=transforms)
        run = cls(task, count_steps(source, config), ranks)
        run.dead.rows_since = training["dead.rows_since"]
        for name, parameter in model.named_parameters():
            prefix = f"adam.{name}."
            moments = {n.removeprefix(prefix): x for n, x in training.items() if n.startswith(prefix)}
            if moments:
                run.optimizer.state[parameter] = moments
            if run.average:
                run.average[name] = training[f"ema.{name}"]
        run.interval = Interval(**state["interval"])
        run.step, run.rows, run.logged_step = state["step"], state["rows"], state["logged_step"]
        return run

    def snapshot(self, source: BatchSource, provenance: dict[str, Any]) -> Snapshot:
        """This state, with the source's cursor."""
        training = {
            "window.mean_layer": self.task.window.mean_layer,
            "window.var_layer": self.task.window.var_layer,
            "dead.rows_since": self.dead.rows_since,
            **{f"transforms.{name}": tensor for name, tensor in self.task.transforms.tensors.items()},
            **{f"ema.{name}": tensor for name, tensor in self.average.items()},
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
            "world_size": self._ranks.size,
            "torch": torch.__version__,
            "description": self._describe(source.fingerprint, provenance),
        }
        return Snapshot(model=self.model.state_dict(), training=training, state=state)

    def finished(self, source: BatchSource, provenance: dict[str, Any]) -> Finished:
        """The result: averaged weights where there is an average."""
        description = {
            "step": self.step,
            "rows": self.rows,
            **self._describe(source.fingerprint, provenance),
            "threads": torch.get_num_threads(),
            "world_size": self._ranks.size,
            "torch": torch.__version__,
        }
        return Finished(self._result().state_dict(), self.task.transforms.tensors, description)

    def trained(self, source: BatchSource, provenance: dict[str, Any]) -> TrainedSAE:
        """What the run's result would be now. Shares its weights with the run where there is no average."""
        var_layer = dict(zip(self.layers, self.task.window.var_layer.tolist(), strict=True))
        return TrainedSAE(
            sae=self._result(),
            config=self.config,
            layers=self.layers,
            var_layer=var_layer,
            source=source.fingerprint,
            provenance=provenance,
            transforms=self.task.transforms,
        )

    def _result(self) -> Dictionary:
        if not self.average:
            return self.model
        averaged = dictionary_of({**self.model.state_dict(), **self.average}, self.config, self.layers)
        averaged.fold_norms()
        return averaged

    def _describe(self, source: str, provenance: dict[str, Any]) -> dict[str, Any]:
        var_layer = dict(zip(map(str, self.layers), self.task.window.var_layer.tolist(), strict=True))
        return {
            "transform": self.task.transforms.digest,
            "layers": list(self.layers),
            "var_layer": var_layer,
            "config": json.loads(self.config.model_dump_json()),
            "source": source,
            "provenance": provenance,
        }

    # Steps.

    def advance(self, arrived: Arrived | Batch, after_failure: str = "") -> tuple[StepSums, float] | None:
        """One optimiser step on a batch. Returns its sums and the gradient's norm; None where no row is of our layers.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; the weights are unchanged.
        """
        if isinstance(arrived, Batch):
            arrived = Arrived.alone(arrived)
        number = self.step + 1
        n_rows = arrived.n_rows
        if not self.task.form.is_joint:
            n_rows = sum(arrived.by_layer.get(layer, 0) for layer in self.layers)
        result = None
        if n_rows:
            batch = pick_layers(arrived.batch, self.layers, self.task.form)
            result = self._learn(batch, n_rows, number, after_failure)
        self.step = number
        self.rows += arrived.n_rows
        return result

    def _learn(self, batch: Batch, n_rows: int, number: int, after: str) -> tuple[StepSums, float]:
        config, progress = self.config, self._progress()
        dead = self.dead.dead()
        wanted = Wanted(
            k=schedule.active_latents(config, self.step),
            n_rows=n_rows,
            dead=dead,
            n_aux=min(config.auxk or 0, len(dead)),
            ranks=self._ranks,
        )
        rows = self.task.form.view(batch, self.layers)
        sums = accumulate_gradients(self.task, rows, wanted, schedule.l1_coef(config, progress))
        self._check(sums.loss + sums.extra_loss + sums.aux_loss, "the loss", number, batch, after)
        lr = schedule.learning_rate(config, self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = apply_gradients(self.model, self.optimizer, config.clip_norm)
        self._check(norm, "the gradient's norm", number, batch, after)
        self.dead.update(sums.active, n_rows)
        self._average(number)
        if sums.threshold is not None:
            self._move_threshold(sums.threshold, number)
        self.interval.add(sums, grad_norm=norm, lr=lr)
        return sums, norm

    def _check(self, value: float, what: str, number: int, batch: Batch, after: str) -> None:
        """On every rank, since the value is the same on all: the one that has the bad rows names them."""
        if self._ranks.size > 1 and not float("-inf") < value < float("inf"):
            tensors = list(batch.hooks.values()) or [batch.rows]
            is_mine = not all(bool(torch.isfinite(x).all()) for x in tensors)
            if self._ranks.any(is_mine) and not is_mine:
                raise NonFiniteError(
                    f"step {number}: {what} is {value}; another process has rows of NaN or infinity, and names them. {after}"
                )
        check_finite(value, what, number, batch, after)

    @torch.no_grad()
    def _average(self, number: int) -> None:
        if self.config.ema_decay is not None:
            stays = schedule.ema_weight(self.config.ema_decay, number)
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - stays)

    @torch.no_grad()
    def _move_threshold(self, smallest: float, number: int) -> None:
        threshold = self.model.get_buffer("threshold")
        stays = schedule.ema_weight(self.config.threshold_decay, number) if float(threshold) > 0 else 0.0
        threshold.lerp_(torch.tensor(smallest, dtype=threshold.dtype, device=threshold.device), 1 - stays)

    def close_interval(self) -> dict[str, Any]:
        """The metrics since the last line; the next interval begins."""
        line = self.interval.line(self.layers)
        self.interval = Interval(len(self.layers))
        self.logged_step = self.step
        return line

    def learning_rate(self) -> float:
        """Of the next step."""
        return schedule.learning_rate(self.config, self.step, self._progress())

    def _progress(self) -> float | None:
        """Rows over all rows where the run's length is given in rows, else steps over all steps; None if endless.

        Raises:
            UsageError: the source has handed out more batches than it has.
        """
        if self.config.rows is not None:
            progress = self.rows / self.config.rows
        elif self._total_steps is not None:
            progress = self.step / self._total_steps
        else:
            return None
        if progress >= 1:
            raise UsageError(
                f"step {self.step + 1} is beyond the source's length of {self._total_steps} batches; "
                "a source's length counts the batches of its whole order, wherever its cursor stands"
            )
        return progress


def count_steps(source: BatchSource, config: TrainConfig) -> int | None:
    """Batches in the source's whole order, wherever its cursor stands; None when the run is measured in rows or endless.

    Raises:
        UsageError: something changes towards an end that cannot be known.
    """
    if config.rows is not None:
        return None
    if isinstance(source, Sized):
        return len(source)
    needs = schedule.needs_end(config)
    if needs is not None:
        raise UsageError(f"{needs}, but this source does not say how long it is; give rows=, or set it to 0")
    return None
