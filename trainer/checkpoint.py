"""A run on disk.

    RUN/
      config.json                      the resolved configuration; its presence makes the folder a run
      metrics.jsonl                    one line per interval
      checkpoints/step-00000123/       all that is needed to go on exactly; the newest two are kept
        model.safetensors              weights
        optimizer.safetensors          Adam's moments, dead counters, what the first window fixed
        state.json                     step, rows, cursor, metric sums, digests of the two files above
      sae.safetensors, sae.json        the result; sae.json is written last and makes the run finished

No pickle anywhere. A checkpoint folder appears under its name only when complete.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from actcache.errors import DamageError, NotFoundError, PlanMismatchError, UsageError
from trainer import durable, transform
from trainer.config import TrainConfig
from trainer.sae import TopKSAE
from trainer.trained import TrainedSAE

FORMAT = 1
KEPT = 2
MAY_DIFFER = {"checkpoint_every_steps"}
"""Fields that change nothing a run computes or records."""


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


class RunFolder:
    """The folder of one run; knows names and commit order, not what a snapshot means."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics = root / "metrics.jsonl"
        self._config = root / "config.json"
        self._checkpoints = root / "checkpoints"

    def prepare(self, config: TrainConfig, *, resume: bool) -> None:
        """Make the folder a run of `config`, or check that it is one.

        Raises:
            UsageError: the folder holds a run and `resume` is false, or holds something else.
            PlanMismatchError: its run has another configuration; names the fields.
        """
        if self._config.exists():
            if not resume:
                raise UsageError(
                    f"{self.root} already holds a run; resume it with --resume, or choose another folder"
                )
            self._check_config(config)
        elif self.root.exists() and any(
            not entry.name.startswith(durable.TEMPORARY) for entry in self.root.iterdir()
        ):
            raise UsageError(
                f"{self.root} is not empty and holds no run (no config.json); choose another folder"
            )
        else:
            self.root.mkdir(parents=True, exist_ok=True)
            durable.write_text(self._config, config.model_dump_json(indent=2) + "\n")
        self._checkpoints.mkdir(exist_ok=True)
        for leftover in self._checkpoints.glob(durable.TEMPORARY + "*"):
            shutil.rmtree(leftover)

    def _check_config(self, config: TrainConfig) -> None:
        try:
            old = TrainConfig.model_validate_json(self._config.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise DamageError(f"{self._config} is not a run's configuration: {error}") from error
        before, now = old.model_dump(), config.model_dump()
        check_same(
            {name: (before[name], now[name]) for name in before if name not in MAY_DIFFER}, str(self.root)
        )

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self._checkpoints.glob("step-*"))

    def save(self, snapshot: Snapshot) -> None:
        """Commit a checkpoint, then remove all but the newest `KEPT`."""
        final = self._checkpoints / f"step-{snapshot.state['step']:08d}"
        temporary = self._checkpoints / (durable.TEMPORARY + final.name)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        digests = {
            name: durable.write_tensors(temporary / name, tensors)
            for name, tensors in (
                ("model.safetensors", snapshot.model),
                ("optimizer.safetensors", snapshot.training),
            )
        }
        document = {"format": FORMAT, "digests": digests, **snapshot.state}
        durable.write_text(temporary / "state.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
        durable.put_in_place(temporary, final)
        for step in self.steps()[:-KEPT]:
            shutil.rmtree(self._checkpoints / f"step-{step:08d}")

    def load(self, step: int, device: torch.device) -> Snapshot:
        """The checkpoint of `step`, its tensors on `device`.

        Raises:
            DamageError: a file is missing or is not what was written.
        """
        folder = self._checkpoints / f"step-{step:08d}"
        hint = f"remove {folder} to go on from an older checkpoint"
        state = _read_json(folder / "state.json", hint)
        check_same({"format": (state.pop("format", None), FORMAT)}, str(folder))
        digests = state.pop("digests")
        tensors = [
            _read_tensors(folder / name, digests[name], device, hint)
            for name in ("model.safetensors", "optimizer.safetensors")
        ]
        return Snapshot(model=tensors[0], training=tensors[1], state=state)

    def finish(self, model: TopKSAE, description: dict[str, Any]) -> None:
        """Write the result; from here on the run is finished."""
        digest = durable.write_tensors(self.root / "sae.safetensors", model.state_dict())
        document = {"format": FORMAT, "transform": transform.digest(), "digest": digest, **description}
        durable.write_text(self.root / "sae.json", json.dumps(document, indent=2, allow_nan=False) + "\n")

    def finished(self) -> dict[str, Any] | None:
        """sae.json of a finished run, else None."""
        path = self.root / "sae.json"
        return _read_json(path, "restore it from a copy, or train again") if path.exists() else None


def load_sae(run_dir: Path | str, *, device: torch.device | str = "cpu") -> TrainedSAE:
    """The SAE of a finished run.

    Raises:
        NotFoundError: no finished run is there.
        PlanMismatchError: it was trained with another transform than this version has.
        DamageError: the weights are not those that were written.
    """
    root = Path(run_dir)
    document = RunFolder(root).finished()
    if document is None:
        raise NotFoundError(
            f"no finished run in {root} (no sae.json); train it to its end, resuming if it was stopped"
        )
    check_same(
        {"format": (document["format"], FORMAT), "transform": (document["transform"], transform.digest())},
        str(root),
    )
    hint = "restore it from a copy, or train again"
    weights = _read_tensors(root / "sae.safetensors", document["digest"], torch.device(device), hint)
    config = TrainConfig.model_validate(document["config"])
    n_latents, width = weights["w_enc"].shape
    sae = TopKSAE(width, n_latents, config.k, generator=torch.Generator())
    sae.load_state_dict(weights)
    return TrainedSAE(
        sae=sae.to(device).eval().requires_grad_(requires_grad=False),
        config=config,
        layers=tuple(document["layers"]),
        var_layer={int(layer): value for layer, value in document["var_layer"].items()},
        source=document["source"],
        provenance=document["provenance"],
    )


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


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise DamageError(f"{path} cannot be read: {error}; {hint}") from error


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
