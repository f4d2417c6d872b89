"""What a run tells those who watch it and those who called it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Outcome = Literal["finished", "stopped", "already finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimiser step of one SAE, for whoever watches.

    name       which SAE, where several are trained; else "".
    step       its number, from 1.
    rows       rows of the source so far; rows_total of them in all, if that is known.
    loss       reconstruction loss of its batch.
    aux_loss   auxiliary loss of its batch.
    train_fvu  per layer, as in `trainer.metrics`, of its batch; layers without rows are left out.
    l0         activations above 1e-3 per row of its batch.
    grad_norm  norm of the gradient before clipping.
    n_dead     dead latents after it, of n_latents.
    step_s     seconds since the batch before, waiting included; of the SAEs trained together, the same for all.
    waited_s   seconds the source says it made this process wait so far.
    """

    name: str
    step: int
    rows: int
    rows_total: int | None
    loss: float
    aux_loss: float
    train_fvu: dict[int, float]
    l0: float
    grad_norm: float
    n_dead: int
    n_latents: int
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
    failed    what stopped an SAE while others trained with it went on: by name, the message.
    """

    outcome: Outcome
    step: int
    rows: int
    elapsed_s: float
    waited_s: float
    failed: dict[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """A dashboard that numbers of one SAE are sent to."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers by name, at a step; steps ascend."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class MakeTracker(Protocol):
    """Opens a dashboard for one SAE."""

    def __call__(self, folder: Any, name: str, config: dict[str, Any], step: int) -> Tracker:
        """A tracker.

        Args:
            folder: the SAE's run folder, a Path.
            name: what it is called among those trained together; "" where it is alone.
            config: resolved.
            step: the run goes on after this one; what was sent of later steps is void.
        """
        ...
