"""Building and training side by side, as people do it: the same SAE whatever the timing, and whoever is killed on the way."""

import json
import signal
import threading

import numpy as np
import pytest

import actcache
from actcache.errors import ActcacheError
from actcache.producer import workers as workers_module
from actcache.reader import follow as follow_module
from actcache.service.footprint import Footprint, bytes_under
from actcache.service.retention import DiskBudget, bounded_by
from actcache.service.supervise import held
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from tests.conftest import Kit, make_decoder, read_texts, small_settings, write_corpus
from tests.service import storm
from tests.service.storm import BUDGET, BUILD, SETTINGS, command
from tests.service.test_storm import free_port
from tests.test_cli import run

SHARDS = {"n_tokens": 24 * 8 * 16, "holdout_frac": 0.05, "dtype": "float32", "codec": "none"}
TRAIN = [
    *(
        "--expansion",
        2,
        "--k",
        4,
        "--batch-rows",
        60,
        "--window-rows",
        256,
        "--commit-shards",
        2,
        "--eval-every",
        20,
    ),
    *("--checkpoint-every", 3, "--device", "cpu", "--set", "first_window_rows=240", "--set", "auxk=4"),
]


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments, code=0: run(monkeypatch, capsys, *arguments, code=code)


@pytest.fixture(scope="module")
def big(kit, tmp_path_factory) -> Kit:
    return Kit(kit.tokenizer, write_corpus(tmp_path_factory.mktemp("text"), read_texts(60, 800)))


@pytest.fixture
def whole(big, tmp_path):
    out = tmp_path / "whole" / "s.zarr"
    big.build(small_settings(out, **SHARDS))
    return out


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(follow_module, "_FIRST_POLL_S", 0.01)
    monkeypatch.setattr(workers_module, "POLL_S", 0.02)


def result(run_folder):
    return {str(p.relative_to(run_folder)): p.read_bytes() for p in run_folder.glob("**/sae.*")}


@pytest.mark.parametrize(
    "more", [[], ["--per-layer"], ["--sweep", "k=2,4"]], ids=["one", "per layer", "sweep"]
)
def test_following_a_build_gives_what_training_afterwards_gives(big, whole, call, tmp_path, more):
    """Within a fifth of the disk, started before the store is there; bit for bit, what is written about it included."""
    call("train", whole, "--out", tmp_path / "after", "--order", "commit", *TRAIN, *more)
    catalog = Catalog(LocalObjects(whole))
    footprint, held_out = Footprint(catalog, whole, 1), catalog.grid.n_holdout_shards
    budget = int(footprint.fixed_bytes + footprint.most[:held_out].sum() + 5 * footprint.most.max())
    out, peak, errors = tmp_path / "live" / "s.zarr", [0], []

    def look(operation: str, _key: str) -> None:
        if operation in ("fsync", "unlink", "remove") and (out / "zarr.json").exists():
            peak[0] = max(peak[0], bytes_under(out))

    def produce() -> None:
        try:
            bounded = bounded_by(DiskBudget(max_bytes=budget, consumers=("a",)))
            big.build(small_settings(out, **SHARDS), make_decoder(), admission=bounded, on_operation=look)
        except ActcacheError as error:
            errors.append(error)

    producer = threading.Thread(target=produce)
    producer.start()
    said = call(
        "train", out, "--out", tmp_path / "live-run", "--follow", "--consumer", "a", *TRAIN, *more
    ).err
    producer.join(60)
    assert errors == []
    assert not producer.is_alive()
    assert "in the order shards are committed in" in said
    assert result(tmp_path / "live-run") == result(tmp_path / "after")
    assert len(result(tmp_path / "live-run")) == (2 if not more else 4)
    assert 0 < peak[0] <= budget < bytes_under(whole)
    assert len(actcache.open(out).retired()) > 10
    # What is left says what it is, and can be evaluated: the holdout is never retired.
    assert json.loads(call("info", out, "--json").out)["retired_shards"] > 10
    report = json.loads(call("verify", out, "--json").out)
    assert report["problems"] == []
    assert report["retired"] > 10
    one = tmp_path / "live-run" / ("k=2" if "--sweep" in more else "")
    call("eval", one, out, "--device", "cpu", "--json")
    assert "was retired on" in call("train", out, "--out", tmp_path / "late", *TRAIN, code=1).err
    assert json.loads(call("top", out, "--json").out)["consumers"][0]["phase"] == "finished"
    assert "finished" in call("top", out, "--once").out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--follow", "--order", "global"], "goes through shards as they are committed"),
        (["--consumer", "a"], "is for --follow"),
    ],
)
def test_what_does_not_go_together_is_refused(call, tmp_path, options, said):
    assert said in call("train", tmp_path / "s.zarr", "--out", tmp_path / "run", *options, code=2).err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-disk", "1GB"], "go together"),
        (["--consumers", "a"], "go together"),
        (["--max-disk", "1GB", "--consumers", "a,a"], "--consumers a,b; got a,a"),
        (["--max-disk", "much", "--consumers", "a"], "is not a size"),
        (["--max-disk", "1GB", "--consumers", "a", "--engine", "ray"], "not there yet"),
        (["--max-disk", "2MB", "--consumers", "a"], "The least is"),
    ],
)
def test_budgets_that_cannot_be_are_refused(call, tmp_path, options, said):
    assert said in call("build", *BUILD, "--out", tmp_path / "s.zarr", *options, code=2).err


