import json

import pytest
import torch

from actcache.errors import (
    CursorError,
    DamageError,
    NonFiniteError,
    NotFoundError,
    PlanMismatchError,
    UsageError,
)
from tests.trainer.list_source import EndlessSource, ListSource, random_source
from trainer import durable, transform
from trainer.checkpoint import load_sae
from trainer.config import TrainConfig
from trainer.loop import train

TIMES = ("rows_per_s", "waited_s", "waited_frac")
FIELDS = {
    "n_latents": 40,
    "k": 4,
    "auxk": 4,
    "batch_rows": 32,
    "dead_after_tokens": 40,
    "lr": 3e-3,
    "log_every_steps": 3,
    "checkpoint_every_steps": 4,
}


def config_of(**fields):
    return TrainConfig(**{**FIELDS, **fields})


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines(out)]


def result(out):
    """All that must be the same however often a run was interrupted."""
    return (out / "sae.safetensors").read_bytes(), (out / "sae.json").read_text(), timeless(out)


class StopAt:
    """True when asked for the (n + 1)-th time: before step n + 1."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left < 0


LIMITS = [
    {"rows": 333},
    {"epochs": 2},
]  # 333 = 10 whole batches of 32, ends of epochs included, and a cut one


@pytest.mark.parametrize("limit", LIMITS)
def test_stopped_at_every_step_and_resumed_is_bit_equal(tmp_path, limit):
    config = config_of(**limit)
    reports = []
    summary = train(random_source(epochs=2), config, tmp_path / "straight", on_step=reports.append)
    expected = result(tmp_path / "straight")
    assert summary.outcome == "finished"
    assert summary.step == len(reports)
    assert any(line["aux_loss"] > 0 for line in expected[2])
    for step in range(summary.step + 1):
        out = tmp_path / f"stopped-{step}"
        first = train(random_source(epochs=2), config, out, stop=StopAt(step))
        if "epochs" in limit or step < summary.step:
            assert (first.outcome, first.step) == ("stopped", step)
            assert not (out / "sae.json").exists()
        second = train(random_source(epochs=2), config, out, resume=True)
        assert second.outcome == ("finished" if first.outcome == "stopped" else "already finished")
        assert result(out) == expected


def test_stopped_again_and_again(tmp_path):
    config = config_of(rows=333)
    train(random_source(epochs=2), config, tmp_path / "straight")
    out = tmp_path / "often"
    outcome = train(random_source(epochs=2), config, out, stop=StopAt(1)).outcome
    while outcome == "stopped":
        outcome = train(random_source(epochs=2), config, out, resume=True, stop=StopAt(1)).outcome
    assert result(out) == result(tmp_path / "straight")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("operation", ["put_in_place", "sync"])
def test_killed_at_every_durable_operation(tmp_path, monkeypatch, operation):
    config = config_of(rows=170, checkpoint_every_steps=2)
    train(random_source(), config, tmp_path / "straight")
    expected = result(tmp_path / "straight")
    original = getattr(durable, operation)
    for i in range(1000):
        done = 0

        def die_at_i(*args, i=i):
            nonlocal done
            done += 1
            if done > i:
                raise Killed
            return original(*args)

        out = tmp_path / f"killed-{i}"
        monkeypatch.setattr(durable, operation, die_at_i)
        try:
            train(random_source(), config, out)
            break
        except Killed:
            monkeypatch.setattr(durable, operation, original)
            train(random_source(), config, out, resume=True)
            assert result(out) == expected
    assert i > 10


def test_rows_are_exact_and_the_last_batch_is_cut(tmp_path):
    summary = train(random_source(epochs=2), config_of(rows=333), tmp_path / "run")
    assert summary.rows == 333
    assert lines(tmp_path / "run")[-1]["rows"] == 333
    exact = train(random_source(), config_of(rows=64), tmp_path / "exact")
    assert (exact.rows, exact.step) == (64, 2)


def test_epochs_take_every_row(tmp_path):
    summary = train(random_source(210, epochs=3), config_of(epochs=3), tmp_path / "run")
    assert (summary.rows, summary.step) == (630, 21)


def test_metrics_lines(tmp_path):
    train(random_source(epochs=2), config_of(epochs=2), tmp_path / "run")
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [3, 6, 9, 12, 14]
    assert [line["rows"] for line in found] == [96, 192, 274, 370, 420]
    first = found[0]
    assert set(first["train_fvu"]) == {"2", "5"}
    assert first["loss"] > 0
    assert 0 < first["l0"] <= 4
    assert 0 <= first["dead_frac"] <= 1
    assert all(name in first for name in TIMES)
    assert found[-1]["loss"] < first["loss"]


def test_checkpoints_are_complete_and_few(tmp_path):
    out = tmp_path / "run"
    train(random_source(epochs=2), config_of(epochs=2, checkpoint_every_steps=3), out)
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["step-00000012", "step-00000014"]
    files = sorted(path.name for path in (out / "checkpoints" / kept[0]).iterdir())
    assert files == ["model.safetensors", "optimizer.safetensors", "state.json"]
    state = json.loads((out / "checkpoints" / kept[1] / "state.json").read_text())
    assert state["threads"] == torch.get_num_threads()
    assert state["cursor"]["next"] == 14
    config = TrainConfig.model_validate_json((out / "config.json").read_text())
    assert config.n_latents == 40
    assert config.layers == (2, 5)


def test_existing_run_without_resume_is_refused(tmp_path):
    train(random_source(), config_of(rows=64), tmp_path)
    with pytest.raises(UsageError, match="already holds a run; resume it with --resume"):
        train(random_source(), config_of(rows=64), tmp_path)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"no config\.json"):
        train(random_source(), config_of(rows=64), tmp_path, resume=True)


def test_resume_where_nothing_is_begins(tmp_path):
    assert train(random_source(), config_of(rows=64), tmp_path / "new", resume=True).outcome == "finished"


def test_finished_run_resumed_does_nothing(tmp_path):
    train(random_source(), config_of(rows=64), tmp_path)

    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}

    before = times()
    summary = train(random_source(), config_of(rows=64), tmp_path, resume=True)
    assert (summary.outcome, summary.step, summary.rows) == ("already finished", 2, 64)
    assert times() == before
    with pytest.raises(PlanMismatchError, match="source"):
        train(random_source(seed=1), config_of(rows=64), tmp_path, resume=True)


def test_other_arguments_are_named(tmp_path):
    train(random_source(), config_of(rows=96), tmp_path, stop=StopAt(1))
    with pytest.raises(PlanMismatchError, match=r"k: 4 there, 5 now; rows: 96 there, 64 now"):
        train(random_source(), config_of(rows=64, k=5), tmp_path, resume=True)
    with pytest.raises(PlanMismatchError, match="source: "):
        train(random_source(seed=1), config_of(rows=96), tmp_path, resume=True)
    summary = train(random_source(), config_of(rows=96, checkpoint_every_steps=1), tmp_path, resume=True)
    assert summary.outcome == "finished"


def test_the_cursor_is_checked_by_the_source(tmp_path):
    train(random_source(), config_of(rows=96), tmp_path, stop=StopAt(1))
    state = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    document = json.loads(state.read_text())
    document["cursor"]["fingerprint"] = "other"
    state.write_text(json.dumps(document))
    with pytest.raises(CursorError):
        train(random_source(), config_of(rows=96), tmp_path, resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_serves(tmp_path, name):
    config = config_of(rows=190, checkpoint_every_steps=2)
    train(random_source(), config, tmp_path / "straight")
    out = tmp_path / "run"
    train(random_source(), config, out, stop=StopAt(4))
    newest = out / "checkpoints" / "step-00000004"
    data = bytearray((newest / name).read_bytes())
    data[-1] ^= 1
    (newest / name).write_bytes(data)
    with pytest.raises(DamageError, match=f"{name} has SHA-256.*remove .*step-00000004"):
        train(random_source(), config, out, resume=True)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    train(random_source(), config, out, resume=True)
    assert result(out) == result(tmp_path / "straight")


def test_torn_and_surplus_metrics_lines_are_cut(tmp_path):
    config = config_of(rows=333)
    train(random_source(epochs=2), config, tmp_path / "straight")
    out = tmp_path / "run"
    train(random_source(epochs=2), config, out, stop=StopAt(4))
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rows": 1}\n{"step": 9, "ro')
    train(random_source(epochs=2), config, out, resume=True)
    assert result(out) == result(tmp_path / "straight")


class PoisonedSource(ListSource):
    """A NaN in the fifth batch, row 3."""

    def _batch(self, ids):
        batch = super()._batch(ids)
        if self._next == 5:
            batch.rows[3, 1] = float("nan")
        return batch


def test_not_a_number_stops_before_the_weights_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    source = random_source(kind=PoisonedSource)
    with pytest.raises(NonFiniteError) as caught:
        train(source, config_of(rows=200, first_window_rows=96), tmp_path)
    message = str(caught.value)
    row = random_source(kind=ListSource)
    batch = [b for _, b in zip(range(5), row, strict=False)][4]
    place = f"row 3 of layer {int(batch.layer[3])}, sequence {int(batch.sequence[3])}, position {int(batch.position[3])}"
    assert "step 5: the loss is nan" in message
    assert "1 of its 32 rows" in message
    assert place in message
    assert "The checkpoint of step 4 is kept" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_divergence_is_told_from_bad_rows(tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"rows are finite \(layers \[2, 5\], sequences \d+-\d+\), so the weights"
    ):
        train(random_source(epochs=9), config_of(epochs=9, lr=1e30, decay_frac=0.0), tmp_path)


def test_too_large_batches_are_refused(tmp_path):
    with pytest.raises(UsageError, match="handed out 64 rows, batch_rows is 32"):
        train(random_source(batch_rows=64), config_of(rows=64), tmp_path)


def test_a_source_too_short_for_the_rows(tmp_path):
    with pytest.raises(UsageError, match="ended after 210 rows, the run is of 500; a checkpoint is saved"):
        train(random_source(), config_of(rows=500), tmp_path)
    assert (tmp_path / "checkpoints" / "step-00000007" / "state.json").exists()


def test_decay_needs_an_end(tmp_path):
    endless = random_source(kind=EndlessSource)
    with pytest.raises(UsageError, match="does not say how long it is; give rows="):
        train(endless, config_of(epochs=1), tmp_path / "a")
    assert train(endless, config_of(epochs=1, decay_frac=0.0), tmp_path / "b").rows == 210
    assert train(random_source(kind=EndlessSource), config_of(rows=64), tmp_path / "c").rows == 64


class ShrinkingSource(ListSource):
    """Its length is what is left, as some loaders have it."""

    def __len__(self):
        return super().__len__() - self._next

    def __iter__(self):
        for i, batch in enumerate(random_source()):
            self._next = i + 1
            yield batch


def test_a_length_that_is_not_the_whole_order_is_found(tmp_path):
    source = random_source(kind=ShrinkingSource)
    train(source, config_of(epochs=1), tmp_path, stop=StopAt(2))
    with pytest.raises(PlanMismatchError, match="length of the source in batches: 7 there, 5 now"):
        train(source, config_of(epochs=1), tmp_path, resume=True)


class LongerSource(ListSource):
    """Hands out more batches than its length."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(random_source())


