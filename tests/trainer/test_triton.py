"""Triton's programs: interpreted on the CPU here, on CUDA with `make gpu`; and that they compile for GPUs at all.

The interpreter takes milliseconds per program, so shapes are small and odd.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton import knobs

from actcache.errors import UsageError
from tests.trainer.problems import as_sets, assert_same, make_problem, run, worst
from trainer.kernels import gradients, make_kernels, reference, sparse, triton

DENSE, CHOSEN = 0.0, 2.0  # shares that make sums over candidates dense always, and never
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
NONE = torch.empty(0, dtype=torch.int64)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _few_lanes(monkeypatch):
    """Several chunks in a row of a hundred latents."""
    monkeypatch.setattr(triton, "LANES", 32)


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((1, 3, 5, 1), {}),
        ((7, 5, 11, 4), {"n_aux": 2, "latent_bias": True}),
        ((6, 17, 129, 3), {"n_aux": 5}),
        ((3, 8, 64, 64), {}),  # every latent chosen: k is more than the lanes
        ((5, 33, 70, 7), {"n_aux": 9, "n_dead": 9, "latent_bias": True}),
    ],
)
def test_equals_the_oracle_and_the_sparse_ones(shape, more, device):
    problem = make_problem(*shape, **more).to(torch.float64, device)
    oracle, others = run(reference, problem), run(sparse, problem)
    mine = run(triton, problem)
    assert_same(mine, oracle, rtol=1e-10, atol=1e-10)
    assert_same(mine, others, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", [DENSE, CHOSEN])
def test_auxiliary_gradients_both_ways(share, device, monkeypatch):
    monkeypatch.setattr(gradients, "DENSE_SHARE", share)
    problem = make_problem(4, 5, 40, 3, n_aux=4).to(torch.float64, device)
    assert_same(run(triton, problem), run(reference, problem), rtol=1e-10, atol=1e-10)


def test_many_rows_come_in_tiles(device, monkeypatch):
    monkeypatch.setattr(triton, "TILE_VALUES", 1)
    monkeypatch.setattr(triton, "TILE_ROWS_MIN", 2)
    problem = make_problem(5, 3, 20, 2, n_aux=2).to(torch.float32, device)
    mine, oracle = problem.encode(triton), problem.encode(reference)
    assert as_sets(mine.values, mine.indices) == as_sets(oracle.values, oracle.indices)
    torch.testing.assert_close(mine.values, oracle.values)


@pytest.mark.parametrize("share", [DENSE, CHOSEN])
def test_gradcheck(share, device, monkeypatch):
    """Finite differences in float64, along random directions: the interpreter is slow."""
    monkeypatch.setattr(gradients, "DENSE_SHARE", share)
    problem = make_problem(2, 3, 7, 2, n_aux=2, n_dead=3, latent_bias=True, seed=3).to(torch.float64, device)

    def through(z, w_enc, bias, w_dec, latent_bias):
        inputs = problem._replace(z=z, w_enc=w_enc, bias=bias, w_dec=w_dec, latent_bias=latent_bias)
        code = inputs.encode(triton)
        live = triton.decode(code.values, code.indices, w_dec)
        aux = triton.decode(code.aux_values, code.aux_indices, w_dec, candidates=problem.dead)
        return live, aux.square(), code.values

    assert torch.autograd.gradcheck(through, tuple(problem.variables), fast_mode=True)


# The search for the largest.


def search(pre, count):
    """Values and indices of the `count` largest of each row."""
    found = triton._Search(len(pre), count, pre.shape[1], pre)
    found.take(pre, 0)
    return found.found()


def by_hand(row, count):
    """Places of the largest, equal ones from the lowest."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]


