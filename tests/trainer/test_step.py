from functools import partial

import pytest
import torch

from tests.trainer.list_source import form_source, random_source
from trainer import transform
from trainer.compiled import _compiled
from trainer.config import TrainConfig
from trainer.forms import FORMS
from trainer.loss import prefixes
from trainer.sae import make_dictionary
from trainer.selection import Wanted
from trainer.state import TrainState
from trainer.step import accumulate_gradients, apply_gradients
from trainer.task import Task
from trainer.window import FirstWindow, measure

CPU = torch.device("cpu")
LAYERS = (2, 5)
NONE_DEAD = torch.empty(0, dtype=torch.int64)
SOME_DEAD = torch.arange(0, 40, 3)


def setup(dtype=torch.float64, form="stacked", **fields):
    """A task with random weights, and a batch of 64 rows."""
    given = {"n_latents": 40, "k": 4, "batch_rows": 64, "rows": 1000, "form": form, **fields}
    if given.get("activation") != "relu":
        given = {"auxk": 6, **given}
    config = TrainConfig(**given).resolve(12)
    batch = form_source(form, batch_rows=64).peek(64)
    rows = FORMS[form].view(batch, LAYERS)
    window, transforms = measure(batch, rows, LAYERS, config, CPU)
    widths = rows.inputs.shape[2], rows.targets.shape[2]
    model = make_dictionary(config, *widths, n_slices=rows.inputs.shape[1])
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if name not in ("w_enc", "w_dec") or form == "transcoder":
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    task = Task(config=config, layers=LAYERS, model=model.to(dtype), window=window, transforms=transforms)
    return task, rows


def wanted(task, rows, dead=NONE_DEAD):
    n_aux = min(task.config.auxk, len(dead))
    return Wanted(k=task.config.k, n_rows=len(rows.inputs), dead=dead, n_aux=n_aux)


def gradients(task, rows, dead=NONE_DEAD, l1_coef=0.0, **changes):
    """Sums and gradients of a fresh pass; `changes` to the configuration."""
    task.model.zero_grad()
    config = task.config.model_copy(update=changes)
    changed = Task(
        config=config,
        layers=task.layers,
        model=task.model,
        window=task.window,
        transforms=task.transforms,
    )
    sums = accumulate_gradients(changed, rows, wanted(task, rows, dead), l1_coef)
    found = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    task.model.zero_grad()
    return sums, found


VARIANTS = [
    {},
    {"loss_space": "standardised"},
    {"form": "feature"},
    {"form": "crosscoder"},
    {"form": "transcoder", "skip": True},
    {"activation": "batchtopk"},
    {"activation": "batchtopk", "form": "crosscoder", "latent_bias": True},
    {"activation": "relu"},
    {"multi_topk": True},
    {"matryoshka": (0.25, 0.25, 0.5)},
    {"matryoshka": (0.5, 0.5), "activation": "batchtopk"},
    {"latent_bias": True},
    {"standardise": "layer"},
]


@pytest.mark.parametrize("micro_rows", [1, 7, 63])
@pytest.mark.parametrize("dead", [NONE_DEAD, SOME_DEAD], ids=["alive", "dead"])
@pytest.mark.parametrize("fields", VARIANTS, ids=repr)
def test_accumulation_changes_nothing(micro_rows, dead, fields):
    if fields.get("activation") == "relu" and len(dead):
        dead = NONE_DEAD
    task, rows = setup(**fields)
    whole, expected = gradients(task, rows, dead, 0.01 if "relu" in fields.values() else 0.0)
    parts, found = gradients(
        task, rows, dead, 0.01 if "relu" in fields.values() else 0.0, micro_rows=micro_rows
    )
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-9)
    for name in ("loss", "aux_loss", "extra_loss"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-7, abs=1e-12)
    assert parts.threshold == whole.threshold
    assert torch.equal(parts.active, whole.active)
    assert torch.equal(parts.n_active, whole.n_active)
    torch.testing.assert_close(parts.residual, whole.residual, rtol=1e-7, atol=0)


