"""TensorBoard and Weights & Biases, both optional: numbers of a run, as it goes.

metrics.jsonl and evaluation.jsonl hold the same numbers; these are for looking at them elsewhere.
"""

from __future__ import annotations

import importlib
import secrets
from pathlib import Path
from typing import Any

from actcache.errors import UsageError
from trainer import durable
from trainer.reports import MakeTracker, Tracker


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{error}; --{extra} needs another package: pip install 'actcache[{extra}]'"
        ) from error


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def tensorboard() -> MakeTracker:
    """Event files in RUN/tensorboard; what a run that is resumed had logged after its checkpoint is dropped.

    Raises:
        UsageError: the package is not installed.
    """
    package = _package("torch.utils.tensorboard", "tensorboard")

    def make(folder: Path, name: str, config: dict[str, Any], step: int) -> Tracker:  # noqa: ARG001
        return _TensorBoard(package.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1))

    return make


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


def wandb(project: str) -> MakeTracker:
    """A run of the project for every SAE, the same one when it is resumed. WANDB_MODE=offline writes to RUN/wandb only.

    Raises:
        UsageError: the package is not installed.
    """
    package = _package("wandb", "wandb")

    def make(folder: Path, name: str, config: dict[str, Any], step: int) -> Tracker:  # noqa: ARG001
        known = folder / "wandb-id"
        if not known.exists():
            durable.write_text(known, secrets.token_hex(8))
        run = package.init(
            project=project,
            id=known.read_text(encoding="utf-8"),
            name=name or folder.resolve().name,
            config=config,
            dir=str(folder),
            resume="allow",
            reinit="create_new",
            settings=package.Settings(console="off", silent=True),
        )
        return _Wandb(run)

    return make
