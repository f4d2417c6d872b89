"""Every form from a source's batches to a saved SAE and back: what it sees, what it restores, what it refuses."""

import json

import pytest
import torch

from actcache.errors import UsageError
from actcache.flow import Batch
from tests.trainer.list_source import ListSource, form_source, random_rows, random_source
from trainer import heldout
from trainer.checkpoint import load_sae
from trainer.config import TrainConfig
from trainer.forms import FORMS, pick_layers, take_rows
from trainer.loop import train
from trainer.state import TrainState
from trainer.transform import standardise

LAYERS = (2, 5)
CPU = torch.device("cpu")


def config_of(form, **fields):
    given = {"n_latents": 64, "k": 6, "batch_rows": 32, "epochs": 6, "lr": 1e-2, "form": form, **fields}
    return TrainConfig(**given)


def trained(form, tmp_path, **fields):
    train(form_source(form, epochs=6), config_of(form, **fields), tmp_path / "run")
    return load_sae(tmp_path / "run")


def metrics(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


# What a form sees.


def test_a_stacked_row_is_one_slice():
    batch = random_source().peek(50)
    rows = FORMS["stacked"].view(batch, LAYERS)
    assert rows.targets is rows.inputs
    assert torch.equal(rows.inputs[:, 0], batch.rows)
    assert [LAYERS[i] for i in rows.layer_i[:, 0]] == batch.layer.tolist()


@pytest.mark.parametrize("form", ["feature", "crosscoder"])
def test_joint_rows_hold_all_layers(form):
    rows, layer = random_rows(40, 12, LAYERS)
    batch = form_source(form, n_rows=20).peek(20)
    seen = FORMS[form].view(batch, LAYERS)
    assert seen.inputs.shape == (20, 2, 12)
    assert seen.layer_i.tolist() == [[0, 1]]
    ids = batch.sequence * 16 + batch.position
    for i, number in enumerate(LAYERS):
        assert torch.equal(seen.inputs[:, i], rows[layer == number][ids])


def test_a_transcoder_sees_pairs():
    batch = form_source("transcoder").peek(30)
    seen = FORMS["transcoder"].view(batch, LAYERS)
    assert torch.equal(seen.inputs[:, 0], batch.hooks["first"])
    assert torch.equal(seen.targets[:, 0], batch.hooks["second"])
    assert seen.targets.shape == (30, 1, 14)


def test_parts_are_all_of_it():
    seen = FORMS["transcoder"].view(form_source("transcoder").peek(30), LAYERS)
    parts = seen.split(7)
    assert [len(part.inputs) for part in parts] == [7, 7, 7, 7, 2]
    for name in ("inputs", "targets", "layer_i"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(seen, name))
    assert FORMS["stacked"].view(random_source().peek(9), LAYERS).split(4)[0].layer_i.shape == (4, 1)
    assert seen.cut(0, 0).split(3) == []


def test_picked_rows_keep_their_provenance():
    batch = form_source("transcoder").peek(64)
    mine = pick_layers(batch, (5,), FORMS["transcoder"])
    ids = (batch.layer == 5).nonzero().squeeze(1)
    for name in ("rows", "layer", "sequence", "position", "slot"):
        assert torch.equal(getattr(mine, name), getattr(batch, name)[ids])
    assert torch.equal(mine.hooks["second"], batch.hooks["second"][ids])
    assert pick_layers(batch, LAYERS, FORMS["transcoder"]) is batch
    joint = form_source("feature", width=2).peek(4)  # as many rows as numbers in `layer`, or nearly
    assert take_rows(joint, torch.tensor([0, 3]), FORMS["feature"]).layer.tolist() == [2, 5]


@pytest.mark.parametrize(
    ("form", "made_for", "message"),
    [
        ("crosscoder", "stacked", "needs all of layers.*stack='layers'"),
        ("feature", "transcoder", "needs all of layers.*stack='feature'"),
        ("stacked", "crosscoder", r"needs \[b, d\] rows.*stack='data'"),
        ("transcoder", "stacked", "two hooks, the input first"),
    ],
)
def test_a_source_of_another_form_is_refused(tmp_path, form, made_for, message):
    with pytest.raises(UsageError, match=message):
        train(form_source(made_for, epochs=6), config_of(form), tmp_path)


def test_rows_that_are_not_of_one_layer_each_are_refused():
    batch = Batch(torch.randn(4, 3), torch.tensor([2, 5]))
    with pytest.raises(UsageError, match="each of one layer"):
        FORMS["stacked"].view(batch, LAYERS)


# From the first step to the saved SAE.

FORM_FIELDS = [
    ("stacked", {}),
    ("stacked", {"standardise": "layer", "activation": "batchtopk"}),
    ("feature", {}),
    ("crosscoder", {}),
    ("crosscoder", {"activation": "relu", "l1_coef": 0.02}),
    ("transcoder", {}),
    ("transcoder", {"skip": True, "latent_bias": True, "ema_decay": 0.9}),
]


@pytest.mark.parametrize(("form", "fields"), FORM_FIELDS, ids=repr)
def test_it_learns_and_what_is_loaded_is_what_was_trained(tmp_path, form, fields):
    sae = trained(form, tmp_path, **fields)
    lines = metrics(tmp_path)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    batch = form_source(form).peek(60)
    found = sae.reconstruct(batch)
    target = FORMS[form].view(batch, LAYERS).targets
    assert torch.equal(found.target, target)
    error = (target - found.restored).square().sum()
    assert error < (target - found.nothing).square().sum()
    # encode and decode by themselves give the same rows
    inputs = batch.hooks["first"] if form == "transcoder" else batch.rows
    layer = None if form in ("feature", "crosscoder") else batch.layer
    code = sae.encode(inputs, layer)
    assert torch.equal(code.values, found.code.values)
    assert torch.equal(sae.decode(code).reshape(found.restored.shape), found.restored)
    assert json.loads((tmp_path / "run" / "sae.json").read_text())["config"]["form"] == form


@pytest.mark.parametrize(("form", "fields"), FORM_FIELDS, ids=repr)
def test_evaluation_by_the_definition(tmp_path, form, fields):
    sae = trained(form, tmp_path, **fields)
    found = heldout.evaluate({"": sae}, form_source(form, n_rows=77, batch_rows=16))[""]
    batch = form_source(form, n_rows=77).peek(1000)
    made = sae.reconstruct(batch)
    for i, number in enumerate(LAYERS):
        at = made.layer_i == i
        x, xhat, nothing = (t[at].double() for t in (made.target, made.restored, made.nothing))
        row = at.nonzero()[:, 0]
        values = made.code.values[row]
        scores = found.layers[number]
        error = (x - xhat).square().sum()
        assert scores.n_rows == len(x)
        assert scores.fvu == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-5)
        assert scores.fvu_scalar == pytest.approx(float(error / (x - x.mean()).square().sum()), rel=1e-5)
        error_k0 = (x - nothing).square().sum()
        assert scores.fvu_k0 == pytest.approx(float(error_k0 / (x - x.mean(0)).square().sum()), rel=1e-5)
        assert scores.explained_variance == pytest.approx(1 - scores.fvu)
        assert scores.l0 == pytest.approx(float((values > 1e-3).sum(1).double().mean()))
        assert scores.l1 == pytest.approx(float(values.sum(1).double().mean()), rel=1e-5)
        alive = set(made.code.indices[row][values > 1e-3].tolist())
        assert (scores.n_alive, scores.n_dead) == (len(alive), 64 - len(alive))
    assert found.mean.fvu == pytest.approx(sum(s.fvu for s in found.layers.values()) / 2)