def test_a_budget_holds_until_it_is_lifted(call, tmp_path):
    build = ["build", *BUILD, "--out", tmp_path / "s.zarr"]
    call(*build, "--max-disk", "2MB", "--consumers", "a", code=2)
    bounded = [*build, "--max-disk", "100MB", "--consumers", "a"]
    call(*bounded)
    assert "is complete" in call(*build).err
    (tmp_path / "s.zarr/acts/resid_post/ledger/c.0.58").unlink()
    assert (
        "is built within a disk budget: give it again (--max-disk 100000000 --consumers a"
        in call(*build, code=2).err
    )
    call(*build, "--max-disk", "none")
    assert not (tmp_path / "s.zarr/.live/budget.json").exists()


def test_nobody_builds_it(call, tmp_path):
    said = call(
        "train", tmp_path / "s.zarr", "--out", tmp_path / "run", "--follow", "--patience", "0.1", code=1
    ).err
    assert "stalled" in said
    assert "Run 'actcache build', then this again" in said


def test_one_run_at_a_time(tmp_path):
    with (
        held(tmp_path / "lock"),
        pytest.raises(ActcacheError, match="another 'actcache run' is at work"),
        held(tmp_path / "lock", patience_s=0.0),
    ):
        pass


def undisturbed(call, folder):
    """The SAE of a store that is built first."""
    call("build", *BUILD, "--out", folder / "acts.zarr")
    options = [text for setting in SETTINGS for text in ("--set", setting)]
    call(
        "train",
        folder / "acts.zarr",
        "--out",
        folder / "run",
        "--order",
        "commit",
        "--device",
        "cpu",
        *options,
    )
    assert bytes_under(folder / "acts.zarr") > 5 * BUDGET - 2_000_000
    return folder


