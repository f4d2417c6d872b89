import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.kernels import reference, sparse

SHAPES = [(1, 3, 5, 1), (7, 5, 11, 4), (33, 17, 129, 13), (300, 8, 64, 64), (129, 31, 257, 5)]


def problem(b, d, f, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    made = (torch.randn(b, d, generator=g), torch.randn(f, d, generator=g), torch.randn(d, generator=g) * 0.1)
    return [t.to(dtype).requires_grad_() for t in made]


def run(kernels, z, w_enc, bias, w_dec, k, dead, n_aux):
    """Values, indices and all gradients of a scalar that depends on everything differentiable."""
    code = kernels.encode(z, w_enc, bias, k, dead, n_aux)
    out = kernels.decode(code.values, code.indices, w_dec)
    aux = kernels.decode(code.aux_values, code.aux_indices, w_dec) if n_aux else torch.zeros(())
    scalar = (
        (out.sin() * torch.arange(1, out.shape[1] + 1)).sum()
        + (aux.cos() * 0.3).sum()
        + code.values.square().sum()
    )
    return code, out, aux, torch.autograd.grad(scalar, (z, w_enc, bias, w_dec))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_aux", [0, 2])
def test_sparse_equals_the_oracle_with_all_gradients(shape, n_aux, monkeypatch):
    b, d, f, k = shape
    monkeypatch.setattr(sparse, "TILE_VALUES", f * 10)
    monkeypatch.setattr(sparse, "TILE_ROWS_MIN", 4)
    z, w_enc, bias = problem(b, d, f)
    w_dec = problem(b, d, f, seed=1)[1]
    dead = torch.arange(0, f, 2)  # overlaps the live selection
    code, out, aux, grads = run(sparse, z, w_enc, bias, w_dec, k, dead, n_aux)
    code_ref, out_ref, aux_ref, grads_ref = run(reference, z, w_enc, bias, w_dec, k, dead, n_aux)
    live = code_ref.values > 0
    assert torch.equal(code.values > 0, live)
    assert torch.equal(code.indices[live], code_ref.indices[live])
    for name in ("values", "aux_values"):
        torch.testing.assert_close(getattr(code, name), getattr(code_ref, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, out_ref)
    torch.testing.assert_close(aux, aux_ref)
    for mine, theirs in zip(grads, grads_ref, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_all_of_the_dead_selected():
    z, w_enc, bias = problem(20, 6, 30)
    w_dec = problem(20, 6, 30, seed=1)[1]
    dead = torch.tensor([1, 4, 5, 28])
    code, out, aux, grads = run(sparse, z, w_enc, bias, w_dec, 3, dead, 4)
    _, out_ref, aux_ref, grads_ref = run(reference, z, w_enc, bias, w_dec, 3, dead, 4)
    assert torch.equal(code.aux_indices, dead.expand(20, 4))
    for mine, theirs in zip((out, aux, *grads), (out_ref, aux_ref, *grads_ref), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("n_aux", [0, 3])
def test_gradcheck(n_aux):
    z, w_enc, bias = problem(5, 4, 9, seed=3)
    w_dec = problem(5, 4, 9, seed=4)[1]
    dead = torch.tensor([0, 2, 3, 8])

    def through(z, w_enc, bias, w_dec):
        code = sparse.encode(z, w_enc, bias, 3, dead, n_aux)
        live = sparse.decode(code.values, code.indices, w_dec)
        if not n_aux:
            return live
        return live, sparse.decode(code.aux_values, code.aux_indices, w_dec).square()

    assert torch.autograd.gradcheck(through, (z, w_enc, bias, w_dec))


def test_more_slots_than_positive_pre_activations():
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    w_enc = torch.tensor(
        [[1.0, 0], [-1, 0], [-2, 0], [0.5, 0], [-0.5, 0]], dtype=torch.float64, requires_grad=True
    )
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    code = sparse.encode(z, w_enc, bias, 4, torch.empty(0, dtype=torch.int64), 0)
    assert code.values.tolist() == [[1.0, 0.5, 0.0, 0.0]]
    assert code.indices[0, :2].tolist() == [0, 3]
    assert len(set(code.indices[0].tolist())) == 4
    (grad,) = torch.autograd.grad(code.values.sum(), w_enc)
    assert grad.tolist() == [[1.0, 0.0], [0, 0], [0, 0], [1, 0], [0, 0]]


def test_a_latent_active_in_every_row_and_latents_in_none():
    z, w_enc, bias = problem(200, 6, 40)
    with torch.no_grad():
        z[:, 0] = 10.0
        w_enc[:, 0] = -1.0
        w_enc[7] = 0.0
        w_enc[7, 0] = 5.0
    w_dec = problem(200, 6, 40, seed=1)[1]
    none = torch.empty(0, dtype=torch.int64)
    code, _, _, grads = run(sparse, z, w_enc, bias, w_dec, 2, none, 0)
    *_, grads_ref = run(reference, z, w_enc, bias, w_dec, 2, none, 0)
    assert (code.indices == 7).any(1).all()
    for mine, theirs in zip(grads, grads_ref, strict=True):
        torch.testing.assert_close(mine, theirs)
    silent = torch.ones(40, dtype=torch.bool)
    silent[code.indices[code.values > 0]] = False
    assert silent.any()
    assert (grads[1][silent] == 0).all()
    assert (grads[3][silent] == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_take_the_lowest_index(data):
    b, f = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, f))
    flat = data.draw(st.lists(st.integers(-2, 3), min_size=b * f, max_size=b * f))
    pre = torch.tensor(flat, dtype=torch.float32).view(b, f)
    values, indices = sparse.largest(pre, k)
    for row in range(b):
        order = sorted(range(f), key=lambda i: (-float(pre[row, i]), i))[:k]
        assert values[row].tolist() == [float(pre[row, i]) for i in order]
        assert {i for i in indices[row].tolist() if pre[row, i] > 0} == {i for i in order if pre[row, i] > 0}
        assert torch.equal(pre[row, indices[row]], values[row])
        assert len(set(indices[row].tolist())) == k


def test_duplicate_latents_tie_in_a_real_encoding():
    z, w_enc, bias = problem(50, 6, 30)
    with torch.no_grad():
        w_enc[15:] = w_enc[:15]  # every latent twice, bit for bit
    code = sparse.encode(z, w_enc, bias, 5, torch.empty(0, dtype=torch.int64), 0)
    reference_code = reference.encode(z, w_enc, bias, 5, torch.empty(0, dtype=torch.int64), 0)
    for mine, theirs, values in zip(code.indices, reference_code.indices, code.values, strict=True):
        positive = values > 0
        assert set(mine[positive].tolist()) == set(theirs[positive].tolist())


def test_repeated_latents_in_one_row_add_up():
    values = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[1, 1, 0]])
    w_dec = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    out, expected = sparse.decode(values, indices, w_dec), reference.decode(values, indices, w_dec)
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(
        torch.autograd.grad(out.square().sum(), (values, w_dec)),
        torch.autograd.grad(expected.square().sum(), (values, w_dec)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_not_a_number_reaches_the_values():
    z, w_enc, bias = problem(3, 4, 20)
    with torch.no_grad():
        z[1, 2] = float("nan")
    code = sparse.encode(z, w_enc, bias, 3, torch.empty(0, dtype=torch.int64), 0)
    assert code.values[1].isnan().any()
    assert code.values[[0, 2]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_twice_in_float32(threads):
    torch.set_num_threads(threads)
    z, w_enc, bias = problem(500, 16, 256, dtype=torch.float32)
    w_dec = problem(500, 16, 256, seed=1, dtype=torch.float32)[1]
    dead = torch.arange(100)
    first, second = (run(sparse, z, w_enc, bias, w_dec, 8, dead, 16) for _ in range(2))
    for a, b in zip((*first[0], *first[3]), (*second[0], *second[3]), strict=True):
        assert torch.equal(a, b)
