"""Our Blosc chunks are what any Blosc reads, and no larger than its own on numbers like activations."""

import struct

import numcodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.store import blosc
from actcache.store.blosc import planes, planes_of, shuffled_zstd
from actcache.store.codec import Codec

HEADER = struct.Struct("<4B3I")
STORED = 2


def made_up(dtype: str, n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    return (x.view(np.uint32) >> 16).astype(dtype) if dtype == "<u2" else x.astype(dtype)


@settings(max_examples=120, deadline=None)
@given(
    dtype=st.sampled_from(["<u2", "<f2", "<f4"]),
    n=st.integers(60, 9_000),
    seed=st.integers(0, 1 << 32),
    n_same=st.integers(0, 9_000),
)
def test_numcodecs_reads_them(dtype, n, seed, n_same):
    numbers = made_up(dtype, n, seed)
    numbers[:n_same] = numbers[0]
    found = shuffled_zstd(numbers)
    theirs = numcodecs.Blosc("zstd", 1, numcodecs.Blosc.SHUFFLE, numbers.nbytes).encode(numbers)
    if found is None:
        assert len(theirs) > 0.9 * numbers.nbytes, "it could have been compressed"
        return
    assert bytes(numcodecs.Blosc().decode(found)) == numbers.tobytes()
    said, of_theirs = HEADER.unpack_from(found), HEADER.unpack_from(theirs)
    assert said[:2] == of_theirs[:2]
    assert said[2] | STORED == of_theirs[2] | STORED, "theirs may be stored as they are"
    assert said[3:6] == of_theirs[3:6]
    assert said[6] == len(found)


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(["<u2", "<f4"]), steps=st.integers(1, 40), seed=st.integers(0, 1 << 32))
def test_numpy_takes_bytes_apart_alike(dtype, steps, seed):
    numbers = made_up(dtype, 32 * steps, seed)
    found = planes(numbers).copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blosc, "plane_loops", dict)
        assert np.array_equal(found, planes(numbers))
    assert found.tobytes() == numbers.view(np.uint8).reshape(-1, numbers.itemsize).T.tobytes()


@pytest.mark.parametrize("dtype", ["<u2", "<f4"])
def test_numbers_like_activations_take_no_more_bytes_than_blosc_takes(dtype):
    numbers = made_up(dtype, 131_072, 0)
    found, _crc = Codec("zstd", np.dtype(dtype), len(numbers)).encode(numbers)
    theirs = numcodecs.Blosc("zstd", 1, numcodecs.Blosc.SHUFFLE, numbers.nbytes).encode(numbers)
    assert len(found) <= len(theirs)


def test_what_does_not_get_smaller_is_stored_by_blosc_as_it_is():
    numbers = np.random.default_rng(0).integers(0, 1 << 16, 1_000).astype("<u2")
    assert shuffled_zstd(numbers) is None
    found, _crc = Codec("zstd", numbers.dtype, len(numbers)).encode(numbers)
    assert bytes(numcodecs.Blosc().decode(found)) == numbers.tobytes()


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(["<u2", "<f2", "<f4"]),
    n=st.integers(60, 9_000),
    seed=st.integers(0, 1 << 32),
    is_ours=st.booleans(),
)
def test_planes_of_chunks_whoever_made_them(dtype, n, seed, is_ours):
    numbers = made_up(dtype, n, seed)
    theirs = numcodecs.Blosc("zstd", 1, numcodecs.Blosc.SHUFFLE, numbers.nbytes).encode(numbers)
    chunk = (shuffled_zstd(numbers) if is_ours else None) or theirs
    found = planes_of(memoryview(chunk), n, numbers.itemsize)
    if chunk[2] & STORED:
        assert found is None
    else:
        assert found is not None
        assert np.array_equal(found, planes(numbers.copy()).copy())


@pytest.mark.parametrize("cname", ["zstd", "lz4", "blosclz"])
@pytest.mark.parametrize(
    "shuffle", [numcodecs.Blosc.NOSHUFFLE, numcodecs.Blosc.SHUFFLE, numcodecs.Blosc.BITSHUFFLE]
)
@pytest.mark.parametrize("block", [1 << 12, 1 << 16])
def test_chunks_made_otherwise_are_left_to_blosc(cname, shuffle, block):
    numbers = made_up("<u2", 1 << 15, 0)
    chunk = numcodecs.Blosc(cname, 1, shuffle, block).encode(numbers)
    found = planes_of(memoryview(chunk), len(numbers), 2)
    assert (found is not None) == (
        (cname, shuffle, block) == ("zstd", numcodecs.Blosc.SHUFFLE, numbers.nbytes)
    )
    assert planes_of(memoryview(chunk), len(numbers) // 2, 4) is None
    assert planes_of(memoryview(chunk)[:10], len(numbers), 2) is None


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 1 << 20), bit=st.integers(0, 7), is_cut=st.booleans())
def test_no_bytes_bring_it_down(at, bit, is_cut):
    """A chunk is compared with its crc32c before: whatever gets this far ends with an error, or with planes."""
    numbers = made_up("<u2", 4096, 1)
    chunk = bytearray(shuffled_zstd(numbers) or b"")
    at %= len(chunk)
    chunk[at] ^= 1 << bit
    if is_cut:
        del chunk[at:]
    try:
        found = planes_of(memoryview(chunk), len(numbers), 2)
    except ValueError:
        return
    assert found is None or found.shape == (2, len(numbers))
