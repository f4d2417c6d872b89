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
    rows: int = 0
    loss: float = 0.0
    aux_loss: float = 0.0
    extra_loss: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0
    n_rows: list[int] = field(default_factory=list)
    residual: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    n_active: list[int] = field(default_factory=list)
    l1: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in _BY_LAYER:
            if not getattr(self, name):
                setattr(self, name, [0] * self.n_layers)

    def add(self, sums: StepSums, *, grad_norm: float, lr: float) -> None:
        """Count one step, weighted by its rows; norm and learning rate are kept of the last one."""
        self.steps += 1
        self.rows += sums.rows
        self.loss += sums.loss * sums.rows
        self.aux_loss += sums.aux_loss * sums.rows
        self.extra_loss += sums.extra_loss * sums.rows
        self.grad_norm, self.lr = grad_norm, lr
        for name in _BY_LAYER:
            added = getattr(sums, name).tolist()
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), added, strict=True)])

    def line(self, layers: tuple[int, ...]) -> dict[str, Any]:
        """The interval's metrics, over its rows; null where there were none.

        loss        (1/rows) sum of row losses: the reconstruction alone.
        aux_loss    auxiliary loss.
        extra_loss  everything else that was minimised (L1 penalty, Multi-TopK, smaller Matryoshka prefixes).
        train_fvu   per layer, sum ||x - xhat||^2 / sum ||x - mean_l||^2 in raw space, over training rows; mean_l is the
                    first window's mean of each dimension. Not held out: for watching a run, not for reporting.
        l0          mean number of activations above 1e-3 per row; l0_layer: of each layer's rows.
        l1          mean sum of activations per row, in standardised units.
        grad_norm   of the last step, after projection and before clipping.
        lr          of the last step.
        """
        n = sum(self.n_rows)
        return {
            "loss": _over(self.loss, self.rows),
            "aux_loss": _over(self.aux_loss, self.rows),
            "extra_loss": _over(self.extra_loss, self.rows),
            "train_fvu": _by_layer(layers, self.residual, self.total),
            "l0": _over(sum(self.n_active), n),
            "l0_layer": _by_layer(layers, self.n_active, self.n_rows),
            "l1": _over(sum(self.l1), n),
            "grad_norm": self.grad_norm,
            "lr": self.lr,
        }


_BY_LAYER = ("n_rows", "residual", "total", "n_active", "l1")


def _over(total: float, n: float) -> float | None:
    return total / n if n > 0 else None


def _by_layer(layers: tuple[int, ...], totals: list[Any], n: list[Any]) -> dict[str, float | None]:
    return {str(layer): _over(a, b) for layer, a, b in zip(layers, totals, n, strict=True)}


def flatten(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line under names with slashes, such as train_fvu/3: what dashboards want."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


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
