"""A run's folder: one process at a time, checkpoints kept by policy, the best one known."""

import json
import multiprocessing
import os

import pytest
import torch

from actcache.errors import NotFoundError, UsageError
from tests.trainer.list_source import ListSource, random_source
from trainer.checkpoint import load_sae
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.run_folder import RunFolder, Snapshot
from trainer.trained import weights_digest

FIELDS = {
    "n_latents": 40,
    "k": 4,
    "batch_rows": 32,
    "rows": 400,
    "lr": 3e-3,
    "log_every_steps": 3,
    "checkpoint_every_steps": 2,
}


@pytest.fixture(autouse=True)
def _fast(fast_disk):
    return fast_disk


def config_of(**fields):
    return TrainConfig(**{**FIELDS, **fields})


def source(**more):
    return random_source(epochs=2, **more)


def stop_at(step):
    """Asked to stop before step `step + 1`."""
    count = iter(range(1000))
    return lambda: next(count) >= step


def kept(out):
    return sorted(int(p.name[5:]) for p in (out / "checkpoints").glob("step-*"))


# One at a time.


def test_two_processes_cannot_share_a_folder(tmp_path):
    context = multiprocessing.get_context("forkserver")
    holding, let_go = context.Event(), context.Event()
    out = tmp_path / "run"
    config = config_of().resolve(12).model_copy(update={"layers": (2, 5)})
    process = context.Process(target=hold_run, args=(out, config, holding, let_go))
    process.start()
    assert holding.wait(60)
    with pytest.raises(UsageError, match=rf"another process \(pid {process.pid}\) is training in"):
        train(source(), config_of(), out, resume=True)
    process.kill()  # the lock goes with the process
    process.join()
    assert train(source(), config_of(), out, resume=True).outcome == "finished"


def hold_run(out, config, holding, let_go):
    RunFolder(out).prepare(config, resume=True)
    holding.set()
    let_go.wait(60)


def test_two_runs_of_one_process_cannot_share_a_folder(tmp_path):
    def intrude(report):
        if report.step == 3:
            with pytest.raises(UsageError, match=f"pid {os.getpid()}"):
                train(source(), config_of(), tmp_path / "run", resume=True)

    assert train(source(), config_of(), tmp_path / "run", on_step=intrude).outcome == "finished"


def test_an_error_lets_go_of_the_folder(tmp_path):
    def fail(_report):
        raise KeyError

    with pytest.raises(KeyError):
        train(source(), config_of(), tmp_path / "run", on_step=fail)
    assert train(source(), config_of(), tmp_path / "run", resume=True).outcome == "finished"


# Which checkpoints are kept.


def snapshot(step):
    return Snapshot(model={"w": torch.tensor([float(step)])}, training={}, state={"step": step})


@pytest.mark.parametrize(
    ("newest", "every", "best", "expected"),
    [(1, None, None, [10]), (3, None, None, [6, 8, 10]), (2, 4, None, [4, 8, 10]), (1, 5, 2, [2, 10])],
)
def test_kept_by_policy(tmp_path, newest, every, best, expected):
    folder = RunFolder(tmp_path)
    folder.prepare(config_of(), resume=False)
    for step in (2, 4, 6, 8, 10):
        folder.save(snapshot(step))
    if best is not None:
        folder.mark_best(best, 0.5)
    folder.prune(newest=newest, every_steps=every)
    assert kept(tmp_path) == expected
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_a_run_keeps_what_it_was_told_to(tmp_path):
    train(source(), config_of(keep_newest=1, keep_every_steps=4), tmp_path / "run")
    assert kept(tmp_path / "run") == [4, 8, 12, 13]
    # it is nobody else's business: a resumed run may keep others
    train(source(), config_of(rows=300), tmp_path / "cut", stop=stop_at(5))
    train(source(), config_of(rows=300, keep_newest=5), tmp_path / "cut", resume=True)
    assert len(kept(tmp_path / "cut")) == 5


class Turning(ListSource):
    """Held-out rows on which an SAE gets worse after a while, as one that overfits."""

    times = 0

    def load_state_dict(self, state):
        super().load_state_dict(state)
        Turning.times += 1

    def _batch(self, ids):
        batch = super()._batch(ids)
        batch.rows += torch.randn(batch.rows.shape, generator=torch.Generator().manual_seed(0)) * max(
            0, Turning.times - 4
        )
        return batch


