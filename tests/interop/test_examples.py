"""The example scripts run as they are, peers load what they wrote, and the how-to pages show those scripts."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import actcache
from tests.docs.pages import DOCS, ROOT, blocks
from tests.interop.rows import LAYER, WIDTH, fvu, make_rows

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

STEPS = 120
NAMES = ("saelens", "dictionary_learning", "sparsify")


def example(name: str) -> Path:
    return ROOT / "examples" / f"{name}_from_store.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("interop"))


@pytest.fixture
def run(rows, tmp_path, monkeypatch):
    def run_example(name: str) -> Path:
        out = tmp_path / "sae"
        monkeypatch.setattr(sys, "argv", [name, str(rows.path), str(out), str(STEPS)])
        runpy.run_path(str(example(name)), run_name="__main__")
        return out

    return run_example


def test_saelens(run, rows):
    out = run("saelens")
    from sae_lens import SAE

    sae = SAE.load_from_disk(out)
    assert sae.cfg.metadata.hook_name == f"blocks.{LAYER}.hook_resid_post"
    assert sae.cfg.metadata.model_name == actcache.open(rows.path).plan.request.model.name
    assert fvu(sae, rows.heldout) < 0.8


def test_dictionary_learning(run, rows):
    folder = run("dictionary_learning") / "trainer_0"
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    assert json.loads((folder / "config.json").read_text())["trainer"]["layer"] == LAYER
    assert fvu(AutoEncoderTopK.from_pretrained(folder / "ae.pt"), rows.heldout) < 0.8


def test_sparsify(run, rows):
    out = run("sparsify")
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(out / f"layers.{LAYER}")
    assert coder.d_in == WIDTH
    assert fvu(lambda x: coder(x).sae_out, rows.heldout) < 0.8


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_example(name):
    page = DOCS / "how-to" / f"train-with-{name.replace('_', '-')}.md"
    code = example(name).read_text(encoding="utf-8").split('"""\n\n', 1)[1]
    assert code in [block.text for block in blocks(page)]
