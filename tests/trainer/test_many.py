"""Several SAEs on the same batches: each is what it would be alone."""

import json

import pytest
import torch

from actcache.errors import NonFiniteError, PlanMismatchError, UsageError
from tests.trainer.list_source import ListSource, form_source, random_rows, random_source
from trainer import durable
from trainer.checkpoint import load_sae
from trainer.config import TrainConfig
from trainer.loop import train, train_many
from trainer.sweep import grid, make_configs, memory_of, parse_setting, value_of

FIELDS = {
    "n_latents": 40,
    "k": 4,
    "auxk": 4,
    "batch_rows": 32,
    "rows": 333,
    "dead_after_tokens": 40,
    "lr": 3e-3,
    "log_every_steps": 3,
    "checkpoint_every_steps": 4,
}
TIMES = ("rows_per_s", "waited_s", "waited_frac")


def source(**more):
    return random_source(epochs=2, **more)


def result(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return (out / "sae.safetensors").read_bytes(), (out / "sae.json").read_text(), timeless


SWEPT = {
    "a": TrainConfig(**FIELDS),
    "b": TrainConfig(**{**FIELDS, "k": 2, "n_latents": 24}),
    "c": TrainConfig(**{**FIELDS, "activation": "batchtopk", "ema_decay": 0.9}),
    "d": TrainConfig(**{**FIELDS, "standardise": "layer", "micro_rows": 7, "seed": 3}),
}


def test_a_sweep_of_four_equals_the_four_alone(tmp_path):
    summary = train_many(source(), SWEPT, tmp_path / "sweep")
    assert (summary.outcome, summary.step, summary.rows) == ("finished", 11, 333)
    for name, config in SWEPT.items():
        train(source(), config, tmp_path / name)
        assert result(tmp_path / "sweep" / name) == result(tmp_path / name)


def test_one_read_trains_all(tmp_path):
    class Counted(ListSource):
        n = 0

        def _batch(self, ids):
            Counted.n += 1
            return super()._batch(ids)

    train_many(source(kind=Counted), SWEPT, tmp_path)
    assert Counted.n == 14 + 11  # the first window, and the run


def test_one_sae_per_layer_equals_runs_of_one_layer(tmp_path):
    configs = make_configs(FIELDS, [], layers=(2, 5))
    assert list(configs) == ["layer=2", "layer=5"]
    train_many(source(), configs, tmp_path / "both")
    rows, layer = random_rows(210, 12, (2, 5))
    for name, config in configs.items():
        train(source(), config, tmp_path / name)
        assert result(tmp_path / "both" / name) == result(tmp_path / name)
        sae = load_sae(tmp_path / "both" / name)
        assert sae.layers == config.layers
        mine = rows[layer == config.layers[0]]
        assert (sae.decode(sae.encode(mine)) - mine).square().sum() < (mine - mine.mean(0)).square().sum()
        lines = result(tmp_path / name)[2]
        assert set(lines[-1]["train_fvu"]) == {name[-1]}
        assert lines[-1]["rows"] == 333  # of the source: all SAEs end with the same batch


def test_an_sae_of_one_layer_sees_only_its_rows(tmp_path):
    """It is the same whatever the rows of other layers are."""
    rows, layer = random_rows(210, 12, (2, 5))
    other = torch.where(layer[:, None] == 5, rows * 7 - 3, rows)
    for name, x in (("a", rows), ("b", other)):
        train(
            ListSource(x, layer, batch_rows=32),
            TrainConfig(**{**FIELDS, "rows": 200, "layers": (2,)}),
            tmp_path / name,
        )
    assert result(tmp_path / "a")[0] == result(tmp_path / "b")[0]
    assert result(tmp_path / "a")[2] == result(tmp_path / "b")[2]


def test_batches_without_a_row_of_a_layer_are_passed_over(tmp_path):
    rows, layer = random_rows(320, 12, (2, 5))
    order = torch.cat([(layer == 2).nonzero().squeeze(1), (layer == 5).nonzero().squeeze(1)])

    class Sorted(ListSource):
        def _order(self, epoch):
            return torch.arange(len(self._rows))

    config = TrainConfig(**{**FIELDS, "rows": None, "epochs": 1, "layers": (5,), "log_every_steps": 2})
    train(Sorted(rows[order], layer[order], batch_rows=32), config, tmp_path)
    lines = result(tmp_path)[2]
    assert [line["loss"] is None for line in lines] == [True, True, False, False, False]
    assert lines[0]["dead_frac"] == 0.0


class StopAt:
    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("step", [0, 3, 8])
def test_stopped_and_resumed_together(tmp_path, step):
    train_many(source(), SWEPT, tmp_path / "straight")
    assert train_many(source(), SWEPT, tmp_path / "cut", stop=StopAt(step)).outcome == "stopped"
    train_many(source(), SWEPT, tmp_path / "cut", resume=True)
    for name in SWEPT:
        assert result(tmp_path / "cut" / name) == result(tmp_path / "straight" / name)


class Killed(BaseException):
    pass


def test_killed_between_two_saves_all_go_on_from_the_step_all_have(tmp_path, monkeypatch, fast_disk):
    configs = {name: SWEPT[name] for name in "ab"}
    train_many(source(), configs, tmp_path / "straight")
    original, done = durable.put_in_place, 0
    for i in range(1, 200, 2):
        out, done = tmp_path / f"cut-{i}", 0

        def die_at_i(*args, i=i):
            nonlocal done
            done += 1
            if done > i:
                raise Killed
            return original(*args)

        monkeypatch.setattr(durable, "put_in_place", die_at_i)
        try:
            train_many(source(), configs, out)
            break
        except Killed:
            pass
        monkeypatch.setattr(durable, "put_in_place", original)
        train_many(source(), configs, out, resume=True)
        for name in configs:
            assert result(out / name) == result(tmp_path / "straight" / name), i
    assert i > 20


def test_one_of_a_sweep_goes_on_alone(tmp_path):
    train_many(source(), SWEPT, tmp_path / "straight")
    train_many(source(), SWEPT, tmp_path / "cut", stop=StopAt(6))
    train(source(), SWEPT["b"], tmp_path / "cut" / "b", resume=True)
    assert result(tmp_path / "cut" / "b") == result(tmp_path / "straight" / "b")
    summary = train_many(source(), SWEPT, tmp_path / "cut", resume=True)
    assert summary.outcome == "finished"
    for name in SWEPT:
        assert result(tmp_path / "cut" / name) == result(tmp_path / "straight" / name)
    assert train_many(source(), SWEPT, tmp_path / "cut", resume=True).outcome == "already finished"


def test_those_that_have_no_step_in_common_are_named(tmp_path):
    train_many(source(), SWEPT, tmp_path, stop=StopAt(6))
    more = {**SWEPT, "e": TrainConfig(**{**FIELDS, "k": 3})}
    with pytest.raises(UsageError, match=r"no checkpoint of the same step \(a: \[4, 6\].*e: none\)"):
        train_many(source(), more, tmp_path, resume=True)


def test_one_that_diverges_is_given_up_and_the_others_go_on(tmp_path, caplog):
    configs = {"good": TrainConfig(**FIELDS), "bad": TrainConfig(**{**FIELDS, "lr": 1e30, "decay_frac": 0.0})}
    summary = train_many(source(), configs, tmp_path / "both")
    assert summary.outcome == "finished"
    assert list(summary.failed) == ["bad"]
    assert "weights have diverged" in summary.failed["bad"]
    assert "bad is given up" in caplog.text
    assert not (tmp_path / "both" / "bad" / "sae.json").exists()
    train(source(), configs["good"], tmp_path / "good")
    assert result(tmp_path / "both" / "good") == result(tmp_path / "good")
    with pytest.raises(NonFiniteError):
        train_many(source(), {"x": configs["bad"], "y": configs["bad"]}, tmp_path / "none")


def test_one_given_up_stays_so_when_the_others_are_resumed(tmp_path):
    bad = TrainConfig(**{**FIELDS, "lr": 1e30, "decay_frac": 0.0})
    configs = {"good": TrainConfig(**FIELDS), "bad": bad, "fine": TrainConfig(**{**FIELDS, "k": 2})}
    train_many(source(), configs, tmp_path / "straight")
    stopped = train_many(source(), configs, tmp_path / "cut", stop=StopAt(9))
    assert list(stopped.failed) == ["bad"]
    summary = train_many(source(), configs, tmp_path / "cut", resume=True)
    assert summary.outcome == "finished"
    assert summary.failed == stopped.failed
    for name in ("good", "fine"):
        assert result(tmp_path / "cut" / name) == result(tmp_path / "straight" / name)
    # alone it is tried again
    with pytest.raises(NonFiniteError):
        train_many(source(), configs, tmp_path / "cut", resume=True)


@pytest.mark.parametrize("field", ["batch_rows", "rows", "form", "log_every_steps"])
def test_what_must_be_the_same_for_all(tmp_path, field):
    other = {"batch_rows": 16, "rows": 64, "form": "feature", "log_every_steps": 5}[field]
    configs = {"a": TrainConfig(**FIELDS), "b": TrainConfig(**{**FIELDS, field: other})}
    with pytest.raises(UsageError, match=f"have one {field}"):
        train_many(source(), configs, tmp_path)


# Starting from another SAE.


def test_a_run_starts_from_another_s_weights(tmp_path):
    train(source(), TrainConfig(**FIELDS), tmp_path / "first")
    first = load_sae(tmp_path / "first")
    config = TrainConfig(**{**FIELDS, "rows": 64, "log_every_steps": 1})
    train(source(seed=4), config, tmp_path / "second", init=first)
    train(source(seed=4), config, tmp_path / "fresh")
    losses = [result(tmp_path / name)[2][0]["loss"] for name in ("second", "fresh")]
    assert losses[0] < 0.97 * losses[1]
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    assert len(saved["init_from"]) == 64
    # going on needs the same start
    train(source(seed=4), config, tmp_path / "cut", init=first, stop=StopAt(1))
    with pytest.raises(PlanMismatchError, match="init_from"):
        train(source(seed=4), config, tmp_path / "cut", resume=True)
    train(source(seed=4), config, tmp_path / "cut", init=first, resume=True)
    assert result(tmp_path / "cut")[0] == result(tmp_path / "second")[0]


def test_another_activation_and_layers_may_start_from_it(tmp_path):
    train(source(), TrainConfig(**FIELDS), tmp_path / "first")
    first = load_sae(tmp_path / "first")
    for i, fields in enumerate(
        (
            {"activation": "batchtopk"},
            {"activation": "relu", "auxk": 0},
            {"layers": (5,), "latent_bias": True},
        )
    ):
        out = tmp_path / str(i)
        assert train(source(), TrainConfig(**{**FIELDS, **fields}), out, init=first).outcome == "finished"


@pytest.mark.parametrize(
    ("fields", "made_for", "message"),
    [
        ({"n_latents": 44}, "stacked", r"w_enc is \[40, 12\] there and \[44, 12\] here"),
        ({"standardise": "layer"}, "stacked", "standardise is 'row' there and 'layer' here"),
        ({"form": "transcoder"}, "transcoder", "form is 'stacked' there and 'transcoder' here"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path, fields, made_for, message):
    train(source(), TrainConfig(**FIELDS), tmp_path / "first")
    config = TrainConfig(**{**FIELDS, **fields})
    with pytest.raises(PlanMismatchError, match=message):
        train(form_source(made_for, epochs=2), config, tmp_path / "x", init=load_sae(tmp_path / "first"))


# What a sweep is called, and what it takes.


def test_a_grid_is_every_combination():
    found = grid(["k=16,32", "expansion=16,64"])
    assert list(found) == ["k=16,expansion=16", "k=16,expansion=64", "k=32,expansion=16", "k=32,expansion=64"]
    assert found["k=32,expansion=16"] == {"k": 32, "expansion": 16}
    assert grid([]) == {"": {}}
    configs = make_configs({"rows": 10}, ["k=8,16"], layers=(3, 11))
    assert list(configs) == ["k=8,layer=03", "k=8,layer=11", "k=16,layer=03", "k=16,layer=11"]
    assert configs["k=16,layer=11"].layers == (11,)


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["k"], "expected NAME=VALUE"),
        (["kay=3"], "no setting 'kay'; the settings are form"),
        (["k=3,3"], "values that differ"),
        (["k=3,"], "values that differ"),
        (["k=3", "k=4"], "every setting once"),
        (["k=a,b"], "k=a: k: Input should be a valid integer"),
        (["activation=topk,jumprelu"], "activation=jumprelu: activation: Input should be"),
    ],
)
def test_a_sweep_that_is_wrong_is_refused(sweeps, message):
    with pytest.raises(UsageError, match=message):
        make_configs({"rows": 10}, sweeps)


def test_settings_are_read_as_json_or_text():
    assert [value_of(x) for x in ("3", "1e-4", "true", "null", "[0.5, 0.5]", "topk")] == [
        3,
        1e-4,
        True,
        None,
        [0.5, 0.5],
        "topk",
    ]
    assert parse_setting("warmup-steps = 5") == ("warmup_steps", "5")


def test_one_sae_per_layer_of_joint_rows_is_refused():
    with pytest.raises(UsageError, match="puts all layers into one row"):
        make_configs({"form": "crosscoder"}, [], layers=(1, 2))


def test_memory_is_what_the_tensors_take(tmp_path):
    config = TrainConfig(**{**FIELDS, "ema_decay": 0.9, "latent_bias": True})
    from trainer.state import TrainState

    state = TrainState.start(source(), config.resolve(12), torch.device("cpu"))
    state.advance(next(iter(source())))
    held = sum(p.numel() for p in state.model.parameters())
    moments = [m for s in state.optimizer.state.values() for m in s.values() if m.ndim]
    total = 4 * (2 * held + sum(m.numel() for m in moments) + sum(a.numel() for a in state.average.values()))
    assert memory_of(config, 12, 2).weights == pytest.approx(total, rel=0.05)