def run_in_a_storm(call, tmp_path, victims: list[str], seed: int) -> None:
    """`actcache run` on data of five times its budget; each round somebody is killed, and it is run again."""
    rng, whole = np.random.default_rng(seed), undisturbed(call, tmp_path / "whole")
    out, log = tmp_path / "live", tmp_path / "log"
    arguments = command("run", *BUILD, "--out", out, "--max-disk", BUDGET)
    arguments += [text for setting in SETTINGS for text in ("--sae", setting)]
    with storm.watched(out / "acts.zarr") as peak:
        for number, victim in enumerate(victims):
            process = storm.start(arguments, log)
            due = storm.n_committed(out / "acts.zarr") + int(rng.integers(1, 3 + 30 // len(victims)))

            def is_due(process=process, due=due) -> bool:
                root = out / "acts.zarr"
                is_there = storm.n_committed(root) >= due and "sae" in storm.pids(root)
                return is_there or process.poll() is not None

            assert storm.wait_until(is_due), log.read_text()
            if process.poll() is not None:
                assert process.returncode == 0, log.read_text()
                break
            if victim == "ctrl-c":
                process.send_signal(signal.SIGINT)
            else:
                found = {**storm.pids(out / "acts.zarr"), "supervisor": process.pid}
                storm.kill(found.get(victim, process.pid))
            code = process.wait(storm.ENDS_S)
            assert code in ((130, 0) if victim == "ctrl-c" else (1, -signal.SIGKILL, 0)), (
                number,
                log.read_text(),
            )
        process = storm.start(arguments, log)
        assert process.wait(storm.ENDS_S) == 0, log.read_text()
        assert 0 < peak() <= BUDGET
    assert result(out / "run") == result(whole / "run")
    store, sae = actcache.open(out / "acts.zarr"), json.loads((out / "run/sae.json").read_text())
    assert sae["rows"] == store.n_kept * len(store.layers), "each row once"
    assert len(store.retired()) > 20
    assert json.loads(call("verify", out / "acts.zarr", "--json").out)["problems"] == []


def test_a_run_that_is_killed_and_run_again(call, tmp_path):
    run_in_a_storm(call, tmp_path, ["sae", "ctrl-c"], seed=0)


@pytest.mark.soak
def test_a_run_in_a_storm(call, tmp_path):
    rng = np.random.default_rng(1)
    run_in_a_storm(
        call, tmp_path, rng.choice(["producer", "sae", "supervisor", "ctrl-c"], 20).tolist(), seed=1
    )


def serve_in_a_storm(call, tmp_path, victims: list[str], seed: int) -> None:
    """A build within a budget, a service, and a trainer that follows through it; each round one is killed and started again."""
    rng, whole, port = np.random.default_rng(seed), undisturbed(call, tmp_path / "whole"), free_port()
    out = tmp_path / "live"
    out.mkdir()
    root, settings = out / "acts.zarr", [text for setting in SETTINGS for text in ("--set", setting)]
    url = f"grpc://127.0.0.1:{port}/acts.zarr"
    commands = {
        "server": command("serve", out, "--port", port),
        "producer": command("build", *BUILD, "--out", root, "--max-disk", BUDGET, "--consumers", "sae"),
        "sae": command(
            *("train", url, "--out", out / "run", "--follow", "--consumer", "sae", "--resume"),
            *("--device", "cpu", *settings),
        ),
    }
    logs = {name: tmp_path / f"{name}.log" for name in commands}
    running = {name: storm.start(arguments, logs[name]) for name, arguments in commands.items()}
    try:
        with storm.watched(root) as peak:
            for victim in victims:
                due = storm.n_committed(root) + int(rng.integers(1, 3 + 30 // len(victims)))

                def is_due(due=due) -> bool:
                    return storm.n_committed(root) >= due or running["producer"].poll() is not None

                assert storm.wait_until(is_due), logs["producer"].read_text()
                storm.kill(running[victim].pid)
                running[victim].wait(storm.ENDS_S)
                running[victim] = storm.start(commands[victim], logs[victim])
            for name in ("producer", "sae"):
                assert running[name].wait(storm.ENDS_S) == 0, logs[name].read_text()
            assert 0 < peak() <= BUDGET
    finally:
        for process in running.values():
            storm.kill(process.pid)
            process.wait(storm.ENDS_S)
    assert result(out / "run") == result(whole / "run")
    store, sae = actcache.open(root), json.loads((out / "run/sae.json").read_text())
    assert sae["rows"] == store.n_kept * len(store.layers), "each row once"
    assert len(store.retired()) > 20
    assert json.loads(call("verify", root, "--json").out)["problems"] == []


@pytest.mark.soak
def test_producer_trainer_and_server_in_a_storm(call, tmp_path):
    rng = np.random.default_rng(2)
    serve_in_a_storm(call, tmp_path, rng.choice(["producer", "sae", "server"], 20).tolist(), seed=2)