def test_the_best_on_held_out_rows_is_kept(tmp_path):
    Turning.times = 0
    config = config_of(eval_every_steps=1, keep_newest=1, checkpoint_every_steps=100)
    train(source(), config, tmp_path, held_out=random_source(80, seed=5, kind=Turning))
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(14))
    fvu = [line["mean"]["fvu"] for line in lines]
    best = min(range(1, 14), key=lambda step: fvu[step])
    assert 1 < best < 13
    assert kept(tmp_path) == [best, 13]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {
        "step": best,
        "fvu": fvu[best],
    }
    assert weights_digest(load_sae(tmp_path, checkpoint="best").sae) == weights_digest(
        load_sae(tmp_path, checkpoint=best).sae
    )
    assert weights_digest(load_sae(tmp_path, checkpoint="last").sae) == weights_digest(load_sae(tmp_path).sae)


def test_evaluation_is_the_same_when_interrupted_and_changes_nothing(tmp_path):
    held_out = {"n_rows": 90, "seed": 5}
    config = config_of(eval_every_steps=3, eval_rows=50, ema_decay=0.9)
    train(source(), config, tmp_path / "straight", held_out=random_source(**held_out))
    straight = (tmp_path / "straight" / "evaluation.jsonl").read_text()
    first = json.loads(straight.splitlines()[0])
    assert first["step"] == 0
    assert first["mean"]["n_rows"] == 64  # the batch that reaches 50 is the second of 32
    for step in (0, 1, 3, 7, 14):
        out = tmp_path / str(step)
        train(
            source(),
            config,
            out,
            held_out=random_source(**held_out),
            stop=stop_at(step),
        )
        train(source(), config, out, held_out=random_source(**held_out), resume=True)
        assert (out / "evaluation.jsonl").read_text() == straight
        assert (out / "sae.safetensors").read_bytes() == (
            tmp_path / "straight" / "sae.safetensors"
        ).read_bytes()
    train(source(), config_of(ema_decay=0.9), tmp_path / "without")
    assert load_bytes(tmp_path / "without") == load_bytes(tmp_path / "straight")


def load_bytes(out):
    return (out / "sae.safetensors").read_bytes(), [
        {k: v for k, v in json.loads(line).items() if k not in ("rows_per_s", "waited_s", "waited_frac")}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def test_evaluation_needs_rows_that_fit_and_says_so_before_the_first_step(tmp_path):
    config = config_of(eval_every_steps=5)
    with pytest.raises(UsageError, match="needs rows to evaluate on"):
        train(source(), config, tmp_path / "a")
    steps = []
    for i, held_out in enumerate((random_source(60, layers=(2, 5, 7)), random_source(60, width=8))):
        if i == 0:
            train(
                source(), config, tmp_path / str(i), held_out=held_out
            )  # rows of other layers are passed over
            continue
        with pytest.raises(UsageError, match="8 wide and the SAE 12"):
            train(source(), config, tmp_path / str(i), held_out=held_out, on_step=steps.append)
    with pytest.raises(UsageError, match="the SAE is of layers"):
        train(source(), config, tmp_path / "b", held_out=random_source(60, layers=(2,)), on_step=steps.append)
    assert steps == []


def test_checkpoints_that_are_not_there(tmp_path):
    train(source(), config_of(), tmp_path)
    with pytest.raises(NotFoundError, match="no best checkpoint"):
        load_sae(tmp_path, checkpoint="best")
    with pytest.raises(NotFoundError, match=r"no checkpoint 3 .*those of steps \[12, 13\]|no checkpoint 3"):
        load_sae(tmp_path, checkpoint=3)
    with pytest.raises(NotFoundError, match="no checkpoint last"):
        load_sae(tmp_path / "nowhere", checkpoint="last")


def test_an_unfinished_run_s_sae_can_be_loaded(tmp_path):
    train(source(), config_of(), tmp_path, stop=stop_at(5), provenance={"model": "toy"})
    with pytest.raises(NotFoundError, match="or ask for one of its checkpoints"):
        load_sae(tmp_path)
    sae = load_sae(tmp_path, checkpoint="last")
    assert sae.provenance == {"model": "toy"}
    assert sae.layers == (2, 5)
