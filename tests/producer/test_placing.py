"""Vectors come to their rows as torch rounds them, however they are put there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.loops.of_rows import row_loops
from actcache.producer import placing
from actcache.producer.placing import Places

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ODD = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 3e38, 65_519.0, 65_520.0, 1.00390625, 1.01171875]


@pytest.mark.parametrize("has_loops", [True, False])
@settings(max_examples=100, deadline=None)
@given(
    acts_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    n=st.integers(1, 60),
    width=st.sampled_from([1, 8, 16, 48, 128, 130]),
    n_padding=st.integers(0, 20),
    odd=st.lists(st.sampled_from(ODD), max_size=12),
    is_strided=st.booleans(),
    skip=st.integers(0, 3),
    seed=st.integers(0, 1 << 16),
)
def test_each_at_its_row(has_loops, acts_dtype, dtype, n, width, n_padding, odd, is_strided, skip, seed):
    g = torch.Generator().manual_seed(seed)
    acts = torch.randn(n, width * 2, generator=g)
    acts.view(-1)[torch.randperm(acts.numel(), generator=g)[: len(odd)]] = torch.tensor(odd)[: acts.numel()]
    acts = acts.to(acts_dtype)[:, ::2] if is_strided else acts.to(acts_dtype)[:, :width].contiguous()
    n_padding = min(n_padding, n - 1)
    n_rows = n - n_padding + 3
    rows = torch.randperm(n_rows, generator=g)[:n].clone() if n <= n_rows else torch.randperm(n, generator=g)
    rows[rows >= n_rows] = -1
    rows[torch.randperm(n, generator=g)[:n_padding]] = -1
    memory = torch.full((skip + n_rows * width,), 7.0, dtype=dtype)
    target = memory[skip:].view(n_rows, width)  # at any place of memory
    expected = torch.full((n_rows, width), 7.0, dtype=dtype)
    for row, vector in zip(rows.tolist(), acts, strict=True):
        if row >= 0:
            expected[row] = vector.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not has_loops:
            patch.setattr(placing, "row_loops", dict)
        Places(rows).put(target, acts)
    assert torch.equal(target.isnan(), expected.isnan())
    assert torch.equal(target.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))
    assert (memory[:skip] == 7.0).all()


def test_the_loop_is_used_for_what_a_model_gives():
    assert row_loops(), "llvmlite is one of the packages for development"
    acts, places = torch.randn(4, 64), Places(torch.tensor([3, -1, 0, 1]))
    for dtype in FLOATS:
        assert places._put_at_once(torch.empty(4, 64, dtype=dtype), acts)
