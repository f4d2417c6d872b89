"""What a store holds: its plan, captures and ledger, checked as they are read. No torch, no zarr, no activations."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from actcache.errors import ActcacheError, DamageError, NotFoundError, UncommittedError, UsageError
from actcache.store.arrays import (
    PER_SHARD_PLAN_ARRAYS,
    ArraySpec,
    capture_arrays,
    checksum,
    decode_strings,
    is_quantised,
    plan_arrays,
    side_arrays,
    side_key,
)
from actcache.store.codec import CRC_BYTES, trailer
from actcache.store.exact import exact_checksum
from actcache.store.ledger import ledger_key, parse_record
from actcache.store.local import LocalFiles
from actcache.store.objects import LocalObjects, Objects, open_objects
from actcache.store.retire import missing, read_retirement, retired_error, retired_shards
from actcache.store.schema import (
    FORMAT,
    LEDGER_GENERATIONS,
    Capture,
    Plan,
    PlannedShard,
    ShardRecord,
    digest_of,
)
from actcache.store.shard import WHAT_TO_DO, Chunks, ShardReader

ATTRIBUTE = "actcache"


@dataclass(frozen=True, slots=True)
class PlanTable:
    """The plan's facts of every shard. kept, stored: [shard] int64 rows; records: the whole of it."""

    kept: NDArray[np.int64]
    stored: NDArray[np.int64]
    records: list[PlannedShard]


def shards_digest(texts: list[str]) -> str:
    """Digest over the plan's shard records, as they are written."""
    return digest_of(texts)


def _attributes(objects: Objects, key: str, what: str) -> dict[str, Any]:
    try:
        document = json.loads(objects.read(f"{key}zarr.json"))
        found = dict(document["attributes"][ATTRIBUTE])
    except FileNotFoundError as error:
        raise NotFoundError(
            f"no {what} at {objects.url}: there is no {key}zarr.json. If a build was stopped while it was still "
            f"planning, run the same command again."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"{objects.url}/{key}zarr.json does not describe an actcache {what} ({type(error).__name__}: {error})"
        ) from error
    return found


def _check_format(found: dict[str, Any], url: str) -> None:
    if found.get("format") != FORMAT:
        raise UsageError(
            f"{url} is written in format {found.get('format')!r}; this actcache reads format {FORMAT}. "
            f"Install the version of actcache that wrote it, or a newer one."
        )


def _first_problem(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:5])


def plan_attributes(plan: Plan) -> dict[str, Any]:
    """What the root group's attributes hold."""
    return {ATTRIBUTE: {"format": FORMAT, "digest": plan.digest, "plan": plan.as_json()}}


def capture_attributes(capture: Capture) -> dict[str, Any]:
    """What a capture group's attributes hold."""
    return {ATTRIBUTE: {"format": FORMAT, "digest": capture.digest, "capture": capture.as_json()}}


