"""Rows in, trained SAEs out: the arrow from a source of batches to run folders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from actcache.errors import ActcacheError, NonFiniteError, UsageError
from actcache.flow import Batch, BatchSource, StopWaiting
from trainer import heldout
from trainer.begin import check_shared, common_step, fit, prepare, start_or_restore
from trainer.config import TrainConfig
from trainer.forms import FORMS, Arrived, take_rows
from trainer.kernels import Kernels, sparse
from trainer.lens import LENS, Lens, LensSource, save_lens
from trainer.member import Member
from trainer.provenance import layer_index
from trainer.ranks import ALONE, Ranks
from trainer.reports import MakeTracker, Outcome, RunSummary, StepReport
from trainer.run_folder import RunFolder
from trainer.trained import TrainedSAE

logger = logging.getLogger(__name__)


def train(source: BatchSource, config: TrainConfig, out: Path, **more: Any) -> RunSummary:
    """Train one SAE on the rows of `source` and leave everything in `out`. See `train_many` for the rest."""
    return train_many(source, {"": config}, out, **more)


def train_many(
    source: BatchSource,
    configs: Mapping[str, TrainConfig],
    out: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    provenance: dict[str, Any] | None = None,
    held_out: BatchSource | None = None,
    init: TrainedSAE | None = None,
    lens: Lens | None = None,
    trackers: Sequence[MakeTracker] = (),
    kernels: Kernels = sparse,
    ranks: Ranks = ALONE,
    on_step: Callable[[StepReport], None] | None = None,
    on_saved: Callable[[dict[str, Any]], None] | None = None,
    offer_save: Callable[[Callable[[], None]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> RunSummary:
    """Train SAEs on the same batches of `source`, read once, each as if it were alone, each in a run folder of its own.

    The run ends after exactly `rows` rows (the last batch is cut), or, by epochs, when the source is exhausted. An
    interrupted and resumed run equals an uninterrupted one bit for bit on CPU with the same number of threads and
    processes. An SAE whose loss is no longer finite is given up, with its last checkpoint, and the others go on.

    Args:
        source: made for as many epochs as the run needs. If it has a length, that is the number of batches in its whole
            order, wherever its cursor stands. Over several ranks, this one's share of it. The caller closes it.
        configs: by name; need not be resolved. A configuration with some of the source's layers trains on their rows only.
        out: the SAE called NAME goes to out/NAME, one called "" to `out` itself; see `trainer.run_folder`.
        device: where the SAEs live; batches are moved there.
        resume: go on with what is in `out`; where there is nothing, begin.
        provenance: JSON that is kept with each SAE.
        held_out: rows to evaluate on, where `eval_every_steps` is set; read from its cursor on, every time.
        init: weights to start from, instead of those of the seed.
        lens: what rows of both sources are seen through; it is kept with each SAE.
        trackers: dashboards.
        kernels: what computes products and sums.
        ranks: the processes of this run. All call this with the same arguments, apart from their share of the sources.
        on_step: called after every step of every SAE.
        on_saved: called, in the first process, when checkpoints of all SAEs are safely on disk, with the cursor of the source
            that they go on from.
        offer_save: given a function that saves checkpoints at once, for a source to call while a batch is waited for.
        stop: asked before every step; when true in any process, checkpoints are saved and the call returns in all. So
            it does where waiting for a batch ends with StopWaiting.

    Raises:
        UsageError: `out` is taken, or source and configurations do not fit each other.
        PlanMismatchError: a run in `out` has another configuration or other rows; names what differs.
        NonFiniteError: no SAE is left whose loss is finite; the last checkpoints stay.
        DamageError: a checkpoint is not what was written.
        PeerError: another process of this run stopped.
    """
    started, waited_before = perf_counter(), source.waited_s()
    if lens is not None:
        source = LensSource(source, lens, device)
        held_out = None if held_out is None else LensSource(held_out, lens, device)
        provenance = {**(provenance or {}), "lens": {"digest": lens.digest, "about": lens.about}}
    resolved = {name: fit(config, source, init) for name, config in configs.items()}
    check_shared(resolved)
    first = next(iter(resolved.values()))
    if first.eval_every_steps is not None and held_out is None:
        raise UsageError(f"eval_every_steps={first.eval_every_steps} needs rows to evaluate on: held_out=")
    folders = {name: RunFolder(out / name) for name in resolved}
    with ExitStack() as stack:
        found = ranks.on_first(lambda: prepare(folders, resolved, source, stack, resume=resume))
        if lens is not None and ranks.is_first:
            for folder in folders.values():
                if not (
                    folder.root / LENS
                ).exists():  # another one there: the rows are others, and refused below
                    save_lens(lens, folder.root / LENS)
        done = found["done"]
        if len(done) == len(folders):
            result = next(iter(done.values()))
            return RunSummary(
                outcome="already finished",
                step=result["step"],
                rows=result["rows"],
                elapsed_s=perf_counter() - started,
                waited_s=0.0,
            )
        left = {name: config for name, config in resolved.items() if name not in done}
        if left.keys() - found["failed"].keys():  # those given up stay so, unless there is nothing else to do
            left = {name: config for name, config in left.items() if name not in found["failed"]}
        going = {name: folders[name] for name in left}
        step = ranks.on_first(lambda: common_step(going, found["new"]))
        try:
            states = start_or_restore(step, going, source, left, torch.device(device), init, kernels, ranks)
        except StopWaiting:
            return RunSummary(
                outcome="stopped",
                step=0,
                rows=0,
                elapsed_s=perf_counter() - started,
                waited_s=source.waited_s() - waited_before,
            )
        members = []
        for name, state in states.items():
            member = Member(name, folders[name], state, source, provenance or {}, ranks)
            stack.callback(member.close)
            member.open(trackers)
            members.append(member)
        run = _Run(source, members, held_out, ranks, on_step, on_saved, stop or (lambda: False))
        if offer_save is not None:
            offer_save(run.save)
        outcome = run.go()
    return RunSummary(
        outcome=outcome,
        step=run.step,
        rows=run.rows,
        elapsed_s=perf_counter() - started,
        waited_s=source.waited_s() - waited_before,
        failed={name: text for name, text in found["failed"].items() if name not in left}
        | {member.name: str(member.error) for member in members if member.error is not None},
    )


class _Run:
    """The loop; lives as long as one call of `train_many`.

    step  steps done, by all members alike.
    rows  rows of the source handed out, over all ranks.
    """

    def __init__(
        self,
        source: BatchSource,
        members: list[Member],
        held_out: BatchSource | None,
        ranks: Ranks,
        on_step: Callable[[StepReport], None] | None,
        on_saved: Callable[[dict[str, Any]], None] | None,
        stop: Callable[[], bool],
    ) -> None:
        self._source, self._members, self._held_out = source, members, held_out
        self._ranks, self._on_step, self._on_saved, self._stop = ranks, on_step, on_saved, stop
        self._config = members[0].config
        self._layers = tuple(source.layers)
        self._evaluated_step: int | None = None
        self.step, self.rows = members[0].state.step, members[0].state.rows

    @property
    def _live(self) -> list[Member]:
        return [member for member in self._members if member.error is None]

    def go(self) -> Outcome:
        """Until the end, or until asked to stop."""
        try:
            self._go()
        except StopWaiting:
            self.save()
            return "stopped"
        for member in self._live:
            member.finish()
        return "finished"

    def _go(self) -> None:
        config = self._config
        if self.step == 0:
            self._evaluate()  # also finds out now what would stop the first evaluation later
        batches = iter(self._source)
        while config.rows is None or self.rows < config.rows:
            if self._ranks.any(self._stop()):
                raise StopWaiting
            began = perf_counter()
            arrived = self._next(batches)
            if arrived is None:
                break
            self._learn(arrived, began)
            if self.step % config.log_every_steps == 0:
                for member in self._live:
                    member.write_line()
            if config.eval_every_steps is not None and self.step % config.eval_every_steps == 0:
                self._evaluate()
            if self.step % config.checkpoint_every_steps == 0:
                self.save()
        self._evaluate()

    def _next(self, batches: Iterator[Batch]) -> Arrived | None:
        """The next batch, cut where the run ends; None when the source is exhausted by epochs.

        Raises:
            StopWaiting: some process does not want to wait for it; no process has taken it then.
        """
        batch, error, counts = None, None, [0] * (3 + len(self._layers))
        before = self._source.state_dict() if self._ranks.size > 1 else None
        try:
            batch = next(batches, None)
            if batch is not None:
                batch = self._cut(batch)
                counts = [0, 1, len(batch), *self._count(batch)]
        except StopWaiting:
            if before is None:
                raise
            counts[0] = 1
        except ActcacheError as caught:
            error = caught
        self._ranks.agree(error)
        table = self._ranks.table(counts)
        does_stop, is_there, n_rows, *by_layer = table.sum(0).tolist()
        if does_stop:
            if before is not None and batch is not None:
                self._source.load_state_dict(before)
            raise StopWaiting
        if is_there not in (0, self._ranks.size):
            raise UsageError(
                f"after {self.rows} rows the sources of some processes have ended and of others not: they must be shares of "
                "one order"
            )
        if batch is None:
            self._check_ended()
            return None
        if n_rows > self._config.batch_rows:
            raise UsageError(
                f"the source handed out {n_rows} rows, batch_rows is {self._config.batch_rows}; make both the same"
            )
        return Arrived(batch, n_rows, dict(zip(self._layers, by_layer, strict=True)))

    def _cut(self, batch: Batch) -> Batch:
        """The rows of a batch before the run's end: by their place in the whole batch, so that ranks cut alike."""
        if self._config.rows is None:
            return batch
        n_left = self._config.rows - self.rows
        is_before = batch.slot < n_left
        if bool(is_before.all()):
            return batch
        return take_rows(batch, is_before.nonzero().squeeze(1), FORMS[self._config.form])

    def _count(self, batch: Batch) -> list[int]:
        if FORMS[self._config.form].is_joint:
            return [len(batch)] * len(self._layers)
        index = layer_index(batch.layer, self._layers)
        return torch.bincount(index, minlength=len(self._layers)).tolist()

    def _check_ended(self) -> None:
        if self._config.rows is not None:
            self.save()
            raise UsageError(
                f"the source ended after {self.rows} rows, the run is of {self._config.rows}; a checkpoint is saved. "
                "Give the source more epochs, or train on fewer rows in another folder"
            )

    def _learn(self, arrived: Arrived, began: float) -> None:
        """One step of every SAE; one that fails is given up, unless it was the last."""
        for member in self._live:
            try:
                report = member.learn(arrived, began)
            except NonFiniteError as error:
                member.error = error
                if not self._live:
                    raise
                member.give_up()
                logger.warning("%s is given up, the others go on: %s", member.name, error)
                continue
            if report is not None and self._on_step is not None:
                self._on_step(report)
        self.step += 1
        self.rows += arrived.n_rows

    def _evaluate(self) -> None:
        """Score every SAE on held-out rows, unless this step's were; the best so far is kept as a checkpoint."""
        config = self._config
        if config.eval_every_steps is None or self._held_out is None or self._evaluated_step == self.step:
            return
        begin = self._held_out.state_dict()
        members = {member.name: member for member in self._live}
        found = heldout.evaluate(
            {name: member.state.trained(self._source, {}) for name, member in members.items()},
            self._held_out,
            ranks=self._ranks,
            n_rows=config.eval_rows,
        )
        self._held_out.load_state_dict(begin)
        for name, member in members.items():
            if member.write_evaluation(found[name]) and self.step:
                member.save(best_fvu=found[name].mean.fvu)
        self._evaluated_step = self.step

    def save(self) -> None:
        """Checkpoints of all SAEs at this step, unless they are there; told to whoever waits for them."""
        for member in self._live:
            member.save()
        for member in self._live:  # all are saved, so every step that one still has is one that all have
            member.prune()
        cursor = self._live[0].saved_cursor
        if cursor is not None and self._on_saved is not None:
            self._on_saved(cursor)
