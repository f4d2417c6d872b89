"""One shard to bytes and back: every bit pattern, and every way in which its bytes can be wrong."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import DamageError
from actcache.store.arrays import capture_arrays
from actcache.store.dtypes import as_float32
from actcache.store.encode import EncodedShard, RunEncoder
from actcache.store.gathered import Gathered
from actcache.store.metadata import array_json
from actcache.store.objects import LocalObjects
from actcache.store.quantise import quantise
from actcache.store.schema import Capture, PlannedShard
from actcache.store.shard import ShardReader, chunks_on_disk, n_stored_chunks
from tests.conftest import as_bits, make_grid

ODD = {
    "bfloat16": np.array([0x7FC0, 0x7FC1, 0x7F81, 0xFFFF, 0x8000, 0x7F80, 0xFF80, 0x0001], np.uint16),
    "float16": np.array([0x7E00, 0x7C01, 0xFFFF, 0x8000, 0x7C00, 0xFC00, 0x0001], np.uint16).view(np.float16),
    "float32": np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x80000000, 0x7F800000, 0x1], np.uint32).view(
        np.float32
    ),
}


def make_capture(dtype, codec, n_layers, width):
    return Capture(
        name="resid_post",
        hook="resid_post",
        layers=tuple(range(n_layers)),
        width=width,
        dtype=dtype,
        codec=codec,
        plan_digest="0" * 64,
        metadata={},
    )


def rows_spec(dtype, codec, *, n_layers, rows_per_shard, rows_per_chunk, width):
    grid = make_grid(1, rows_per_shard, 1, rows_per_chunk, 0)
    return capture_arrays(grid, make_capture(dtype, codec, n_layers, width))["rows"]


def encode(rows, spec, n_threads=1, dtype="bfloat16", codec=None, kept=None):
    capture = make_capture(dtype, codec or spec.codec_name, rows.shape[0], rows.shape[2])
    stored = rows.shape[1]
    planned = PlannedShard(kept=stored if kept is None else kept, stored=stored, objects={})
    gathered = Gathered(capture, spec, planned, lambda *_: None)
    with ThreadPoolExecutor(n_threads) as pool:
        shard = EncodedShard(rows, RunEncoder(capture, spec), gathered, pool, 3)
        data = b"".join(part for parts in shard for part in parts)
        return data, shard.chunks


def chunks_in(data, n_layers, n_chunks, stored, rows_per_chunk, width=None):
    return chunks_on_disk(
        lambda start, n: data[start : start + n],
        len(data),
        n_layers=n_layers,
        chunks_per_shard=n_chunks,
        stored=stored,
        rows_per_chunk=rows_per_chunk,
        quantised_width=width,
    )


def reader_of(folder, data, chunks, spec, quantised=None):
    (folder / "acts/resid_post/rows").mkdir(parents=True, exist_ok=True)
    (folder / spec.key(0, 0, 0)).write_bytes(data)
    return ShardReader(
        LocalObjects(folder), spec.key(0, 0, 0), chunks, spec.codec, spec.inner[1:], quantised=quantised
    )


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
    encoded, chunks = encode(rows, spec, dtype=dtype)
    assert encode(rows, spec, n_threads=3, dtype=dtype)[0] == encoded
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
    found = chunks_in(encoded, n_layers, n_chunks, stored, rows_per_chunk)
    assert np.array_equal(found.length, chunks.length)
    assert np.array_equal(found.crc, chunks.crc)
    assert np.array_equal(found.offset, chunks.offset)


SMALL = {"n_layers": 2, "rows_per_shard": 12, "rows_per_chunk": 4, "width": 3}


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    n_layers=st.integers(1, 3),
    rows_per_chunk=st.integers(1, 20),
    n_chunks=st.integers(1, 4),
    width=st.integers(1, 40),
    data=st.data(),
)
def test_codes_survive(folder, dtype, n_layers, rows_per_chunk, n_chunks, width, data):
    """Whatever rows are in codes for is read back by the reader, and found again in an object that nobody recorded."""
    rows_per_shard = rows_per_chunk * n_chunks
    stored = data.draw(st.integers(0, rows_per_shard))
    kept = data.draw(st.integers(0, stored))
    spec = rows_spec(
        dtype,
        "uint8",
        n_layers=n_layers,
        rows_per_shard=rows_per_shard,
        rows_per_chunk=rows_per_chunk,
        width=width,
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    values = rng.standard_normal((n_layers, stored, width), np.float32)
    values[rng.random(values.shape[:2]) < 0.2] *= 1000
    rows = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)
    is_odd = rng.random(rows.shape) < 0.02
    rows[is_odd] = rng.choice(ODD[dtype], int(is_odd.sum()))
    encoded, chunks = encode(rows, spec, dtype=dtype, codec="uint8", kept=kept)
    again = encode(rows, spec, n_threads=3, dtype=dtype, codec="uint8", kept=kept)
    assert again[0] == encoded
    reader = reader_of(folder, encoded, chunks, spec, dtype)
    assert reader.dtype == rows.dtype
    for layer_i, c in np.ndindex(n_layers, n_stored_chunks(stored, rows_per_chunk)):
        given = rows[layer_i, c * rows_per_chunk : (c + 1) * rows_per_chunk]
        run = quantise(given, 1, dtype, min(max(0, kept - c * rows_per_chunk), len(given)))
        (q,), said = run.chunks, run.said
        found, out = reader.read_codes(layer_i, c), np.empty(reader.shape, reader.dtype)
        assert found.block() == q.block()
        assert np.array_equal(found.codes[: len(given)], q.codes)
        assert (found.codes[len(given) :] == 255).all()
        assert reader.read(layer_i, c, out) is out
        assert as_bits(out)[: len(given)].tobytes() == as_bits(said).tobytes()
        assert np.isnan(as_float32(out[len(given) :], dtype)).all()
    found = chunks_in(encoded, n_layers, n_chunks, stored, rows_per_chunk, width)
    for a, b in ((found, chunks), (found.blocks, chunks.blocks)):
        assert np.array_equal(a.length, b.length)
        assert np.array_equal(a.crc, b.crc)
    assert found.errors == chunks.errors


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none", "uint8"])
def test_no_byte_can_change_unnoticed(tmp_path, codec):
    """Every single byte of a shard: the reader refuses the chunk it lies in, and adopting refuses the whole."""
    spec = rows_spec("bfloat16", codec, **SMALL)
    rows = np.arange(2 * 10 * 3, dtype=np.uint16).reshape(2, 10, 3)
    data, chunks = encode(rows, spec, codec=codec)
    quantised, width = ("bfloat16", 3) if codec == "uint8" else (None, None)
    reader = reader_of(tmp_path, data, chunks, spec, quantised)
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 1
        with pytest.raises(ValueError, match=r"crc32c|chunks|index|scales|bytes"):
            chunks_in(bytes(damaged), 2, 3, 10, 4, width)
        reader_of(tmp_path, bytes(damaged), chunks, spec)
        in_body = (chunks.offset <= i) & (i < chunks.offset + chunks.stored - 4)
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
            chunks_in(data[:n], 2, 3, 12, 4)
    with pytest.raises(ValueError, match=r"bytes|index|chunks"):
        chunks_in(data + b"\0", 2, 3, 12, 4)
    reader = reader_of(tmp_path, data[: int(chunks.offset[1, 1]) + 2], chunks, spec)
    reader.read(1, 0)
    with pytest.raises(DamageError, match="ends after 2 of 24 bytes"):
        reader.read(1, 1)


def test_another_number_of_stored_rows_is_refused():
    spec = rows_spec("bfloat16", "zstd", **SMALL)
    data, _ = encode(np.zeros((2, 8, 3), np.uint16), spec)
    with pytest.raises(ValueError, match="exactly 3 chunks"):
        chunks_in(data, 2, 3, 9, 4)


def test_a_chunk_stands_for_its_rows_with_its_own_scales_only(tmp_path):
    """Blocks of two chunks in each other's place: every trailer is right, and the ledger notices."""
    spec = rows_spec("bfloat16", "uint8", **SMALL)
    rows = np.arange(2 * 12 * 3, dtype=np.uint16).reshape(2, 12, 3) + 0x3F00
    data, chunks = encode(rows, spec, codec="uint8")
    blocks = chunks.offset + chunks.length
    n = int(chunks.blocks.length[0, 0])
    a, b = (int(blocks[0, c]) for c in (0, 1))
    swapped = data[:a] + data[b : b + n] + data[a + n : b] + data[a : a + n] + data[b + n :]
    reader = reader_of(tmp_path, swapped, chunks, spec, "bfloat16")
    for c in (0, 1):
        with pytest.raises(DamageError, match="block of scales that does not match"):
            reader.read(0, c)
    reader.read(0, 2)


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
