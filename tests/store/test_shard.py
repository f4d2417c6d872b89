"""One shard to bytes and back: every bit pattern, and every way in which its bytes can be wrong."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import DamageError
from actcache.store.arrays import capture_arrays
from actcache.store.metadata import array_json
from actcache.store.objects import LocalObjects
from actcache.store.schema import Capture
from actcache.store.shard import Chunks, EncodedShard, ShardReader, chunks_on_disk, n_stored_chunks
from tests.conftest import as_bits, make_grid

ODD = {
    "bfloat16": np.array([0x7FC0, 0x7FC1, 0x7F81, 0xFFFF, 0x8000, 0x7F80, 0xFF80, 0x0001], np.uint16),
    "float16": np.array([0x7E00, 0x7C01, 0xFFFF, 0x8000, 0x7C00, 0xFC00, 0x0001], np.uint16).view(np.float16),
    "float32": np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x80000000, 0x7F800000, 0x1], np.uint32).view(
        np.float32
    ),
}


def rows_spec(dtype, codec, *, n_layers, rows_per_shard, rows_per_chunk, width):
    grid = make_grid(1, rows_per_shard, 1, rows_per_chunk, 0)
    capture = Capture(
        name="resid_post",
        hook="resid_post",
        layers=tuple(range(n_layers)),
        width=width,
        dtype=dtype,
        codec=codec,
        plan_digest="0" * 64,
        metadata={},
    )
    return capture_arrays(grid, capture)["rows"]


def encode(rows, spec, n_threads=1):
    with ThreadPoolExecutor(n_threads) as pool:
        shard = EncodedShard(rows, spec, pool, 3)
        data = b"".join(shard)
        return data, shard.chunks


def reader_of(folder, data, chunks, spec):
    (folder / "acts/resid_post/rows").mkdir(parents=True, exist_ok=True)
    (folder / spec.key(0, 0, 0)).write_bytes(data)
    return ShardReader(LocalObjects(folder), spec.key(0, 0, 0), chunks, spec.codec, spec.inner[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shard")


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    codec=st.sampled_from(["zstd", "lz4", "none"]),
    n_layers=st.integers(1, 3),
    rows_per_chunk=st.integers(1, 20),
    n_chunks=st.integers(1, 4),
    width=st.integers(1, 40),
    data=st.data(),
)
def test_bits_survive(folder, dtype, codec, n_layers, rows_per_chunk, n_chunks, width, data):
    """Any bits: NaN payloads, infinities, -0 and subnormals; in three readers, for any number of stored rows."""
    rows_per_shard = rows_per_chunk * n_chunks
    stored = data.draw(st.integers(0, rows_per_shard))
    spec = rows_spec(
        dtype,
        codec,
        n_layers=n_layers,
        rows_per_shard=rows_per_shard,
        rows_per_chunk=rows_per_chunk,
        width=width,
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rows = rng.integers(0, 256, (n_layers, stored, width, spec.dtype.itemsize), np.uint8).view(spec.dtype)[
        ..., 0
    ]
    is_odd = rng.random(rows.shape) < 0.3
    rows[is_odd] = rng.choice(ODD[dtype], int(is_odd.sum()))
    encoded, chunks = encode(rows, spec)
    assert encode(rows, spec, n_threads=3)[0] == encoded
    reader = reader_of(folder, encoded, chunks, spec)
    for layer_i in range(n_layers):
        for c in range(n_stored_chunks(stored, rows_per_chunk)):
            expected = rows[layer_i, c * rows_per_chunk : (c + 1) * rows_per_chunk]
            assert as_bits(reader.read(layer_i, c))[: len(expected)].tobytes() == as_bits(expected).tobytes()
    (folder / spec.path / "zarr.json").write_bytes(array_json(spec))
    by_zarr = np.asarray(zarr.open_array(folder / spec.path, mode="r")[...])
    assert as_bits(by_zarr[:, :stored]).tobytes() == as_bits(rows).tobytes()
    holes = np.full((n_layers, rows_per_shard - stored, width), spec.fill, spec.dtype)
    assert as_bits(by_zarr[:, stored:]).tobytes() == as_bits(holes).tobytes()
    found = chunks_on_disk(encoded, n_layers, n_chunks, stored, rows_per_chunk)
    assert np.array_equal(found.length, chunks.length)
    assert np.array_equal(found.crc, chunks.crc)
    assert np.array_equal(Chunks.from_table(chunks.table(), n_layers).offset, chunks.offset)


SMALL = {"n_layers": 2, "rows_per_shard": 12, "rows_per_chunk": 4, "width": 3}


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
def test_no_byte_can_change_unnoticed(tmp_path, codec):
    """Every single byte of a shard: the reader refuses the chunk it lies in, and adopting refuses the whole."""
    spec = rows_spec("bfloat16", codec, **SMALL)
    rows = np.arange(2 * 10 * 3, dtype=np.uint16).reshape(2, 10, 3)
    data, chunks = encode(rows, spec)
    reader = reader_of(tmp_path, data, chunks, spec)
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 1
        with pytest.raises(ValueError, match=r"crc32c|chunks|index"):
            chunks_on_disk(bytes(damaged), 2, 3, 10, 4)
        reader_of(tmp_path, bytes(damaged), chunks, spec)
        in_body = (chunks.offset <= i) & (i < chunks.offset + chunks.length.astype(int) - 4)
        for layer_i, c in np.ndindex(2, 3):
            if in_body[layer_i, c]:
                with pytest.raises(DamageError, match=f"chunk {c} of layer index {layer_i}"):
                    reader.read(layer_i, c)
            else:
                reader.read(layer_i, c)


def test_no_shard_can_end_early(tmp_path):
    spec = rows_spec("bfloat16", "none", **SMALL)
    data, chunks = encode(np.zeros((2, 12, 3), np.uint16), spec)
    for n in range(len(data)):
        with pytest.raises(ValueError, match=r"bytes|index|chunks"):
            chunks_on_disk(data[:n], 2, 3, 12, 4)
    with pytest.raises(ValueError, match=r"bytes|index|chunks"):
        chunks_on_disk(data + b"\0", 2, 3, 12, 4)
    reader = reader_of(tmp_path, data[: int(chunks.offset[1, 1]) + 2], chunks, spec)
    reader.read(1, 0)
    with pytest.raises(DamageError, match="ends after 2 of 24 bytes"):
        reader.read(1, 1)


def test_another_number_of_stored_rows_is_refused():
    spec = rows_spec("bfloat16", "zstd", **SMALL)
    data, _ = encode(np.zeros((2, 8, 3), np.uint16), spec)
    with pytest.raises(ValueError, match="exactly 3 chunks"):
        chunks_on_disk(data, 2, 3, 9, 4)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_lying_blosc_header_is_refused(tmp_path, codec):
    """Even when ledger and bytes agree: the decoder would write past the end of its buffer."""
    spec = rows_spec("bfloat16", codec, **SMALL)
    data, chunks = encode(np.zeros((2, 12, 3), np.uint16), spec)
    larger = rows_spec("bfloat16", codec, **SMALL | {"width": 300})
    reader = reader_of(tmp_path, data, chunks, larger)
    with pytest.raises(DamageError, match="blosc header"):
        reader.read(0, 0)


def test_a_missing_shard_is_damage(tmp_path):
    spec = rows_spec("bfloat16", "none", **SMALL)
    data, chunks = encode(np.zeros((2, 12, 3), np.uint16), spec)
    reader = reader_of(tmp_path, data, chunks, spec)
    (tmp_path / spec.key(0, 0, 0)).unlink()
    with pytest.raises(DamageError, match="committed but missing"):
        reader.read(0, 0)