def dense_code(task, z, k, dead=NONE_DEAD, n_aux=0):
    """Dense activations and auxiliary ones of a rule, by its definition, with gradients."""
    model, config = task.model, task.config
    pre = (z - model.bias) @ model.w_enc.T
    if model.latent_bias is not None:
        pre = pre + model.latent_bias
    a = torch.relu(pre)
    if config.activation == "topk":
        edge = a.sort(1, descending=True).values[:, k - 1 : k]
        a = torch.where(a >= edge, a, 0)
    if config.activation == "batchtopk":
        edge = a.flatten().sort(descending=True).values[k * len(z) - 1]
        a = torch.where(a >= edge, a, 0)
    aux = None
    if n_aux:
        only = torch.relu(pre[:, dead])
        edge = only.sort(1, descending=True).values[:, n_aux - 1 : n_aux]
        aux = torch.zeros_like(pre).index_copy(1, dead, torch.where(only >= edge, only, 0))
    return a, aux


def restored(task, z, a):
    model = task.model
    zhat = a @ model.w_dec + (model.bias if model.out_bias is None else model.out_bias)
    return zhat if model.w_skip is None else zhat + z @ model.w_skip.T


@pytest.mark.parametrize("fields", VARIANTS, ids=repr)
def test_whole_step_against_an_independent_dense_formula(fields):
    is_relu = fields.get("activation") == "relu"
    task, rows = setup(**fields)
    config, dead = task.config, NONE_DEAD if is_relu else SOME_DEAD
    l1 = 0.01 if is_relu else 0.0
    sums, got = gradients(task, rows, dead, l1)

    # raw rows through the definition of each form
    x, y, layer_i = rows.inputs.double(), rows.targets.double(), rows.layer_i.expand(rows.inputs.shape[:2])
    if config.standardise == "row":
        z = (x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 1e-5)
    else:
        flat, of = x.flatten(0, 1), layer_i.flatten()
        means = torch.stack([flat[of == i].mean(0) for i in range(2)])
        scales = torch.stack([flat[of == i].var(0, correction=0).mean().sqrt() for i in range(2)])
        z = (x - means[layer_i]) / scales[layer_i].unsqueeze(2)
    flat_y, of = y.flatten(0, 1), layer_i.flatten()
    mean_y = torch.stack([flat_y[of == i].mean(0) for i in range(2)])
    var_y = torch.stack([flat_y[of == i].var(0, correction=0).mean() for i in range(2)])
    if config.form == "transcoder":
        back_mean, back_scale = mean_y[layer_i], var_y.sqrt()[layer_i].unsqueeze(2)
    elif config.standardise == "row":
        back_mean, back_scale = x.mean(2, keepdim=True), x.std(2, keepdim=True) + 1e-5
    else:
        back_mean, back_scale = means[layer_i], scales[layer_i].unsqueeze(2)
    target_z = (y - back_mean) / back_scale

    def reconstruction(a):
        zhat = restored(task, z.flatten(1), a).view_as(target_z)
        if config.loss_space == "standardised":
            var_z = torch.stack(
                [target_z.flatten(0, 1)[of == i].var(0, correction=0).mean() for i in range(2)]
            )
            return ((target_z - zhat).square().mean(2) / var_z[layer_i]).mean(), zhat
        yhat = zhat * back_scale + back_mean
        return ((y - yhat).square().mean(2) / var_y[layer_i]).mean(), zhat

    n_aux = min(config.auxk, len(dead))
    a, aux_a = dense_code(task, z.flatten(1), config.k, dead, n_aux)
    main, zhat = reconstruction(a)
    objective = main
    if config.multi_topk:
        objective = main + reconstruction(dense_code(task, z.flatten(1), 4 * config.k)[0])[0] / 8
    if config.matryoshka:
        ends = prefixes(config.matryoshka, 40)
        objective = sum(reconstruction(a * (torch.arange(40) < end))[0] for end in ends) / len(ends)
    if l1:
        objective = objective + l1 * a.sum(1).mean()
    aux = torch.zeros(())
    if n_aux:
        e = (target_z - zhat).flatten(1).detach()
        aux = ((aux_a @ task.model.w_dec - e).square().sum(1) / e.square().sum(1)).mean() / 32
    (objective + aux).backward()
    # transforms compute in float32
    assert sums.loss == pytest.approx(main.item(), rel=1e-5)
    assert sums.extra_loss == pytest.approx((objective - main).item(), rel=1e-4, abs=1e-6)
    assert sums.aux_loss == pytest.approx(aux.item(), rel=1e-5)
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert int(sums.n_active.sum()) == int((a > 1e-3).sum()) * rows.inputs.shape[1]


