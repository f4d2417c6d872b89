"""Checking a store, byte by byte, against its plan and ledger. Finds every problem, not just the first."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from actcache.errors import ActcacheError
from actcache.store.arrays import PER_SHARD_PLAN_ARRAYS, ArraySpec, plan_arrays, side_arrays, side_key
from actcache.store.codec import CRC_BYTES, crc32c, trailer
from actcache.store.ledger import ledger_key
from actcache.store.objects import Objects
from actcache.store.open import (
    CaptureCatalog,
    Catalog,
    capture_attributes,
    object_problem,
    plan_attributes,
)
from actcache.store.retire import of_every_generation, read_retirement
from actcache.store.schema import ShardRecord
from actcache.store.shard import Chunks, chunk_problem


class Problem(NamedTuple):
    """One thing that is wrong.

    object, what    which object, and what about it.
    capture, shard  where it is one shard that is damaged; a shard of no capture belongs to the plan.
    is_copy         what is committed is right, and what readers that know no ledger see in its place is not.
    """

    object: str
    what: str
    capture: str | None = None
    shard: int | None = None
    is_copy: bool = False


def _check_object(
    objects: Objects, spec: ArraySpec, key: str, expected: tuple[int, int]
) -> Iterator[Problem]:
    try:
        what = object_problem(spec, objects.read(key), expected)
    except FileNotFoundError:
        what = "is missing"
    if what:
        yield Problem(key, what)


def _check_metadata(objects: Objects, key: str, digest: str) -> Iterator[Problem]:
    try:
        found = hashlib.sha256(objects.read(key)).hexdigest()
    except FileNotFoundError:
        yield Problem(key, "is missing")
        return
    if found != digest:
        yield Problem(key, "was altered: other readers would see another array than was written")


def _check_group(objects: Objects, key: str, attributes: dict[str, Any]) -> Iterator[Problem]:
    """A group whose attributes hold a digest of themselves: the rest of its document is for other readers."""
    found = json.loads(objects.read(key))
    expected = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    if {name: found.get(name) for name in expected} != expected:
        yield Problem(key, "was altered: other readers would see another group than was written")


def _check_rows(capture: CaptureCatalog, key: str, record: ShardRecord) -> Iterator[Problem]:
    """Every byte of a shard object, one layer at a time."""
    spec, objects = capture.arrays["rows"], capture.objects
    assert spec.inner is not None
    n_layers = len(capture.capture.layers)
    chunks = Chunks.from_record(record, n_layers)
    try:
        n_bytes = objects.size(key)
        if n_bytes != record.rows_bytes:
            yield Problem(key, f"holds {n_bytes} bytes where {record.rows_bytes} were committed")
        for layer_i in range(n_layers):
            yield from _check_layer(capture, key, chunks, layer_i)
        index, at = chunks.index_bytes(spec.chunk[1] // spec.inner[1]), int(chunks.stored.sum())
        rest = bytes(objects.read_range(key, at, record.rows_bytes - at))
    except FileNotFoundError:
        yield Problem(key, "is missing")
        return
    if rest[-len(index) :] != index:
        yield Problem(key, "its index is not the one that was committed")
    errors = rest[: -len(index)]
    if chunks.blocks is not None and (
        crc32c(errors[:-CRC_BYTES]) != chunks.errors or errors[-CRC_BYTES:] != trailer(chunks.errors)
    ):
        yield Problem(key, "its block of errors does not match the crc32c in the ledger")


def _check_layer(capture: CaptureCatalog, key: str, chunks: Chunks, layer_i: int) -> Iterator[Problem]:
    offset, stored = chunks.offset[layer_i], chunks.stored[layer_i]
    if not len(offset):
        return
    start = int(offset[0])
    data = memoryview(capture.objects.read_range(key, start, int(stored.sum())))
    for chunk, (first, n_bytes) in enumerate(zip(offset - start, stored, strict=True)):
        body = data[int(first) : int(first + n_bytes)]
        problem = chunk_problem(chunks, (layer_i, chunk), body)
        if problem:
            layer = capture.capture.layers[layer_i]
            yield Problem(key, f"chunk {chunk} of layer {layer} {problem}")


def check_shard(capture: CaptureCatalog, shard: int) -> list[Problem]:
    """Every problem of one committed shard."""
    name = capture.capture.name
    try:
        record = capture.record(shard)
    except ActcacheError as error:
        newest = capture.newest(shard)
        key = ledger_key(capture.arrays["ledger"], shard, newest[0] if newest else 0)
        return [Problem(key, str(error), name, shard)]
    problems = [p._replace(capture=name, shard=shard) for p in _check_objects(capture, shard, record)]
    if record.generation:
        problems += [
            Problem(
                p.object,
                f"{p.what}; the shard was rebuilt, and readers that know no ledger would see what it was before",
                name,
                shard,
                is_copy=True,
            )
            for p in _check_objects(capture, shard, record, 0)
        ]
    return problems


def _check_objects(
    capture: CaptureCatalog, shard: int, record: ShardRecord, generation: int | None = None
) -> Iterator[Problem]:
    """What is not as a record says, of the objects of its own generation or of those under the names of another."""
    generation = record.generation if generation is None else generation
    yield from _check_rows(capture, side_key(capture.arrays["rows"], shard, generation), record)
    for name in side_arrays(capture.capture):
        spec = capture.arrays[name]
        yield from _check_object(capture.objects, spec, side_key(spec, shard, generation), record.side[name])


def _check_capture(capture: CaptureCatalog) -> Iterator[Problem]:
    """What no record of a single shard covers: the layer numbers, and rows that nothing commits."""
    spec = capture.arrays["layer"]
    try:
        layers = spec.decode(capture.objects.read(spec.key(0))).tolist()
        if tuple(layers) != capture.capture.layers:
            yield Problem(
                spec.key(0), f"holds layers {layers} where {list(capture.capture.layers)} were captured"
            )
    except FileNotFoundError:
        yield Problem(spec.key(0), "is missing")
    except ValueError as error:
        yield Problem(spec.key(0), f"cannot be decoded: {error}")
    committed = set(capture.committed())
    on_disk = set(capture.objects.names(capture.arrays["rows"].path))
    for shard in range(capture.plan.grid.n_shards):
        key = capture.arrays["rows"].key(0, shard, 0)
        if shard not in committed and key.rsplit("/", 1)[1] in on_disk:
            yield Problem(
                capture.arrays["ledger"].key(0, shard),
                f"is missing although {key} is there: a build was stopped at this shard (running it again mends "
                f"this), or the record was lost",
            )


def _check_retired(capture: CaptureCatalog) -> Iterator[Problem]:
    """The records of retired shards, and objects that should have gone with them."""
    retired = plan_arrays(capture.plan.grid)["retired"]
    for shard in capture.retired():
        try:
            record = read_retirement(capture.objects, retired, capture.plan, shard)
        except ActcacheError as error:
            yield Problem(retired.key(shard), str(error))
            continue
        for _spec, key in of_every_generation(capture.arrays, shard):
            folder, _, name = key.rpartition("/")
            if record is not None and name in capture.objects.names(folder):
                yield Problem(
                    key,
                    "is still there although its shard is retired: a build was stopped while it made room (running it "
                    "again mends this)",
                )


def find_problems(
    catalog: Catalog, threads: int, on_shard: Callable[[], None] = lambda: None
) -> list[Problem]:
    """Every problem of a store that opens; empty when every committed byte is what was committed.

    Reads everything once. `on_shard` is called after each shard of each capture, and after each of the plan's.
    """
    objects = catalog.objects
    problems = list(_check_group(objects, "zarr.json", plan_attributes(catalog.plan)))
    for path, digest in catalog.plan.metadata.items():
        problems += _check_metadata(objects, f"{path}/zarr.json", digest)
    try:
        planned = catalog.shards.records
    except ActcacheError as error:
        return [*problems, Problem("shards", str(error))]
    try:
        captures = list(catalog.captures.values())
    except ActcacheError as error:
        problems.append(Problem("acts", str(error)))
        captures = []

    def check_plan(shard: int) -> list[Problem]:
        found: list[Problem] = []
        for name in PER_SHARD_PLAN_ARRAYS:
            spec = catalog.arrays[name]
            key = spec.key(shard, *(0,) * (len(spec.shape) - 1))
            found += _check_object(objects, spec, key, planned[shard].objects[name])
        return [problem._replace(shard=shard) for problem in found]

    with ThreadPoolExecutor(threads, thread_name_prefix="actcache-verify") as pool:
        for found in pool.map(check_plan, range(catalog.grid.n_shards)):
            problems += found
            on_shard()
        for capture in captures:
            name = f"acts/{capture.capture.name}/zarr.json"
            problems += _check_group(objects, name, capture_attributes(capture.capture))
            problems += _check_capture(capture)
            problems += _check_retired(capture)
            for path, digest in capture.capture.metadata.items():
                problems += _check_metadata(objects, f"acts/{capture.capture.name}/{path}/zarr.json", digest)
            live = capture.live()
            for found in pool.map(check_shard, [capture] * len(live), live):
                problems += found
                on_shard()
    return problems
