"""Compiled loops do what their definitions in NumPy, and other people's code, do."""

import ctypes
import sys

import crc32c as crc32c_package
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.loops import engine
from actcache.loops.compiled import compiled
from actcache.reader import order
from actcache.store.codec import crc32c, extend_crc32c

LOOPS = compiled()


def test_there_are_some():
    assert LOOPS is not None, "llvmlite is one of the packages for development"


def test_it_runs_without_llvmlite(monkeypatch):
    for cached in (engine.features, compiled):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert compiled() is None
    for cached in (engine.features, compiled):
        cached.cache_clear()
    monkeypatch.undo()
    assert compiled() is not None


def crc_loops():
    """By file: those that this processor has the instructions for."""
    able = engine.features() or {}
    wide = ["crc32c_wide.ll"] if able.get("vpclmulqdq") and able.get("avx512f") else []
    names = ["crc32c.ll", *wide] if LOOPS and LOOPS.direct else []
    kinds = (engine.POINTER, engine.INTEGER, engine.POINTER, ctypes.c_uint32)
    texts = {name: engine.text_of(name) + engine.text_of("loops_x86.ll") for name in names}
    compiled_texts = {name: engine.Engine(engine.text_of("loops.ll") + text) for name, text in texts.items()}
    return {name: made.loop("crc32c", ctypes.c_uint32, *kinds) for name, made in compiled_texts.items()}


CRC_LOOPS = crc_loops()


@given(
    seed=st.integers(0, 1 << 32),
    start=st.integers(0, 9),
    n=st.integers(0, 3 * 4032 + 9),
    before=st.integers(0, (1 << 32) - 1),
)
@pytest.mark.parametrize("name", CRC_LOOPS or [pytest.param("", marks=pytest.mark.skip("no such processor"))])
def test_crc32c(name, seed, start, n, before):
    data = np.random.default_rng(seed).integers(0, 256, start + n).astype(np.uint8)[start:]
    found = CRC_LOOPS[name](data.ctypes.data, len(data), LOOPS.direct.shift.ctypes.data, before)
    assert found == crc32c_package.crc32c(data.tobytes(), before)


@pytest.mark.parametrize("n", [0, 1, 65_535, 65_536, 300_001])
@pytest.mark.parametrize("kind", [bytes, memoryview, np.asarray, bytearray])
def test_crc32c_of_any_buffer(n, kind):
    data = kind(np.random.default_rng(n).integers(0, 256, n).astype(np.uint8))
    assert crc32c(data) == crc32c_package.crc32c(bytes(data))
    assert extend_crc32c(data, 77) == crc32c_package.crc32c(bytes(data), 77)


@settings(max_examples=200, deadline=None)
@given(
    key=st.integers(0, (1 << 64) - 1),
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    partitions=st.integers(1, 17),
    seed=st.integers(0, 1 << 32),
)
def test_rows_are_permuted_as_numpy_does(key, counts, partitions, seed):
    dealt = np.random.default_rng(seed).integers(0, partitions, len(counts))
    found = order.arrange(key, np.array(counts), dealt, partitions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "compiled", lambda: None)
        expected = order.arrange(key, np.array(counts), dealt, partitions)
    assert np.array_equal(found.slot, expected.slot)
    assert np.array_equal(found.partition, expected.partition)
