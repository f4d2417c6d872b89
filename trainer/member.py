"""One SAE in training, with its run folder: what several trained on the same batches each have for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from actcache.errors import NonFiniteError
from actcache.flow import BatchSource
from trainer.config import TrainConfig
from trainer.forms import Arrived
from trainer.heldout import HeldOut
from trainer.metrics import MetricsFile, flatten
from trainer.ranks import Ranks
from trainer.reports import MakeTracker, StepReport, Tracker
from trainer.run_folder import RunFolder
from trainer.state import TrainState
from trainer.step import StepSums


class Member:
    """An SAE being trained. Over several processes all have it, the first one writes.

    name    among those trained together; "" where it is alone.
    error   why it was given up, if it was.
    saved_cursor  of the source, at the last checkpoint that this process saved.
    """

    def __init__(
        self,
        name: str,
        folder: RunFolder,
        state: TrainState,
        source: BatchSource,
        provenance: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        self.name, self.folder, self.state = name, folder, state
        self.error: NonFiniteError | None = None
        self._source, self._provenance, self._ranks = source, provenance, ranks
        self.saved_step = state.step or None
        self.saved_cursor: dict[str, Any] | None = None
        self._line_rows, self._line_at, self._line_waited = state.rows, perf_counter(), source.waited_s()
        self._metrics: MetricsFile | None = None
        self._evaluation: MetricsFile | None = None
        self._trackers: list[Tracker] = []

    def open(self, trackers: Sequence[MakeTracker]) -> None:
        """Open files and dashboards; what they hold of steps that are to come is cut off. `close` them."""
        if not self._ranks.is_first:
            return
        state = self.state
        if state.step in self.folder.steps():
            self.saved_step = state.step
        self._metrics = MetricsFile(self.folder.metrics, keep_to_step=state.logged_step)
        self._evaluation = MetricsFile(self.folder.evaluation, keep_to_step=state.step or -1)
        config = state.config.model_dump(mode="json")
        for make in trackers:
            self._trackers.append(make(self.folder.root, self.name, config, state.step))

    @property
    def config(self) -> TrainConfig:
        """Resolved."""
        return self.state.config

    def learn(self, arrived: Arrived, began: float) -> StepReport | None:
        """One step. None where the batch has no row of its layers.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; the weights are as they were.
        """
        saved = self.saved_step
        left = (
            "No checkpoint had been saved yet" if saved is None else f"The checkpoint of step {saved} is kept"
        )
        learnt = self.state.advance(arrived, left)
        return None if learnt is None else self._report(*learnt, began)

    def _report(self, sums: StepSums, norm: float, began: float) -> StepReport:
        state = self.state
        by_layer = zip(state.layers, sums.residual.tolist(), sums.total.tolist(), strict=True)
        return StepReport(
            name=self.name,
            step=state.step,
            rows=state.rows,
            rows_total=state.config.rows,
            loss=sums.loss,
            aux_loss=sums.aux_loss,
            train_fvu={layer: residual / total for layer, residual, total in by_layer if total > 0},
            l0=float(sums.n_active.sum() / sums.n_rows.sum()),
            grad_norm=norm,
            n_dead=len(state.dead.dead()),
            n_latents=state.model.n_latents,
            step_s=perf_counter() - began,
            waited_s=self._source.waited_s(),
        )

    def write_line(self) -> None:
        """One line over the steps since the last; seconds are those of this process."""
        state, now, waited = self.state, perf_counter(), self._source.waited_s()
        elapsed = now - self._line_at
        line = {
            "step": state.step,
            "rows": state.rows,
            **state.close_interval(),
            **self._norms(),
            "dead_frac": len(state.dead.dead()) / state.model.n_latents,
            "rows_per_s": (state.rows - self._line_rows) / elapsed,
            "waited_s": waited - self._line_waited,
            "waited_frac": (waited - self._line_waited) / elapsed,
        }
        self._line_rows, self._line_at, self._line_waited = state.rows, now, waited
        if self._metrics is not None:
            self._metrics.append(line)
            self._track("train", line)

    def _norms(self) -> dict[str, Any]:
        """Facts about weights that belong to a line: batch top-k's threshold; which layers latents write to."""
        found: dict[str, Any] = {}
        if self.config.activation == "batchtopk":
            found["threshold"] = float(self.state.model.get_buffer("threshold"))
        if self.state.task.form.is_joint:
            shares = self.state.model.relative_norms(len(self.state.layers)).mean(0)
            found["relative_norm"] = dict(zip(map(str, self.state.layers), shares.tolist(), strict=True))
        return found

    def write_evaluation(self, found: HeldOut) -> bool:
        """One line of held-out scores. True where they are the best so far (in the first process)."""
        state = self.state
        if self._evaluation is None:
            return False
        line = {
            "step": state.step,
            "rows": state.rows,
            **found.as_json(),
            "dead_frac": found.mean.n_dead / state.model.n_latents,
        }
        self._evaluation.append(line)
        self._track("held_out", line)
        best = self.folder.best()
        return best is None or best["step"] > state.step or found.mean.fvu < best["fvu"]

    def _track(self, kind: str, line: dict[str, Any]) -> None:
        if self._trackers:
            numbers = {f"{kind}/{n}": x for n, x in flatten(line).items() if n != "step"}
            for tracker in self._trackers:
                tracker.log(self.state.step, numbers)

    def save(self, best_fvu: float | None = None) -> None:
        """Write a checkpoint, unless this step's is there; `best_fvu`: it is the best so far."""
        if self._metrics is None or self._evaluation is None:
            self.saved_step = self.state.step
            return
        if self.state.step != self.saved_step:
            self._metrics.sync()
            self._evaluation.sync()
            snapshot = self.state.snapshot(self._source, self._provenance)
            self.folder.save(snapshot)
            self.saved_step, self.saved_cursor = self.state.step, snapshot.state["cursor"]
        if best_fvu is not None:
            self.folder.mark_best(self.state.step, best_fvu)

    def prune(self) -> None:
        """Remove checkpoints that are not to be kept."""
        if self._metrics is not None:
            config = self.config
            self.folder.prune(newest=config.keep_newest, every_steps=config.keep_every_steps)

    def give_up(self) -> None:
        """Remember why it was given up, so that the others can go on without it after an interruption too."""
        if self._metrics is not None:
            self.folder.mark_failed(str(self.error))

    def finish(self) -> None:
        """Write the last line, the last checkpoint and the result."""
        if self.state.interval.steps:
            self.write_line()
        self.save()
        self.prune()
        if self._metrics is not None:
            self._metrics.sync()
            self.folder.finish(self.state.finished(self._source, self._provenance))

    def close(self) -> None:
        """Let go of files and dashboards."""
        for file in (self._metrics, self._evaluation):
            if file is not None:
                file.close()
        for tracker in self._trackers:
            tracker.close()