class CaptureCatalog:
    """One capture: its record, arrays and what is committed of it."""

    def __init__(self, objects: Objects, plan: Plan, capture: Capture) -> None:
        self.objects, self.plan, self.capture = objects, plan, capture
        self.arrays = capture_arrays(plan.grid, capture)
        self._records: dict[int, ShardRecord] = {}
        self._readers: dict[int, ShardReader] = {}
        self._retired = plan_arrays(plan.grid)["retired"]
        self.files = LocalFiles(objects.root) if isinstance(objects, LocalObjects) else None

    def committed(self) -> list[int]:
        """Committed shards, retired ones too, ascending. Looks at the store every time it is called."""
        return sorted({shard for shard, _generation in self._ledger_names()})

    def retired(self) -> list[int]:
        """Retired shards, ascending: committed once, their rows deleted. Looks at the store every time it is called."""
        return sorted(retired_shards(self.objects, self._retired))

    def live(self) -> list[int]:
        """Shards that can be read: committed and not retired, ascending."""
        return sorted(set(self.committed()) - set(self.retired()))

    def check_not_retired(self, shard: int) -> None:
        """RetiredError where the rows of a shard were deleted to make room."""
        record = read_retirement(self.objects, self._retired, self.plan, shard)
        if record is not None:
            raise retired_error(self.objects.url, record)

    def _missing(self, shard: int, key: str) -> Callable[[], ActcacheError]:
        """Says why an object is not there. It does not hold this catalog, which holds the readers that hold it."""
        return partial(missing, self.objects, self._retired, self.plan, shard, key)

    def is_committed(self, shard: int) -> bool:
        """Whether a shard is committed. Looks at the store every time it is called."""
        try:
            self.objects.size(ledger_key(self.arrays["ledger"], shard))
        except FileNotFoundError:
            return False
        return True

    def _ledger_names(self) -> list[tuple[int, int]]:
        found = []
        for name in self.objects.names(self.arrays["ledger"].path):
            prefix, _, rest = name.partition(".")
            generation, _, shard = rest.partition(".")
            if prefix == "c" and generation.isdigit() and shard.isdigit():
                found.append((int(shard), int(generation)))
        return found

    def record(self, shard: int) -> ShardRecord:
        """The ledger record in force of a shard; UncommittedError when there is none."""
        known = self._records.get(shard)  # another thread may forget it at any moment
        if known is None:
            found = self.newest(shard)
            if found is None:
                raise UncommittedError(
                    f"shard {shard} of {self.capture.name} in {self.objects.url} is not committed yet. "
                    f"'actcache info' lists what is; run the same 'actcache build' again to continue."
                )
            generation, data = found
            key = ledger_key(self.arrays["ledger"], shard, generation)
            self._records[shard] = known = parse_record(data, key, self.capture, shard, generation)
        return known

    def newest(self, shard: int) -> tuple[int, bytes] | None:
        """Generation and bytes of the record in force, not checked; None where there is none. Looks at the store."""
        found = None
        for generation in range(LEDGER_GENERATIONS):  # they are dense: the last that exists is in force
            try:
                data = self.objects.read(ledger_key(self.arrays["ledger"], shard, generation))
            except FileNotFoundError:
                break
            found = generation, data
        return found

    def reader(self, shard: int) -> ShardReader:
        """Chunks of a committed shard."""
        known = self._readers.get(shard)
        if known is None:
            spec, record = self.arrays["rows"], self.record(shard)
            assert spec.inner is not None
            chunks = Chunks.from_record(record, len(self.capture.layers))
            key = side_key(spec, shard, record.generation)
            _one, rows_per_chunk, width = spec.inner
            self._readers[shard] = known = ShardReader(
                self.objects,
                key,
                chunks,
                spec.codec,
                (rows_per_chunk, width),
                files=self.files,
                quantised=self.capture.dtype if is_quantised(self.capture) else None,
                on_missing=self._missing(shard, key),
            )
        return known

    def forget_before(self, shard: int) -> None:
        """Let go of what was read about lower shards; it is read again where somebody asks."""
        for known in (self._records, self._readers):
            for number in [n for n in list(known) if n < shard]:
                known.pop(number, None)

    def side(self, name: str, shard: int) -> NDArray[Any]:
        """A side array's values for one committed shard, in the shape of its object; not `exact`, which others read."""
        spec = self.arrays[name]
        assert name in side_arrays(self.capture)
        assert spec.inner is None
        record = self.record(shard)
        key = side_key(spec, shard, record.generation)
        return read_checked(self.objects, spec, key, record.side[name], self._missing(shard, key))

    def layer_index(self, layer: int) -> int:
        """Where a model layer lies on the layer axis; UsageError names those there are."""
        if layer not in self.capture.layers:
            raise UsageError(
                f"layer {layer} is not in {self.capture.name}; it holds layers {list(self.capture.layers)}"
            )
        return self.capture.layers.index(layer)


def read_checked(
    objects: Objects,
    spec: ArraySpec,
    key: str,
    expected: tuple[int, int],
    on_missing: Callable[[], ActcacheError] | None = None,
) -> NDArray[Any]:
    """Read one object and compare it with what was written down of it (bytes, crc32c)."""
    try:
        data = objects.read(key)
        if object_problem(spec, data, expected):
            data = objects.read(key)  # it may have gone wrong on the way here
    except FileNotFoundError as error:
        if on_missing is not None:
            raise on_missing() from error
        raise DamageError(f"{key} is missing. {WHAT_TO_DO}") from error
    problem = object_problem(spec, data, expected)
    if problem:
        raise DamageError(f"{key} {problem}. {WHAT_TO_DO}")
    try:
        return spec.decode(data)
    except ValueError as error:
        raise DamageError(f"{key} cannot be decoded: {error}") from error


def object_problem(spec: ArraySpec, data: bytes, expected: tuple[int, int]) -> str | None:
    """What is wrong with an object's bytes, or None."""
    if len(data) != expected[0]:
        return f"holds {len(data)} bytes where {expected[0]} were written"
    if spec.inner is not None:
        return _sharded_problem(spec, data, expected)
    if checksum(data) != expected or data[-CRC_BYTES:] != trailer(expected[1]):
        return "does not match the crc32c that was written down for it"
    return None


