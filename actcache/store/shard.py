"""One shard of activation rows to bytes and back: a Zarr v3 sharded chunk, written and read without zarr-python.

    chunk (layer 0, rows 0..R) | crc | chunk (layer 0, rows R..2R) | crc | ... | chunk (layer 1, ...) | ... | index | crc

Chunks lie layer by layer, so one layer of a shard is one contiguous range. Chunks of padding are absent. The index
holds (offset, length) for every chunk, absent ones as 2^64-1, little-endian, with its own crc32c. Readers of ours do
not need it: offsets follow from the lengths in the ledger, and the ledger's crc32c are the ones compared.
"""

import base64
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DamageError
from actcache.store.arrays import ArraySpec
from actcache.store.codec import CRC_BYTES, Codec, crc32c, with_trailer
from actcache.store.local import LocalFiles
from actcache.store.objects import Objects
from actcache.store.remote import merge_ranges
from actcache.store.schema import ChunkTable

_ABSENT = np.uint64(0xFFFFFFFFFFFFFFFF)


def _pack(values: NDArray[np.uint32]) -> str:
    return base64.b64encode(values.astype("<u4").tobytes()).decode("ascii")


def _unpack(text: str, n_layers: int) -> NDArray[np.uint32]:
    flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u4")
    return flat.reshape(n_layers, -1)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where the chunks of a shard lie and what they must be.

    length  [l, c] uint32, bytes of each stored chunk, trailer included.
    crc     [l, c] uint32, crc32c of the bytes before the trailer.
    """

    length: NDArray[np.uint32]
    crc: NDArray[np.uint32]

    @classmethod
    def from_table(cls, table: ChunkTable, n_layers: int) -> Self:
        """From a ledger record; ValueError where the record cannot be this shard's."""
        return cls(_unpack(table.lengths, n_layers), _unpack(table.crc32c, n_layers))

    def table(self) -> ChunkTable:
        """As the ledger holds it."""
        return ChunkTable(lengths=_pack(self.length), crc32c=_pack(self.crc))

    @property
    def offset(self) -> NDArray[np.int64]:
        """[l, c] first byte of each chunk."""
        flat = self.length.reshape(-1).astype(np.int64)
        return (np.cumsum(flat) - flat).reshape(self.length.shape)

    def index_bytes(self, chunks_per_shard: int) -> bytes:
        """The Zarr index of the shard with its trailer."""
        index = np.full((self.length.shape[0], chunks_per_shard, 2), _ABSENT, dtype="<u8")
        index[:, : self.length.shape[1], 0] = self.offset
        index[:, : self.length.shape[1], 1] = self.length
        data = index.tobytes()
        return with_trailer(data, crc32c(data))


