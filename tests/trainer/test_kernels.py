import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import UsageError
from tests.trainer.problems import as_sets, assert_same, make_problem, run, worst
from trainer.kernels import gradients, make_kernels, reference, sparse

SHAPES = [(1, 3, 5, 1), (7, 5, 11, 4), (33, 17, 129, 13), (300, 8, 64, 64), (129, 31, 257, 5)]
NONE = torch.empty(0, dtype=torch.int64)
DENSE, CHOSEN = 0.0, 2.0  # shares that make sums over candidates dense always, and never


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(sparse, "TILE_VALUES", 640)
    monkeypatch.setattr(sparse, "TILE_ROWS_MIN", 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n_aux", "share"), [(0, CHOSEN), (2, CHOSEN), (2, DENSE)])
@pytest.mark.parametrize("latent_bias", [False, True])
def test_sparse_equals_the_oracle_with_all_gradients(
    shape, n_aux, share, latent_bias, small_tiles, monkeypatch
):
    monkeypatch.setattr(gradients, "DENSE_SHARE", share)
    problem = make_problem(*shape, n_aux=n_aux, latent_bias=latent_bias)
    assert_same(run(sparse, problem), run(reference, problem), rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes(data):
    f = data.draw(st.integers(1, 40))
    n_dead = data.draw(st.integers(0, f))
    problem = make_problem(
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 9)),
        f,
        data.draw(st.integers(1, f)),
        n_dead=n_dead,
        n_aux=data.draw(st.integers(0, n_dead)),
        latent_bias=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    assert_same(run(sparse, problem), run(reference, problem), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [DENSE, CHOSEN])
def test_all_of_the_dead_selected(share, monkeypatch):
    monkeypatch.setattr(gradients, "DENSE_SHARE", share)
    problem = make_problem(20, 6, 30, 3, n_dead=4, n_aux=4)
    mine = run(sparse, problem)
    assert torch.equal(mine.code.aux_indices, problem.dead.expand(20, 4))
    assert_same(mine, run(reference, problem), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernels", [reference, sparse])
@pytest.mark.parametrize(("n_aux", "share"), [(0, CHOSEN), (3, CHOSEN), (3, DENSE)])
@pytest.mark.parametrize("latent_bias", [False, True])
def test_gradcheck(kernels, n_aux, share, latent_bias, monkeypatch):
    """Finite differences in float64, of every path a gradient takes."""
    monkeypatch.setattr(gradients, "DENSE_SHARE", share)
    problem = make_problem(5, 4, 9, 3, n_aux=n_aux, n_dead=4, latent_bias=latent_bias, seed=3)

    def through(*variables):
        tensors = [*variables, None][:5]
        code = problem._replace(
            **dict(zip(("z", "w_enc", "bias", "w_dec", "latent_bias"), tensors, strict=True))
        ).encode(kernels)
        live = kernels.decode(code.values, code.indices, tensors[3])
        if not n_aux:
            return live, code.values
        aux = kernels.decode(code.aux_values, code.aux_indices, tensors[3], candidates=problem.dead)
        return live, aux.square(), code.values

    assert torch.autograd.gradcheck(through, tuple(problem.variables))


def test_more_slots_than_positive_pre_activations():
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    w_enc = torch.tensor(
        [[1.0, 0], [-1, 0], [-2, 0], [0.5, 0], [-0.5, 0]], dtype=torch.float64, requires_grad=True
    )
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    code = sparse.encode(z, w_enc, bias, 4, NONE, 0)
    assert code.values.tolist() == [[1.0, 0.5, 0.0, 0.0]]
    assert code.indices[0, :2].tolist() == [0, 3]
    assert len(set(code.indices[0].tolist())) == 4
    (grad,) = torch.autograd.grad(code.values.sum(), w_enc)
    assert grad.tolist() == [[1.0, 0.0], [0, 0], [0, 0], [1, 0], [0, 0]]


def test_a_latent_active_in_every_row_and_latents_in_none():
    problem = make_problem(200, 6, 40, 2)
    with torch.no_grad():
        problem.z[:, 0] = 10.0
        problem.w_enc[:, 0] = -1.0
        problem.w_enc[7] = 0.0
        problem.w_enc[7, 0] = 5.0
    mine = run(sparse, problem)
    assert (mine.code.indices == 7).any(1).all()
    assert_same(mine, run(reference, problem), rtol=1e-10, atol=1e-10)
    silent = torch.ones(40, dtype=torch.bool)
    silent[mine.code.indices[mine.code.values > 0]] = False
    assert silent.any()
    assert (mine.gradients[1][silent] == 0).all()
    assert (mine.gradients[3][silent] == 0).all()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_ties_take_the_lowest_index(data):
    b, f = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, f))
    number = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, float("inf")])
    flat = data.draw(st.lists(number, min_size=b * f, max_size=b * f))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    ordered = data.draw(st.booleans())
    pre = torch.tensor(flat, dtype=dtype).view(b, f)
    values, indices = sparse.largest(pre, k, ordered=ordered)
    for row in range(b):
        order = sorted(range(f), key=lambda i: (-float(pre[row, i]), i))[:k]
        found = values[row].tolist()
        assert (found if ordered else sorted(found, reverse=True)) == [float(pre[row, i]) for i in order]
        assert {i for i in indices[row].tolist() if pre[row, i] > 0} == {i for i in order if pre[row, i] > 0}
        assert torch.equal(pre[row, indices[row]], values[row])
        assert len(set(indices[row].tolist())) == k


