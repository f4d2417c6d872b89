"""The command line, as a person uses it: build, continue, look, check, train, resume, evaluate; and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli
from actcache.store.schema import Plan

ASSETS = Path(__file__).parent / "assets"
BUILD = [
    "build",
    "--model",
    str(ASSETS / "tiny-neox"),
    "--corpus",
    str(ASSETS / "text"),
    "--tokens",
    "12000",
    "--seq-len",
    "50",
    "--layers",
    "0,2:4",
    "--holdout",
    "0.2",
    "--device",
    "cpu",
]


def run(monkeypatch, capsys, *arguments, code=0):
    """Call the command line in this process; returns (standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["actcache", *map(str, arguments)])
    monkeypatch.setattr(cli.console, "_file", None, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        cli.console, "_width", 200
    )  # nothing a test looks for is broken in two by a long path
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    capture = capsys.readouterr()
    assert (stopped.value.code or 0) == code, capture.err
    return capture


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "acts.zarr"
    subprocess.run(
        [sys.executable, "cli.py", *BUILD, "--out", out, "--json"], check=True, cwd=Path(cli.__file__).parent
    )
    return out


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments, code=0: run(monkeypatch, capsys, *arguments, code=code)


def test_build_again_does_nothing_and_other_arguments_are_refused(store, call):
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*")}
    assert "Nothing to do" in call(*BUILD, "--out", store).err
    refused = call(*BUILD, "--out", store, "--seed", 5, "--codec", "lz4", "--exclude-first", 3, code=1).err
    for line in (
        "seed is 0 there and 5 here",
        "codec is 'zstd' there and 'lz4' here",
        "exclude_first is 1 there and 3 here",
    ):
        assert line in refused
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*")} == before


def test_codecs_are_tried_on_a_store_and_on_a_model(store, call):
    found = json.loads(call("codecs", store, "--sample", "1MB", "--json").out)
    assert list(found["codecs"]) == ["zstd", "lz4", "none", "uint8"]
    assert found["recommended"] in ("zstd", "lz4", "none")
    assert set(found["codecs"]["uint8"]["error"]) == {"0", "2", "3"}
    said = call("codecs", store, "--layers", "2").out
    assert "layers 2" in said
    assert "worst dimension" in said
    sample = BUILD[1:5]
    of_model = json.loads(call("codecs", *sample, "--tokens", "2048", "--dtype", "float32", "--json").out)
    assert of_model["row_bytes"] == 128 * 4
    assert of_model["codecs"]["uint8"]["ratio"] > 3
    for wrong in ([], [store, *sample], ["--model", "x"]):
        assert "give a STORE, or --model and --corpus" in call("codecs", *wrong, code=2).err


def test_the_build_ends_with_its_stages(call, tmp_path):
    shown = call(*BUILD, "--out", tmp_path / "s.zarr", "--codec", "uint8").err
    for word in ("forward", "encode", "write", "sync and commit", "the bottleneck was: forward", "tok/s"):
        assert word in shown
    facts = json.loads(call("info", tmp_path / "s.zarr", "--json").out)["captures"]["resid_post"]
    assert max(facts["fvu_of_quantising"]) <= max(facts["fvu_of_worst_dimension"]) < 5e-4


def test_info_says_what_is_there(store, call):
    facts = json.loads(call("info", store, "--json").out)
    assert facts["tokens"] == 12000
    assert facts["captures"]["resid_post"]["layers"] == [0, 2, 3]
    assert facts["captures"]["resid_post"]["complete"]
    plan = json.loads((store / "zarr.json").read_text())["attributes"]["actcache"]["plan"]
    assert facts["digest"] == Plan.model_validate_json(json.dumps(plan)).digest
    said = call("info", store).out
    assert "12,000" in said
    assert "tiny-neox" in said


def test_verify_lists_problems_and_fails(store, call, tmp_path):
    assert json.loads(call("verify", store, "--json").out)["problems"] == []
    damaged = tmp_path / "damaged.zarr"
    subprocess.run(["cp", "-r", store, damaged], check=True)
    target = damaged / "acts" / "resid_post" / "rows" / "c.0.0.0"
    data = bytearray(target.read_bytes())
    data[1000] ^= 1
    target.write_bytes(data)
    (damaged / "tokens" / "c.1.0").unlink()
    found = json.loads(call("verify", damaged, "--json", code=1).out)["problems"]
    assert {p["object"] for p in found} == {"acts/resid_post/rows/c.0.0.0", "tokens/c.1.0"}
    said = call("verify", damaged, code=1)
    assert "tokens/c.1.0: is missing" in said.out
    assert "2 problems" in said.err


def test_repair_mends_a_shard_and_says_so(store, call, tmp_path):
    damaged = tmp_path / "damaged.zarr"
    subprocess.run(["cp", "-r", store, damaged], check=True)
    assert "nothing to do" in call("repair", damaged).err
    (damaged / "acts/resid_post/rows/c.0.0.0").unlink()
    assert "--model" in call("repair", damaged, code=2).err
    found = json.loads(call("repair", damaged, "--model", ASSETS / "tiny-neox", "--json").out)
    assert found["rebuilt"] == [["resid_post", 0]]
    assert (found["left"], found["build"]["n_built"]) == ([], 1)
    assert json.loads(call("verify", damaged, "--json").out)["problems"] == []
    (damaged / "acts/resid_post/norm/g1.0.0").write_bytes(b"")
    (damaged / "keep/c.1.0").unlink()
    said = call("repair", damaged, "--model", ASSETS / "tiny-neox", code=1)
    assert "shard 0 of resid_post: rebuilt" in said.err
    assert "keep/c.1.0: is missing" in said.out


