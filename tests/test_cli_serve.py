"""`actcache serve`, and every command that reads a store given the address of one: as a person uses them."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import actcache
import cli
from actcache.service.access import Access
from actcache.service.server import Server
from tests.conftest import write_store
from tests.test_cli import run

TOKEN = "a-token-of-some-length"
TRAIN = (
    "--expansion",
    "2",
    "--k",
    "4",
    "--batch-rows",
    "64",
    "--window-rows",
    "1024",
    "--set",
    "warmup_steps=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("shelf")
    for name in ("a.zarr", "b.zarr"):
        write_store(found / name, n_sequences=24, seq_len=32, rows_per_chunk=32, width=16)
    return found


@pytest.fixture(scope="module")
def address(folder):
    server = Server(str(folder), Access(token=TOKEN))
    yield f"grpc://127.0.0.1:{server.port}"
    server.stop()


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("ACTCACHE_TOKEN_FILE", str(tmp_path / "token"))
    return lambda *arguments, code=0: run(monkeypatch, capsys, *arguments, code=code)


def test_commands_that_look_take_an_address(call, folder, address):
    url, local = f"{address}/a.zarr", folder / "a.zarr"
    assert [found["name"] for found in json.loads(call("info", address, "--json").out)["stores"]] == [
        "a.zarr",
        "b.zarr",
    ]
    assert "b.zarr" in call("info", address).out
    assert json.loads(call("info", url, "--json").out) == json.loads(call("info", local, "--json").out)
    assert "no problems" in call("verify", url).err
    look = json.loads(call("top", url, "--json").out)
    assert look["service"]["stores"] == ["a.zarr", "b.zarr"]
    assert "under way" in call("top", url, "--once").out
    assert json.loads(call("codecs", url, "--json").out)


def test_a_run_through_a_service_is_the_run_from_disk(call, folder, address, tmp_path):
    url, local = f"{address}/a.zarr", folder / "a.zarr"
    call("train", local, "--out", tmp_path / "local", *TRAIN, "--json")
    call("train", url, "--out", tmp_path / "served", *TRAIN, "--json")
    weights = [(tmp_path / name / "sae.safetensors").read_bytes() for name in ("local", "served")]
    assert weights[0] == weights[1]
    scores = [json.loads(call("eval", tmp_path / "local", where, "--json").out) for where in (local, url)]
    assert scores[0] == scores[1]
    call(
        "train", local, "--out", tmp_path / "served", *TRAIN, "--resume", "--json"
    )  # it is finished: same store


def test_commands_that_write_refuse_an_address(call, address):
    said = call("build", "--add", "--model", "m", "--out", f"{address}/a.zarr", code=1)
    assert "grpc" in said.err


def test_who_is_refused_is_told_why_and_nothing_else(call, address, folder, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("another-token-of-some-length")
    said = call("info", f"{address}/a.zarr", code=1).err
    assert "refused" in said
    assert "wants a token" in said
    assert str(folder) not in said
    monkeypatch.setenv("ACTCACHE_TOKEN_FILE", str(tmp_path / "nowhere"))
    assert "ACTCACHE_TOKEN_FILE" in call("info", f"{address}/a.zarr", code=2).err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--host", "0.0.0.0"), "nothing says who may come"),
        (("--tls-cert", "nowhere.pem"), "there is no file"),
        (("--token-file", "nowhere"), "--token-file nowhere"),
        (("--memory", "much"), "is not a size"),
    ],
)
def test_serve_refuses(call, folder, options, match, monkeypatch):
    monkeypatch.delenv("ACTCACHE_TOKEN_FILE")
    code = 1 if match == "there is no file" else 2
    assert match in call("serve", folder, "--port", "0", *options, code=code).err


def test_serve_until_it_is_told_to_stop(folder):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = [sys.executable, "cli.py", "serve", folder, "--port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(cli.__file__).parent,
        env={**os.environ, "ACTCACHE_TOKEN": TOKEN},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard)),
    )
    assert process.stdout is not None
    urls = [process.stdout.readline().strip() for _ in range(2)]
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] >= min(hard, 1 << 16)
    with actcache.open(urls[1], {"token": TOKEN}).stream(batch_size=8, window_rows=64) as stream:
        n_rows = sum(len(batch) for batch in stream)
    process.send_signal(signal.SIGTERM)
    _out, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "metrics at http://127.0.0.1:" in said
    assert f"{n_rows:,} rows in" in said
    assert TOKEN not in said
