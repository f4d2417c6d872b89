"""Retiring a shard: its rows are deleted, in every capture, to make room for others.

The retirement is written down before anything is deleted, so a reader that misses an object can tell what was planned
from what was lost. The ledger record stays: what the rows were is still known. A retired shard does not come back.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from actcache.errors import ActcacheError, DamageError, RetiredError
from actcache.store.arrays import ArraySpec, decode_strings, encode_strings, side_key
from actcache.store.disk import Disk
from actcache.store.objects import Objects
from actcache.store.schema import FORMAT, LEDGER_GENERATIONS, Plan, Producer, Retirement, canonical


class ShardObject(NamedTuple):
    """An object that goes with its shard: the rows, or what is small beside them."""

    spec: ArraySpec
    key: str


def shard_objects(arrays: dict[str, ArraySpec], shard: int, generation: int = 0) -> list[ShardObject]:
    """What a shard has on disk in one capture besides its ledger record."""
    beside = [spec for name, spec in arrays.items() if name not in ("rows", "layer", "ledger")]
    return [ShardObject(spec, side_key(spec, shard, generation)) for spec in (arrays["rows"], *beside)]


def of_every_generation(arrays: dict[str, ArraySpec], shard: int) -> Iterator[ShardObject]:
    """What a shard may have on disk in one capture, under the names of repairs too."""
    for generation in range(LEDGER_GENERATIONS):
        yield from shard_objects(arrays, shard, generation)


def retired_shards(objects: Objects, spec: ArraySpec) -> set[int]:
    """Shards that are retired now, by the names of their records."""
    numbers = (name.removeprefix("c.") for name in objects.names(spec.path) if name.startswith("c."))
    return {int(number) for number in numbers if number.isdigit()}


def read_retirement(objects: Objects, spec: ArraySpec, plan: Plan, shard: int) -> Retirement | None:
    """The retirement of a shard, if it is retired; DamageError where the record is altered or another's."""
    key = spec.key(shard)
    try:
        data = objects.read(key)
    except FileNotFoundError:
        return None
    try:
        (text,) = decode_strings(data)
        record = Retirement.model_validate_json(text)
    except ValueError as error:
        raise DamageError(f"the retirement {key} cannot be read: {error}") from error
    if record.digest != record.expected_digest():
        raise DamageError(f"the retirement {key} does not match its own digest: it was altered.")
    if record.shard != shard or record.plan_digest != plan.digest:
        raise DamageError(f"the retirement {key} is that of shard {record.shard}, or of another store.")
    return record


def missing(objects: Objects, spec: ArraySpec, plan: Plan, shard: int, key: str) -> ActcacheError:
    """Why an object of a committed shard is not there: it is retired, or it was lost."""
    record = read_retirement(objects, spec, plan, shard)
    if record is None:
        return DamageError(
            f"{key} is committed but missing. Run 'actcache verify' on the store to list all damage."
        )
    return retired_error(objects.url, record)


def retired_error(url: str, record: Retirement) -> RetiredError:
    """The error of a reader that needs a retired shard."""
    waited_for = ", ".join(f"{name} at shard {at}" for name, at in record.consumers.items())
    return RetiredError(
        f"shard {record.shard} of {url} was retired on {record.producer.committed_at} to stay within the disk budget, "
        f"when no registered consumer needed it any more ({waited_for}). Its rows are gone. Build the store again, with a "
        f"larger --max-disk or with this consumer among --consumers."
    )


def retire(
    disk: Disk, spec: ArraySpec, plan: Plan, shard: int, consumers: dict[str, int], version: str
) -> None:
    """Write down that a shard is retired. Nothing is deleted yet: see `remove_retired`."""
    draft = Retirement(
        format=FORMAT,
        plan_digest=plan.digest,
        shard=shard,
        consumers=consumers,
        digest="0" * 64,
        producer=Producer(
            nonce=disk.nonce,
            actcache_version=version,
            committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )
    record = draft.model_copy(update={"digest": draft.expected_digest()})
    disk.create(spec.key(shard), encode_strings([canonical(record.as_json())]))


def remove_retired(disk: Disk, captures: Iterable[dict[str, ArraySpec]], shard: int) -> None:
    """Delete what a retired shard still has on disk; several processes may do so at once."""
    for arrays in captures:
        for _spec, key in of_every_generation(arrays, shard):
            if (disk.root / key).exists():
                disk.remove(key, missing_ok=True)
