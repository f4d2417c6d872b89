"""Rows in, a trained SAE out: the arrow from a source of batches to a run folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from actcache.errors import UsageError
from actcache.flow import Batch, BatchSource
from trainer.checkpoint import RunFolder, check_same
from trainer.config import TrainConfig
from trainer.metrics import MetricsFile
from trainer.state import TrainState, count_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimiser step, for whoever watches.

    step       its number, from 1.
    rows       rows trained on so far; rows_total of them in all, if that is known.
    loss       reconstruction loss of its batch.
    aux_loss   auxiliary loss of its batch.
    train_fvu  per layer, as in `trainer.metrics`, of its batch; layers without rows are left out.
    grad_norm  norm of the gradient before clipping.
    n_dead     dead latents after it.
    step_s     seconds it took, waiting for its batch included.
    waited_s   seconds the source says it made this process wait so far.
    """

    step: int
    rows: int
    rows_total: int | None
    loss: float
    aux_loss: float
    train_fvu: dict[int, float]
    grad_norm: float
    n_dead: int
    step_s: float
    waited_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a call of `train` ended.

    outcome   `finished`; `stopped`: asked to, a checkpoint is there to resume from; `already finished`: nothing was done.
    step      optimiser steps of the whole run so far.
    rows      rows of the whole run so far.
    elapsed_s seconds of this call.
    waited_s  seconds of this call spent waiting for data.
    """

    outcome: Literal["finished", "stopped", "already finished"]
    step: int
    rows: int
    elapsed_s: float
    waited_s: float


def train(
    source: BatchSource,
    config: TrainConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    provenance: dict[str, Any] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> RunSummary:
    """Train a top-k SAE on the rows of `source` and leave everything in `out`.

    The run ends after exactly `config.rows` rows (the last batch is cut), or, by epochs, when the source is exhausted. An
    interrupted and resumed run equals an uninterrupted one bit for bit on CPU with the same number of threads.

    Args:
        source: made for as many epochs as the run needs. If it has a length, that is the number of batches in its whole
            order, wherever its cursor stands. The caller closes it.
        config: need not be resolved.
        out: the run's folder, see `trainer.checkpoint`.
        device: where the SAE lives; batches are moved there.
        resume: go on with the run in `out`; without one, begin it.
        provenance: JSON that is kept with the SAE.
        on_step: called after every step.
        stop: asked before every step; when true, a checkpoint is saved and the call returns.

    Raises:
        UsageError: `out` is taken, or source and config do not fit each other.
        PlanMismatchError: the run in `out` has another configuration or other rows; names what differs.
        NonFiniteError: a loss or gradient is not finite; the last checkpoint stays.
        DamageError: a checkpoint is not what was written.
    """
    started = perf_counter()
    config = _fit(config, source)
    folder = RunFolder(out)
    folder.prepare(config, resume=resume)
    result = folder.finished()
    if result is not None:
        check_same({"source": (result["source"], source.fingerprint)}, str(out))
        return RunSummary(
            outcome="already finished",
            step=result["step"],
            rows=result["rows"],
            elapsed_s=perf_counter() - started,
            waited_s=0.0,
        )
    state = _start_or_restore(folder, source, config, torch.device(device))
    run = _Run(source, state, folder, provenance or {}, on_step)
    try:
        outcome = run.go(stop or (lambda: False))
    finally:
        run.metrics.close()
    return RunSummary(
        outcome=outcome,
        step=state.step,
        rows=state.rows,
        elapsed_s=perf_counter() - started,
        waited_s=source.waited_s() - run.waited_before,
    )


class _Run:
    """The loop with what it writes to; lives as long as one call of `train`."""

    def __init__(
        self,
        source: BatchSource,
        state: TrainState,
        folder: RunFolder,
        provenance: dict[str, Any],
        on_step: Callable[[StepReport], None] | None,
    ) -> None:
        self.source = source
        self.state = state
        self.folder = folder
        self.provenance = provenance
        self.on_step = on_step
        self.metrics = MetricsFile(folder.metrics, keep_to_step=state.logged_step)
        self.waited_before = source.waited_s()
        self._saved_step = max(folder.steps(), default=None)
        self._line_rows = state.rows
        self._line_at = perf_counter()
        self._line_waited = self.waited_before

    def go(self, stop: Callable[[], bool]) -> Literal["finished", "stopped"]:
        config, state = self.state.config, self.state
        batches = iter(self.source)
        while config.rows is None or state.rows < config.rows:
            if stop():
                self._save()
                return "stopped"
            began = perf_counter()
            batch = self._next(batches)
            if batch is None:
                break
            self._step(batch, began)
            if state.step % config.log_every_steps == 0:
                self._write_line()
            if state.step % config.checkpoint_every_steps == 0:
                self._save()
        self._finish()
        return "finished"

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, cut where the run ends; None when it is exhausted by epochs."""
        config, state = self.state.config, self.state
        batch = next(batches, None)
        if batch is None:
            if config.rows is not None:
                self._save()
                raise UsageError(
                    f"the source ended after {state.rows} rows, the run is of {config.rows}; a checkpoint is saved. "
                    "Give the source more epochs, or train on fewer rows in another folder"
                )
            return None
        if len(batch) > config.batch_rows:
            raise UsageError(
                f"the source handed out {len(batch)} rows, batch_rows is {config.batch_rows}; make both the same"
            )
        if config.rows is not None and len(batch) > config.rows - state.rows:
            return _first_rows(batch, config.rows - state.rows)
        return batch

    def _step(self, batch: Batch, began: float) -> None:
        state, saved = self.state, self._saved_step
        left = (
            "No checkpoint had been saved yet" if saved is None else f"The checkpoint of step {saved} is kept"
        )
        sums, norm = state.advance(batch, left)
        if self.on_step is not None:
            self.on_step(
                StepReport(
                    step=state.step,
                    rows=state.rows,
                    rows_total=state.config.rows,
                    loss=sums.loss,
                    aux_loss=sums.aux_loss,
                    train_fvu={
                        layer: residual / total
                        for layer, residual, total in zip(
                            state.layers, sums.residual.tolist(), sums.total.tolist(), strict=True
                        )
                        if total > 0
                    },
                    grad_norm=norm,
                    n_dead=len(state.dead.dead()),
                    step_s=perf_counter() - began,
                    waited_s=self.source.waited_s(),
                )
            )

    def _write_line(self) -> None:
        """One line over the steps since the last; seconds are those of this process."""
        state, now, waited = self.state, perf_counter(), self.source.waited_s()
        elapsed = now - self._line_at
        self.metrics.append(
            {
                "step": state.step,
                "rows": state.rows,
                **state.close_interval(),
                "dead_frac": len(state.dead.dead()) / state.model.n_latents,
                "rows_per_s": (state.rows - self._line_rows) / elapsed,
                "waited_s": waited - self._line_waited,
                "waited_frac": (waited - self._line_waited) / elapsed,
            }
        )
        self._line_rows, self._line_at, self._line_waited = state.rows, now, waited

    def _save(self) -> None:
        if self.state.step != self._saved_step:
            self.metrics.sync()
            self.folder.save(self.state.snapshot(self.source))
            self._saved_step = self.state.step

    def _finish(self) -> None:
        state = self.state
        if state.interval.steps:
            self._write_line()
        self._save()
        self.metrics.sync()
        var_layer = dict(zip(map(str, state.layers), state.window.var_layer.tolist(), strict=True))
        self.folder.finish(
            state.model,
            {
                "step": state.step,
                "rows": state.rows,
                "layers": state.layers,
                "var_layer": var_layer,
                "config": json.loads(state.config.model_dump_json()),
                "source": self.source.fingerprint,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "provenance": self.provenance,
            },
        )


