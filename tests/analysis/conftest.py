"""A tiny model, a store of all its layers and a run on them, as the command line makes them."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

import actcache
import cli
from actcache.model import Decoder
from analysis.models import Model
from analysis.subject import Subject, load_subject
from tests.conftest import make_decoder, no_sync, small_settings

FILTER = ["--outlier-norm-ratio", "1.3"]
"""Low, so that rows are left out, different ones at every layer."""


def run_cli(*arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["actcache", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code, stopped.value.code


@pytest.fixture(scope="session")
def tiny(kit, tmp_path_factory) -> Path:
    """A folder with `store.zarr` (3 shards of 8 sequences of 16 tokens, one held out, position 0 excluded) and `run`."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = small_settings(
        folder / "store.zarr", exclude_first=1, dtype="float32", hooks=("resid_post", "mlp_in", "mlp_out")
    )
    with no_sync():
        kit.build(settings)
        train(folder / "store.zarr", folder / "run", "--hook", "resid_post")
    return folder


def train(store: Path, out: Path, *more) -> None:
    run_cli(
        "train", store, "--out", out, "--expansion", 4, "--k", 6, "--batch-rows", 64, "--epochs", 6, "--lr", 5e-3, "--auxk", 0,
        "--device", "cpu", *FILTER, *more,
    )  # fmt: skip


@pytest.fixture
def store_and_run(tiny, tmp_path) -> Path:
    """A copy of it, to be broken."""
    shutil.copytree(tiny, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def subject(tiny) -> Subject:
    return load_subject(tiny / "run", actcache.open(tiny / "store.zarr"))


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    """The model the store was built with, whole."""
    return make_decoder()


@pytest.fixture(scope="session")
def model(decoder, tokenizer) -> Model:
    return Model(decoder, tokenizer)


@pytest.fixture(scope="session")
def acts(subject) -> dict[int, torch.Tensor]:
    """[q, t, d] of every layer of the holdout, as the store gives them by place."""
    n = subject.store.plan.grid.n_holdout_sequences
    return {layer: subject.store.read(layer=layer, sequences=slice(0, n)) for layer in subject.layers}
