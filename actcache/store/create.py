"""Writing a plan: every array and every object that is known before the first forward pass.

A plan is staged in a folder beside its final place and given its name in one step, so it is there or it is not.
"""

import glob
import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.store.arrays import (
    PER_SHARD_PLAN_ARRAYS,
    ArraySpec,
    capture_arrays,
    checksum,
    encode_strings,
    plan_arrays,
)
from actcache.store.disk import (
    Disk,
    is_held,
    make_folders,
    publish,
    publish_folder,
    remove_abandoned,
    workspaces,
)
from actcache.store.metadata import array_json, group_json
from actcache.store.mixing import mix
from actcache.store.open import capture_attributes, plan_attributes, shards_digest
from actcache.store.schema import (
    FORMAT,
    Capture,
    Grid,
    Plan,
    PlannedShard,
    Record,
    Request,
    TextRecord,
    canonical,
)

OnOperation = Callable[[str, str], None]


def capture_name(hook: str) -> str:
    """The group's name of a hook: its own, or of a module hook the path within the block and the side.

    `layers.*.mlp.up_proj:out` is `mlp.up_proj.out`: a name that every file system and every shell takes.
    """
    pattern, colon, side = hook.rpartition(":")
    if not colon:
        return hook
    return f"{pattern.partition('.*')[2].removeprefix('.') or 'block'}.{side}"


class CaptureRequest(Record):
    """A capture as asked for, before it is bound to a plan. `name` is that of the hook where left out."""

    name: str | None = None
    hook: Any
    layers: tuple[int, ...]
    width: int
    dtype: Any
    codec: Any

    @property
    def group(self) -> str:
        """The name of the group it is stored in."""
        return self.name or capture_name(self.hook)


class Sequences(NamedTuple):
    """The sequences of one shard: tokens and document [q, t] uint32, keep [q, t] bool."""

    tokens: NDArray[np.uint32]
    document: NDArray[np.uint32]
    keep: NDArray[np.bool_]


def _staged(final: Path) -> Iterator[Path]:
    yield from final.parent.glob(f"{glob.escape(final.name)}.planning-{'[0-9a-f]' * 16}")


def sweep_staged(final: Path) -> None:
    """Remove the folders in which dead processes were planning the store `final`."""
    for left in _staged(final):
        remove_abandoned(left)


def is_being_planned(final: Path) -> bool:
    """Whether a living process is planning the store `final`."""
    return any(is_held(workspace) for folder in _staged(final) for workspace in workspaces(folder))


@contextmanager
def staging(final: Path, on_operation: OnOperation | None) -> Iterator[Disk]:
    """A locked folder beside `final` in which a plan is written, renamed to `final` at the end.

    FileExistsError when `final` was taken meanwhile.
    """
    make_folders(final.parent)
    staged = final.parent / f"{final.name}.planning-{secrets.token_hex(8)}"
    disk = Disk(staged, on_operation)
    try:
        with disk:
            yield disk
            publish(disk, final)
    except Exception:
        shutil.rmtree(staged, ignore_errors=True)  # not disk.root: after the rename that is the store itself
        raise


def _create_array(disk: Disk, spec: ArraySpec) -> str:
    disk.makedirs(spec.path)
    document = array_json(spec)
    disk.create(f"{spec.path}/zarr.json", document)
    return hashlib.sha256(document).hexdigest()


def _plan_shard(
    disk: Disk, arrays: dict[str, ArraySpec], grid: Grid, seed: int, shard: int, given: Sequences
) -> PlannedShard:
    mixed = mix(grid, seed, shard, given.keep, given.document)
    values: dict[str, NDArray[Any]] = {
        "tokens": given.tokens,
        "document": given.document,
        "keep": given.keep,
        "row_sequence": mixed.row_sequence,
        "row_position": mixed.row_position,
    }
    objects: dict[str, tuple[int, int]] = {}
    for name in PER_SHARD_PLAN_ARRAYS:
        spec = arrays[name]
        data = spec.encode(values[name])
        disk.create(spec.key(shard, *(0,) * (len(spec.shape) - 1)), data)
        objects[name] = checksum(data)
    return PlannedShard(kept=mixed.kept, stored=mixed.stored, objects=objects)


