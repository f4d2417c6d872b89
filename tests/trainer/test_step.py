import pytest
import torch

from tests.trainer.list_source import random_source
from trainer import transform
from trainer.config import TrainConfig
from trainer.kernels import reference
from trainer.sae import TopKSAE
from trainer.state import TrainState
from trainer.step import accumulate_gradients, apply_gradients
from trainer.window import FirstWindow, measure_window

CPU = torch.device("cpu")
LAYERS = (2, 5)
NONE_DEAD = torch.empty(0, dtype=torch.int64)


def setup(dtype=torch.float64, **fields):
    config = TrainConfig(
        **{"n_latents": 40, "k": 4, "batch_rows": 64, "rows": 1000, "auxk": 6, **fields}
    ).resolve(12)
    model = TopKSAE(12, 40, config.k, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = random_source(batch_rows=64).peek(64)
    window = measure_window(batch, LAYERS, config.loss_space, CPU)
    return config, model, batch, window


def grads_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_rows", [1, 7, 32, 63])
@pytest.mark.parametrize("dead", [NONE_DEAD, torch.arange(0, 40, 3)])
@pytest.mark.parametrize("space", ["raw", "standardised"])
def test_accumulation_changes_nothing(micro_rows, dead, space):
    config, model, batch, window = setup(loss_space=space)
    whole = accumulate_gradients(model, batch, LAYERS, window, dead, config)
    expected = grads_of(model)
    model.zero_grad()
    parts = accumulate_gradients(
        model, batch, LAYERS, window, dead, config.model_copy(update={"micro_rows": micro_rows})
    )
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-9)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-7)
    assert parts.aux_loss == pytest.approx(whole.aux_loss, rel=1e-7)
    assert torch.equal(parts.active, whole.active)
    assert parts.n_active == whole.n_active
    torch.testing.assert_close(parts.residual, whole.residual, rtol=1e-7, atol=0)


def test_whole_step_against_an_independent_dense_formula():
    config, model, batch, window = setup()
    dead = torch.arange(0, 40, 3)
    sums = accumulate_gradients(model, batch, LAYERS, window, dead, config)
    got = grads_of(model)
    model.zero_grad()
    standardised = transform.standardise(batch.rows)
    z, scale, mean = (t.double() for t in (standardised.z, standardised.scale, standardised.mean))
    code = reference.encode(z, model.w_enc, model.bias, 4, dead, 6)
    zhat = reference.decode(code.values, code.indices, model.w_dec) + model.bias
    x, xhat = z * scale + mean, zhat * scale + mean
    var = window.var_layer.double()[torch.searchsorted(torch.tensor(LAYERS), batch.layer)]
    main = ((x - xhat).square().sum(1) / (12 * var)).mean()
    e = (z - zhat).detach()
    ehat = reference.decode(code.aux_values, code.aux_indices, model.w_dec)
    aux = ((ehat - e).square().sum(1) / e.square().sum(1)).mean() / 32
    (main + aux).backward()
    assert sums.loss == pytest.approx(main.item(), rel=1e-12)
    assert sums.aux_loss == pytest.approx(aux.item(), rel=1e-12)
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-12)


def test_train_fvu_sums_and_loss_agree():
    config, model, batch, window = setup()
    sums = accumulate_gradients(model, batch, LAYERS, window, NONE_DEAD, config)
    # measured on the window itself, the loss is the layers' FVU weighted by their rows
    fvu = sums.residual / sums.total
    expected = float((fvu * sums.n_rows).sum() / sums.n_rows.sum())
    assert sums.loss == pytest.approx(expected, rel=1e-5)


def test_auxk_moves_dead_latents_and_only_when_there_are_any():
    config, model, batch, window = setup()
    with torch.no_grad():
        model.w_enc[:10] *= 1e-3  # never among the top k, but positive for some rows
    accumulate_gradients(model, batch, LAYERS, window, NONE_DEAD, config)
    without = grads_of(model)
    assert (without["w_dec"][:10] == 0).all()
    assert (without["w_enc"][:10] == 0).all()
    model.zero_grad()
    sums = accumulate_gradients(model, batch, LAYERS, window, torch.arange(10), config)
    with_aux = grads_of(model)
    assert sums.aux_loss > 0
    assert (with_aux["w_dec"][:10].abs().sum(1) > 0).all()
    assert (with_aux["w_enc"][:10].abs().sum(1) > 0).all()
    # live latents are not pushed: the residual is a constant
    assert torch.equal(with_aux["w_dec"][10:], without["w_dec"][10:])
    assert torch.equal(with_aux["w_enc"][10:], without["w_enc"][10:])


