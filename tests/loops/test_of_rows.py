"""Compiled norms and moments say of any rows what float64 says, and what NumPy says where there is no compiler."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.loops import engine, of_rows
from actcache.loops.of_rows import STEP, row_loops
from actcache.store import statistics
from actcache.store.dtypes import as_float32, disk_dtype
from actcache.store.quantise import dequantise, quantise

DTYPES = ("bfloat16", "float16", "float32")


def made_up(dtype: str, n: int, d: int, seed: int, spread: float, offset: float) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d)) * spread + offset
    if dtype == "bfloat16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(disk_dtype(dtype))


def test_there_are_some():
    assert row_loops(), "llvmlite is one of the packages for development"
    assert set(row_loops()) <= set(DTYPES)


def test_it_runs_without_llvmlite(monkeypatch):
    for cached in (engine.features, row_loops):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert row_loops() == {}
    for cached in (engine.features, row_loops):
        cached.cache_clear()
    monkeypatch.undo()
    assert row_loops()


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 300),
    steps=st.integers(1, 9),
    seed=st.integers(0, 1 << 32),
    spread=st.sampled_from([1e-3, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    data=st.data(),
)
def test_what_is_said_of_rows(dtype, n, steps, seed, spread, offset, data):
    rows = made_up(dtype, n, steps * STEP, seed, spread, offset)
    kept = data.draw(st.integers(0, n))
    exact = as_float32(rows, dtype).astype(np.float64)
    found = statistics.row_statistics(rows, dtype, kept)
    np.testing.assert_allclose(found.norm, np.sqrt((exact**2).sum(1)), rtol=1e-6)
    assert found.is_finite.all()
    exact, moments = exact[:kept], found.moments
    assert moments.n == kept
    if not kept:
        return
    deviation = exact.std(0)
    assert (np.abs(moments.mean - exact.mean(0)) <= 1e-6 * (deviation + np.abs(exact.mean(0)))).all()
    squares = ((exact - exact.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(moments.m2, squares, rtol=3e-6, atol=1e-9 * kept * np.abs(exact).max() ** 2)
    assert np.array_equal(moments.least, exact.min(0))
    assert np.array_equal(moments.greatest, exact.max(0))


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 200),
    seed=st.integers(0, 1 << 32),
    n_odd=st.integers(0, 5),
    odd=st.sampled_from([np.nan, np.inf, -np.inf, 6e4, 3e38, 1e-38]),
)
def test_numpy_says_the_same(dtype, n, seed, n_odd, odd):
    rows = made_up(dtype, n, 3 * STEP, seed, 1.0, 0.5)
    at = np.random.default_rng(seed).integers(0, [n, 3 * STEP], (n_odd, 2))
    with np.errstate(over="ignore"):
        value = np.float32(odd).astype(np.float16 if dtype == "float16" else np.float32)
    rows[tuple(at.T)] = value.view(np.uint32) >> 16 if dtype == "bfloat16" else value
    found = statistics.row_statistics(rows, dtype, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_rows, "row_loops", dict)
        expected = statistics.row_statistics(rows, dtype, n)
    np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-6)
    assert np.array_equal(found.is_finite, expected.is_finite)
    assert found.moments.n == expected.moments.n
    for name in ("mean", "m2", "least", "greatest"):
        np.testing.assert_allclose(
            getattr(found.moments, name), getattr(expected.moments, name), rtol=3e-6, atol=1e-6, err_msg=name
        )


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    n_chunks=st.integers(1, 4),
    r=st.integers(1, 40),
    steps=st.integers(1, 9),
    seed=st.integers(0, 1 << 32),
    n_odd=st.integers(0, 4),
    odd=st.sampled_from([np.nan, np.inf, 3e4, 0.0, -0.0]),
    data=st.data(),
)
def test_numpy_quantises_alike(dtype, n_chunks, r, steps, seed, n_odd, odd, data):
    rows = made_up(dtype, n_chunks * r, steps * STEP, seed, 1.0, 0.5)
    rng = np.random.default_rng(seed)
    rows[rng.integers(0, len(rows), n_odd)] = made_up(dtype, 1, 1, 0, 0.0, odd)[0]
    rows[:, rng.random(rows.shape[1]) < 0.1] = rows[0, 0]
    kept = data.draw(st.sampled_from([len(rows), len(rows), rng.integers(0, len(rows) + 1)]))

    def all_of_it():
        run = quantise(rows, n_chunks, dtype, kept)
        again = [dequantise(q, dtype) for q in run.chunks]
        return run, np.concatenate(again)

    found, read = all_of_it()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_rows, "row_loops", dict)
        expected, theirs = all_of_it()
    for q, other in zip(found.chunks, expected.chunks, strict=True):
        for name in q._fields:
            assert getattr(q, name).tobytes() == getattr(other, name).tobytes(), name
    assert found.said.tobytes() == expected.said.tobytes()
    assert read.tobytes() == theirs.tobytes()
    np.testing.assert_allclose(found.errors, expected.errors, rtol=1e-5, atol=1e-12)
    is_coded = np.ones(kept, bool)
    is_coded[found.exact_rows[found.exact_rows < kept]] = False
    x, y = (as_float32(of[:kept][is_coded], dtype).astype(np.float64) for of in (rows, found.said))
    np.testing.assert_allclose(found.errors, ((x - y) ** 2).sum(0), rtol=1e-5, atol=1e-12)
