"""The options of build and plan, as a person gives them: dry runs, mixtures, ids, conversations, additions, and mistakes."""

import json
import shutil
import sys

import numpy as np
import pytest

import actcache
import cli
from tests.conftest import ASSETS, read_texts
from tests.producer.test_build import snapshot
from tests.test_cli import run

MODEL = str(ASSETS / "tiny-neox")
TEXT = str(ASSETS / "text" / "sotu.jsonl")
SMALL = ["--tokens", 3000, "--seq-len", 50, "--layers", "0,2", "--holdout", 0.2, "--sequences-per-shard", 15]


@pytest.fixture(autouse=True)
def _fast(fast_disk):
    """No test here cuts the power."""


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments, code=0: run(monkeypatch, capsys, *arguments, code=code)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small store, built by the command line."""
    out = tmp_path_factory.mktemp("cli") / "s.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            [
                "actcache",
                *map(
                    str,
                    ["build", "--model", MODEL, "--corpus", TEXT, *SMALL, "--device", "cpu", "--out", out],
                ),
            ],
        )
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return out


@pytest.fixture
def store(built, tmp_path):
    return shutil.copytree(built, tmp_path / "s.zarr")


# plan


def test_plan_says_what_build_would_make_and_writes_nothing(call, tmp_path, monkeypatch, built):
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "--model", MODEL, "--corpus", TEXT, *SMALL, "--hook", "resid_post"]
    found = json.loads(call(*arguments, "--json", "--tokens-per-s", 100, "--read").out)
    grid = actcache.open(built).plan.grid
    assert found["grid"] == grid.as_json()
    assert found["n_tokens"] == 3000
    assert found["seconds"] == 30
    assert found["text"]["tokens_by_source"] == [["sotu.jsonl", 3000]]
    assert found["captures"][0]["bytes_by_codec"]["none"] == 3000 * 2 * 128 * 2
    said = call(
        *arguments, "--hook-module", "gpt_neox.layers.{}.mlp.dense_h_to_4h:in", "--tokens-per-s", 100
    ).out
    for words in (
        "3,000 tokens in 60 sequences of 50, 4 shards",
        "0 min 30 s",
        "mlp.dense_h_to_4h.in",
        "batch variance",
        "Nothing was written",
        "was not read",
    ):
        assert words in " ".join(said.split()), words
    assert list(tmp_path.iterdir()) == []


def test_plan_needs_no_weights(call, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (ASSETS / "tiny-neox" / name).exists():
            shutil.copyfile(ASSETS / "tiny-neox" / name, tmp_path / name)
    found = json.loads(call("plan", "--model", tmp_path, "--corpus", TEXT, *SMALL, "--json").out)
    assert found["captures"][0]["width"] == 128


def test_plan_has_the_options_of_build_but_those_of_a_run():
    import inspect

    own = set(inspect.signature(cli.plan).parameters)
    of_build = set(inspect.signature(cli.build).parameters)
    assert own - of_build == {"read", "tokens_per_s"}
    of_a_run = {"ctx", "model_dtype", "device", "device_map", "encode_threads", "add"}
    of_a_run |= {"max_disk", "consumers", "expire_after"}
    assert of_build - own == of_a_run


# build


def test_a_mixture_of_text_at_a_url_and_here(call, tmp_path, monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "store", {})
    lines = "".join(json.dumps({"text": text}) + "\n" for text in read_texts(55, 300))
    (tmp_path / "near.jsonl").write_text(lines)
    fsspec.filesystem("memory").pipe_file("/bucket/far.jsonl", lines.encode())
    out = tmp_path / "s.zarr"
    arguments = [
        "--model",
        MODEL,
        "--corpus",
        f"{tmp_path}/near.jsonl:0.25",
        "--corpus",
        "memory://bucket/far.jsonl:0.75",
    ]
    call("build", *arguments, *SMALL, "--out", out, "--device", "cpu")
    plan = actcache.open(out).plan
    assert plan.request.corpus.name == "near.jsonl + far.jsonl"
    assert [source.weight for source in plan.request.corpus.sources] == [0.25, 0.75]
    near, far = (source.n_tokens for source in plan.text.sources)
    assert near + far == 3000
    assert 600 < near < 900
    facts = json.loads(call("info", out, "--json").out)
    assert facts["corpus"] == "near.jsonl + far.jsonl"
    assert "Nothing to do" in call("build", *arguments, *SMALL, "--out", out, "--device", "cpu").err


def test_ids_and_conversations_and_isolation(call, tmp_path):
    ids = np.random.default_rng(0).integers(1, 4096, (60, 40)).astype(np.uint32)
    ids.tofile(tmp_path / "ids.bin")
    call(
        *[
            "build",
            "--model",
            MODEL,
            "--corpus",
            tmp_path / "ids.bin",
            "--token-dtype",
            "uint32",
            "--document-tokens",
            40,
        ],
        *[
            "--seq-len",
            64,
            "--isolate-documents",
            "--exclude-first",
            3,
            "--separator",
            "bos",
            "--holdout",
            0.2,
            "--layers",
            1,
        ],
        *["--out", tmp_path / "ids.zarr", "--device", "cpu"],
    )
    store = actcache.open(tmp_path / "ids.zarr")
    request = store.plan.request
    (source,) = request.corpus.sources
    assert (source.kind, source.token_dtype, source.document_tokens) == ("ids", "uint32", 40)
    assert (request.isolate_documents, source.separator_id) == (True, 0)
    for d in range(60):
        assert sorted(store.tokens[store.document == d].tolist()) == [0, *sorted(ids[d].tolist())]
    talks = [[{"role": "user", "content": f"Number {i} " * 8}] for i in range(40)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"turns": talk}) + "\n" for talk in talks))
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    call(
        *[
            "build",
            "--model",
            MODEL,
            "--corpus",
            tmp_path / "talks.jsonl",
            "--text-column",
            "turns",
            "--packing",
            "document",
        ],
        *["--chat-template", tmp_path / "mine.jinja", "--seq-len", 64, "--holdout", 0.2, "--layers", 1],
        *["--out", tmp_path / "talks.zarr", "--device", "cpu"],
    )
    store = actcache.open(tmp_path / "talks.zarr")
    from actcache.model import load_tokenizer

    (at,) = np.flatnonzero((store.document == 7).any(1))
    text = load_tokenizer(MODEL).decode(store.tokens[at][store.document[at] == 7])
    assert text == "[user] " + "Number 7 " * 8
    assert store.plan.request.packing == "document"


def test_add_takes_everything_else_from_the_store(call, store):
    before = snapshot(store)
    call("build", "--add", "--model", MODEL, "--out", store, "--layers", "1,3")
    call(
        "build",
        "--add",
        "--model",
        MODEL,
        "--out",
        store,
        "--hook-module",
        "layers.*.mlp.dense_h_to_4h",
        "--layers",
        2,
    )
    facts = json.loads(call("info", store, "--json").out)["captures"]
    assert {name: c["layers"] for name, c in facts.items()} == {
        "resid_post": [0, 2],
        "resid_post.2": [1, 3],
        "mlp.dense_h_to_4h.out": [2],
    }
    assert all(c["complete"] for c in facts.values())
    assert facts["mlp.dense_h_to_4h.out"]["hook"] == "layers.*.mlp.dense_h_to_4h:out"
    assert json.loads(call("verify", store, "--json").out)["problems"] == []
    after = snapshot(store)
    assert {name: after[name] for name in before} == before
    summary = json.loads(
        call("build", "--add", "--model", MODEL, "--out", store, "--layers", "1,3", "--json").out
    )
    assert summary["n_built"] == 0
    build = ["build", "--model", MODEL, "--corpus", TEXT, *SMALL, "--device", "cpu", "--out", store]
    assert "Nothing to do" in call(*build).err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--seed", 3, "--corpus", TEXT], 2, "--add takes the plan from s.zarr: leave out --corpus, --seed"),
        (
            ["--hook", "resid_post"],
            2,
            "layers [0, 2] of resid_post are in s.zarr already (capture resid_post); add the others: --layers 1,3",
        ),
        (
            ["--hook", "mlp_out", "--model-dtype", "bfloat16"],
            1,
            "compute_dtype is 'float32' there and 'bfloat16' here",
        ),
        (["--hook", "mlp_out", "--shard-memory", "1kB"], 2, "--shard-memory"),
        (["--hook-module", "layers.*.nose"], 2, "has no module 'nose'"),
    ],
)
def test_what_add_refuses(call, store, monkeypatch, arguments, code, expected):
    monkeypatch.chdir(store.parent)
    before = snapshot(store)
    said = call("build", "--add", "--model", MODEL, "--out", "s.zarr", *arguments, code=code).err
    assert expected in said
    assert "Traceback" not in said
    assert snapshot(store) == before


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ([], 2, "--corpus is missing"),
        (["--corpus", TEXT, "--corpus", TEXT], 2, "no weights: the first would give all. Give each a share"),
        (["--corpus", f"{TEXT}:0.5", "--corpus", TEXT], 2, "1 of 2 corpora have a weight"),
        (["--corpus", f"{TEXT}:much"], 2, "'much' is no weight"),
        (["--corpus", TEXT, "--ids-column", "a", "--text-column", "b"], 2, "leave out --text-column"),
        (
            ["--corpus", TEXT, "--ids-column", "text"],
            1,
            "sotu.jsonl, line 1: column 'text' holds no list of integers",
        ),
        (["--corpus", TEXT, "--chat-template", "tokenizer"], 2, "chat template 'tokenizer': tokenizer"),
        (["--corpus", TEXT, "--packing", "tight"], 2, "--packing tight: expected one of packed, document"),
        (
            ["--corpus", TEXT, "--separator", "pad"],
            2,
            "--separator pad: expected one of auto, eos, bos, none",
        ),
        (
            ["--corpus", TEXT, "--packing", "document", "--isolate-documents"],
            2,
            "a sequence holds one document already",
        ),
        (["--corpus", TEXT, "--hook-module", "layers.1.mlp"], 2, "write * for the layer's number"),
        (["--corpus", TEXT, "--hook", "nose"], 2, "no hook 'nose'"),
        (["--corpus", "nose://x"], 2, "corpus nose://x"),
        (["--corpus", TEXT, "--document-tokens", 0], 2, "--document-tokens 0: expected at least 1"),
    ],
)
@pytest.mark.parametrize("command", ["build", "plan"])
def test_mistakes_get_one_clear_error_from_build_and_plan(
    call, tmp_path, monkeypatch, command, arguments, code, expected
):
    monkeypatch.chdir(tmp_path)
    read = ["--read"] if command == "plan" else []
    said = call(command, "--model", MODEL, *SMALL, "--out", "s.zarr", *arguments, *read, code=code).err
    assert expected in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_no_accelerate(call, tmp_path, monkeypatch):
    import importlib.util

    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else whole(name, *a)
    )
    arguments = [
        "build",
        "--model",
        MODEL,
        "--corpus",
        TEXT,
        *SMALL,
        "--device-map",
        "auto",
        "--out",
        tmp_path / "s.zarr",
    ]
    said = call(*arguments, code=2).err
    assert "pip install 'actcache[accelerate]'" in said
    monkeypatch.undo()


def test_device_map_auto(call, tmp_path, built):
    arguments = [
        "build",
        "--model",
        MODEL,
        "--corpus",
        TEXT,
        *SMALL,
        "--device-map",
        "auto",
        "--out",
        tmp_path / "s.zarr",
    ]
    call(*arguments)
    one, other = (actcache.open(root) for root in (built, tmp_path / "s.zarr"))
    assert one.plan.digest == other.plan.digest