def test_a_tie_beside_a_value_that_is_not_a_number():
    pre = torch.tensor([[1.0, 2.0, float("nan"), 1.0, 1.0]])
    for ordered in (True, False):
        values, indices = sparse.largest(pre, 3, ordered=ordered)
        assert set(indices[0].tolist()) == {0, 1, 2}
        assert values.isnan().sum() == 1


def test_duplicate_latents_tie_in_a_real_encoding():
    problem = make_problem(50, 6, 30, 5, n_aux=4)
    with torch.no_grad():
        problem.w_enc[15:] = problem.w_enc[:15]  # every latent twice, bit for bit
    code, oracle = problem.encode(sparse), problem.encode(reference)
    assert as_sets(code.values, code.indices) == as_sets(oracle.values, oracle.indices)
    assert as_sets(code.aux_values, code.aux_indices) == as_sets(oracle.aux_values, oracle.aux_indices)


@pytest.mark.parametrize("candidates", [None, torch.arange(4)])
def test_repeated_latents_in_one_row_add_up(candidates):
    values = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[1, 1, 0]])
    w_dec = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    out = sparse.decode(values, indices, w_dec, candidates=candidates)
    expected = reference.decode(values, indices, w_dec)
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(
        torch.autograd.grad(out.square().sum(), (values, w_dec)),
        torch.autograd.grad(expected.square().sum(), (values, w_dec)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_not_a_number_reaches_the_values():
    problem = make_problem(3, 4, 20, 3)
    with torch.no_grad():
        problem.z[1, 2] = float("nan")
    code = problem.encode(sparse)
    assert code.values[1].isnan().any()
    assert code.values[[0, 2]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("share", [DENSE, CHOSEN])
def test_same_bits_twice_in_float32(threads, share, monkeypatch):
    monkeypatch.setattr(gradients, "DENSE_SHARE", share)
    torch.set_num_threads(threads)
    problem = make_problem(500, 16, 256, 8, n_dead=100, n_aux=16, dtype=torch.float32)
    first, second = run(sparse, problem), run(sparse, problem)
    for a, b in zip((*first.code, *first.gradients), (*second.code, *second.gradients), strict=True):
        assert torch.equal(a, b)


# Autocast: products in bfloat16, weights and gradients in float32.


def test_autocast_keeps_weights_and_gradients_in_float32():
    """Errors against float64 are those of the dense layers under autocast; a sum with a bias is rounded once more."""
    problem = make_problem(65, 33, 130, 7, n_dead=40, n_aux=20, latent_bias=True, dtype=torch.float32)
    truth = run(reference, problem.to(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        code = problem.encode(sparse)
        decoded = sparse.decode(code.values, code.indices, problem.w_dec)
        oracle = problem.encode(reference)
    assert {t.dtype for t in (code.values, code.aux_values, decoded)} == {torch.float32}
    expected = worst(oracle.values.sort(1).values, truth.code.values.sort(1).values)
    assert 1e-4 < expected < 1e-2  # or the oracle was not in bfloat16
    assert worst(code.values.sort(1).values, truth.code.values.sort(1).values) <= expected + 2**-9
    grads = torch.autograd.grad(code.values.sum() + decoded.square().sum(), problem.variables)
    assert {g.dtype for g in grads} == {torch.float32}


def test_autocast_gradients_are_exact_for_the_latents_chosen():
    """What bfloat16 chose is differentiated in float32: no gradient is rounded to 8 bits."""
    problem = make_problem(20, 8, 30, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        code = problem.encode(sparse)
        (mine,) = torch.autograd.grad(code.values.sum(), problem.w_enc)
    active = torch.zeros(20, 30).scatter_add_(1, code.indices, (code.values > 0).float())
    torch.testing.assert_close(mine, active.T @ (problem.z - problem.bias).detach())


# Choosing.


def test_kernels_are_chosen_by_name():
    assert make_kernels("auto", "cpu") is sparse
    assert make_kernels("sparse", "cuda") is sparse
    assert make_kernels("reference", "cpu") is reference
    with pytest.raises(UsageError, match="'fast': expected one of auto, reference, sparse, triton"):
        make_kernels("fast", "cpu")


def test_nothing_is_imported_before_it_is_chosen():
    code = (
        "import sys, trainer.loop, trainer.kernels; from trainer.kernels import make_kernels; make_kernels('auto', 'cpu');"
        "sys.exit('trainer.kernels.triton' in sys.modules or 'trainer.kernels.reference' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_triton_missing_is_said(monkeypatch):
    monkeypatch.setattr("trainer.kernels._has_triton", lambda: False)
    assert make_kernels("auto", "cuda") is sparse
    with pytest.raises(UsageError, match="triton is not installed"):
        make_kernels("triton", "cuda")
