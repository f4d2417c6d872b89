"""Which latents are active, in training and in evaluation; what changes on schedule."""

import json

import pytest
import torch

from tests.trainer.list_source import random_source
from trainer.checkpoint import load_sae
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.sae import Dictionary
from trainer.schedule import active_latents, ema_weight, l1_coef, learning_rate
from trainer.selection import BatchTopK, ReLU, TopK, Wanted
from trainer.state import TrainState
from trainer.trained import weights_digest

CPU = torch.device("cpu")
NONE_DEAD = torch.empty(0, dtype=torch.int64)


def make(selection, **more):
    return Dictionary(8, 40, selection, generator=torch.Generator().manual_seed(0), **more)


def rows(n=30, seed=1):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def start(**fields):
    config = TrainConfig(**{"n_latents": 40, "k": 4, "rows": 3200, "batch_rows": 32, **fields}).resolve(12)
    source = random_source(epochs=20)
    return TrainState.start(source, config, CPU), source


def test_batch_top_k_takes_k_per_row_on_average_and_exactly():
    model = make(BatchTopK(3))
    z = rows()
    z[:10] *= 3  # longer rows have larger activations, and so more of them
    prepared = model.selection.prepare(model, z.split(7), Wanted(k=3, n_rows=30, dead=NONE_DEAD))
    codes = [prepared.encode(i, part).code for i, part in enumerate(z.split(7))]
    active = torch.cat([code.n_active() for code in codes])
    assert int(active.sum()) == 90
    assert active[:10].float().mean() > 2 * active[10:].float().mean()
    smallest = min(float(code.code.values.detach().min()) for code in codes if len(code.code.values))
    assert prepared.threshold == pytest.approx(smallest)


def test_batch_top_k_in_evaluation_goes_by_the_threshold_row_by_row():
    model = make(BatchTopK(3))
    model.threshold.fill_(0.8)
    z = rows()
    together = model.encode(z)
    pre = (z - model.bias) @ model.w_enc.T
    assert torch.equal((together.values > 0).sum(1), (pre >= 0.8).sum(1))
    for i in (0, 7, 29):  # whatever else is in the batch
        alone = model.encode(z[i : i + 1])
        n = alone.values.shape[1]
        torch.testing.assert_close(alone.values[0], together.values[i, :n])
        assert (together.values[i, n:] == 0).all()