def test_train_fvu_sums_and_loss_agree():
    task, rows = setup()
    sums, _ = gradients(task, rows)
    # measured on the window itself, the loss is the layers' FVU weighted by their rows
    fvu = sums.residual / sums.total
    expected = float((fvu * sums.n_rows).sum() / sums.n_rows.sum())
    assert sums.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_auxk_moves_dead_latents_and_only_when_there_are_any(activation):
    task, rows = setup(activation=activation)
    with torch.no_grad():
        task.model.w_enc[:10] *= 1e-3  # never among the largest, but positive for some rows
    _, without = gradients(task, rows)
    assert (without["w_dec"][:10] == 0).all()
    assert (without["w_enc"][:10] == 0).all()
    sums, with_aux = gradients(task, rows, torch.arange(10))
    assert sums.aux_loss > 0
    assert (with_aux["w_dec"][:10].abs().sum(1) > 0).all()
    assert (with_aux["w_enc"][:10].abs().sum(1) > 0).all()
    # live latents are not pushed: the residual is a constant
    torch.testing.assert_close(with_aux["w_dec"][10:], without["w_dec"][10:], rtol=0, atol=1e-15)
    torch.testing.assert_close(with_aux["w_enc"][10:], without["w_enc"][10:], rtol=0, atol=1e-15)


@pytest.mark.parametrize("auxk", [0, None])
def test_auxk_off(auxk):
    task, rows = setup(auxk=auxk)
    assert gradients(task, rows, torch.arange(10))[0].aux_loss == 0.0


def test_nothing_dead_computes_no_auxiliary_part(monkeypatch):
    task, rows = setup()
    monkeypatch.setattr(task.model, "directions", count := Calls(task.model.directions))
    assert gradients(task, rows)[0].aux_loss == 0.0
    assert count.n == 0
    assert gradients(task, rows, SOME_DEAD)[0].aux_loss > 0
    assert count.n == 1


class Calls:
    def __init__(self, function):
        self.function, self.n = function, 0

    def __call__(self, *args):
        self.n += 1
        return self.function(*args)


def test_fewer_dead_than_auxk():
    task, rows = setup()
    assert gradients(task, rows, torch.tensor([3]))[0].aux_loss > 0


def test_norms_stay_one_and_clipping_bounds_the_gradient():
    task, rows = setup(torch.float32)
    model = task.model
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    accumulate_gradients(task, rows, wanted(task, rows))
    model.project_decoder_gradient()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    norm = apply_gradients(model, optimizer, 1e-3)
    assert norm == pytest.approx(float(expected), rel=1e-5)
    moved = [p - before[name] for name, p in model.named_parameters() if name != "w_dec"]
    assert torch.cat([m.flatten() for m in moved]).norm() <= 1.001e-3
    torch.testing.assert_close(model.w_dec.norm(dim=1), torch.ones(40))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
def test_bfloat16_products_are_near_and_the_weights_stay_float32(activation):
    task, rows = setup(torch.float32, k=30, activation=activation)  # k so large that few selections differ
    exact, exact_grads = gradients(task, rows)
    task.model.precision = "bfloat16"
    rough, rough_grads = gradients(task, rows)
    assert activation == "topk" or rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    for name, grad in rough_grads.items():
        assert grad.dtype == torch.float32
        assert (grad - exact_grads[name]).norm() < 0.03 * exact_grads[name].norm()
    assert all(p.dtype == torch.float32 for p in task.model.parameters())


