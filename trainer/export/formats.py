"""All formats by name: writing an SAE in one, telling which one files are in, reading them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from actcache.errors import NotFoundError, UsageError
from trainer import durable
from trainer.checkpoint import load_sae, step_of
from trainer.export import dictionary_learning, mlsae, openai, saelens, sparsify
from trainer.export.card import make_card
from trainer.export.portable import hooks_of, make_portable
from trainer.export.run import check_free, find_runs, finished_again, form_of, make_finished
from trainer.run_folder import Finished, RunFolder
from trainer.trained import TrainedSAE

OURS = "actcache"

FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "openai": openai,
    "mlsae": mlsae,
}

NAMES = (OURS, *FORMATS)


def export_runs(
    root: Path,
    out: Path,
    name: str,
    *,
    layer: int | None = None,
    checkpoint: str | None = None,
    names_model: bool = True,
) -> list[Path]:
    """Write the SAE of a run to a new folder; of a folder of runs, each to one folder in it. All, or nothing.

    Args:
        root: a run, or a folder of runs as a sweep leaves them.
        out: the new folder.
        name: one of `NAMES`.
        layer: see `make_portable`.
        checkpoint: see `load_for_export`.
        names_model: see `export`.

    Returns:
        The folders written.

    Raises:
        NotFoundError: there is no run, or one is not finished and no checkpoint of it was asked for.
        UsageError: as of `export`.
    """
    runs = find_runs(root)
    with _appearing(out) as temporary:
        for called, folder in runs.items():
            trained, facts = load_for_export(folder, checkpoint)
            _write(trained, temporary / called, name, layer, facts, names_model=names_model)
    return [out / called for called in runs]


def export(
    trained: TrainedSAE,
    out: Path,
    name: str,
    *,
    layer: int | None = None,
    names_model: bool = True,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write an SAE and its model card to a new folder, at once.

    Args:
        trained: the SAE.
        out: the folder.
        name: one of `NAMES`.
        layer: see `make_portable`.
        names_model: whether to say which language model and revision the rows come from.
        facts: what is known of the run besides: steps, rows, scores; for the card.

    Raises:
        UsageError: there is no such format, it has no such SAE, or `out` is there already.
    """
    with _appearing(out) as temporary:
        _write(trained, temporary, name, layer, facts or {}, names_model=names_model)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that gets the name `out` when all that was to be written to it is."""
    check_free(out)
    temporary = out.with_name(durable.TEMPORARY + out.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    durable.put_in_place(temporary, out)


def _write(
    trained: TrainedSAE,
    folder: Path,
    name: str,
    layer: int | None,
    facts: dict[str, Any],
    *,
    names_model: bool,
) -> None:
    if name not in NAMES:
        raise UsageError(f"format {name!r}: expected one of {', '.join(NAMES)}")
    if not names_model:
        trained = replace(trained, provenance=without_model(trained.provenance))
    folder.mkdir(exist_ok=True)
    if name == OURS:
        RunFolder(folder).finish(finished_again(trained, facts))
    else:
        FORMATS[name].write(make_portable(trained, layer), folder)
    durable.write_text(folder / "README.md", make_card(trained, name, facts, layer))


def without_model(provenance: dict[str, Any]) -> dict[str, Any]:
    """Provenance that does not name the language model: the digest of its weights stays, for those who have it."""
    model = provenance.get("model")
    if not model:
        return provenance
    return {**provenance, "model": {**model, "name": None, "revision": None}}


def detect(folder: Path) -> str:
    """The format of files.

    Raises:
        NotFoundError: nothing is there.
        UsageError: they are in none of the formats.
    """
    if not folder.exists():
        raise NotFoundError(f"no {folder}")
    if (folder / "sae.json").is_file():
        return OURS
    for name, module in FORMATS.items():
        if module.recognises(folder):
            return name
    raise UsageError(
        f"{folder} holds no SAE in a format known here ({', '.join(NAMES)}); if it is one, say which with --format"
    )


def load_for_export(run: Path, checkpoint: str | None = None) -> tuple[TrainedSAE, dict[str, Any]]:
    """A run's SAE, and what else its files say: steps, rows, versions, the newest held-out scores.

    Args:
        run: its folder.
        checkpoint: None: the result; "best", "last" or a step.

    Raises:
        NotFoundError: no finished run, or no such checkpoint, is there.
        UsageError: `checkpoint` is none of these.
    """
    folder = RunFolder(run)
    if checkpoint is None:
        step = None
        found = folder.finished() or {}
        facts = {name: found[name] for name in ("step", "rows", "torch") if name in found}
    else:
        step = step_of(folder, _which(checkpoint))
        facts = {"checkpoint": checkpoint, "step": step}
    trained = load_sae(run, checkpoint=step)
    if folder.evaluation.is_file():
        lines = [json.loads(line) for line in folder.evaluation.read_text(encoding="utf-8").splitlines()]
        scores = [line for line in lines if step is None or line["step"] == step]
        if scores:
            facts["scores"] = scores[-1]
    return trained, facts


def check_exported(folder: Path) -> None:
    """Raises NotFoundError or UsageError unless this is what `export` wrote, or a folder of such folders."""
    inner = [path.parent for path in sorted(folder.glob("*/README.md"))]
    for one in inner or [folder]:
        detect(one)
    if not inner and not (folder / "README.md").is_file():
        raise UsageError(
            f"{folder} has no README.md: upload what 'actcache export' writes, which has a model card"
        )


def _which(checkpoint: str) -> int | Literal["best", "last"]:
    if checkpoint == "best" or checkpoint == "last":
        return checkpoint
    if not checkpoint.isdigit():
        raise UsageError(f"checkpoint {checkpoint!r}: expected best, last or the number of a step")
    return int(checkpoint)


class Imported(NamedTuple):
    """An SAE that was read, and what has to be decided before it can be a run.

    name        its format.
    form        of a row, as in a run's configuration.
    width       of one layer's input.
    n_latents   f.
    layers      the model's layer numbers it says it is of; empty where it does not say.
    hooks       where in a block its rows come from, and are predicted, likewise.
    provenance  what it says of itself.
    make        given layers and provenance, the result of a run.
    """

    name: str
    form: str
    width: int
    n_latents: int
    layers: tuple[int, ...]
    hooks: tuple[str, ...]
    provenance: dict[str, Any]
    make: Callable[[tuple[int, ...], dict[str, Any]], Finished]


def read(folder: Path, name: str | None = None) -> Imported:
    """An SAE in any of the formats.

    Args:
        folder: where it is; of openai's format also the file itself.
        name: the format; None: told by the files.

    Raises:
        NotFoundError: a file is missing.
        DamageError: a file is not what it should be.
        UsageError: it computes something that we have not, or there is no such format.
    """
    name = detect(folder) if name is None else name
    if name == OURS:
        return _read_ours(folder)
    if name not in FORMATS:
        raise UsageError(f"format {name!r}: expected one of {', '.join(NAMES)}")
    sae = FORMATS[name].read(folder)
    provenance = dict(sae.about.get("provenance", {}))
    provenance["imported"] = {"format": name, "from": folder.name, **sae.about}
    provenance["imported"].pop("provenance", None)
    return Imported(
        name=name,
        form=form_of(sae),
        width=sae.width // sae.n_slices,
        n_latents=sae.n_latents,
        layers=sae.layers,
        hooks=sae.hooks,
        provenance=provenance,
        make=lambda layers, known: make_finished(sae, layers, known),
    )


def _read_ours(folder: Path) -> Imported:
    trained = load_sae(folder)
    found = RunFolder(folder).finished() or {}
    facts = {name: found[name] for name in ("step", "rows", "torch") if name in found}

    def make(layers: tuple[int, ...], known: dict[str, Any]) -> Finished:
        if layers != trained.layers:
            raise UsageError(f"this SAE was trained on layers {list(trained.layers)}, not {list(layers)}")
        return finished_again(replace(trained, provenance=known), facts)

    return Imported(
        name=OURS,
        form=trained.config.form,
        width=trained.sae.width // trained.n_slices,
        n_latents=trained.sae.n_latents,
        layers=trained.layers,
        hooks=hooks_of(trained),
        provenance=trained.provenance,
        make=make,
    )
