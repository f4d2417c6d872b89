"""Committing a shard: its rows, its side objects, and last the ledger record that makes it exist.

All three steps create and never replace. Finding an object already there (left by a process that died, or put there
by another worker a moment ago) means: check it, adopt it, and record ITS digests. Rows decide everything else: the
side objects are functions of the rows as stored.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DamageError, NonFiniteError
from actcache.store.arrays import (
    SIDE_ARRAYS,
    ArraySpec,
    checksum,
    decode_strings,
    encode_strings,
    side_key,
)
from actcache.store.disk import Disk
from actcache.store.objects import Objects
from actcache.store.schema import FORMAT, Capture, PlannedShard, Producer, ShardRecord, canonical
from actcache.store.shard import Chunks, EncodedShard, ShardReader, chunks_on_disk
from actcache.store.statistics import ShardStatistics, as_float32, shard_statistics

N_AHEAD = 8


def ledger_key(spec: ArraySpec, shard: int, generation: int = 0) -> str:
    """Key of the record of one shard."""
    return spec.key(generation, shard)


def parse_record(data: bytes, key: str, capture: Capture, shard: int) -> ShardRecord:
    """A ledger record from its object; DamageError where it is altered or another's."""
    try:
        (text,) = decode_strings(data)
        record = ShardRecord.model_validate_json(text)
    except ValueError as error:  # pydantic's errors are ValueErrors too
        raise DamageError(f"ledger record {key} cannot be read: {error}") from error
    if record.digest != record.expected_digest():
        raise DamageError(
            f"ledger record {key} does not match its own digest: it was altered after the commit."
        )
    if record.shard != shard or record.capture_digest != capture.digest:
        raise DamageError(f"ledger record {key} is that of shard {record.shard} of another capture or place.")
    return record


class ShardCommitter:
    """Commits shards of one capture. `commit` may be called for a shard whose rows are already on disk.

    check_finite  called with (shard, layer index, row within the shard) of the first NaN or infinity found.
    """

    def __init__(
        self,
        disk: Disk,
        objects: Objects,
        capture: Capture,
        arrays: dict[str, ArraySpec],
        pool: Executor,
        version: str,
        where: Callable[[int, int], str],
    ) -> None:
        self._disk, self._objects, self._capture, self._arrays = disk, objects, capture, arrays
        self._pool, self._version, self._where = pool, version, where

    def rows_on_disk(self, shard: int, planned: PlannedShard) -> tuple[NDArray[Any], Chunks] | None:
        """Rows [l, stored, d] that a process left behind without committing them; None when there are none.

        An object that fails its own checks is removed: no commit covers it and its writer is gone.
        """
        spec = self._arrays["rows"]
        assert spec.inner is not None
        key, (n_layers, rows_per_shard, width), r = spec.key(0, shard, 0), spec.chunk, spec.inner[1]
        try:
            data = self._objects.read(key)
        except FileNotFoundError:
            return None
        try:
            chunks = chunks_on_disk(data, n_layers, rows_per_shard // r, planned.stored, r)
        except ValueError:
            self._disk.remove(key)
            return None
        reader = ShardReader(self._objects, key, chunks, spec.codec, (r, width))
        rows = np.empty((n_layers, chunks.length.shape[1] * r, width), spec.dtype)
        for layer_i, c in np.ndindex(chunks.length.shape):
            rows[layer_i, c * r : (c + 1) * r] = reader.read(layer_i, c)
        return rows[:, : planned.stored], chunks

    def commit(self, shard: int, planned: PlannedShard, rows: NDArray[Any]) -> ShardRecord:
        """Commit one shard of stored rows [l, stored, d]; returns the record that holds, ours or another's."""
        spec = self._arrays["rows"]
        encoded = EncodedShard(rows, spec, self._pool, N_AHEAD)
        statistics = self._statistics(shard, planned, rows)
        if self._disk.create(spec.key(0, shard, 0), encoded):
            return self._record(shard, encoded.chunks, statistics)
        return self.adopt(shard, planned) or self.commit(shard, planned, rows)

    def adopt(self, shard: int, planned: PlannedShard) -> ShardRecord | None:
        """Commit a shard whose rows are on disk already; None when they are not, or not whole."""
        found = self.rows_on_disk(shard, planned)
        if found is None:
            return None
        self._disk.settle(self._arrays["rows"].key(0, shard, 0))
        return self._record(shard, found[1], self._statistics(shard, planned, found[0]))

    def _statistics(self, shard: int, planned: PlannedShard, rows: NDArray[Any]) -> ShardStatistics:
        statistics = shard_statistics(rows, self._capture.dtype, planned.kept, self._arrays["rows"].chunk[1])
        for layer_i, row in np.argwhere(~np.isfinite(statistics.norm[:, : planned.stored])):
            values = as_float32(rows[layer_i, row], self._capture.dtype)
            if not np.isfinite(values).all():
                raise NonFiniteError(
                    f"{'NaN' if np.isnan(values).any() else 'infinity'} in {self._capture.name}, layer "
                    f"{self._capture.layers[layer_i]}, {self._where(shard, int(row))}: the shard was not committed. "
                    f"Try another --model-dtype (float16 overflows where bfloat16 does not) or another --dtype."
                )
        return statistics

    def _record(self, shard: int, chunks: Chunks, statistics: ShardStatistics) -> ShardRecord:
        side = {name: self._side(name, shard, getattr(statistics, name)) for name in SIDE_ARRAYS}
        spec = self._arrays["rows"]
        assert spec.inner is not None
        index = chunks.index_bytes(spec.chunk[1] // spec.inner[1])
        draft = ShardRecord(
            format=FORMAT,
            capture_digest=self._capture.digest,
            shard=shard,
            generation=0,
            rows_bytes=int(chunks.length.sum(dtype=np.int64)) + len(index),
            chunks=chunks.table(),
            side=side,
            digest="0" * 64,
            producer=Producer(
                nonce=self._disk.nonce,
                actcache_version=self._version,
                committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )
        record = draft.model_copy(update={"digest": draft.expected_digest()})
        key = ledger_key(self._arrays["ledger"], shard)
        if self._disk.create(key, encode_strings([canonical(record.as_json())])):
            return record
        return parse_record(self._objects.read(key), key, self._capture, shard)

    def _side(self, name: str, shard: int, values: NDArray[Any]) -> tuple[int, int]:
        spec = self._arrays[name]
        shaped = values.reshape(spec.chunk)
        key, data = side_key(spec, shard), spec.encode(shaped)
        if not self._disk.create(key, data):
            there = self._objects.read(key)
            if there != data:
                there = self._checked(spec, key, there, shaped)
            data = there
        return checksum(data)

    def _checked(self, spec: ArraySpec, key: str, data: bytes, values: NDArray[Any]) -> bytes:
        """Bytes of a side object another process made from the same rows: equal up to rounding, or an error."""
        try:
            found = spec.decode(data)
        except ValueError as error:
            raise DamageError(
                f"{key} was left behind damaged ({error}). Remove that file, then build again."
            ) from error
        if not np.allclose(found, values, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise DamageError(
                f"{key} was left behind by another process and does not describe the rows beside it. "
                f"Remove that file, then build again."
            )
        return data
