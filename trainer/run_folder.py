"""A run on disk.

    RUN/
      config.json                      the resolved configuration; its presence makes the folder a run
      metrics.jsonl, evaluation.jsonl  one line per interval, and per evaluation on held-out rows
      checkpoints/step-00000123/       all that is needed to go on exactly; some are kept, see `RunFolder.prune`
        model.safetensors              weights
        optimizer.safetensors          Adam's moments, averaged weights, dead counters, what the first window fixed
        state.json                     step, rows, cursor, metric sums, digests of the two files above
      checkpoints/best.json            which checkpoint had the smallest held-out FVU
      sae.safetensors, sae.json        the result; sae.json is written last and makes the run finished
      failed.json                      why it was given up while SAEs trained with it went on
      lock                             held by the process that trains

No pickle anywhere. A checkpoint folder appears under its name only when complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from actcache.errors import DamageError, PlanMismatchError, UsageError
from trainer import durable
from trainer.config import TrainConfig

FORMAT = 1
LOCK = "lock"
MAY_DIFFER = {
    "checkpoint_every_steps",
    "keep_newest",
    "keep_every_steps",
    "eval_every_steps",
    "eval_rows",
}
"""Fields that change nothing a run computes or writes to metrics.jsonl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state between two steps.

    model     weights by name.
    training  all other tensors by name.
    state     JSON: everything else, with `step`.
    """

    model: dict[str, Tensor]
    training: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finished:
    """What makes a finished SAE: weights, the fixed numbers of its transforms, and JSON."""

    model: dict[str, Tensor]
    transforms: dict[str, Tensor]
    description: dict[str, Any]


class RunFolder:
    """The folder of one run; knows names and commit order, not what a snapshot means."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics = root / "metrics.jsonl"
        self.evaluation = root / "evaluation.jsonl"
        self._config = root / "config.json"
        self._checkpoints = root / "checkpoints"
        self._best = self._checkpoints / "best.json"
        self._failed = root / "failed.json"
        self._lock: int | None = None

    # The folder.

    def prepare(self, config: TrainConfig, *, resume: bool) -> bool:
        """Make the folder a run of `config`, or check that it is one; nobody else can until `release`.

        Returns:
            Whether it was made now.

        Raises:
            UsageError: the folder holds a run and `resume` is false, or holds something else, or is being trained in.
            PlanMismatchError: its run has another configuration; names the fields.
        """
        is_new = not self._config.exists()
        if not is_new:
            if not resume:
                raise UsageError(
                    f"{self.root} already holds a run; resume it with --resume, or choose another folder"
                )
            self._hold()
            self._check_config(config)
        elif self.root.exists() and not all(_is_ours(entry.name) for entry in self.root.iterdir()):
            raise UsageError(
                f"{self.root} is not empty and holds no run (no config.json); choose another folder"
            )
        else:
            self.root.mkdir(parents=True, exist_ok=True)
            self._hold()
            durable.write_text(self._config, config.model_dump_json(indent=2) + "\n")
        self._checkpoints.mkdir(exist_ok=True)
        for leftover in self._checkpoints.glob(durable.TEMPORARY + "*"):
            shutil.rmtree(leftover)
        return is_new

    def _hold(self) -> None:
        """Take the lock. The operating system lets go of it when this process ends, however it ends."""
        path = self.root / LOCK
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = path.read_text(encoding="utf-8").strip() or "unknown"
            self.release()
            raise UsageError(
                f"another process (pid {holder}) is training in {self.root}; wait for it, or choose another folder"
            ) from error
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others train in this folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_config(self, config: TrainConfig) -> None:
        try:
            old = TrainConfig.model_validate_json(self._config.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise DamageError(f"{self._config} is not a run's configuration: {error}") from error
        before, now = old.model_dump(), config.model_dump()
        check_same(
            {name: (before[name], now[name]) for name in before if name not in MAY_DIFFER}, str(self.root)
        )

    # Checkpoints.

    def steps(self) -> list[int]:
        """Steps of which a checkpoint is there, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self._checkpoints.glob("step-*"))

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint."""
        final = self._folder(snapshot.state["step"])
        temporary = self._checkpoints / (durable.TEMPORARY + final.name)
        temporary.mkdir()
        digests = {
            name: durable.write_tensors(temporary / name, tensors)
            for name, tensors in (
                ("model.safetensors", snapshot.model),
                ("optimizer.safetensors", snapshot.training),
            )
        }
        document = {"format": FORMAT, "digests": digests, **snapshot.state}
        durable.write_text(temporary / "state.json", _dumped(document))
        durable.put_in_place(temporary, final)

    def load(self, step: int, device: torch.device) -> Snapshot:
        """The checkpoint of `step`, its tensors on `device`.

        Raises:
            DamageError: a file is missing or is not what was written.
        """
        folder = self._folder(step)
        hint = f"remove {folder} to go on from an older checkpoint"
        state = read_json(folder / "state.json", hint)
        check_same({"format": (state.pop("format", None), FORMAT)}, str(folder))
        digests = state.pop("digests")
        tensors = [
            _read_tensors(folder / name, digests[name], device, hint)
            for name in ("model.safetensors", "optimizer.safetensors")
        ]
        return Snapshot(model=tensors[0], training=tensors[1], state=state)

    def cursor(self, step: int) -> dict[str, Any]:
        """Where the source stood at the checkpoint of `step`."""
        folder = self._folder(step)
        return read_json(folder / "state.json", f"remove {folder} to go on from an older checkpoint")[
            "cursor"
        ]

    def prune(self, *, newest: int, every_steps: int | None) -> None:
        """Remove checkpoints, except the `newest`, those whose step is a multiple of `every_steps`, and the best one."""
        steps, best = self.steps(), self.best()
        for step in steps[:-newest]:
            is_kept = every_steps is not None and step % every_steps == 0
            if not is_kept and (best is None or best["step"] != step):
                self._remove(step)

    def forget_after(self, step: int) -> None:
        """Remove checkpoints of later steps: the run goes on from an earlier one."""
        for later in self.steps():
            if later > step:
                self._remove(later)

    def _remove(self, step: int) -> None:
        """Under its name a checkpoint is whole, also while it is being removed."""
        gone = self._checkpoints / f"{durable.TEMPORARY}gone-{step:08d}"
        self._folder(step).rename(gone)
        shutil.rmtree(gone)

    def best(self) -> dict[str, Any] | None:
        """`step` and `fvu` of the best checkpoint on held-out rows; None where none was evaluated or it is gone."""
        if not self._best.exists():
            return None
        found = read_json(self._best, f"remove {self._best}")
        return found if self._folder(found["step"]).exists() else None

    def mark_best(self, step: int, fvu: float) -> None:
        """Say which saved checkpoint is the best."""
        durable.write_text(self._best, _dumped({"step": step, "fvu": fvu}))

    def failed(self) -> str | None:
        """Why it was given up, if it was."""
        if not self._failed.exists():
            return None
        return read_json(self._failed, f"remove {self._failed}")["error"]

    def mark_failed(self, error: str) -> None:
        """Say that it was given up."""
        durable.write_text(self._failed, _dumped({"error": error}))

    def _folder(self, step: int) -> Path:
        return self._checkpoints / f"step-{step:08d}"

    # The result.

    def finish(self, result: Finished) -> None:
        """Write the result; from here on the run is finished."""
        tensors = {**result.model, **{f"transforms.{n}": x for n, x in result.transforms.items()}}
        digest = durable.write_tensors(self.root / "sae.safetensors", tensors)
        document = {"format": FORMAT, "digest": digest, **result.description}
        durable.write_text(self.root / "sae.json", _dumped(document))
        self._failed.unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """sae.json of a finished run, else None."""
        path = self.root / "sae.json"
        return read_json(path, "restore it from a copy, or train again") if path.exists() else None

    def load_result(self, device: torch.device) -> Finished:
        """What `finish` wrote, its tensors on `device`.

        Raises:
            DamageError: the weights are not those that were written.
        """
        document = self.finished()
        assert document is not None
        check_same({"format": (document["format"], FORMAT)}, str(self.root))
        hint = "restore it from a copy, or train again"
        tensors = _read_tensors(self.root / "sae.safetensors", document["digest"], device, hint)
        fixed = {n.removeprefix("transforms."): x for n, x in tensors.items() if n.startswith("transforms.")}
        weights = {n: x for n, x in tensors.items() if not n.startswith("transforms.")}
        return Finished(weights, fixed, document)


def check_same(pairs: dict[str, tuple[Any, Any]], where: str) -> None:
    """Raises PlanMismatchError naming every field whose value on disk differs from the one now."""
    different = [
        f"{name}: {before!r} there, {now!r} now" for name, (before, now) in pairs.items() if before != now
    ]
    if different:
        raise PlanMismatchError(
            f"{where} was made with other arguments ({'; '.join(different)}). "
            "Go on with those it was made with, or choose another folder"
        )


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object that we wrote; DamageError with `hint` where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise DamageError(f"{path} cannot be read: {error}; {hint}") from error


def _is_ours(name: str) -> bool:
    return name == LOCK or name.startswith(durable.TEMPORARY)


def _dumped(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _read_tensors(path: Path, digest: str, device: torch.device, hint: str) -> dict[str, Tensor]:
    if not path.exists():
        raise DamageError(f"{path} is missing; {hint}")
    found = durable.file_digest(path)
    if found != digest:
        raise DamageError(f"{path} has SHA-256 {found}, written was {digest}; {hint}")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise DamageError(f"{path} cannot be read: {error}; {hint}") from error
