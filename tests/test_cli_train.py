"""`actcache train` as a person uses it: forms, one SAE per layer, sweeps, processes, starting from another run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from tests.conftest import write_store
from tests.test_cli import run

ROOT = Path(cli.__file__).parent
COMMON = ["--expansion", 4, "--k", 4, "--batch-rows", 64, "--epochs", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two hooks, three layers, 12 wide; 60 sequences of 16 tokens, 15 of them held out."""
    path = tmp_path_factory.mktemp("cli") / "acts.zarr"
    write_store(
        path,
        n_sequences=60,
        seq_len=16,
        per_shard=15,
        width=12,
        layers=(0, 2, 3),
        hooks=("mlp_in", "mlp_out"),
        dtype="float32",
    )
    return path


@pytest.fixture
def call(monkeypatch, capsys, fast_disk):
    return lambda *arguments, code=0: run(monkeypatch, capsys, *arguments, code=code)


def train(store, out, *more):
    return ["train", store, "--out", out, "--hook", "mlp_in", *COMMON, *more]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("form", ["stacked", "feature", "crosscoder", "transcoder"])
def test_every_form_trains_and_is_evaluated(store, call, tmp_path, form):
    more = ["--target-hook", "mlp_out", "--set", "skip=true"] if form == "transcoder" else []
    said = call(*train(store, tmp_path / "run", "--form", form, *more, "--eval-every", 5)).err
    assert "finished after" in said
    assert "weights, gradients, Adam" in said
    held_out = lines(tmp_path / "run" / "evaluation.jsonl")
    assert held_out[0]["step"] == 0
    assert set(held_out[-1]["layers"]) == {"0", "2", "3"}
    if form != "transcoder":  # the two hooks hold random numbers that have nothing to do with each other
        assert held_out[-1]["mean"]["fvu"] < held_out[0]["mean"]["fvu"]
    scores = json.loads(call("eval", tmp_path / "run", store, "--json", "--device", "cpu").out)
    for layer, found in scores["layers"].items():
        assert found["fvu"] == pytest.approx(held_out[-1]["layers"][layer]["fvu"], rel=1e-6)
    table = call("eval", tmp_path / "run", store, "--device", "cpu").out
    assert ("norm" in table) == (form in ("feature", "crosscoder"))
    if form == "crosscoder":
        refused = call("eval", tmp_path / "run", store, "--picture", tmp_path / "x.png", code=2).err
        assert "latents" in refused


def test_one_sae_per_layer_of_a_sweep(store, call, tmp_path):
    arguments = train(store, tmp_path / "runs", "--per-layer", "--sweep", "k=2,4", "--set", "keep_newest=1")
    said = call(*arguments).err
    assert "all" in said
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert names == [f"k={k},layer={layer}" for k in (2, 4) for layer in (0, 2, 3)]
    for name in names:
        config = json.loads((tmp_path / "runs" / name / "config.json").read_text())
        assert f"k={config['k']},layer={config['layers'][0]}" == name
        scores = json.loads(call("eval", tmp_path / "runs" / name, store, "--json", "--device", "cpu").out)
        assert set(scores["layers"]) == {name[-1]}
    assert "Nothing to do" in call(*arguments, "--resume").err


def test_a_run_starts_from_another(store, call, tmp_path):
    call(*train(store, tmp_path / "a"))
    call(
        *train(
            store,
            tmp_path / "b",
            "--init-from",
            tmp_path / "a",
            "--activation",
            "batchtopk",
            "--eval-every",
            100,
        )
    )
    call(*train(store, tmp_path / "c", "--activation", "batchtopk", "--eval-every", 100))
    first = [lines(tmp_path / name / "evaluation.jsonl")[0]["mean"]["l1"] for name in "bc"]
    assert first[0] != first[1]
    assert "no finished run" in call(*train(store, tmp_path / "d", "--init-from", tmp_path / "x"), code=1).err


def test_json_says_how_it_ended(store, call, tmp_path):
    summary = json.loads(call(*train(store, tmp_path / "run", "--json", "--set", "warmup_steps=3")).out)
    assert summary["outcome"] == "finished"
    assert summary["failed"] == {}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["warmup_steps"] == 3


def test_one_of_a_sweep_that_diverges_fails_the_command_after_the_others(store, call, tmp_path):
    said = call(
        *train(store, tmp_path / "runs", "--sweep", "lr=1e-3,1e30", "--set", "decay_frac=0"), code=1
    ).err
    assert "error (non_finite): lr=1e30" in said
    assert (tmp_path / "runs" / "lr=1e-3" / "sae.json").exists()
    assert not (tmp_path / "runs" / "lr=1e30" / "sae.json").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--form", "clt"], "form: Input should be 'stacked', 'feature', 'crosscoder' or 'transcoder'"),
        (["--form", "transcoder"], "give both, or another form"),
        (["--target-hook", "mlp_out"], "give both, or another form"),
        (["--form", "crosscoder", "--per-layer"], "puts all layers into one row"),
        (["--set", "warmup=3"], "there is no setting 'warmup'"),
        (["--set", "warmup_steps"], "expected NAME=VALUE"),
        (["--set", "warmup_steps=many"], "warmup_steps: Input should be a valid integer"),
        (["--sweep", "k=4,4"], "values that differ"),
        (["--sweep", "k=4,400"], "k=400: k=400 is 400 active latents of n_latents=48"),
        (["--activation", "relu", "--auxk", 3], "auxk=3 needs activation topk or batchtopk"),
        (["--rows", 100], "rows=100 and epochs=2 both say when to stop"),
        (["--partitions", 0], "partitions"),
    ],
)
def test_bad_input_gets_one_clear_error(store, call, tmp_path, more, expected):
    said = call(*train(store, tmp_path / "run", *more), code=2)
    assert expected in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_two_processes_of_torchrun_give_what_one_gives(store, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    more = ["--eval-every", 5, "--activation", "batchtopk"]
    for name, launcher in (("one", [sys.executable]), ("two", torchrun)):
        command = [*launcher, "cli.py", *map(str, train(store, tmp_path / name, *more, "--json"))]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)  # once, by the first process
        assert (summary["outcome"], summary["step"]) == ("finished", len_of(tmp_path / name))
    one, two = (lines(tmp_path / name / "evaluation.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["mean"]["fvu"] == pytest.approx(b["mean"]["fvu"], rel=1e-3)
        assert a["mean"]["n_rows"] == b["mean"]["n_rows"]


def len_of(out):
    return lines(out / "metrics.jsonl")[-1]["step"]
