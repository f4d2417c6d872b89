"""The compiled loop and the one of NumPy do what the definition says, wherever rows begin and however long they are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.loops.compiled import compiled
from actcache.reader import scatter as module
from actcache.reader.scatter import ALIGNMENT, Target, aligned_empty


@pytest.fixture(params=["compiled", "numpy"])
def loop(request, monkeypatch):
    """Which of the two is used, counting how often."""
    used = []
    loops = compiled()
    assert loops is not None, "llvmlite is one of the packages for development"

    def counted(*arguments):
        used.append(1)
        loops.scatter(*arguments)

    counting = loops._replace(scatter=counted)
    monkeypatch.setattr(module, "compiled", lambda: counting if request.param == "compiled" else None)
    return request.param, used


@given(
    width=st.sampled_from([1, 3, 16, 32, 64, 96, 160]),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
    n_slots=st.integers(0, 12),
    n_window=st.integers(12, 40),
    columns=st.integers(1, 3),
    is_chosen=st.booleans(),
    data=st.data(),
)
def check(width, dtype, n_slots, n_window, columns, is_chosen, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 16)))
    rows = rng.integers(0, 255, (12, width)).astype(dtype)
    window = aligned_empty((n_window, width * columns), np.dtype(dtype))
    window[:] = 7
    head, column = data.draw(st.integers(0, n_window - 12)), data.draw(st.integers(0, columns - 1)) * width
    target = window[head:, column : column + width]
    slots = rng.permutation(len(target))[:n_slots]
    chosen = np.sort(rng.permutation(12)[:n_slots]) if is_chosen else None
    expected = window.copy()
    for i, slot in enumerate(slots):  # the definition
        expected[head + slot, column : column + width] = rows[i if chosen is None else chosen[i]]
    Target(target).put(slots, rows, chosen)
    assert np.array_equal(window, expected)


def test_it_is_what_it_says(loop):
    check()
    name, used = loop
    assert bool(used) == (name == "compiled")


@given(
    steps=st.integers(1, 5),
    dtype=st.sampled_from([np.uint16, np.float32]),
    n_slots=st.integers(0, 12),
    columns=st.integers(1, 3),
    is_chosen=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_bytes_side_by_side_are_put_together_on_the_way(steps, dtype, n_slots, columns, is_chosen, seed):
    rng, width = np.random.default_rng(seed), 32 * steps
    rows = rng.integers(0, 256, (12, width * np.dtype(dtype).itemsize)).astype(np.uint8).view(dtype)
    planes = np.ascontiguousarray(rows.view(np.uint8).reshape(-1, rows.itemsize).T)
    window = aligned_empty((30, width * columns), np.dtype(dtype))
    window.view(np.uint8)[:] = 7
    part = window[3:, (columns - 1) * width :]
    slots = rng.permutation(27)[:n_slots]
    chosen = rng.permutation(12)[:n_slots] if is_chosen else None
    expected = window.view(np.uint8).copy()
    for i, slot in enumerate(slots):
        row = rows[i if chosen is None else chosen[i]].view(np.uint8)
        expected[3 + slot, (columns - 1) * row.size :] = row
    target = Target(part)
    assert target.takes_planes
    target.put_planes(slots, planes, chosen)
    assert np.array_equal(window.view(np.uint8), expected)


def test_rows_that_do_not_fill_cache_lines_go_the_other_way(monkeypatch):
    monkeypatch.setattr(module, "compiled", lambda: pytest.fail("not for these"))
    rows = np.arange(24, dtype=np.uint16).reshape(2, 12)
    window = aligned_empty((4, 12), rows.dtype)
    Target(window).put(np.array([3, 0]), rows)
    assert np.array_equal(window[[3, 0]], rows)
    rows = np.arange(64, dtype=np.uint16).reshape(2, 32)
    shifted = np.empty(4 * 32 + 1, np.uint16)[1:].reshape(4, 32)
    Target(shifted).put(np.array([1, 2]), rows)
    assert np.array_equal(shifted[[1, 2]], rows)


def test_windows_begin_at_a_cache_line():
    for n in range(1, 40):
        assert aligned_empty((n, 3), np.dtype(np.uint16)).ctypes.data % ALIGNMENT == 0