@pytest.mark.parametrize(
    ("name", "n", "count"),
    [("spread", 100, 5), ("in one lane", 100, 5), ("ascending", 97, 6), ("equal", 70, 9), ("few", 3, 3)],
)
def test_search(name, n, count, device):
    """Whether the bound lets few through, or so many that the slow way is taken: all in one lane make it the lowest."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(2, n, generator=generator)
    if name == "in one lane":
        pre[:, ::32] += 100
    elif name == "ascending":
        pre = torch.arange(n).float().repeat(2, 1)
    elif name == "equal":
        pre = torch.randint(0, 2, (2, n), generator=generator).float()
    values, indices = search(pre.to(device), count)
    for row in range(2):
        expected = by_hand(pre[row].tolist(), count)
        assert indices[row].tolist() == expected
        assert values[row].tolist() == pre[row, expected].tolist()


def test_search_orders_signs_zeros_infinities_and_nan(device):
    inf, nan = float("inf"), float("nan")
    pre = torch.tensor([[-inf, -1.5, -0.0, 0.0, 1e-40, 2.0, inf, -nan, nan, -3.0]])
    values, indices = search(pre.to(device), 10)
    assert indices[0].tolist() == [7, 8, 6, 5, 4, 3, 2, 1, 9, 0]
    assert values[0, :2].isnan().all()
    assert values[0, 2:].tolist() == [inf, 2.0, pre[0, 4].item(), 0.0, -0.0, -1.5, -3.0, -inf]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_search_takes_the_lowest_of_latents_that_rounding_made_equal(dtype, device):
    pre = (1 + torch.rand(2, 90, generator=torch.Generator().manual_seed(0)) / 64).to(dtype)
    _, indices = search(pre.to(device), 7)
    assert indices.tolist() == [by_hand(row, 7) for row in pre.tolist()]


# Error budgets: no worse than the same dtype's dense layers, against float64 of the same numbers.

ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(5, 27, 70, 5)])
def test_errors_are_within_those_of_dense_layers(dtype, shape, device):
    b, _, _, k = shape
    problem = make_problem(*shape).to(dtype, device)
    exact = problem.to(torch.float64, device)
    indices = problem.encode(sparse).indices  # the same for all, so that only sums differ
    weights = torch.rand(b, k, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def outcome(kernels, p, w):
        values = w.requires_grad_()
        out = kernels.decode(values, indices, p.w_dec)
        return (out, *torch.autograd.grad((out * p.z).sum(), (values, p.w_dec)))

    truth = outcome(reference, exact, weights.detach().double())
    dense = outcome(reference, problem, weights.detach())
    mine = outcome(triton, problem, weights.detach())
    code, oracle = problem.encode(triton), exact.encode(reference)
    pairs = [
        *zip(mine, dense, truth, strict=True),
        (code.values, problem.encode(reference).values, oracle.values),
    ]
    for got, expected, true in pairs:
        assert got.dtype == dtype
        assert worst(got, true) <= worst(expected, true) + ROUNDING[dtype]


def test_autocast(device):
    problem = make_problem(6, 9, 40, 3, n_aux=2, dtype=torch.float32).to(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        mine, theirs = run(triton, problem), run(sparse, problem)
    assert {t.dtype for t in (mine.code.values, mine.decoded, *mine.gradients)} == {torch.float32}
    assert_same(mine, theirs, rtol=1e-5, atol=1e-4)


def test_not_a_number_reaches_the_values(device):
    problem = make_problem(3, 4, 20, 3).to(torch.float32, device)
    with torch.no_grad():
        problem.z[1, 2] = float("nan")
    code = problem.encode(triton)
    assert code.values[1].isnan().any()
    assert code.values[[0, 2]].isfinite().all()


def test_same_bits_twice(device):
    problem = make_problem(6, 8, 40, 4, n_aux=3, dtype=torch.float32).to(torch.float32, device)
    first, second = run(triton, problem), run(triton, problem)
    for a, b in zip((*first.code, *first.gradients), (*second.code, *second.gradients), strict=True):
        assert torch.equal(a, b)


# Where they run.


def test_tensors_of_the_cpu_are_refused_where_nothing_interprets(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(UsageError, match="need a CUDA device, these tensors are on 'cpu'"):
        make_kernels("triton", "cpu")
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert make_kernels("triton", "cpu") is triton
    assert make_kernels("auto", "cuda") is triton
    assert make_kernels("auto", "cpu") is sparse


COMPILE = Path(__file__).with_name("compile_programs.py")


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.soak), 90])
def test_programs_compile_for_a_gpu_without_one(capability, tmp_path, monkeypatch):
    """To machine code, by the assembler that triton brings; and no program spills registers."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, COMPILE, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {"search", "bags", "dots", "by_latent"}
    assert all(line.endswith(" 0 bytes of local memory") for line in lines), done.stdout
