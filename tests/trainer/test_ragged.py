"""Selections of as many latents per row as pass a threshold, against dense tensors."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.kernels import ragged
from trainer.kernels.ragged import Candidates, Ragged, nth_largest

SHAPES = [(1, 3, 5), (7, 5, 11), (33, 17, 129), (300, 8, 64), (129, 31, 257)]
NONE_DEAD = torch.empty(0, dtype=torch.int64)


def problem(b, d, f, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    made = (torch.randn(b, d, generator=g), torch.randn(f, d, generator=g), torch.randn(d, generator=g) * 0.1)
    return [t.to(dtype).requires_grad_() for t in made]


def dense(code: Ragged, shape):
    return torch.zeros(shape, dtype=code.values.dtype).index_put(
        (code.rows, code.latents), code.values, accumulate=True
    )


positive = st.floats(2.0**-100, 2.0**100, width=32)


@given(st.lists(positive, min_size=1, max_size=200), st.data())
def test_nth_largest_is_that_of_a_sort(values, data):
    n = data.draw(st.integers(1, len(values)))
    assert nth_largest(torch.tensor(values), n) == sorted(values, reverse=True)[n - 1]
    assert nth_largest(torch.tensor(values), len(values) + 1) == 0.0


class Adder:
    """Adds up what threads bring, as an all-reduce does."""

    def __init__(self, n):
        self.barrier = threading.Barrier(n, timeout=60)
        self.brought = {}

    def of(self, place):
        def add_up(counts):
            self.brought[place] = counts.clone()
            self.barrier.wait()
            total = sum(self.brought.values())
            self.barrier.wait()
            counts.copy_(total)

        return add_up


@given(st.lists(positive, min_size=1, max_size=100), st.integers(1, 4), st.data())
def test_nth_largest_of_values_in_several_places(values, n_places, data):
    n = data.draw(st.integers(1, len(values) + 1))
    of = data.draw(st.lists(st.integers(0, n_places - 1), min_size=len(values), max_size=len(values)))
    shares = [
        torch.tensor([v for v, p in zip(values, of, strict=True) if p == place]) for place in range(n_places)
    ]
    adder = Adder(n_places)
    with ThreadPoolExecutor(n_places) as pool:
        found = list(pool.map(lambda place: nth_largest(shares[place], n, adder.of(place)), range(n_places)))
    expected = sorted(values, reverse=True)[n - 1] if n <= len(values) else 0.0
    assert found == [expected] * n_places


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.0, 0.7, 100.0])
def test_select_equals_the_oracle(shape, threshold, monkeypatch):
    monkeypatch.setattr(ragged, "TILE_VALUES", shape[2] * 10)
    monkeypatch.setattr(ragged, "TILE_ROWS_MIN", 4)
    z, w_enc, bias = problem(*shape)
    with torch.no_grad():
        code = ragged.select(z, w_enc, bias, threshold)
    expected = ragged.select_dense(z, w_enc, bias, threshold)
    torch.testing.assert_close(dense(code, expected.shape), expected.detach(), rtol=1e-12, atol=1e-12)
    assert (code.rows.diff() >= 0).all()
    values, latents = ragged.pad(code, shape[0])
    back = torch.zeros_like(expected).scatter_add(1, latents, values)
    torch.testing.assert_close(back, expected.detach(), rtol=1e-12, atol=1e-12)
    assert (values.diff(dim=1) <= 0).all()
    assert values.shape[1] == int((expected > 0).sum(1).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cuts", [1, 3])
@pytest.mark.parametrize("per_row", [1, 2, 1000])
def test_candidates_hold_the_largest_of_the_whole_batch(shape, cuts, per_row, monkeypatch):
    monkeypatch.setattr(ragged, "TILE_VALUES", shape[2] * 10)
    monkeypatch.setattr(ragged, "TILE_ROWS_MIN", 4)
    b, _, f = shape
    z, w_enc, bias = (t.detach().float() for t in problem(*shape))
    n = per_row * b
    candidates = Candidates(n)
    parts = z.tensor_split(cuts)
    for part in parts:
        candidates.add(part, w_enc, bias, NONE_DEAD, 0)
    threshold = candidates.threshold()
    pre = torch.relu((z - bias) @ w_enc.T)
    ranked = pre[pre > 0].sort(descending=True).values
    expected = float(ranked[n - 1]) if n <= len(ranked) else 0.0
    assert threshold == pytest.approx(expected, rel=1e-5)
    found = torch.cat(
        [dense(p.at_least(threshold), (len(x), f)) for p, x in zip(candidates.parts, parts, strict=True)]
    )
    torch.testing.assert_close(found, torch.where(pre >= threshold * (1 - 1e-6), pre, 0))
    assert int((found > 0).sum()) == min(n, len(ranked))
    held = sum(len(p.values) for p in candidates.parts)
    assert held <= 2 * n + 10 * f  # bounded, however many are positive


def test_candidates_choose_auxiliary_latents_too():
    z, w_enc, bias = (t.detach() for t in problem(40, 6, 30))
    dead = torch.tensor([1, 4, 5, 28])
    candidates = Candidates(80)
    for part in z.split(9):
        candidates.add(part, w_enc, bias, dead, 2)
    pre = torch.relu((z - bias) @ w_enc.T)[:, dead]
    values = torch.cat([v for v, _ in candidates.aux])
    torch.testing.assert_close(values, pre.topk(2).values)
    latents = torch.cat([i for _, i in candidates.aux])
    assert set(latents.unique().tolist()) <= set(dead.tolist())


def test_equal_ones_at_the_edge_are_taken_all():
    z = torch.ones(2, 1)
    w_enc = torch.tensor([[3.0], [2.0], [2.0], [1.0]])
    candidates = Candidates(3)  # 3, 3, then four 2s
    candidates.add(z, w_enc, torch.zeros(1), NONE_DEAD, 0)
    assert candidates.threshold() == 2.0
    assert candidates.parts[0].at_least(2.0).values.tolist() == [3.0, 2.0, 2.0] * 2


def test_a_row_that_is_not_finite_shows():
    z, w_enc, bias = (t.detach() for t in problem(20, 4, 30))
    z[7, 1] = torch.nan
    z[9, 0] = torch.inf
    candidates = Candidates(40)
    for part in z.split(6):
        candidates.add(part, w_enc, bias, NONE_DEAD, 0)
    chosen = [part.at_least(candidates.threshold()) for part in candidates.parts]
    assert chosen[1].rows[chosen[1].values.isnan()].tolist() == [1, 3]
    assert (chosen[1].rows.diff() >= 0).all()
    assert sum(len(part.values) for part in chosen) == 40


def through(z, w_enc, bias, w_dec, threshold=0.5):
    """Everything differentiable: chosen values and what they decode to."""
    with torch.no_grad():
        code = ragged.select(z, w_enc, bias, threshold)
    values = ragged.attach(code.values, code.rows, code.latents, z, w_enc, bias)
    return ragged.decode(code._replace(values=values), len(z), w_dec), values


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_oracle(shape):
    z, w_enc, bias = problem(*shape)
    w_dec = problem(*shape, seed=1)[1]
    out, values = through(z, w_enc, bias, w_dec)
    a = ragged.select_dense(z, w_enc, bias, 0.5)
    expected = ragged.decode_dense(a, w_dec)
    torch.testing.assert_close(out, expected)
    mine = torch.autograd.grad(out.sin().sum() + values.square().sum(), (z, w_enc, bias, w_dec))
    theirs = torch.autograd.grad(expected.sin().sum() + a.square().sum(), (z, w_enc, bias, w_dec))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    z, w_enc, bias = problem(5, 4, 9, seed=3)
    w_dec = problem(5, 4, 9, seed=4)[1]
    assert torch.autograd.gradcheck(through, (z, w_enc, bias, w_dec))


def test_nothing_chosen():
    z, w_enc, bias = problem(5, 4, 9)
    w_dec = problem(5, 4, 9, seed=1)[1]
    out, values = through(z, w_enc, bias, w_dec, threshold=1e9)
    assert (out == 0).all()
    assert len(values) == 0
    for grad in torch.autograd.grad(out.sum() + values.sum(), (w_enc, bias, w_dec)):
        assert (grad == 0).all()
    code = ragged.select(z.detach(), w_enc.detach(), bias.detach(), 1e9)
    assert [t.shape for t in ragged.pad(code, 5)] == [(5, 0), (5, 0)]


def test_same_bits_twice_in_float32():
    z, w_enc, bias = problem(500, 16, 256, dtype=torch.float32)
    w_dec = problem(500, 16, 256, seed=1, dtype=torch.float32)[1]
    results = []
    for _ in range(2):
        out, values = through(z, w_enc, bias, w_dec)
        results.append((out, values, *torch.autograd.grad(out.sin().sum(), (w_enc, bias, w_dec))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_bits_of_float32_are_in_the_order_of_numbers():
    """What the radix selection rests on."""
    values = np.sort(np.random.default_rng(0).lognormal(0, 10, 1000).astype(np.float32))
    assert (np.diff(values.view(np.int32)) >= 0).all()