@pytest.mark.parametrize("auxk", [0, None])
def test_auxk_off(auxk):
    config, model, batch, window = setup(auxk=auxk)
    sums = accumulate_gradients(model, batch, LAYERS, window, torch.arange(10), config)
    assert sums.aux_loss == 0.0


def test_nothing_dead_computes_no_auxiliary_part(monkeypatch):
    config, model, batch, window = setup()
    monkeypatch.setattr(model, "decode_directions", count := Calls(model.decode_directions))
    sums = accumulate_gradients(model, batch, LAYERS, window, NONE_DEAD, config)
    assert sums.aux_loss == 0.0
    assert count.n == 1


class Calls:
    def __init__(self, function):
        self.function, self.n = function, 0

    def __call__(self, *args):
        self.n += 1
        return self.function(*args)


def test_fewer_dead_than_auxk():
    config, model, batch, window = setup()
    assert accumulate_gradients(model, batch, LAYERS, window, torch.tensor([3]), config).aux_loss > 0


def test_norms_stay_one_and_clipping_bounds_the_gradient():
    config, model, batch, window = setup(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    accumulate_gradients(model, batch, LAYERS, window, NONE_DEAD, config)
    model.project_decoder_gradient()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    norm = apply_gradients(model, optimizer, 1e-3)
    assert norm == pytest.approx(float(expected), rel=1e-5)
    moved = [p - before[name] for name, p in model.named_parameters() if name != "w_dec"]
    assert torch.cat([m.flatten() for m in moved]).norm() <= 1.001e-3
    torch.testing.assert_close(model.w_dec.norm(dim=1), torch.ones(40))
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_does_not_move_the_dead_counters():
    source = random_source()
    state = TrainState.start(source, TrainConfig(n_latents=40, k=4, rows=64).resolve(12), CPU)
    before = state.dead.rows_since.clone()
    state.model.encode(transform.standardise(source.peek(32).rows).z)
    assert torch.equal(state.dead.rows_since, before)


def test_threshold_counts_rows_of_all_layers():
    config = TrainConfig(n_latents=40, k=4, rows=64, dead_after_tokens=50).resolve(12)
    assert TrainState.start(random_source(), config, CPU).dead.after_rows == 100


def test_counters_move_once_per_step_whatever_the_accumulation():
    for micro_rows in (None, 4):
        source = random_source()
        config = TrainConfig(n_latents=400, k=1, rows=64, batch_rows=32, micro_rows=micro_rows).resolve(12)
        state = TrainState.start(source, config, CPU)
        state.advance(next(iter(source)), "")
        assert state.dead.rows_since.max() == 32


def test_bias_is_the_median_of_standardised_rows():
    source = random_source()
    state = TrainState.start(source, TrainConfig(n_latents=40, k=4, rows=64).resolve(12), CPU)
    z = transform.standardise(source.peek(1000).rows).z
    bias = state.model.bias.detach()

    def cost(point):
        return float((z - point).norm(dim=1).sum())

    assert cost(bias) <= min(cost(z.mean(0)), *(cost(bias + 0.01 * direction) for direction in torch.eye(12)))
    assert bias.abs().max() < 3  # raw rows have means up to 11
    assert source.state_dict()["next"] == 0


@pytest.mark.parametrize(("rows", "epochs"), [(1000, None), (None, 5)])
def test_learning_rate_warms_up_and_decays(rows, epochs):
    config = TrainConfig(n_latents=40, k=4, lr=1.0, rows=rows, epochs=epochs, warmup_steps=4, decay_frac=0.5)
    source = random_source(200, batch_rows=100, epochs=5)  # 10 batches, 1000 rows
    state = TrainState.start(source, config.resolve(12), CPU)
    rates = []
    for step in range(10):
        state.step, state.rows = step, step * 100
        rates.append(state.learning_rate())
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_window_is_kept_in_float32():
    window = FirstWindow(mean_layer=torch.zeros(1, 2), var_layer=torch.ones(1))
    assert window.mean_layer.dtype == torch.float32
