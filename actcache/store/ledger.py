"""Committing a shard: its rows, its side objects, and last the ledger record that makes it exist.

All three steps create and never replace. Finding an object already there (left by a process that died, or put there
by another worker a moment ago) means: check it, adopt it, and record ITS digests. Rows decide everything else: the
side objects are functions of the rows as stored.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DamageError, NonFiniteError
from actcache.store.arrays import (
    ArraySpec,
    checksum,
    decode_strings,
    encode_strings,
    is_quantised,
    side_arrays,
    side_key,
)
from actcache.store.codec import CRC_BYTES
from actcache.store.disk import Disk, Writer
from actcache.store.encode import EncodedShard, RunEncoder
from actcache.store.exact import Checksummed, exact_checksum, exact_parts, same_exact
from actcache.store.gathered import Gathered, gather
from actcache.store.objects import Objects
from actcache.store.schema import FORMAT, Capture, PlannedShard, Producer, ShardRecord, canonical
from actcache.store.shard import Chunks, ShardReader, chunks_on_disk


def ledger_key(spec: ArraySpec, shard: int, generation: int = 0) -> str:
    """Key of the record of one shard."""
    return spec.key(generation, shard)


def parse_record(data: bytes, key: str, capture: Capture, shard: int, generation: int = 0) -> ShardRecord:
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
    if (record.shard, record.generation, record.capture_digest) != (shard, generation, capture.digest):
        raise DamageError(
            f"ledger record {key} is that of shard {record.shard}, generation {record.generation}, of this or another "
            f"capture."
        )
    return record


class Written(NamedTuple):
    """A shard whose rows are written under a temporary name: `finish` commits it, or its writer is closed."""

    shard: int
    planned: PlannedShard
    writer: Writer
    chunks: Chunks
    gathered: Gathered


class ShardCommitter:
    """Commits shards of one capture. `commit` may be called for a shard whose rows are already on disk.

    `write` needs the rows and threads that encode, `finish` waits for the disk: the two halves of `commit`.

    where             says, for an error, which place of the corpus a row (shard, row within it) comes from.
    n_ahead           runs of chunks, of some megabytes each, encoded ahead of the writer.
    allow_non_finite  commits rows with NaN or infinity: counted, and left out of the statistics.
    generations       by shard, those that are rebuilt: which generation is written; of others the first, 0.
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
        *,
        n_ahead: int = 8,
        allow_non_finite: bool = False,
        generations: Mapping[int, int] | None = None,
    ) -> None:
        self._disk, self._objects, self._capture, self._arrays = disk, objects, capture, arrays
        self._pool, self._version, self._where = pool, version, where
        self._n_ahead, self._allow_non_finite = n_ahead, allow_non_finite
        self._generations = generations or {}
        self._rows = arrays["rows"]
        self._encoder = RunEncoder(capture, self._rows)

    def commit(self, shard: int, planned: PlannedShard, rows: NDArray[Any]) -> ShardRecord:
        """Commit one shard of stored rows [l, stored, d]; returns the record that holds, ours or another's."""
        return self.finish(self.write(shard, planned, rows))

    def write(self, shard: int, planned: PlannedShard, rows: NDArray[Any]) -> Written:
        """Encode and write stored rows [l, stored, d], which are not needed afterwards; nothing is visible yet."""
        gathered = self._gathered(shard, planned)
        encoded = EncodedShard(rows, self._encoder, gathered, self._pool, self._n_ahead)
        writer = Writer(self._disk, self._key(shard))
        try:
            for parts in encoded:
                writer.write(*parts)
            writer.flush()
        except BaseException:
            writer.close()
            raise
        return Written(shard, planned, writer, encoded.chunks, gathered)

    def finish(self, written: Written) -> ShardRecord:
        """Commit what was written; returns the record that holds, ours or another's."""
        with written.writer:
            while not written.writer.commit():
                record = self.adopt(written.shard, written.planned)
                if record is not None:
                    return record
        return self._record(written.shard, written.chunks, written.gathered)

    def adopt(self, shard: int, planned: PlannedShard) -> ShardRecord | None:
        """Commit a shard whose rows are on disk already, without a record; None when they are not, or not whole.

        Read chunk by chunk. An object that fails its own checks is removed: no commit covers it and its writer is gone.
        """
        spec, key = self._rows, self._key(shard)
        assert spec.inner is not None
        try:
            n_bytes = self._objects.size(key)
        except FileNotFoundError:
            return None
        try:
            chunks = chunks_on_disk(
                lambda start, n: self._objects.read_range(key, start, n),
                n_bytes,
                n_layers=spec.chunk[0],
                chunks_per_shard=spec.chunk[1] // spec.inner[1],
                stored=planned.stored,
                rows_per_chunk=spec.inner[1],
                quantised_width=spec.chunk[2] if is_quantised(self._capture) else None,
            )
        except ValueError:
            self._disk.remove(key)
            return None
        gathered = self._gathered(shard, planned)
        gather(self._reader(shard, chunks), gathered, self._capture.dtype)
        if chunks.blocks is not None:
            n_errors = gathered.squared_errors.nbytes
            errors = self._objects.read_range(key, int(chunks.stored.sum()), n_errors)
            gathered.squared_errors[:] = np.frombuffer(errors, "<f8").reshape(gathered.squared_errors.shape)
        self._disk.settle(key)
        return self._record(shard, chunks, gathered)

    def _key(self, shard: int) -> str:
        return side_key(self._rows, shard, self._generation(shard))

    def _generation(self, shard: int) -> int:
        return self._generations.get(shard, 0)

    def _reader(self, shard: int, chunks: Chunks) -> ShardReader:
        assert self._rows.inner is not None
        return ShardReader(
            self._objects,
            self._key(shard),
            chunks,
            self._rows.codec,
            (self._rows.inner[1], self._rows.inner[2]),
            quantised=self._capture.dtype if is_quantised(self._capture) else None,
        )

    def _gathered(self, shard: int, planned: PlannedShard) -> Gathered:
        def refuse(layer_i: int, row: int, is_nan: bool) -> None:  # noqa: FBT001 - a callback
            if self._allow_non_finite:
                return
            raise NonFiniteError(
                f"{'NaN' if is_nan else 'infinity'} in {self._capture.name}, layer "
                f"{self._capture.layers[layer_i]}, {self._where(shard, row)}: the shard was not committed. "
                f"Try another --model-dtype (float16 overflows where bfloat16 does not) or another --dtype; "
                f"--allow-non-finite stores such rows and leaves them out of the statistics."
            )

        return Gathered(self._capture, self._rows, planned, refuse)

    def _record(self, shard: int, chunks: Chunks, gathered: Gathered) -> ShardRecord:
        values = gathered.side_values()
        side = {
            name: self._side(name, shard, values[name]) if name in values else self._exact(shard, chunks)
            for name in side_arrays(self._capture)
        }
        spec = self._rows
        assert spec.inner is not None
        index = chunks.index_bytes(spec.chunk[1] // spec.inner[1])
        n_errors = gathered.squared_errors.nbytes + CRC_BYTES if gathered.is_quantised else 0
        draft = ShardRecord(
            format=FORMAT,
            capture_digest=self._capture.digest,
            shard=shard,
            generation=self._generation(shard),
            rows_bytes=int(chunks.stored.sum()) + n_errors + len(index),
            chunks=chunks.table(),
            scales=chunks.scale_table(),
            side=side,
            digest="0" * 64,
            producer=Producer(
                nonce=self._disk.nonce,
                actcache_version=self._version,
                committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )
        record = draft.model_copy(update={"digest": draft.expected_digest()})
        key = ledger_key(self._arrays["ledger"], shard, record.generation)
        if self._disk.create(key, encode_strings([canonical(record.as_json())])):
            return record
        return parse_record(self._objects.read(key), key, self._capture, shard, record.generation)

    def _side(self, name: str, shard: int, values: NDArray[Any]) -> tuple[int, int]:
        spec = self._arrays[name]
        shaped = values.reshape(spec.chunk)
        key, data = side_key(spec, shard, self._generation(shard)), spec.encode(shaped)
        if not self._disk.create(key, data):
            there = self._objects.read(key)
            if there != data:
                self._check_side(spec, key, there, shaped)
            data = there
        return checksum(data)

    def _check_side(self, spec: ArraySpec, key: str, data: bytes, values: NDArray[Any]) -> None:
        """A side object another process made from the same rows must be equal up to rounding."""
        try:
            found = spec.decode(data)
        except ValueError as error:
            raise _left_damaged(key, error) from error
        if not np.allclose(found, values, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise _not_of_these_rows(key)

    def _exact(self, shard: int, chunks: Chunks) -> tuple[int, int]:
        """The array in which other readers find the rows stored exactly: a copy of what lies in the shard's blocks."""
        spec, reader = self._arrays["exact"], self._reader(shard, chunks)
        key = side_key(spec, shard, self._generation(shard))
        parts = Checksummed(exact_parts(reader, spec))
        if self._disk.create(key, parts):
            return parts.checksum
        there = self._objects.read(key)
        try:
            found = exact_checksum(there, spec)
        except ValueError as error:
            raise _left_damaged(key, error) from error
        if found != parts.checksum and not same_exact(there, reader, spec):
            raise _not_of_these_rows(key)
        return found


def _left_damaged(key: str, error: ValueError) -> DamageError:
    return DamageError(f"{key} was left behind damaged ({error}). Remove that file, then build again.")


def _not_of_these_rows(key: str) -> DamageError:
    return DamageError(
        f"{key} was left behind by another process and does not describe the rows beside it. "
        f"Remove that file, then build again."
    )
