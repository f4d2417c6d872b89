"""Compiled loops do what their definitions in NumPy, and other people's code, do."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.loops import engine
from actcache.loops.compiled import compiled
from actcache.reader import order
from actcache.store.codec import crc32c

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


@given(seed=st.integers(0, 1 << 32), start=st.integers(0, 9), n=st.integers(0, 3 * 4032 + 9))
def test_crc32c(seed, start, n):
    if LOOPS is None or LOOPS.direct is None:
        pytest.skip("this processor has no instruction for it")
    data = np.random.default_rng(seed).integers(0, 256, start + n).astype(np.uint8)[start:]
    found = LOOPS.direct.crc32c(data.ctypes.data, len(data), LOOPS.direct.shift.ctypes.data)
    assert found == crc32c(data.tobytes())


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