def test_the_threshold_is_the_moving_average_of_the_smallest_selected(tmp_path):
    state, source = start(activation="batchtopk")
    expected = 0.0
    for number, batch in enumerate(source, 1):
        sums, _ = state.advance(batch)
        stays = 0.0 if number == 1 else min(0.99, (1 + number) / (10 + number))
        expected = expected * stays + sums.threshold * (1 - stays)
        if number == 12:
            break
    assert float(state.model.threshold) == pytest.approx(expected, rel=1e-5)
    # it is saved with the SAE, and in its metrics
    config = TrainConfig(
        n_latents=40, k=4, rows=640, batch_rows=32, activation="batchtopk", log_every_steps=20
    )
    train(random_source(epochs=4), config, tmp_path)
    sae = load_sae(tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(sae.sae.threshold) == pytest.approx(line["threshold"]) != 0
    code = sae.encode(random_source().peek(210).rows)
    assert float((code.values > 0).sum(1).float().mean()) == pytest.approx(4, rel=0.25)
    assert set(line["l0_layer"]) == {"2", "5"}
    assert line["l0"] == pytest.approx(4.0, rel=1e-6)


def test_relu_takes_all_that_are_positive():
    model = make(ReLU())
    z = rows()
    found = model.encode(z)
    pre = torch.relu((z - model.bias) @ model.w_enc.T)
    dense = torch.zeros_like(pre).scatter_add(1, found.indices, found.values)
    torch.testing.assert_close(dense, pre)
    assert model.k is None


def test_the_l1_penalty_keeps_latents_few(tmp_path):
    l0 = {}
    for coef in (1e-4, 0.5):
        config = TrainConfig(
            n_latents=40, rows=3000, batch_rows=100, activation="relu", l1_coef=coef, lr=1e-2
        )
        train(random_source(batch_rows=100, epochs=20), config, tmp_path / str(coef))
        l0[coef] = json.loads((tmp_path / str(coef) / "metrics.jsonl").read_text().splitlines()[-1])["l0"]
    assert l0[0.5] < 0.6 * l0[1e-4]


def test_multi_top_k_evaluates_with_k():
    model = make(TopK(3, multi=True))
    assert model.encode(rows()).values.shape == (30, 3)
    prepared = model.selection.prepare(model, [], Wanted(k=3, n_rows=30, dead=NONE_DEAD))
    found = prepared.encode(0, rows())
    assert found.code.values.shape == (30, 3)
    assert found.wide.values.shape == (30, 12)
    assert torch.equal(found.wide.values[:, :3], found.code.values)


@pytest.mark.parametrize("selection", [TopK(3), BatchTopK(3), ReLU()], ids=["topk", "batchtopk", "relu"])
def test_a_latent_bias_is_added_to_every_pre_activation(selection):
    model = make(selection, latent_bias=True)
    with torch.no_grad():
        model.latent_bias.copy_(torch.randn(40, generator=torch.Generator().manual_seed(5)))
        if isinstance(selection, BatchTopK):
            model.threshold.fill_(0.5)
    z = rows()
    found = model.encode(z)
    pre = (z - model.bias) @ model.w_enc.T + model.latent_bias
    torch.testing.assert_close(found.values, torch.where(found.values > 0, pre.gather(1, found.indices), 0.0))
    assert (found.values > 0).sum() == {
        "TopK": 90,
        "BatchTopK": int((pre >= 0.5).sum()),
        "ReLU": int((pre > 0).sum()),
    }[type(selection).__name__]


# Schedules.


def config_of(**fields):
    return TrainConfig(n_latents=400, k=4, rows=1000, **fields).resolve(12)


def test_k_falls_linearly_to_its_value():
    config = config_of(k_anneal_steps=4, k_anneal_from=20)
    assert [active_latents(config, step) for step in range(6)] == [20, 16, 12, 8, 4, 4]
    assert config_of(k_anneal_steps=4).k_anneal_from == 120  # ten widths
    assert TrainConfig(n_latents=40, k=4, rows=1, k_anneal_steps=4).resolve(12).k_anneal_from == 40
    assert active_latents(config_of(), 0) == 4


def test_k_in_training_is_that_of_the_step():
    state, source = start(k_anneal_steps=3, k_anneal_from=10, n_latents=400)
    l0 = []
    for batch in source:
        sums, _ = state.advance(batch)
        l0.append(float(sums.n_active.sum() / sums.rows))
        if len(l0) == 5:
            break
    assert l0 == pytest.approx([10, 8, 6, 4, 4], abs=0.01)


def test_the_penalty_s_weight_rises_over_the_first_share_of_the_run():
    config = config_of(activation="relu", l1_coef=2.0, l1_warmup_frac=0.5)
    assert [l1_coef(config, p) for p in (0.0, 0.25, 0.5, 0.9)] == [0.0, 1.0, 2.0, 2.0]
    assert l1_coef(config_of(activation="relu", l1_coef=2.0, l1_warmup_frac=0.0), None) == 2.0
    assert l1_coef(config_of(), 0.5) == 0.0
    assert config_of(activation="relu").l1_coef == pytest.approx(5 / 12)


def test_learning_rate_without_an_end():
    config = config_of(decay_frac=0.0, warmup_steps=2, lr=1.0)
    assert [learning_rate(config, step, None) for step in range(3)] == [0.5, 1.0, 1.0]


def test_a_moving_average_does_not_hold_on_to_its_start():
    assert [ema_weight(0.999, step) for step in (1, 8, 10**6)] == [2 / 11, 0.5, 0.999]


def test_averaged_weights_are_the_result_and_have_unit_norms(tmp_path):
    state, source = start(ema_decay=0.5, lr=1e-2)
    expected = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    for number, batch in enumerate(source, 1):
        state.advance(batch)
        stays = min(0.5, (1 + number) / (10 + number))
        for name, p in state.model.named_parameters():
            expected[name] = stays * expected[name] + (1 - stays) * p.detach()
        if number == 9:
            break
    for name, tensor in expected.items():
        torch.testing.assert_close(state.average[name], tensor)
    result = state.trained(source, {}).sae
    torch.testing.assert_close(result.w_dec.norm(dim=1), torch.ones(40))
    norms = expected["w_dec"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(result.w_enc, expected["w_enc"] * norms)
    # a finished run holds the average, its checkpoint both
    config = TrainConfig(n_latents=40, k=4, rows=333, batch_rows=32, ema_decay=0.9, lr=1e-2)
    train(random_source(epochs=2), config, tmp_path)
    last = load_sae(tmp_path, checkpoint="last")
    assert weights_digest(last.sae) == weights_digest(load_sae(tmp_path).sae)