def n_stored_chunks(stored: int, rows_per_chunk: int) -> int:
    """Chunks per layer that hold at least one stored row."""
    return -(-stored // rows_per_chunk)


def _padded(rows: NDArray[Any], spec: ArraySpec) -> NDArray[Any]:
    """One chunk of rows; a short last one is filled up, because Zarr knows no short inner chunk."""
    assert spec.inner is not None
    if rows.shape[0] == spec.inner[1]:
        return rows
    whole = np.full(spec.inner[1:], spec.fill, dtype=rows.dtype)
    whole[: rows.shape[0]] = rows
    return whole


class EncodedShard:
    """The parts of a shard in file order, encoded on `pool` a few chunks ahead of the writer.

    rows  [l, stored, d] numbers on disk dtype. Iterate once, then ask for `chunks`.
    """

    def __init__(self, rows: NDArray[Any], spec: ArraySpec, pool: Executor, n_ahead: int) -> None:
        self._rows, self._spec, self._pool, self._n_ahead = rows, spec, pool, n_ahead
        self._lengths: list[int] = []
        self._crcs: list[int] = []

    def _jobs(self) -> Iterator[NDArray[Any]]:
        assert self._spec.inner is not None
        r = self._spec.inner[1]
        for layer_rows in self._rows:
            for start in range(0, layer_rows.shape[0], r):
                yield _padded(layer_rows[start : start + r], self._spec)

    def __iter__(self) -> Iterator[bytes]:
        codec, pending = self._spec.codec, deque[Future[tuple[bytes, int]]]()
        jobs = self._jobs()
        for job in jobs:
            pending.append(self._pool.submit(codec.encode, job))
            if len(pending) > self._n_ahead:
                yield self._take(pending)
        while pending:
            yield self._take(pending)
        yield self.chunks.index_bytes(self._spec.chunk[1] // self._spec.inner[1])  # type: ignore[index]

    def _take(self, pending: deque[Future[tuple[bytes, int]]]) -> bytes:
        data, crc = pending.popleft().result()
        self._lengths.append(len(data) + CRC_BYTES)
        self._crcs.append(crc)
        return with_trailer(data, crc)

    @property
    def chunks(self) -> Chunks:
        """Lengths and crc32c of what was encoded."""
        shape = (self._rows.shape[0], -1)
        return Chunks(
            np.array(self._lengths, np.uint32).reshape(shape), np.array(self._crcs, np.uint32).reshape(shape)
        )


def chunk_damage(key: str, layer_i: int, chunk: int, what: str) -> DamageError:
    """The error of one bad chunk."""
    return DamageError(
        f"{key}: chunk {chunk} of layer index {layer_i} {what}. Run 'actcache verify' on the store to list all damage."
    )


class ShardReader:
    """Chunks of one committed shard, each compared with the ledger before it is decoded.

    files  reads a local store without new memory for each chunk; None reads through `objects`.
    """

    def __init__(
        self,
        objects: Objects,
        key: str,
        chunks: Chunks,
        codec: Codec,
        shape: tuple[int, int],
        *,
        files: LocalFiles | None = None,
    ) -> None:
        self._objects, self._files, self.key, self.chunks = objects, files, key, chunks
        self._codec, self.shape, self.dtype = codec, shape, codec.dtype
        self._offset = chunks.offset

    def read(self, layer_i: int, chunk: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows [R, d] of one chunk; DamageError where a byte differs from what was committed.

        They are in `out` where something had to be decoded, else (codec `none`) a read-only view of the bytes read, good
        until this thread reads again.
        """
        return self.decode(layer_i, chunk, self.load(layer_i, chunk), out)

    def requests(self, wanted: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Which of the chunks `wanted` (layer index, chunk) to fetch together: those that lie side by side."""
        return [request.parts for request in merge_ranges([self._range(*one) for one in wanted])]

    def n_bytes(self, layer_i: int, chunk: int) -> int:
        """Bytes of a chunk without its trailer."""
        return int(self.chunks.length[layer_i, chunk]) - CRC_BYTES

    def _range(self, layer_i: int, chunk: int) -> tuple[int, int]:
        return int(self._offset[layer_i, chunk]), self.n_bytes(layer_i, chunk)

    def fetch(self, wanted: Sequence[tuple[int, int]], *, fresh: bool = False) -> list[bytes | memoryview]:
        """Bytes of chunks (layer index, chunk) from object storage, not yet compared with anything: for `decode`."""
        try:
            return self._objects.read_ranges(self.key, [self._range(*one) for one in wanted], fresh=fresh)
        except FileNotFoundError as error:
            raise DamageError(f"{self.key} is committed but missing. {_ASK_VERIFY}") from error

    def load(self, layer_i: int, chunk: int, *, fresh: bool = False) -> Any:
        """Bytes of one chunk, not yet compared with anything: for `decode`, before this thread loads again."""
        if self._files is None:
            return self.fetch([(layer_i, chunk)], fresh=fresh)[0]
        try:
            return self._files.read(self.key, *self._range(layer_i, chunk))
        except FileNotFoundError as error:
            raise DamageError(f"{self.key} is committed but missing. {_ASK_VERIFY}") from error

    def _problem(self, layer_i: int, chunk: int, data: Any) -> str | None:
        n_bytes = self.n_bytes(layer_i, chunk)
        if len(data) != n_bytes:
            return f"ends after {len(data)} of {n_bytes} bytes"
        if crc32c(data) != int(self.chunks.crc[layer_i, chunk]):
            return "does not match the crc32c in the ledger"
        return None

    def decode(self, layer_i: int, chunk: int, data: Any, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """As `read`, from the chunk's bytes. Wrong ones are read once more: they may have gone wrong on the way here."""
        problem = self._problem(layer_i, chunk, data)
        if problem:
            data = self.load(layer_i, chunk, fresh=True)
            problem = self._problem(layer_i, chunk, data)
        if problem:
            raise chunk_damage(self.key, layer_i, chunk, problem)
        if self._codec.name == "none" and len(data) == self._codec.n_bytes:
            view = np.frombuffer(data, self._codec.dtype).reshape(self.shape)
            view.flags.writeable = False
            return view
        rows = np.empty(self.shape, self._codec.dtype) if out is None else out
        problem = self._codec.decode_into(memoryview(data), rows)
        if problem:
            raise chunk_damage(self.key, layer_i, chunk, f"cannot be decoded: {problem}")
        return rows

    def will_need(self, layer_i: int, chunk: int) -> None:
        """Tell the operating system that a chunk will be read soon; does nothing where there is no way to."""
        if self._files is not None:
            start, n_bytes = int(self._offset[layer_i, chunk]), int(self.chunks.length[layer_i, chunk])
            self._files.will_need(self.key, start, n_bytes)


_ASK_VERIFY = "Run 'actcache verify' on the store to list all damage."


def chunks_on_disk(
    data: bytes, n_layers: int, chunks_per_shard: int, stored: int, rows_per_chunk: int
) -> Chunks:
    """Read a shard object's own index and check it whole: for adopting one that no ledger record covers yet.

    ValueError says what is wrong. Every chunk is compared with its own trailer.
    """
    n_index = n_layers * chunks_per_shard * 16
    if len(data) < n_index + CRC_BYTES:
        raise ValueError(f"{len(data)} bytes cannot hold an index of {n_index}")
    index_data = data[-n_index - CRC_BYTES : -CRC_BYTES]
    if crc32c(index_data) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise ValueError("its index does not match its crc32c")
    index = np.frombuffer(index_data, "<u8").reshape(n_layers, chunks_per_shard, 2)
    n_chunks = n_stored_chunks(stored, rows_per_chunk)
    length = index[:, :n_chunks, 1].astype(np.uint32)
    if (index[:, :n_chunks] == _ABSENT).any() or (index[:, n_chunks:] != _ABSENT).any():
        raise ValueError(f"its index does not hold exactly {n_chunks} chunks a layer")
    found = Chunks(length, np.zeros_like(length))
    if found.index_bytes(chunks_per_shard) != data[-n_index - CRC_BYTES :] or int(
        length.sum()
    ) + n_index + 4 != len(data):
        raise ValueError("its chunks do not lie back to back, layer by layer")
    for at, start in np.ndenumerate(found.offset):
        end = int(start) + int(length[at])
        crc = crc32c(data[int(start) : end - CRC_BYTES])
        if crc != int.from_bytes(data[end - CRC_BYTES : end], "little"):
            raise ValueError(f"chunk {at[1]} of layer index {at[0]} does not match its crc32c")
        found.crc[at] = crc
    return found
