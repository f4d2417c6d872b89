"""One shard of activation rows to bytes and back: a Zarr v3 sharded chunk, written and read without zarr-python.

    chunk (layer 0, rows 0..R) | crc | chunk (layer 0, rows R..2R) | crc | ... | chunk (layer 1, ...) | ... | index | crc

and where rows are quantised

    codes | crc | scales | crc | codes | crc | scales | crc | ... | errors | crc | index | crc

Chunks lie layer by layer, so one layer of a shard is one contiguous range. Chunks of padding are absent. The index
holds (offset, length) for every chunk, absent ones as 2^64-1, little-endian, with its own crc32c. Readers of ours do
not need it: offsets follow from the lengths in the ledger, and the ledger's crc32c are the ones compared.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ActcacheError, DamageError
from actcache.store.codec import CRC_BYTES, Codec, crc32c, trailer, with_trailer
from actcache.store.dtypes import disk_dtype
from actcache.store.local import LocalFiles
from actcache.store.objects import Objects
from actcache.store.quantise import Quantised, dequantise, parse
from actcache.store.remote import merge_ranges
from actcache.store.schema import ChunkTable, ScaleTable, ShardRecord

ABSENT = np.uint64(0xFFFFFFFFFFFFFFFF)
"""Offset and length, in an index, of a chunk that is not stored."""

WHAT_TO_DO = (
    "Run 'actcache verify' on the store to list all damage and 'actcache repair' to mend it; if it was repaired since it was "
    "opened, open it again."
)
"""Of damage to a shard."""


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
    blocks  the same of the block of scales behind each chunk; None where rows are not quantised.
    errors  crc32c of the block of errors behind them all.
    """

    length: NDArray[np.uint32]
    crc: NDArray[np.uint32]
    blocks: "Chunks | None" = None
    errors: int = 0

    @classmethod
    def from_record(cls, record: ShardRecord, n_layers: int) -> Self:
        """From a ledger record; ValueError where the record cannot be this shard's."""
        tables = [t for t in (record.chunks, record.scales) if t is not None]
        found = [(_unpack(t.lengths, n_layers), _unpack(t.crc32c, n_layers)) for t in tables]
        if record.scales is None:
            return cls(*found[0])
        return cls(*found[0], blocks=Chunks(*found[1]), errors=record.scales.errors)

    def table(self) -> ChunkTable:
        """As the ledger holds it."""
        return ChunkTable(lengths=_pack(self.length), crc32c=_pack(self.crc))

    def scale_table(self) -> ScaleTable | None:
        """What the ledger holds of blocks."""
        if self.blocks is None:
            return None
        lengths, crc32c_ = (_pack(values) for values in (self.blocks.length, self.blocks.crc))
        return ScaleTable(lengths=lengths, crc32c=crc32c_, errors=self.errors)

    @property
    def stored(self) -> NDArray[np.int64]:
        """[l, c] bytes that belong to each chunk: itself, and the block behind it."""
        length = self.length.astype(np.int64)
        return length if self.blocks is None else length + self.blocks.length

    @property
    def offset(self) -> NDArray[np.int64]:
        """[l, c] first byte of each chunk."""
        flat = self.stored.reshape(-1)
        return (np.cumsum(flat) - flat).reshape(self.length.shape)

    def index_bytes(self, chunks_per_shard: int) -> bytes:
        """The Zarr index of the shard with its trailer."""
        index = np.full((self.length.shape[0], chunks_per_shard, 2), ABSENT, dtype="<u8")
        index[:, : self.length.shape[1], 0] = self.offset
        index[:, : self.length.shape[1], 1] = self.length
        data = index.tobytes()
        return with_trailer(data, crc32c(data))


