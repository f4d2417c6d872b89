"""Rebuilding damaged shards from the stored tokens; nothing else in the store is touched.

A rebuilt shard has objects of new names and a new ledger record, of the next generation: until that record is there, the
store is what it was, and from then on it is whole. Afterwards the names that Zarr knows are given to the new objects, for
readers that know no ledger, and what the shard was before is gone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actcache.errors import PlanMismatchError, UsageError
from actcache.model import Decoder
from actcache.producer.add import IMPORTED, check_model
from actcache.producer.build import default_encode_threads, fill_shards
from actcache.producer.clock import Clock
from actcache.producer.summary import BuildReporter, BuildSummary
from actcache.store.arrays import side_arrays, side_key
from actcache.store.disk import Disk, workspaces
from actcache.store.objects import LocalObjects, open_objects
from actcache.store.open import CaptureCatalog, Catalog
from actcache.store.schema import LEDGER_GENERATIONS
from actcache.store.verify import Problem, check_shard, find_problems

_RUN_WITH = ("tokens", "document", "keep")
"""Of the plan, what the model is run with."""

Shard = tuple[str, int]
"""A capture's name, and the number of a shard."""


@dataclass(slots=True)
class RepairSummary:
    """What a repair found and did.

    found    everything that was wrong.        left     what still is: a repair cannot mend it.
    rebuilt  shards the model was run for.     renamed  shards of which only what other readers see was wrong.
    build    seconds and bytes of rebuilding.
    """

    store: Path
    found: list[Problem]
    left: list[Problem] = field(default_factory=list)
    rebuilt: list[Shard] = field(default_factory=list)
    renamed: list[Shard] = field(default_factory=list)
    build: BuildSummary | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "store": str(self.store),
            "found": [problem._asdict() for problem in self.found],
            "left": [problem._asdict() for problem in self.left],
            "rebuilt": self.rebuilt,
            "renamed": self.renamed,
            "build": self.build and self.build.as_json(),
        }


class _Damaged:
    """The shards to rebuild, in plan order; their objects get Zarr's names when all their captures are committed."""

    def __init__(self, disk: Disk, catalog: Catalog, shards: Sequence[Shard]) -> None:
        self._disk = disk
        self._of_shard: dict[int, list[CaptureCatalog]] = {}
        for name, shard in sorted(shards, key=lambda found: found[1]):
            self._of_shard.setdefault(shard, []).append(catalog.captures[name])
        self.captures = list({c.capture.name: c for found in self._of_shard.values() for c in found}.values())
        self.n_tokens = sum(len(catalog.grid.sequences_of(s)) for s in self._of_shard) * catalog.grid.seq_len
        self.check: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[tuple[int, list[CaptureCatalog]]]:
        yield from self._of_shard.items()

    def done(self, shard: int) -> None:
        """All of a shard is committed."""
        for capture in self._of_shard[shard]:
            rename_to_zarr(self._disk, capture, shard)


def rename_to_zarr(disk: Disk, capture: CaptureCatalog, shard: int) -> None:
    """Give Zarr's names to the objects of the record in force, and remove those of generations between."""
    newest = capture.newest(shard)
    assert newest is not None
    for name in ("rows", *side_arrays(capture.capture)):
        spec = capture.arrays[name]
        disk.rename(side_key(spec, shard, newest[0]), side_key(spec, shard))
        for generation in range(1, newest[0]):
            key = side_key(spec, shard, generation)
            if (disk.root / key).exists():
                disk.remove(key)


