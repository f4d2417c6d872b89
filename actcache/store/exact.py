"""The array `exact` of a quantised capture: for other readers, the rows that are not in codes.

It has the shape of the rows and their logical dtype, and is sharded as they are; a chunk without such rows is absent, and
rows that are in codes are holes. All of it is a copy of what lies in the blocks of the shard of codes.
"""

import math
from collections.abc import Iterator

import numpy as np

from actcache.store.arrays import ArraySpec
from actcache.store.codec import CRC_BYTES, crc32c, extend_crc32c, trailer
from actcache.store.shard import ABSENT, ShardReader

Parts = tuple[bytes | memoryview, bytes]


def exact_parts(reader: ShardReader, spec: ArraySpec) -> Iterator[Parts]:
    """The object of one shard from the shard of codes: chunks, and last the index, each with its trailer."""
    assert spec.inner is not None
    index = np.full((spec.chunk[0], spec.chunk[1] // spec.inner[1], 2), ABSENT, "<u8")
    at = 0
    for layer_i, chunk, rows in exact_chunks(reader, spec):
        data, crc = spec.codec.encode(rows)
        index[layer_i, chunk] = at, len(data) + CRC_BYTES
        at += len(data) + CRC_BYTES
        yield data, trailer(crc)
    data = index.tobytes()
    yield data, trailer(crc32c(data))


def exact_chunks(reader: ShardReader, spec: ArraySpec) -> Iterator[tuple[int, int, np.ndarray]]:
    """(layer index, chunk, rows [R, d] with holes) of every chunk that has rows stored exactly; the rows are reused."""
    assert spec.inner is not None
    assert reader.chunks.blocks is not None
    without = 8 * spec.inner[2] + CRC_BYTES  # bytes of a block that holds no rows
    rows = np.empty(spec.inner[1:], spec.dtype)
    for layer_i, chunk in np.argwhere(reader.chunks.blocks.length > without).tolist():
        found = reader.read_codes(layer_i, chunk)
        rows[:] = spec.fill
        rows[found.exact_rows] = found.exact
        yield layer_i, chunk, rows


class Checksummed:
    """Parts on their way to the disk; afterwards `checksum` is their length, and the crc32c of all but their trailers."""

    def __init__(self, parts: Iterator[Parts]) -> None:
        self._parts = parts
        self.checksum = (0, 0)

    def __iter__(self) -> Iterator[Parts]:
        n_bytes = crc = 0
        for body, end in self._parts:
            crc, n_bytes = extend_crc32c(body, crc), n_bytes + len(body) + len(end)
            yield body, end
        self.checksum = (n_bytes, crc)


def exact_checksum(data: bytes, spec: ArraySpec) -> tuple[int, int]:
    """Length, and crc32c of all but the trailers; ValueError where a trailer is wrong or something lies between chunks.

    A crc32c over the trailers too would be the same number for any chunks of the same lengths.
    """
    index, crc = _index_of(data, spec), 0
    at = 0
    for start, n_bytes in sorted(index[index[..., 1] != ABSENT].tolist()):
        body, end = (
            data[start : start + n_bytes - CRC_BYTES],
            data[start + n_bytes - CRC_BYTES : start + n_bytes],
        )
        if start != at or end != trailer(crc32c(body)):
            raise ValueError(f"bytes {start} to {start + n_bytes} are not a chunk with its crc32c")
        crc, at = extend_crc32c(body, crc), start + n_bytes
    if at + index.nbytes + CRC_BYTES != len(data):
        raise ValueError(f"{len(data)} bytes hold {at} bytes of chunks and an index of {index.nbytes}")
    return len(data), extend_crc32c(index, crc)


def _index_of(data: bytes, spec: ArraySpec) -> np.ndarray:
    """[l, c, 2] uint64; ValueError where its crc32c is wrong."""
    assert spec.inner is not None
    shape = (spec.chunk[0], spec.chunk[1] // spec.inner[1], 2)
    end = len(data) - CRC_BYTES
    start = end - 8 * math.prod(shape)
    if start < 0 or trailer(crc32c(data[start:end])) != data[end:]:
        raise ValueError("its index does not match its crc32c")
    return np.frombuffer(data, "<u8", math.prod(shape), start).reshape(shape)


def same_exact(data: bytes, reader: ShardReader, spec: ArraySpec) -> bool:
    """Whether a whole object that is there already holds the rows of the shard of codes, however they are compressed."""
    assert spec.inner is not None
    index, there = _index_of(data, spec), np.empty(spec.inner[1:], spec.dtype)
    n_left = int((index[..., 1] != ABSENT).sum())
    for layer_i, chunk, rows in exact_chunks(reader, spec):
        start, n_bytes = (int(i) for i in index[layer_i, chunk])
        body = memoryview(data)[start : start + n_bytes - CRC_BYTES]
        if spec.codec.decode_into(body, there) is not None or there.tobytes() != rows.tobytes():
            return False
        n_left -= 1
    return n_left == 0