def train_arguments(store, out):
    return [
        "train",
        store,
        "--out",
        out,
        "--expansion",
        2,
        "--k",
        8,
        "--batch-rows",
        512,
        "--epochs",
        2,
        "--device",
        "cpu",
    ]


def test_train_then_eval(store, call, tmp_path):
    said = call(*train_arguments(store, tmp_path / "run")).err
    assert "Left out: " in said
    assert "finished after" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "train_fvu", "dead_frac", "rows_per_s", "waited_s"} <= set(lines[-1])
    assert set(lines[-1]["train_fvu"]) == {"0", "2", "3"}
    assert "Nothing to do" in call(*train_arguments(store, tmp_path / "run"), "--resume").err
    assert "already holds a run" in call(*train_arguments(store, tmp_path / "run"), code=2).err
    picture = tmp_path / "picture.png"
    scores = json.loads(
        call("eval", tmp_path / "run", store, "--json", "--picture", picture, "--device", "cpu").out
    )
    assert set(scores["layers"]) == {"0", "2", "3"}
    assert 0 < scores["mean"]["fvu"] < scores["mean"]["fvu_k0"]
    assert picture.exists()
    assert "k=0" in call("eval", tmp_path / "run", store, "--device", "cpu").out


def test_an_unfinished_store_is_trained_on_as_it_was(store, call, tmp_path):
    """--resume goes on with the shards that were committed when the run began, whatever was committed since."""
    unfinished = tmp_path / "unfinished.zarr"
    subprocess.run(["cp", "-r", store, unfinished], check=True)
    record = max(
        (unfinished / "acts/resid_post/ledger").glob("c.0.*"), key=lambda p: int(p.name.split(".")[2])
    )
    text = record.read_bytes()
    record.unlink()
    arguments = train_arguments(unfinished, tmp_path / "run")
    assert "partial=True (--partial)" in call(*arguments, code=1).err
    assert "partial=True (--partial)" in call("info", unfinished, "--shuffle", code=1).err
    quality = ("info", unfinished, "--shuffle", "--partial", "--json", "--batch-size", 256, "--run-chunks", 2)
    assert json.loads(call(*quality).out)["shuffle"]["n_batches"] > 10
    assert json.loads(call("bench", unfinished, "--seconds", 0.01, "--rounds", 1, "--json").out)["stream"] > 0
    assert "finished after" in call(*arguments, "--partial").err
    record.write_bytes(text)
    assert "Nothing to do" in call(*arguments, "--partial", "--resume").err
    assert "Nothing to do" in call(*arguments, "--resume").err
    scores = json.loads(call("eval", tmp_path / "run", unfinished, "--json", "--device", "cpu").out)
    assert 0 < scores["mean"]["fvu"] < 1


def test_a_terminated_run_resumes_to_the_same_bits(store, tmp_path):
    """SIGTERM in the middle: exit 130 and a checkpoint; resumed, the SAE equals an undisturbed one byte for byte."""
    root = Path(cli.__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def command(out):
        more = ["--checkpoint-every", 5, "--epochs", 6]
        return [sys.executable, "cli.py", *map(str, [*train_arguments(store, out), *more])]

    subprocess.run(command(tmp_path / "straight"), check=True, cwd=root, env=environment, capture_output=True)
    process = subprocess.Popen(
        command(tmp_path / "cut"), cwd=root, env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("checkpoints/step-*")) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint appeared"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (130, 0)  # 0 where the run was faster than the signal
    subprocess.run(
        [*command(tmp_path / "cut"), "--resume"], check=True, cwd=root, env=environment, capture_output=True
    )
    results = [(tmp_path / name / "sae.safetensors").read_bytes() for name in ("straight", "cut")]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["info", "nowhere.zarr"], 1, "no store at nowhere.zarr"),
        ([*BUILD[:2], "nowhere/at/all/x", *BUILD[3:], "--out", "x.zarr"], 1, "nowhere/at/all/x"),
        ([*BUILD, "--out", "x.zarr", "--layers", "9"], 2, "no layer 9"),
        ([*BUILD, "--out", "x.zarr", "--dtype", "int8"], 2, "expected one of bfloat16, float16, float32"),
        ([*BUILD, "--out", "x.zarr", "--shard-memory", "much"], 2, "'much' is not a size"),
        (  # one layer, so that what is asked for fits any disk
            [*BUILD, "--out", "x.zarr", "--layers", "0", "--tokens", "300000"],
            1,
            "the corpus is too short",
        ),
        ([*BUILD, "--out", "x.zarr", "--exclude-first", "50"], 2, "more would keep nothing"),
        ([*BUILD, "--out", "x.zarr", "--device", "cuda:9999"], 2, "--device cuda:9999"),
        ([*BUILD, "--out", "x.zarr", "--hook", "nose"], 2, "nose"),
    ],
)
def test_bad_input_gets_one_clear_error(call, tmp_path, monkeypatch, arguments, code, expected):
    monkeypatch.chdir(tmp_path)
    said = call(*arguments, code=code)
    assert expected in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "x.zarr").exists()
    assert not list(tmp_path.glob("*planning*"))


def test_a_wrong_run_or_selection_is_refused(store, call, tmp_path):
    assert "layer" in call("train", store, "--out", tmp_path / "r", "--layers", "1", code=2).err
    assert "too little" in call("train", store, "--out", tmp_path / "r", "--memory", "1MB", code=1).err
    assert "no finished run" in call("eval", tmp_path / "r", store, code=1).err