def repair(
    location: str,
    load: Callable[[Catalog], Decoder],
    *,
    threads: int = 2,
    encode_threads: int | None = None,
    allow_non_finite: bool = False,
    on_verify: Callable[[], None] = lambda: None,
    reporter: BuildReporter | None = None,
    on_operation: Callable[[str, str], None] | None = None,
) -> RepairSummary:
    """Find what is damaged in a store, as `verify` does, and rebuild those shards with the model.

    Args:
        location: the store, a folder.
        load: loads the model the store was made with; called if there is a shard to rebuild.
        threads: that read and check.
        encode_threads: that compress; None: see `default_encode_threads`.
        allow_non_finite: store rows with NaN or infinity instead of stopping.
        on_verify: called after each shard that is checked: of the plan, and of every capture.
        reporter: told about rebuilding.
        on_operation: called before every step that changes the disk.

    Raises:
        UsageError: not a local folder, or a shard that was rebuilt too often. PlanMismatchError: another model, dtype of
            computing or device class, or a store that no model of ours made. DiskFullError: it does not fit.
    """
    objects = open_objects(location)
    if not isinstance(objects, LocalObjects):
        raise UsageError(
            f"{location} is not on a disk of this machine: copy the store here, repair it, copy it back"
        )
    catalog = Catalog(objects)
    found = find_problems(catalog, threads, on_verify)
    rebuilt, renamed = _shards_to_mend(found)
    summary = RepairSummary(objects.root, found, rebuilt=rebuilt, renamed=renamed)
    if rebuilt or renamed or workspaces(objects.root):
        generations = _next_generations(catalog, rebuilt)
        decoder = _load(catalog, load) if rebuilt else None
        with Disk(objects.root, on_operation) as disk:
            disk.sweep()
            for name, shard in renamed:
                rename_to_zarr(disk, catalog.captures[name], shard)
            if decoder is not None:
                summary.build = BuildSummary(objects.root, n_shards=catalog.grid.n_shards)
                damaged = _Damaged(disk, catalog, rebuilt)
                reporter = reporter or BuildReporter()
                reporter.on_start(0, damaged.n_tokens)
                decoder.cut(max(max(c.capture.layers) for c in damaged.captures))
                fill_shards(
                    catalog,
                    damaged.captures,
                    damaged,
                    disk,
                    decoder,
                    encode_threads or default_encode_threads(decoder.device.type),
                    summary.build,
                    reporter,
                    Clock(),
                    allow_non_finite=allow_non_finite,
                    generations=generations,
                )
    again, mended = Catalog(objects), {*rebuilt, *renamed}
    summary.left = [p for p in found if (p.capture, p.shard) not in mended]
    summary.left += [p for name, shard in sorted(mended) for p in check_shard(again.captures[name], shard)]
    return summary


def _shards_to_mend(found: Sequence[Problem]) -> tuple[list[Shard], list[Shard]]:
    """Shards to rebuild, and shards that are right but for what other readers see; none whose tokens are lost."""
    lost = {p.shard for p in found if p.capture is None and p.object.split("/")[0] in _RUN_WITH}
    shards: dict[bool, set[Shard]] = {False: set(), True: set()}
    for p in found:
        if p.capture is not None and p.shard is not None and (p.is_copy or p.shard not in lost):
            shards[p.is_copy].add((p.capture, p.shard))
    return sorted(shards[False]), sorted(shards[True] - shards[False])


def _next_generations(catalog: Catalog, shards: Sequence[Shard]) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for name, shard in shards:
        newest = catalog.captures[name].newest(shard)
        generation = newest[0] + 1 if newest else 0
        if generation >= LEDGER_GENERATIONS:
            raise UsageError(
                f"shard {shard} of {name} in {catalog.objects.url} was rebuilt {LEDGER_GENERATIONS - 1} times, and its "
                f"ledger has no room for another. Copy the store to a disk that keeps what is written, or build it anew."
            )
        found.setdefault(name, {})[shard] = generation
    return found


def _load(catalog: Catalog, load: Callable[[Catalog], Decoder]) -> Decoder:
    """The model, once it is known to be the one."""
    if catalog.plan.request.device == IMPORTED:
        raise PlanMismatchError(
            f"{catalog.objects.url} was imported: no model is known to have made its rows, so none can rebuild them. Remove "
            f"the ledger records and the objects of the damaged shards, then run the same 'actcache import' again."
        )
    decoder = load(catalog)
    check_model(catalog, decoder)
    return decoder


def model_of(catalog: Catalog, given: str | None) -> tuple[str, str | None]:
    """Name and revision of the model to load: what was given, else what the plan says of a model from a hub."""
    model = catalog.plan.request.model
    if given is not None:
        return given, None
    if model.revision is None:
        raise UsageError(
            f"{catalog.objects.url} was made with {model.name}, a local folder: say where it is now, with --model"
        )
    return model.name, model.revision
