"""Several processes train as one does: the same rows, the same numbers, an end for all."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actcache.errors import UsageError
from tests.trainer.list_source import ListSource, form_source, random_source
from tests.trainer.together import FAILED, errors, finish, run_together, start, train_share
from trainer.config import TrainConfig
from trainer.loop import train, train_many
from trainer.median import geometric_median
from trainer.ranks import Ranks
from trainer.scores import Scores

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
    "eval_every_steps": 5,
}
TIMES = ("rows_per_s", "waited_s", "waited_frac")


def lines(path: Path):
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in path.read_text().splitlines()]


def near(found, expected):
    """JSON of the same shape with numbers that agree within rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[k], v) for k, v in expected.items())
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=2e-3, abs=1e-4)
    return found == expected


def check_equal_runs(one: Path, two: Path, *, exact: bool):
    a, b = (load_file(path / "sae.safetensors") for path in (one, two))
    for name, tensor in b.items():
        if exact:
            assert torch.equal(a[name], tensor), name
        else:
            torch.testing.assert_close(a[name], tensor, rtol=1e-3, atol=1e-4)
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        found, expected = lines(one / file), lines(two / file)
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert x == y if exact else near(x, y), (file, x, y)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation": "batchtopk", "ema_decay": 0.9},
        {"form": "crosscoder"},
        {"form": "transcoder", "loss_space": "standardised", "micro_rows": 7},
    ],
    ids=repr,
)
def test_two_processes_train_as_one(tmp_path, fields):
    form = fields.get("form", "stacked")
    make, held_out = partial(form_source, form, epochs=2), partial(form_source, form, n_rows=90)
    config = TrainConfig(**{**FIELDS, **fields})
    train(make(), config, tmp_path / "one", held_out=held_out())
    more = {"held_out": held_out}
    run_together(2, tmp_path / "meet", train_share, make, {"": config}, tmp_path / "two", more)
    check_equal_runs(tmp_path / "two", tmp_path / "one", exact=False)
    found = lines(tmp_path / "two" / "metrics.jsonl")
    assert sum(line["aux_loss"] for line in found) > 0 or form != "stacked" or "activation" in fields
    # whole numbers are not near, they are the same
    for a, b in zip(found, lines(tmp_path / "one" / "metrics.jsonl"), strict=True):
        assert (a["step"], a["rows"], a["dead_frac"]) == (b["step"], b["rows"], b["dead_frac"])
    assert json.loads((tmp_path / "two" / "sae.json").read_text())["world_size"] == 2


def stop_at(step):
    """Asked to stop before the step after this one."""
    count = iter(range(1000))
    return lambda: next(count) >= step


def train_and_stop(ranks: Ranks, make, configs, out, step, more):
    stop = stop_at(step) if ranks.rank == 1 else (lambda: False)  # the others are told
    train_many(make(rank=ranks.rank, world_size=ranks.size), configs, out, ranks=ranks, stop=stop, **more)


def test_stopped_and_resumed_by_as_many_is_bit_equal_and_by_another_number_is_near(tmp_path, caplog):
    make = partial(random_source, epochs=2)
    configs = {"": TrainConfig(**{**FIELDS, "eval_every_steps": None})}
    run_together(2, tmp_path / "a", train_share, make, configs, tmp_path / "straight", {})
    straight = load_file(tmp_path / "straight" / "sae.safetensors")
    for first, second in ((2, 2), (2, 1), (1, 2)):
        out = tmp_path / f"{first}-{second}"
        if first == 2:
            run_together(2, tmp_path / f"b{second}", train_and_stop, make, configs, out, 5, {})
        else:
            train(make(), configs[""], out, stop=stop_at(5))
        assert not (out / "sae.json").exists()
        steps = sorted(p.name for p in (out / "checkpoints").iterdir())
        assert steps == ["step-00000004", "step-00000005"]
        if second == 2:
            run_together(2, tmp_path / f"c{first}", train_share, make, configs, out, {"resume": True})
        else:
            train(make(), configs[""], out, resume=True)
        if first == second:
            files = [(path / "sae.safetensors").read_bytes() for path in (out, tmp_path / "straight")]
            assert files[0] == files[1]
        for name, tensor in load_file(out / "sae.safetensors").items():
            torch.testing.assert_close(tensor, straight[name], rtol=1e-3, atol=1e-4)
    assert "resuming with 1 processes a run that had 2" in caplog.text


class BrokenSource(ListSource):
    """Breaks at its fourth batch, in the process of rank 1 only."""

    def _batch(self, ids):
        if self._rank == 1 and self._next == 4 and len(ids) == 32 and self.handed_out:
            raise UsageError("a chunk cannot be read")
        return super()._batch(ids)

    handed_out = False

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.handed_out = True  # the first window has been read


