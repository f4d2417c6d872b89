"""One line of metrics.jsonl per interval of steps, and the file they stand in."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.step import StepSums


@dataclass(slots=True)
class Interval:
    """Sums since the last line; part of a checkpoint, so a line that spans an interruption is the same.

    Lists run over the run's layers.
    """

    n_layers: int
    steps: int = 0
    loss: float = 0.0
    aux_loss: float = 0.0
    n_active: int = 0
    grad_norm: float = 0.0
    lr: float = 0.0
    n_rows: list[int] = field(default_factory=list)
    residual: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.n_rows = self.n_rows or [0] * self.n_layers
        self.residual = self.residual or [0.0] * self.n_layers
        self.total = self.total or [0.0] * self.n_layers

    def add(self, sums: StepSums, *, grad_norm: float, lr: float) -> None:
        """Count one step, weighted by its rows; norm and learning rate are kept of the last one."""
        rows = int(sums.n_rows.sum())
        self.steps += 1
        self.loss += sums.loss * rows
        self.aux_loss += sums.aux_loss * rows
        self.n_active += sums.n_active
        self.grad_norm, self.lr = grad_norm, lr
        self.n_rows = [a + b for a, b in zip(self.n_rows, sums.n_rows.tolist(), strict=True)]
        self.residual = [a + b for a, b in zip(self.residual, sums.residual.tolist(), strict=True)]
        self.total = [a + b for a, b in zip(self.total, sums.total.tolist(), strict=True)]

    def line(self, layers: tuple[int, ...]) -> dict[str, Any]:
        """The interval's metrics, over its rows.

        loss       (1/rows) sum of row losses, without the auxiliary loss, which is `aux_loss`.
        train_fvu  per layer, sum ||x - xhat||^2 / sum ||x - mean_l||^2 in raw space, over training rows; mean_l is the
                   first window's mean of each dimension. Not held out: for watching a run, not for reporting. Null for a
                   layer without rows.
        l0         mean number of activations above 1e-3 per row.
        grad_norm  of the last step, after projection and before clipping.
        lr         of the last step.
        """
        rows = sum(self.n_rows)
        fvu = [r / t if t > 0 else None for r, t in zip(self.residual, self.total, strict=True)]
        return {
            "loss": self.loss / rows,
            "aux_loss": self.aux_loss / rows,
            "train_fvu": {str(layer): value for layer, value in zip(layers, fvu, strict=True)},
            "l0": self.n_active / rows,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
        }


class MetricsFile:
    """Appends JSON lines, each with its `step`, ascending."""

    def __init__(self, path: Path, *, keep_to_step: int) -> None:
        """Open for appending; lines after `keep_to_step`, and a torn last line, are cut off."""
        _truncate(path, keep_to_step)
        self._file = path.open("ab")

    def append(self, line: dict[str, Any]) -> None:
        """Write one line through to the operating system."""
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Make all lines durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _truncate(path: Path, keep_to_step: int) -> None:
    if not path.exists():
        return
    keep = 0
    with path.open("rb") as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError):
                break
            if not line.endswith(b"\n") or step > keep_to_step:
                break
            keep += len(line)
    os.truncate(path, keep)