def test_more_batches_than_the_length(tmp_path):
    with pytest.raises(UsageError, match="step 4 is beyond the source's length of 3 batches"):
        train(random_source(kind=LongerSource), config_of(epochs=1), tmp_path)


def test_layers_must_be_those_of_the_source(tmp_path):
    with pytest.raises(UsageError, match=r"\(2, 3\), the source hands out layers \(2, 5\)"):
        train(random_source(), config_of(rows=64, layers=(2, 3)), tmp_path)


def test_k_beyond_the_latents_of_this_width(tmp_path):
    with pytest.raises(UsageError, match="k=30"):
        train(random_source(), config_of(rows=64, n_latents=None, expansion=2, k=30), tmp_path)


def test_other_thread_count_is_said(tmp_path, caplog):
    train(random_source(), config_of(rows=96), tmp_path, stop=StopAt(1))
    path = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "threads": 77}))
    train(random_source(), config_of(rows=96), tmp_path, resume=True)
    assert "a run that had 77" in caplog.text


def test_load_sae_uses_the_run_s_own_transform(tmp_path):
    train(random_source(), config_of(rows=200), tmp_path, provenance={"model": "toy", "revision": 3})
    trained = load_sae(tmp_path)
    rows = random_source().peek(20).rows.to(torch.bfloat16)
    code = trained.encode(rows)
    z, mean, scale = transform.standardise(rows)
    selected = trained.sae.encode(z)
    assert torch.equal(code.values, selected.values)
    assert torch.equal(code.indices, selected.indices)
    expected = trained.sae.decode(selected.values, selected.indices) * scale + mean
    torch.testing.assert_close(trained.decode(code), expected)
    assert trained.provenance == {"model": "toy", "revision": 3}
    assert trained.layers == (2, 5)
    assert set(trained.var_layer) == {2, 5}
    assert trained.config.k == 4
    assert not any(parameter.requires_grad for parameter in trained.sae.parameters())


