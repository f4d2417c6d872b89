"""What `export` writes is loaded by the real packages, which compute what our SAE computes; what they save is read back.

openai's and mlsae's code is on no package index: tests/trainer/test_export.py judges those formats.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.interop.peers import make_saelens, train_dictionary_learning
from tests.interop.rows import LAYER, STEPS, WIDTH, K, make_rows, shuffled
from tests.trainer.saes import compute, make_sae, relative
from trainer.checkpoint import load_sae
from trainer.export.formats import detect, export, read
from trainer.export.run import write_run

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

NEAR = 1e-5


class Loaded(NamedTuple):
    """An SAE in a package of its own: rows in, dense activations and what comes out; how it saves itself to a folder."""

    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    save: Callable[[Path], object]


def saelens(folder: Path) -> Loaded:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    return Loaded(lambda x: (sae.encode(x), sae(x)), sae.save_model)


def sparsify(folder: Path) -> Loaded:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out = coder(x)
        acts = torch.zeros(len(x), coder.num_latents).scatter_add_(1, out.latent_indices, out.latent_acts)
        return acts, out.sae_out

    return Loaded(run, coder.save_to_disk)


def dictionary_learning(folder: Path) -> Loaded:
    from dictionary_learning.utils import load_dictionary

    sae, config = load_dictionary(str(folder), device="cpu")

    def save(out: Path) -> None:
        out.mkdir()
        torch.save(sae.state_dict(), out / "ae.pt")
        (out / "config.json").write_text(json.dumps(config))

    return Loaded(lambda x: (sae.encode(x), sae(x)), save)


LOADERS = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}

RAW, STANDARDISED = "raw", "standardised"  # what the package has to be given

CASES = [
    ("saelens", RAW, {}),
    ("saelens", RAW, {"latent_bias": True}),
    ("saelens", RAW, {"layers": (0, 3, 5)}),
    ("saelens", RAW, {"standardise": "layer", "latent_bias": True}),
    ("saelens", RAW, {"activation": "batchtopk"}),
    ("saelens", RAW, {"activation": "relu", "latent_bias": True}),
    ("saelens", RAW, {"form": "crosscoder", "layers": (1, 2)}),
    ("saelens", STANDARDISED, {"form": "feature", "layers": (1, 2)}),
    ("saelens", RAW, {"form": "transcoder", "activation": "batchtopk", "out_width": 9}),
    ("saelens", RAW, {"form": "transcoder", "activation": "relu", "standardise": "layer", "skip": True}),
    ("saelens", STANDARDISED, {"form": "transcoder", "activation": "relu", "skip": True}),
    ("sparsify", STANDARDISED, {}),
    ("sparsify", STANDARDISED, {"layers": (0, 3, 5), "latent_bias": True}),
    ("sparsify", RAW, {"standardise": "layer"}),
    ("sparsify", RAW, {"form": "crosscoder", "layers": (1, 2)}),
    ("sparsify", RAW, {"form": "transcoder", "standardise": "layer", "skip": True, "latent_bias": True}),
    ("sparsify", STANDARDISED, {"form": "transcoder"}),
    ("dictionary_learning", STANDARDISED, {"latent_bias": True}),
    ("dictionary_learning", RAW, {"standardise": "layer"}),
    ("dictionary_learning", RAW, {"standardise": "layer", "activation": "batchtopk"}),
    ("dictionary_learning", STANDARDISED, {"activation": "relu", "latent_bias": True}),
    ("dictionary_learning", RAW, {"activation": "relu", "standardise": "layer"}),
    ("dictionary_learning", RAW, {"form": "crosscoder", "layers": (1, 2)}),
]


@pytest.mark.parametrize(
    ("name", "given", "settings"),
    CASES,
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
@torch.no_grad()
def test_the_package_computes_what_we_compute(name, given, settings, tmp_path):
    trained = make_sae(**settings)
    ours = compute(trained)
    export(trained, tmp_path / "theirs", name)
    loaded = LOADERS[name](tmp_path / "theirs")
    acts, out = loaded.run(ours.x if given == RAW else ours.z)
    expected = ours.xhat if given == RAW else ours.zhat
    assert relative(out, expected) <= NEAR
    if name == "dictionary_learning" and settings.get("activation") == "relu":
        assert torch.equal(acts > 0, ours.acts > 0)  # in units of decoder rows of norm 1
    else:
        assert relative(acts, ours.acts) <= NEAR
        assert torch.equal(acts > 0, ours.acts > 0)
    loaded.save(tmp_path / "saved")
    for folder in ("theirs", "saved"):  # read back from what we wrote, and from what the package made of it
        again = imported(tmp_path / folder, tmp_path / f"{folder}-run", trained.layers)
        if folder == "theirs" or name != "sparsify":
            back = compute(again)
            assert torch.equal(back.acts > 0, ours.acts > 0)
            assert relative(back.xhat, ours.xhat) <= NEAR
        else:  # sparsify drops our note: what it saved is an SAE of rows as it was given them
            code = again.encode(ours.x if given == RAW else ours.z)
            assert relative(again.decode(code), expected) <= NEAR


def imported(folder: Path, out: Path, layers: tuple[int, ...]):
    found = read(folder)
    assert not found.layers or set(found.layers) <= set(layers)
    write_run(found.make(found.layers or layers[:1], found.provenance), out)
    return load_sae(out)


def test_the_configurations_say_where_an_sae_belongs(tmp_path):
    from sae_lens import SAE

    trained = make_sae()
    for name in LOADERS:
        export(trained, tmp_path / name, name)
        assert detect(tmp_path / name) == name
    sae = SAE.load_from_disk(tmp_path / "saelens")
    assert sae.cfg.metadata.model_name == "someone/a-model"
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert sae.cfg.metadata.actcache["provenance"]["plan"] == "0123456789abcdef"
    for name, file in (("sparsify", "cfg.json"), ("dictionary_learning", "config.json")):
        config = json.loads((tmp_path / name / file).read_text())
        assert "each row is standardised first" in config["actcache"]["rows"]
        assert config["actcache"]["layers"] == [3]


@pytest.mark.parametrize("name", LOADERS)
@torch.no_grad()
def test_the_code_on_the_card_runs(name, tmp_path):
    trained = make_sae()
    export(trained, tmp_path / "out", name)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    ours = compute(trained)
    names = {"rows": ours.x if name == "saelens" else ours.z}
    exec(code.replace("FOLDER", str(tmp_path / "out")), names)
    assert relative(names["restored"], ours.xhat if name == "saelens" else ours.zhat) <= NEAR


# What their trainers make is read as it is.


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("interop"))


@torch.no_grad()
def test_an_sae_trained_by_saelens(rows, tmp_path):
    with torch.enable_grad():
        sae = make_saelens(shuffled(rows.train, 0), 0).fit()
    sae.cfg.metadata.hook_name = f"blocks.{LAYER}.hook_resid_post"
    sae.save_inference_model(tmp_path / "theirs")
    theirs = saelens(tmp_path / "theirs").run(rows.heldout)[1]
    ours = imported(tmp_path / "theirs", tmp_path / "run", (LAYER,))
    assert relative(ours.decode(ours.encode(rows.heldout)), theirs) <= NEAR


@torch.no_grad()
def test_an_sae_trained_by_dictionary_learning(rows, tmp_path):
    with torch.enable_grad():
        sae = train_dictionary_learning(shuffled(rows.train, 0), 0)
    (tmp_path / "theirs").mkdir()
    torch.save(sae.state_dict(), tmp_path / "theirs" / "ae.pt")
    ours = imported(tmp_path / "theirs", tmp_path / "run", (LAYER,))
    assert relative(ours.decode(ours.encode(rows.heldout)), sae(rows.heldout)) <= NEAR


@torch.no_grad()
def test_a_batch_topk_sae_of_saelens(rows, tmp_path):
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    training = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=64, k=K))
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * 32, train_batch_size_samples=128, lr=3e-3, lr_end=3e-4
    )
    with torch.enable_grad():
        sae = SAETrainer(cfg=cfg, sae=training, data_provider=shuffled(rows.train, 0)).fit()
    sae.save_inference_model(tmp_path / "theirs")
    acts, out = saelens(tmp_path / "theirs").run(rows.heldout)
    ours = imported(tmp_path / "theirs", tmp_path / "run", (LAYER,))
    code = ours.encode(rows.heldout)
    assert 0 < float((acts > 0).float().sum(1).mean()) < 64
    assert int((code.values > 0).sum()) == int((acts > 0).sum())
    assert relative(ours.decode(code), out) <= NEAR
