"""What has to be settled before the first step: configurations, folders, and the state that each SAE starts from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from actcache.errors import UsageError
from actcache.flow import BatchSource
from trainer.config import TrainConfig
from trainer.forms import FORMS
from trainer.kernels import Kernels
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder, check_same
from trainer.state import TrainState, count_steps
from trainer.trained import TrainedSAE, weights_digest
from trainer.window import read_first_window

logger = logging.getLogger(__name__)

SHARED = (
    "form",
    "batch_rows",
    "first_window_rows",
    "rows",
    "epochs",
    "checkpoint_every_steps",
    "eval_every_steps",
    "eval_rows",
    "log_every_steps",
)
"""Settings that SAEs trained on the same batches have in common."""


def fit(config: TrainConfig, source: BatchSource, init: TrainedSAE | None) -> TrainConfig:
    """The resolved configuration, with the source's layers filled in."""
    layers, form = tuple(source.layers), FORMS[config.form]
    wanted = config.layers or layers
    if not set(wanted) <= set(layers) or (form.is_joint and wanted != layers):
        raise UsageError(
            f"config.layers is {config.layers}, the source hands out layers {layers}; make the source with the layers"
        )
    width = form.width(source.width, layers)
    try:
        resolved = config.resolve(width)
    except ValueError as error:
        raise UsageError(f"this configuration does not fit rows of width {width}: {error}") from error
    started_from = None if init is None else weights_digest(init.sae)
    return resolved.model_copy(update={"layers": wanted, "init_from": started_from})


def check_shared(configs: Mapping[str, TrainConfig]) -> None:
    """Raises UsageError where SAEs to be trained on the same batches differ in what they must have in common."""
    for field in SHARED:
        values = {name: getattr(config, field) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            raise UsageError(
                f"SAEs trained on the same batches have one {field}; here it is {values}. Train them apart"
            )


def prepare(
    folders: Mapping[str, RunFolder],
    configs: Mapping[str, TrainConfig],
    source: BatchSource,
    stack: ExitStack,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Make or check the folders, locked until the stack unwinds.

    Returns:
        What is `done` already (step and rows by name), what was `failed` (errors by name) and what is `new` (names).
    """
    done, failed, new = {}, {}, []
    for name, folder in folders.items():
        stack.callback(folder.release)
        if folder.prepare(configs[name], resume=resume):
            new.append(name)
        result = folder.finished()
        if result is not None:
            check_same({"source": (result["source"], source.fingerprint)}, str(folder.root))
            done[name] = {"step": result["step"], "rows": result["rows"]}
        elif folder.failed() is not None:
            failed[name] = folder.failed()
    return {"done": done, "failed": failed, "new": new}


def start_or_restore(
    step: int | None,
    folders: Mapping[str, RunFolder],
    source: BatchSource,
    configs: Mapping[str, TrainConfig],
    device: torch.device,
    init: TrainedSAE | None,
    kernels: Kernels,
    ranks: Ranks,
) -> dict[str, TrainState]:
    """The state of every SAE at `step`, the source's cursor moved there; None: new ones.

    Raises:
        PlanMismatchError: a checkpoint is of other rows; names what differs.
        DamageError: a checkpoint is not what was written.
    """
    if step is None:
        first = read_first_window(source, next(iter(configs.values())))
        return {
            name: TrainState.start(
                source, config, device, first=first, init=init, kernels=kernels, ranks=ranks
            )
            for name, config in configs.items()
        }
    states, cursor = {}, None
    for name, folder in folders.items():
        snapshot = folder.load(step, device)
        cursor = snapshot.state["cursor"]
        _check_source(snapshot.state, source, configs[name], folder, ranks)
        states[name] = TrainState.restore(source, configs[name], snapshot, kernels=kernels, ranks=ranks)
    assert cursor is not None
    source.load_state_dict(cursor)
    return states


def common_step(folders: Mapping[str, RunFolder], new: Sequence[str]) -> int | None:
    """The newest step of which every folder has a checkpoint, others' later ones removed; None: begin.

    All are saved before any is pruned, so where none is in common the first save was cut short: some have one checkpoint,
    some have none.

    Raises:
        UsageError: that is not what happened: they were not trained together.
    """
    steps = {name: set(folder.steps()) for name, folder in folders.items()}
    common = max(set.intersection(*steps.values()), default=None)
    was_cut_short = all(len(found) <= 1 for found in steps.values()) and not set(new) & steps.keys()
    if common is None and any(steps.values()) and not was_cut_short:
        there = "; ".join(f"{name}: {sorted(found) or 'none'}" for name, found in steps.items())
        raise UsageError(
            f"these SAEs cannot go on together, they have no checkpoint of the same step ({there}). Train them apart"
        )
    for folder in folders.values():
        folder.forget_after(-1 if common is None else common)
    return common


def saved_cursor(out: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """The cursor that SAEs in `out` would go on from; None where they would begin, or are finished. Changes nothing."""
    folders = [RunFolder(out / name) for name in names]
    left = [folder for folder in folders if folder.finished() is None]
    left = [folder for folder in left if folder.failed() is None] or left
    common = set.intersection(*(set(folder.steps()) for folder in left)) if left else set()
    return left[0].cursor(max(common)) if common else None


def _check_source(
    state: dict[str, Any], source: BatchSource, config: TrainConfig, folder: RunFolder, ranks: Ranks
) -> None:
    check_same(
        {
            "source": (state["source"], source.fingerprint),
            "length of the source in batches": (state["total_steps"], count_steps(source, config)),
        },
        str(folder.root),
    )
    for what, now in (("threads", torch.get_num_threads()), ("processes", ranks.size)):
        before = state["threads" if what == "threads" else "world_size"]
        if before != now:
            logger.warning(
                "resuming with %d %s a run that had %d: the result is the same within rounding, no longer bit for bit",
                now,
                what,
                before,
            )