def create_plan(
    disk: Disk,
    *,
    version: str,
    request: Request,
    text: TextRecord,
    grid: Grid,
    sequences_of: Callable[[int], Sequences],
    captures: list[CaptureRequest],
    on_shard: Callable[[], None],
) -> Plan:
    """Write a whole plan into the staged folder of `disk`; the root document, which makes it a store, last."""
    arrays = plan_arrays(grid)
    metadata = {spec.path: _create_array(disk, spec) for spec in arrays.values()}
    planned = []
    for shard in range(grid.n_shards):
        planned.append(_plan_shard(disk, arrays, grid, request.seed, shard, sequences_of(shard)))
        on_shard()
    n_kept = sum(p.kept for p in planned)
    _check_kept(planned, grid, request)
    texts = [canonical(p.as_json()) for p in planned]
    table = arrays["shards"]
    for start in range(0, len(texts), table.chunk[0]):
        part = texts[start : start + table.chunk[0]]
        disk.create(
            table.key(start // table.chunk[0]), encode_strings(part + [""] * (table.chunk[0] - len(part)))
        )
    disk.makedirs("acts")
    acts = group_json({})
    disk.create("acts/zarr.json", acts)
    metadata["acts"] = hashlib.sha256(acts).hexdigest()
    plan = Plan(
        format=FORMAT,
        actcache_version=version,
        request=request,
        text=text,
        grid=grid,
        n_kept=n_kept,
        shards_digest=shards_digest(texts),
        metadata=metadata,
    )
    for capture in captures:
        create_capture(disk, plan, capture)
    disk.create("zarr.json", group_json(plan_attributes(plan)))
    return plan


def _check_kept(planned: list[PlannedShard], grid: Grid, request: Request) -> None:
    for part, shards in (
        ("training", planned[grid.n_holdout_shards :]),
        ("holdout", planned[: grid.n_holdout_shards]),
    ):
        if shards and not any(p.kept for p in shards):
            raise UsageError(
                f"no row of the {part} part would be kept: with --seq-len {request.seq_len} and --exclude-first "
                f"{request.exclude_first} every position is excluded, a special token or padding. Lower --exclude-first."
            )


def create_capture(disk: Disk, plan: Plan, asked: CaptureRequest) -> Capture:
    """Write one capture's group and arrays; its record, which makes it exist, last."""
    draft = Capture(
        name=asked.group,
        hook=asked.hook,
        layers=asked.layers,
        width=asked.width,
        dtype=asked.dtype,
        codec=asked.codec,
        plan_digest=plan.digest,
        metadata={},
    )
    arrays = capture_arrays(plan.grid, draft)
    disk.makedirs(f"acts/{draft.name}")
    metadata = {name: _create_array(disk, spec) for name, spec in arrays.items()}
    layer = arrays["layer"]
    disk.create(layer.key(0), layer.encode(np.array(asked.layers, dtype=layer.dtype)))
    capture = draft.model_copy(update={"metadata": metadata})
    disk.create(f"acts/{draft.name}/zarr.json", group_json(capture_attributes(capture)))
    return capture


def add_capture(disk: Disk, plan: Plan, asked: CaptureRequest) -> None:
    """Add a capture to a store that is there: written aside, and given its name in one step.

    Where the name is taken nothing is changed; whoever asks looks at what is there.
    """
    aside = disk.workspace / f"{asked.group}.capture"
    with Disk(aside, disk.announce) as staged:
        create_capture(staged, plan, asked)
        key = f"acts/{asked.group}"
        with suppress(FileExistsError):
            publish_folder(disk, aside / key, key)


def as_requested(capture: Capture) -> CaptureRequest:
    """What a capture was asked as, for comparing with what is asked now."""
    return CaptureRequest(
        name=capture.name,
        hook=capture.hook,
        layers=capture.layers,
        width=capture.width,
        dtype=capture.dtype,
        codec=capture.codec,
    )