@pytest.mark.filterwarnings("ignore")  # those of the compiler are not ours to answer for
def test_compiled_parts_give_the_same_numbers(monkeypatch):
    """As graphs, of a form that uses all of them, in parts of other sizes. `make soak` compiles them to machine code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled_parts_agree()
    _compiled.cache_clear()


def compiled_parts_agree():
    _compiled.cache_clear()
    task, rows = setup(torch.float32, form="transcoder", micro_rows=48)
    plain, expected = gradients(task, rows, SOME_DEAD)
    compiled, found = gradients(task, rows, SOME_DEAD, compile=True)
    for name in ("loss", "aux_loss"):
        assert getattr(compiled, name) == pytest.approx(getattr(plain, name), rel=1e-5)
    torch.testing.assert_close(compiled.total, plain.total, rtol=1e-5, atol=0)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6)


def start(source=None, **fields):
    config = TrainConfig(**{"n_latents": 40, "k": 4, "rows": 64, **fields}).resolve(12)
    return TrainState.start(source or random_source(), config, CPU)


def test_evaluation_does_not_move_the_dead_counters():
    source = random_source()
    state = start(source)
    before = state.dead.rows_since.clone()
    state.model.encode(transform.standardise(source.peek(32).rows).z)
    assert torch.equal(state.dead.rows_since, before)


@pytest.mark.parametrize(
    ("form", "expected"), [("stacked", 100), ("transcoder", 100), ("feature", 50), ("crosscoder", 50)]
)
def test_the_threshold_counts_tokens(form, expected):
    """50 tokens are 100 rows where each of two layers gives one, and 50 where a row holds both."""
    state = start(form_source(form), form=form, dead_after_tokens=50)
    assert state.dead.after_rows == expected


def test_counters_move_once_per_step_whatever_the_accumulation():
    for micro_rows in (None, 4):
        source = random_source()
        state = start(source, n_latents=400, k=1, batch_rows=32, micro_rows=micro_rows)
        state.advance(next(iter(source)))
        assert state.dead.rows_since.max() == 32


def test_a_latent_is_dead_from_the_step_that_reaches_the_threshold_on():
    """With 30 tokens of two layers, 60 rows: alive after 32 rows, dead after 64; the loss has an auxiliary part then."""
    source = random_source()
    state = start(source, rows=200, n_latents=400, k=1, batch_rows=32, dead_after_tokens=30)
    aux = []
    for batch in source:
        aux.append(state.advance(batch)[0].aux_loss)
        if len(aux) == 3:
            break
    assert aux[:2] == [0.0, 0.0]
    assert aux[2] > 0


def test_bias_is_the_median_of_standardised_rows():
    source = random_source()
    state = start(source)
    z = transform.standardise(source.peek(1000).rows).z
    bias = state.model.bias.detach()

    def cost(point):
        return float((z - point).norm(dim=1).sum())

    assert cost(bias) <= min(cost(z.mean(0)), *(cost(bias + 0.01 * direction) for direction in torch.eye(12)))
    assert bias.abs().max() < 3  # raw rows have means up to 11
    assert source.state_dict()["next"] == 0


@pytest.mark.parametrize(("rows", "epochs"), [(1000, None), (None, 5)])
def test_learning_rate_warms_up_and_decays(rows, epochs):
    source = random_source(200, batch_rows=100, epochs=5)  # 10 batches, 1000 rows
    state = start(source, lr=1.0, rows=rows, epochs=epochs, warmup_steps=4, decay_frac=0.5, batch_rows=100)
    rates = []
    for step in range(10):
        state.step, state.rows = step, step * 100
        rates.append(state.learning_rate())
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_window_is_kept_in_float32():
    window = FirstWindow(mean_layer=torch.zeros(1, 2), var_layer=torch.ones(1))
    assert window.mean_layer.dtype == torch.float32