def test_load_sae_refusals(tmp_path):
    with pytest.raises(NotFoundError, match="no finished run"):
        load_sae(tmp_path)
    train(random_source(), config_of(rows=64), tmp_path / "run")
    path = tmp_path / "run" / "sae.json"
    text = path.read_text()
    path.write_text(text.replace(json.loads(text)["transform"], "0" * 16))
    with pytest.raises(PlanMismatchError, match="transform"):
        load_sae(tmp_path / "run")
    path.write_text(text)
    weights = tmp_path / "run" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(DamageError, match="SHA-256"):
        load_sae(tmp_path / "run")


def test_a_sparse_dictionary_is_learnt(tmp_path):
    generator = torch.Generator().manual_seed(0)
    n_rows, width, n_true, active = 40_000, 24, 48, 3
    truth = torch.nn.functional.normalize(torch.randn(n_true, width, generator=generator), dim=1)
    chosen = torch.rand(n_rows, n_true, generator=generator).topk(active, dim=1).indices
    weights = torch.rand(n_rows, active, generator=generator) + 0.5
    rows = torch.zeros(n_rows, n_true).scatter_(1, chosen, weights) @ truth * 4 + 7
    layer = torch.arange(n_rows) % 2
    config = TrainConfig(
        n_latents=96, k=4, lr=4e-3, batch_rows=512, epochs=4, dead_after_tokens=10_000, log_every_steps=20
    )
    train(ListSource(rows, layer, batch_rows=512, epochs=4), config, tmp_path)
    found = lines(tmp_path)
    assert max(found[-1]["train_fvu"].values()) < 0.12 < min(found[0]["train_fvu"].values())
    assert found[-1]["dead_frac"] < 0.2
    trained = load_sae(tmp_path)
    x = rows[:4000]
    xhat = trained.decode(trained.encode(x))
    assert float((x - xhat).square().sum() / (x - x.mean(0)).square().sum()) < 0.12