def n_stored_chunks(stored: int, rows_per_chunk: int) -> int:
    """Chunks per layer that hold at least one stored row."""
    return -(-stored // rows_per_chunk)


def chunk_damage(key: str, layer_i: int, chunk: int, what: str) -> DamageError:
    """The error of one bad chunk."""
    return DamageError(f"{key}: chunk {chunk} of layer index {layer_i} {what}. {WHAT_TO_DO}")


class ShardReader:
    """Chunks of one committed shard, each compared with the ledger before it is decoded.

    files       reads a local store without new memory for each chunk; None reads through `objects`.
    quantised   the logical dtype of rows that are stored in codes; None: rows are stored as they are.
    on_missing  the error to raise where the object is not there.
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
        quantised: str | None = None,
        on_missing: Callable[[], ActcacheError] | None = None,
    ) -> None:
        self._objects, self._files, self.key, self.chunks = objects, files, key, chunks
        self._codec, self.shape, self.quantised = codec, shape, quantised
        self.dtype = codec.dtype if quantised is None else disk_dtype(quantised)
        """Of the rows that are handed out: bfloat16 is its bits."""
        self.row_bytes = shape[1] * self.dtype.itemsize
        self._offset, self._stored = chunks.offset, chunks.stored
        self._is_plain = codec.name == "none" and quantised is None
        self.comes_in_planes = codec.name == "zstd" and quantised is None
        """Whether `planes` is worth being asked."""
        self._on_missing = on_missing

    def read(self, layer_i: int, chunk: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows [R, d] of one chunk; DamageError where a byte differs from what was committed.

        They are in `out` where something had to be decoded, else (codec `none`) a read-only view of the bytes read, good
        until this thread reads again.
        """
        return self.decode(layer_i, chunk, self.load(layer_i, chunk), out)

    def read_codes(self, layer_i: int, chunk: int) -> Quantised:
        """Of a quantised shard, one chunk in codes, with what turns them into rows; good until this thread reads again."""
        return self.decode_codes(layer_i, chunk, self.load(layer_i, chunk))

    def requests(self, wanted: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Which of the chunks `wanted` (layer index, chunk) to fetch together: those that lie side by side."""
        return [request.parts for request in merge_ranges([self.range_of(*one) for one in wanted])]

    def n_bytes(self, layer_i: int, chunk: int) -> int:
        """Bytes of a chunk (and, where it is quantised, of the block behind it) without the last trailer."""
        return self._stored.item(layer_i, chunk) - CRC_BYTES

    def range_of(self, layer_i: int, chunk: int) -> tuple[int, int]:
        """First byte of a chunk in its file, and `n_bytes`."""
        return self._offset.item(layer_i, chunk), self._stored.item(layer_i, chunk) - CRC_BYTES

    def fetch(self, wanted: Sequence[tuple[int, int]], *, fresh: bool = False) -> list[bytes | memoryview]:
        """Bytes of chunks (layer index, chunk) from object storage, not yet compared with anything: for `decode`."""
        try:
            return self._objects.read_ranges(self.key, [self.range_of(*one) for one in wanted], fresh=fresh)
        except FileNotFoundError as error:
            raise self._missing() from error

    def _missing(self) -> ActcacheError:
        if self._on_missing is not None:
            return self._on_missing()
        return DamageError(f"{self.key} is committed but missing. {WHAT_TO_DO}")

    def load(
        self, layer_i: int, chunk: int, *, fresh: bool = False, files: LocalFiles | None = None
    ) -> bytes | memoryview:
        """Bytes of one chunk, not yet compared with anything: for `decode`, before this thread loads again.

        files  to read a local store with, in place of the reader's own.
        """
        files = files or self._files
        if files is None:
            return self.fetch([(layer_i, chunk)], fresh=fresh)[0]
        try:
            return files.read(self.key, *self.range_of(layer_i, chunk), fresh=fresh)
        except FileNotFoundError as error:
            raise self._missing() from error

    def _problem(self, layer_i: int, chunk: int, data: memoryview) -> str | None:
        n_bytes = self.n_bytes(layer_i, chunk)
        if len(data) != n_bytes:
            return f"ends after {len(data)} of {n_bytes} bytes"
        return chunk_problem(self.chunks, (layer_i, chunk), data)

    def _checked(self, layer_i: int, chunk: int, data: bytes | memoryview) -> memoryview:
        """The bytes, once they are right. Wrong ones are read once more: they may have gone wrong on the way here."""
        found = memoryview(data)
        problem = self._problem(layer_i, chunk, found)
        if problem:
            found = memoryview(self.load(layer_i, chunk, fresh=True))
            problem = self._problem(layer_i, chunk, found)
        if problem:
            raise chunk_damage(self.key, layer_i, chunk, problem)
        return found

    def decode(self, layer_i: int, chunk: int, data: Any, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """As `read`, from the chunk's bytes as `fetch` returns them."""
        if self.quantised is not None:
            return dequantise(self.decode_codes(layer_i, chunk, data), self.quantised, out)
        data = self._checked(layer_i, chunk, data)
        if self._codec.name == "none" and len(data) == self._codec.n_bytes:
            view = np.frombuffer(data, self._codec.dtype).reshape(self.shape)
            view.flags.writeable = False
            return view
        rows = np.empty(self.shape, self._codec.dtype) if out is None else out
        problem = self._codec.decode_into(data, rows)
        if problem:
            raise chunk_damage(self.key, layer_i, chunk, f"cannot be decoded: {problem}")
        return rows

    def decode_codes(self, layer_i: int, chunk: int, data: Any) -> Quantised:
        """As `read_codes`, from the chunk's bytes as `fetch` returns them; views of these."""
        data = self._checked(layer_i, chunk, data)
        n_codes = int(self.chunks.length[layer_i, chunk])
        try:
            codes = np.frombuffer(data[: n_codes - CRC_BYTES], np.uint8).reshape(self.shape)
            return parse(codes, data[n_codes:], self.dtype)
        except ValueError as error:
            raise chunk_damage(self.key, layer_i, chunk, f"cannot be decoded: {error}") from error

    def planes(self, layer_i: int, chunk: int, data: Any) -> NDArray[np.uint8] | None:
        """Bytes [itemsize, R * d] of a chunk's rows, those of equal significance side by side; see `Codec`."""
        try:
            return self._codec.planes(self._checked(layer_i, chunk, data))
        except ValueError as error:
            raise chunk_damage(self.key, layer_i, chunk, f"cannot be decoded: {error}") from error

    def as_is(self, layer_i: int, chunk: int) -> tuple[int, int, int] | None:
        """First byte, bytes and crc32c of a chunk that is stored as it is handed out; None: it has to be decoded."""
        n_bytes = self._stored.item(layer_i, chunk) - CRC_BYTES
        if not self._is_plain or n_bytes != self._codec.n_bytes:
            return None
        return self._offset.item(layer_i, chunk), n_bytes, self.chunks.crc.item(layer_i, chunk)

    def will_need(self, layer_i: int, chunk: int, files: LocalFiles) -> None:
        """Tell the operating system that a chunk will be read soon; does nothing where there is no way to."""
        files.will_need(self.key, self._offset.item(layer_i, chunk), self._stored.item(layer_i, chunk))


def chunk_problem(chunks: Chunks, at: tuple[int, int], data: memoryview) -> str | None:
    """What is wrong with the bytes of a chunk (all it stores, with or without the last trailer), or None."""
    end = int(chunks.length[at])
    crc = int(chunks.crc[at])
    if crc32c(data[: end - CRC_BYTES]) != crc:
        return "does not match the crc32c in the ledger"
    if len(data) >= end and data[end - CRC_BYTES : end] != trailer(crc):
        return "has another trailer than its crc32c in the ledger"
    if chunks.blocks is not None:
        problem = chunk_problem(chunks.blocks, at, data[end:])
        return problem and f"has a block of scales that {problem}"
    return None


ReadRange = Callable[[int, int], bytes | memoryview]


def chunks_on_disk(
    read: ReadRange,
    n_bytes: int,
    *,
    n_layers: int,
    chunks_per_shard: int,
    stored: int,
    rows_per_chunk: int,
    quantised_width: int | None = None,
) -> Chunks:
    """Read a shard object's own index and check it whole: for adopting one that no ledger record covers yet.

    Every chunk is compared with its own trailer, one at a time.

    Args:
        read: bytes [start, start + n) of the object.
        n_bytes: its length.
        n_layers: layers of the capture.
        chunks_per_shard: chunks a layer may have.
        stored: rows stored per layer.
        rows_per_chunk: R.
        quantised_width: width of rows in codes; None where they are stored as they are.

    Raises:
        ValueError: says what is wrong.
    """
    n_index = n_layers * chunks_per_shard * 16
    n_errors = 0 if quantised_width is None else n_layers * quantised_width * 8 + CRC_BYTES
    end = n_bytes - n_index - CRC_BYTES - n_errors
    if end < 0:
        raise ValueError(f"{n_bytes} bytes cannot hold an index of {n_index}")
    index_data = bytes(read(end + n_errors, n_index + CRC_BYTES))
    if trailer(crc32c(index_data[:-CRC_BYTES])) != index_data[-CRC_BYTES:]:
        raise ValueError("its index does not match its crc32c")
    index = np.frombuffer(index_data, "<u8", n_index // 8).reshape(n_layers, chunks_per_shard, 2)
    n_chunks = n_stored_chunks(stored, rows_per_chunk)
    if (index[:, :n_chunks] == ABSENT).any() or (index[:, n_chunks:] != ABSENT).any():
        raise ValueError(f"its index does not hold exactly {n_chunks} chunks a layer")
    found = _laid_out(index[:, :n_chunks].astype(np.int64), end, has_blocks=quantised_width is not None)
    if found.index_bytes(chunks_per_shard) != index_data or int(found.stored.sum()) != end:
        raise ValueError("its chunks do not lie back to back, layer by layer")
    for at, start in np.ndenumerate(found.offset):
        data = memoryview(read(int(start), int(found.stored[at])))
        for part, body in _parts(found, at, data):
            crc = crc32c(body[:-CRC_BYTES])
            if body[-CRC_BYTES:] != trailer(crc):
                raise ValueError(f"chunk {at[1]} of layer index {at[0]} does not match its crc32c")
            part.crc[at] = crc
    if not n_errors:
        return found
    errors = memoryview(read(end, n_errors))
    crc = crc32c(errors[:-CRC_BYTES])
    if errors[-CRC_BYTES:] != trailer(crc):
        raise ValueError("its block of errors does not match its crc32c")
    return replace(found, errors=crc)


def _laid_out(index: NDArray[np.int64], end: int, *, has_blocks: bool) -> Chunks:
    """Chunks from an index [l, c, 2] of offsets and lengths; a block reaches to the next chunk, the last one to `end`."""
    length = index[..., 1]
    if not has_blocks:
        return Chunks(length.astype(np.uint32), np.zeros(length.shape, np.uint32))
    starts = np.append(index[..., 0].reshape(-1), end)
    block = (starts[1:] - starts[:-1]).reshape(length.shape) - length
    if (block <= CRC_BYTES).any():
        raise ValueError("its chunks have no room for scales between them")
    zeros = np.zeros(length.shape, np.uint32)
    return Chunks(length.astype(np.uint32), zeros, Chunks(block.astype(np.uint32), zeros.copy()))


def _parts(chunks: Chunks, at: tuple[int, ...], data: memoryview) -> list[tuple[Chunks, memoryview]]:
    """The chunk and, where there is one, the block behind it, each with its trailer."""
    end = int(chunks.length[at])
    return [(chunks, data[:end])] + ([] if chunks.blocks is None else [(chunks.blocks, data[end:])])
