"""Export, push and import-sae on the command line."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch

import cli
from tests.conftest import write_store
from tests.test_cli import run
from tests.trainer.fake_hub import serve
from tests.trainer.saes import WIDTH, make_sae
from trainer.checkpoint import load_sae
from trainer.export import hub as hub_module
from trainer.export.formats import export


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments, code=0: run(monkeypatch, capsys, *arguments, code=code)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "acts.zarr"
    write_store(path, n_sequences=40, seq_len=16, per_shard=8, width=WIDTH, layers=(0, 3), n_holdout_shards=1)
    return path


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """A run on both layers, and a sweep of two."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for more in (["--out", folder / "run"], ["--out", folder / "sweep", "--sweep", "k=2,4"]):
            arguments = [
                "train",
                store,
                "--expansion",
                2,
                "--k",
                4,
                "--batch-rows",
                64,
                "--device",
                "cpu",
                *more,
            ]
            patch.setattr(sys, "argv", ["actcache", *map(str, arguments), "--json"])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert not stopped.value.code
    return folder


@pytest.mark.parametrize(
    "name", ["actcache", "saelens", "sparsify", "dictionary_learning", "openai", "mlsae"]
)
def test_out_and_in_again_scores_the_same(name, trained, store, call, tmp_path):
    said = json.loads(
        call("export", trained / "run", "--format", name, "--out", tmp_path / "out", "--json").out
    )
    assert said == {"format": name, "folders": [str(tmp_path / "out")], "commit": None}
    call("import-sae", tmp_path / "out", "--out", tmp_path / "again", "--store", store)
    scores = [
        json.loads(call("eval", folder, store, "--json", "--device", "cpu").out)["mean"]["fvu"]
        for folder in (trained / "run", tmp_path / "again")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_one_that_says_nothing_needs_a_store_or_layers(store, call, tmp_path):
    export(make_sae((0, 3), provenance={}), tmp_path / "sae", "openai")
    (tmp_path / "sae" / "actcache.json").unlink()
    weights = tmp_path / "sae" / "autoencoder.pt"
    assert "give --layers, or a --store" in call("import-sae", weights, "--out", tmp_path / "a", code=2).err
    said = call("import-sae", weights, "--out", tmp_path / "a", "--layers", "3", "--json").out
    assert json.loads(said)["layers"] == [3]
    assert "was not made by 'actcache train'" in call("eval", tmp_path / "a", store, code=2).err
    call("import-sae", weights, "--out", tmp_path / "b", "--store", store)
    assert load_sae(tmp_path / "b").layers == (0, 3)
    scores = json.loads(call("eval", tmp_path / "b", store, "--json", "--device", "cpu").out)
    assert set(scores["layers"]) == {"0", "3"}


def test_it_has_to_fit_the_store(store, call, tmp_path):
    export(make_sae((5,), provenance={}), tmp_path / "sae", "saelens")
    refused = call("import-sae", tmp_path / "sae", "--out", tmp_path / "a", "--store", store, code=2).err
    assert "holds layers [0, 3] at resid_post, not [5]" in refused
    write_store(tmp_path / "narrow.zarr", width=4)
    narrow = tmp_path / "narrow.zarr"
    refused = call("import-sae", tmp_path / "sae", "--out", tmp_path / "a", "--store", narrow, code=2).err
    assert "reads rows of width 12" in refused
    assert not (tmp_path / "a").exists()


def test_a_sweep_goes_out_together(trained, call, tmp_path):
    call("export", trained / "sweep", "--format", "saelens", "--out", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["k=2", "k=4"]
    assert json.loads((tmp_path / "out" / "k=2" / "cfg.json").read_text())["k"] == 2


def test_an_unfinished_one_of_a_sweep_stops_all(trained, call, tmp_path):
    shutil.copytree(trained / "sweep", tmp_path / "sweep")
    (tmp_path / "sweep" / "k=4" / "sae.json").unlink()
    assert "no finished run" in call("export", tmp_path / "sweep", "--out", tmp_path / "out", code=1).err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep"]


def test_to_the_hub_and_back(trained, store, call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with serve() as hub:
        for name in ("push", "download"):
            there = partial(getattr(hub_module, name), endpoint=hub.endpoint)
            monkeypatch.setattr(hub_module, name, there)
        arguments = ("--format", "mlsae", "--push-to", "you/one", "--private", "--no-model", "--json")
        said = json.loads(call("export", trained / "run", "--out", tmp_path / "out", *arguments).out)
        assert said["commit"].startswith(hub.endpoint)
        assert hub.private == {"you/one": True}
        call("push", tmp_path / "out", "you/two")
        assert hub.repos["you/two"] == hub.repos["you/one"]
        call("import-sae", "you/one", "--out", tmp_path / "again", "--store", store)
        assert "no such repository" in call("import-sae", "you/none", "--out", tmp_path / "x", code=1).err
        assert "is called OWNER/NAME" in call("import-sae", "nothing", "--out", tmp_path / "x", code=1).err
    ours = load_sae(trained / "run")
    again = load_sae(tmp_path / "again")
    assert torch.equal(again.sae.w_enc, ours.sae.w_enc)
    assert again.provenance["imported"]["from"] == "you/one"
    assert again.provenance["imported"]["revision"] == hub.sha("you/one")


def test_only_what_export_writes_is_pushed(call, tmp_path):
    (tmp_path / "out").mkdir()
    assert "holds no SAE" in call("push", tmp_path / "out", "you/one", code=2).err
    assert "no run in" in call("export", tmp_path / "out", "--out", tmp_path / "x", code=1).err


def test_kernels_are_chosen_by_name(store, call, tmp_path):
    refused = call("train", store, "--out", tmp_path / "run", "--kernels", "fast", code=2).err
    assert "expected one of auto, reference, sparse, triton" in refused