def _sharded_problem(spec: ArraySpec, data: bytes, expected: tuple[int, int]) -> str | None:
    try:
        is_right = exact_checksum(data, spec) == expected
    except ValueError as error:
        return f"is damaged: {error}"
    return None if is_right else "does not match the crc32c that was written down for it"


class Catalog:
    """A store, opened. Everything read is checked against the plan or the ledger first."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        found = _attributes(objects, "", "store")
        _check_format(found, objects.url)
        try:
            self.plan = Plan.model_validate_json(json.dumps(found["plan"]))
        except (ValidationError, KeyError) as error:
            detail = _first_problem(error) if isinstance(error, ValidationError) else f"no {error}"
            raise DamageError(f"the plan in {objects.url}/zarr.json cannot be read: {detail}") from error
        if self.plan.digest != found.get("digest"):
            raise DamageError(
                f"the plan in {objects.url}/zarr.json does not match its digest: it was edited after it was written. "
                f"Restore the file; a store with other settings is made by another 'actcache build'."
            )
        self.grid = self.plan.grid
        self.arrays = plan_arrays(self.grid)

    @cached_property
    def shards(self) -> PlanTable:
        """The plan's facts of every shard, checked against the plan's digest."""
        spec, texts = self.arrays["shards"], []
        for start in range(0, self.grid.n_shards, spec.chunk[0]):
            key = spec.key(start // spec.chunk[0])
            try:
                texts += decode_strings(self.objects.read(key))
            except FileNotFoundError as error:
                raise DamageError(
                    f"{key} is missing from {self.objects.url}; it belongs to the plan."
                ) from error
            except ValueError as error:
                raise DamageError(f"{key} in {self.objects.url} cannot be read: {error}") from error
        texts, padding = texts[: self.grid.n_shards], texts[self.grid.n_shards :]
        if shards_digest(texts) != self.plan.shards_digest or any(padding):
            raise DamageError(
                f"the shard table {spec.path}/ in {self.objects.url} does not match the plan: it was altered."
            )
        records = [PlannedShard.model_validate_json(text) for text in texts]
        kept, stored = (
            np.array([getattr(r, name) for r in records], np.int64) for name in ("kept", "stored")
        )
        return PlanTable(kept, stored, records)

    @cached_property
    def captures(self) -> dict[str, CaptureCatalog]:
        """The captures by name."""
        found: dict[str, CaptureCatalog] = {}
        for name in self.objects.names("acts"):
            if name == "zarr.json":
                continue
            attributes = _attributes(self.objects, f"acts/{name}/", "capture")
            _check_format(attributes, self.objects.url)
            try:
                capture = Capture.model_validate_json(json.dumps(attributes["capture"]))
            except (ValidationError, KeyError) as error:
                detail = _first_problem(error) if isinstance(error, ValidationError) else f"no {error}"
                raise DamageError(f"the record in acts/{name}/zarr.json cannot be read: {detail}") from error
            if capture.digest != attributes.get("digest") or capture.plan_digest != self.plan.digest:
                raise DamageError(
                    f"acts/{name}/zarr.json in {self.objects.url} does not match its digest or belongs to another plan."
                )
            found[name] = CaptureCatalog(self.objects, self.plan, capture)
        return found

    def capture(self, name: str) -> CaptureCatalog:
        """One capture; UsageError names those there are."""
        if name not in self.captures:
            raise UsageError(f"no capture {name!r} in {self.objects.url}; it has {sorted(self.captures)}")
        return self.captures[name]

    def plan_object(self, name: str, shard: int) -> NDArray[Any]:
        """One shard's part of a plan array (`tokens`, `document`, `keep`, `row_sequence`, `row_position`)."""
        assert name in PER_SHARD_PLAN_ARRAYS
        spec = self.arrays[name]
        key = spec.key(shard, *(0,) * (len(spec.shape) - 1))
        values = read_checked(self.objects, spec, key, self.shards.records[shard].objects[name])
        return values[: len(self.grid.sequences_of(shard))] if spec.dims[0] == "sequence" else values


def open_catalog(location: str) -> Catalog:
    """Open a store; NotFoundError, UsageError or DamageError say why it cannot be."""
    return Catalog(open_objects(location))