def _fit(config: TrainConfig, source: BatchSource) -> TrainConfig:
    """The resolved configuration, with the source's layers filled in."""
    if config.layers is not None and config.layers != tuple(source.layers):
        raise UsageError(
            f"config.layers is {config.layers}, the source hands out layers {source.layers}; make the source with the layers"
        )
    try:
        resolved = config.resolve(source.width)
    except ValueError as error:
        raise UsageError(f"this configuration does not fit rows of width {source.width}: {error}") from error
    return resolved.model_copy(update={"layers": tuple(source.layers)})


def _start_or_restore(
    folder: RunFolder, source: BatchSource, config: TrainConfig, device: torch.device
) -> TrainState:
    steps = folder.steps()
    if not steps:
        return TrainState.start(source, config, device)
    snapshot = folder.load(steps[-1], device)
    state = snapshot.state
    check_same(
        {
            "source": (state["source"], source.fingerprint),
            "length of the source in batches": (state["total_steps"], count_steps(source, config)),
        },
        str(folder.root),
    )
    if state["threads"] != torch.get_num_threads():
        logger.warning(
            "resuming with %d threads a run that had %d: the result is the same within rounding, no longer bit for bit",
            torch.get_num_threads(),
            state["threads"],
        )
    return TrainState.restore(source, config, snapshot)


def _first_rows(batch: Batch, n_rows: int) -> Batch:
    return Batch(batch.rows[:n_rows], batch.layer[:n_rows], lookup=lambda name: getattr(batch, name)[:n_rows])