def test_an_error_in_one_process_ends_all_with_a_reason(tmp_path):
    make = partial(random_source, kind=BrokenSource)
    configs = {"": TrainConfig(**{**FIELDS, "rows": 200, "eval_every_steps": None})}
    meeting = tmp_path / "meet"
    codes = finish(start(2, meeting, train_share, make, configs, tmp_path / "run", {}))
    assert codes == [FAILED, FAILED]
    said = errors(meeting)
    assert said[1] == "usage: a chunk cannot be read"
    assert said[0].startswith("peer: process 1 of 2 stopped with an error")


def test_a_folder_that_is_taken_stops_all_processes(tmp_path):
    make = partial(random_source, epochs=2)
    configs = {"": TrainConfig(**{**FIELDS, "eval_every_steps": None})}
    train(make(), configs[""], tmp_path / "run")
    codes = finish(start(2, tmp_path / "meet", train_share, make, configs, tmp_path / "run", {}))
    assert codes == [FAILED, FAILED]
    said = errors(tmp_path / "meet")
    assert "already holds a run" in said[0]
    assert said[1].startswith("peer: process 0")


def kill_at(report, rank, step):
    if rank == 1 and report.step == step:
        os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(ranks: Ranks, make, configs, out):
    train_many(
        make(rank=ranks.rank, world_size=ranks.size),
        configs,
        out,
        ranks=ranks,
        on_step=partial(kill_at, rank=ranks.rank, step=6),
    )


def test_a_killed_process_is_noticed_and_nothing_is_lost(tmp_path):
    make = partial(random_source, epochs=2)
    configs = {"": TrainConfig(**{**FIELDS, "eval_every_steps": None})}
    run_together(2, tmp_path / "a", train_share, make, configs, tmp_path / "straight", {})
    codes = finish(start(2, tmp_path / "b", train_and_die, make, configs, tmp_path / "run"))
    assert codes == [FAILED, -signal.SIGKILL]
    assert errors(tmp_path / "b")[0].startswith("peer: process 0 of 2 lost the others")
    run_together(2, tmp_path / "c", train_share, make, configs, tmp_path / "run", {"resume": True})
    check = [(tmp_path / name / "sae.safetensors").read_bytes() for name in ("straight", "run")]
    assert check[0] == check[1]


class PoisonedSource(ListSource):
    """NaN in one row of the fourth batch, which rank 1 reads."""

    def _batch(self, ids):
        batch = super()._batch(ids)
        if self._rank == 1 and self._next == 4 and self.handed_out:
            batch.rows[2, 1] = float("nan")
        return batch

    handed_out = False

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.handed_out = True


def test_the_process_that_has_the_bad_row_names_it(tmp_path):
    make = partial(random_source, kind=PoisonedSource)
    configs = {"": TrainConfig(**{**FIELDS, "rows": 200, "eval_every_steps": None})}
    codes = finish(start(2, tmp_path / "meet", train_share, make, configs, tmp_path / "run", {}))
    assert codes == [FAILED, FAILED]
    said = errors(tmp_path / "meet")
    assert "step 4: the loss is nan; 1 of its" in said[1]
    assert "another process has rows of NaN" in said[0]


# The sums of which it is made.


def sums_of(ranks: Ranks, out: Path) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(101, 6, generator=g) + 3
    share = z[ranks.rank :: ranks.size][: 200 if ranks.rank else 1]  # a rank may have next to nothing
    everything = torch.cat([z[r :: ranks.size][: 200 if r else 1] for r in range(ranks.size)])
    median = geometric_median(share, ranks=ranks)
    torch.testing.assert_close(median, geometric_median(everything), rtol=1e-6, atol=1e-6)

    def scored(x):
        scores = Scores((0, 1), 6, 4, torch.device("cpu"))
        layer_i = (x[:, 0] > 3).long()
        values, indices = x[:, :2].abs(), (x[:, :2].abs() * 10).long() % 4
        scores.add(x, x * 0.9, x * 0.5, values, indices, values > 2.5, layer_i)
        return scores

    mine = scored(share)
    mine.together(ranks)
    for layer, expected in scored(everything).by_layer().items():
        for a, b in zip(mine.by_layer()[layer], expected, strict=True):
            assert a == pytest.approx(b, rel=1e-9)
    assert mine.mean().n_alive == scored(everything).mean().n_alive
    assert ranks.on_first(lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert ranks.any(ranks.rank == ranks.size - 1)
    assert not ranks.any(flag=False)
    assert ranks.table([ranks.rank, 7]).tolist() == [[r, 7] for r in range(ranks.size)]
    (out / f"done-{ranks.rank}").touch()


@pytest.mark.parametrize("size", [2, 3])
def test_medians_and_scores_are_those_of_all_rows(tmp_path, size):
    run_together(size, tmp_path / "meet", sums_of, tmp_path)
    assert len(list(tmp_path.glob("done-*"))) == size