def test_an_evaluation_of_stacked_rows_is_that_of_the_analysis(tmp_path):
    """One definition, in two places: they give the same numbers."""
    from analysis import metrics as analysis

    sae = trained("stacked", tmp_path)
    mine = heldout.evaluate({"": sae}, form_source("stacked", n_rows=99))[""]
    theirs = analysis.evaluate(sae, form_source("stacked", n_rows=99))
    for layer, scores in theirs.layers.items():
        for name, value in scores._asdict().items():
            assert getattr(mine.layers[layer], name) == pytest.approx(value, rel=1e-6), name


# Feature: each layer's slice by itself, never over l * d.


def test_a_large_layer_does_not_drown_a_small_one():
    rows, _ = random_rows(200, 12, LAYERS)
    joint = rows.view(100, 2, 12).clone()
    joint[:, 1] = joint[:, 1] * 1000 + 5000
    batch = Batch(joint.flatten(1), torch.tensor(LAYERS))
    state = TrainState.start(
        ListSource(joint.flatten(1), torch.tensor(LAYERS), batch_rows=32),
        config_of("feature").resolve(12),
        CPU,
    )
    z, _ = state.task.see(FORMS["feature"].view(batch, LAYERS))
    by_layer = z.view(100, 2, 12)
    torch.testing.assert_close(by_layer.std(2), torch.ones(100, 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(by_layer[:, 0], standardise(joint[:, 0]).z)


# Crosscoder.


def test_a_crosscoder_s_norms_are_one_jointly_and_its_relative_norms_are_reported(tmp_path):
    sae = trained("crosscoder", tmp_path)
    by_layer = sae.sae.w_dec.view(64, 2, 12).norm(dim=2)
    torch.testing.assert_close(by_layer.square().sum(1), torch.ones(64))
    expected = by_layer / by_layer.sum(1, keepdim=True)
    torch.testing.assert_close(sae.relative_norms(), expected)
    assert (by_layer - by_layer.mean()).abs().max() > 0.01  # they are learnt, not fixed at 1/sqrt(2)
    line = metrics(tmp_path)[-1]["relative_norm"]
    assert line == {
        "2": pytest.approx(float(expected[:, 0].mean()), rel=1e-4),
        "5": pytest.approx(float(expected[:, 1].mean()), rel=1e-4),
    }


def test_a_crosscoder_selects_by_activation_times_decoder_norm():
    """Over all layers at once: scaling a latent's decoder down and its encoder up changes nothing once norms are folded."""
    source = form_source("crosscoder")
    state = TrainState.start(source, config_of("crosscoder").resolve(12), CPU)
    z, _ = state.task.see(FORMS["crosscoder"].view(source.peek(50), LAYERS))
    model = state.model
    with torch.no_grad():
        model.w_dec.mul_(torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) * 3 + 0.1)
    a = torch.relu((z - model.bias) @ model.w_enc.T)
    norms = model.w_dec.norm(dim=1)
    score = (a * norms).detach()
    kept = torch.where(score >= score.topk(6).values[:, -1:], a, 0)
    expected = (kept @ model.w_dec).detach()
    model.fold_norms()
    found = model.encode(z)
    torch.testing.assert_close(
        model.decode_directions(found.values, found.indices), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.values, score.topk(6).values, rtol=1e-4, atol=1e-5)


# Transcoder.


def test_a_transcoder_starts_at_the_mean_of_its_target():
    """W_dec is 0 and b_dec the target's mean, so the first loss is the variance: 1 in every layer."""
    source = form_source("transcoder", batch_rows=500)
    state = TrainState.start(source, config_of("transcoder", skip=True, batch_rows=500).resolve(12), CPU)
    assert (state.model.w_dec == 0).all()
    assert (state.model.w_skip == 0).all()
    everything = next(iter(source))
    found = state.trained(source, {}).reconstruct(everything)
    for i in range(2):
        mean = found.target[found.layer_i == i].mean(0)
        torch.testing.assert_close(
            found.restored[found.layer_i == i], mean.expand(105, 14), rtol=1e-4, atol=1e-4
        )
    sums, _ = state.advance(everything)
    assert sums.loss == pytest.approx(1.0, rel=1e-4)


def test_a_transcoder_s_norms_are_free(tmp_path):
    sae = trained("transcoder", tmp_path)
    norms = sae.sae.w_dec.norm(dim=1)
    assert (norms - 1).abs().max() > 0.1


def test_a_prediction_does_not_depend_on_the_target(tmp_path):
    """The target's row may tell nothing: its own mean and scale are what is to be predicted."""
    sae = trained("transcoder", tmp_path)
    batch = form_source("transcoder").peek(40)
    before = sae.reconstruct(batch).restored
    batch.hooks["second"] = batch.hooks["second"] * 100 - 7
    assert torch.equal(sae.reconstruct(batch).restored, before)


def test_skip_adds_a_linear_map(tmp_path):
    """What is linear in the standardised input is learnt by the skip connection without any latent."""
    rows, layer = random_rows(2000, 12, LAYERS)
    z = standardise(rows).z
    target = z @ torch.randn(12, 12, generator=torch.Generator().manual_seed(2))
    fvu = {}
    for skip in (False, True):
        source = ListSource(rows, layer, batch_rows=100, epochs=8, more={"second": target})
        config = TrainConfig(
            form="transcoder", skip=skip, n_latents=16, k=1, batch_rows=100, epochs=8, lr=2e-2, auxk=0
        )
        train(source, config, tmp_path / str(skip))
        found = heldout.evaluate(
            {"": load_sae(tmp_path / str(skip))},
            ListSource(rows, layer, batch_rows=100, more={"second": target}),
        )
        fvu[skip] = found[""].mean.fvu
    assert fvu[True] < 0.05 < 0.3 < fvu[False]


def test_an_sae_of_several_layers_with_fixed_numbers_asks_which_layer(tmp_path):
    sae = trained("stacked", tmp_path, standardise="layer")
    batch = form_source("stacked").peek(10)
    with pytest.raises(UsageError, match="say which layer"):
        sae.encode(batch.rows)
    assert sae.encode(batch.rows, batch.layer).values.shape == (10, 6)
