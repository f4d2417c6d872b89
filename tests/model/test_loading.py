"""Layer numbers as they are written; models and tokenizers from folders, over several devices, and what is refused."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn

from actcache.errors import ModelError, NotFoundError, UsageError
from actcache.model import FAMILIES, Decoder, load_model, load_skeleton, load_tokenizer, parse_layers
from tests.model.families import N_LAYERS, VOCAB, WIDTH, WRAPPERS, make

ASSETS = Path(__file__).parents[1] / "assets"
TINY_NEOX = ASSETS / "tiny-neox"


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)), (" all ", (0, 1, 2, 3, 4, 5)), ("5,0, 3", (0, 3, 5)), ("0:6", (0, 1, 2, 3, 4, 5)),
        ("2", (2,)), ("5,1:3", (1, 2, 5)),
    ],
)  # fmt: skip
def test_parse_layers(text, layers):
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither a layer nor a range"), ("a", "neither"), ("-1", "neither"), ("1,,2", "neither"), ("1.5", "neither"),
        ("0:", "neither"), (":3", "neither"), ("0:4:2", "neither"), ("3:3", "is empty"), ("4:2", "is empty"),
        ("6", "no layer 6; the model has 0 to 5"), ("0:7", "no layer 6"), ("1,1", "layer 1 is named twice"),
        ("2,0:3", "layer 2 is named twice"),
    ],
)  # fmt: skip
def test_parse_layers_refuses(text, message):
    with pytest.raises(UsageError, match=message):
        parse_layers(text, 6)


@pytest.fixture(scope="module")
def tiny_neox():
    return load_model(TINY_NEOX)


def test_tiny_neox_is_what_its_readme_says(tiny_neox):
    readme = (TINY_NEOX / "README.md").read_text()
    assert (tiny_neox.family, tiny_neox.n_layers, tiny_neox.width) == ("gpt_neox", 4, 128)
    assert (tiny_neox.vocab_size, tiny_neox.max_positions, tiny_neox.dtype) == (4096, 512, torch.float32)
    assert f"{sum(p.numel() for p in tiny_neox.causal_lm.parameters()):,} (float32)" in readme
    for name in ("model.safetensors", "tokenizer.json"):
        assert f"{hashlib.sha256((TINY_NEOX / name).read_bytes()).hexdigest()}  {name}" in readme


def test_tiny_neox_predicts_text(tiny_neox):
    lines = (ASSETS / "text" / "sotu.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    encoded = load_tokenizer(TINY_NEOX)(
        [json.loads(line)["text"] for line in lines], add_special_tokens=False
    )
    ids = torch.tensor([[0, *document[:255]] for document in encoded["input_ids"]])
    shuffled = ids[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]

    def loss(x):
        with torch.inference_mode():
            logits = tiny_neox.causal_lm(x, use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).item()

    assert loss(ids) < 4.6
    assert loss(shuffled) > 7  # uniform is log(4096) = 8.3


def test_load_model_in_another_dtype():
    assert load_model(str(TINY_NEOX), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UsageError, match="dtype 'fp8': expected auto, float32, bfloat16 or float16"):
        load_model(TINY_NEOX, dtype="fp8")


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY_NEOX / name, tmp_path / name)
    return tmp_path


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_load_model_refuses_missing_weights(folder):
    change_config(folder, num_hidden_layers=5)
    with pytest.raises(
        ModelError, match=r"12 parameters are not in the weights.*gpt_neox\.layers\.4.*would be random"
    ):
        load_model(folder)


def test_load_model_refuses_weights_of_another_shape(folder):
    change_config(folder, intermediate_size=256)
    with pytest.raises(ModelError, match=r"12 parameters.*have another shape there.*layers\.0\.mlp"):
        load_model(folder)


def test_load_model_refuses_another_family_before_reading_weights(folder):
    change_config(folder, model_type="bloom")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="family 'bloom'"):
        load_model(folder)


def test_load_model_refuses_what_transformers_does_not_know(folder):
    change_config(folder, model_type="nonsense")
    with pytest.raises(ModelError, match="names no model that transformers knows"):
        load_model(folder)


def test_load_model_without_safetensors_or_with_half_of_one(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ModelError, match=r"cannot be loaded.*Expected model\.safetensors"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded.*Expected model\.safetensors"):
        load_model(folder)


def test_load_model_from_a_folder_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("load", [load_model, load_skeleton, load_tokenizer])
def test_no_such_folder_never_asks_the_hub(tmp_path, load):
    for name in (tmp_path / "gone", str(tmp_path / "gone"), "./gone", "a/b/c", ""):
        with pytest.raises(NotFoundError, match="no such folder"):
            load(name)
    with pytest.raises(ModelError, match="a file; expected a folder"):
        load(TINY_NEOX / "config.json")


def test_a_folder_without_a_tokenizer_gives_none_that_is_made_up(folder):
    with pytest.raises(ModelError, match=r"Expected tokenizer\.json"):
        load_tokenizer(folder)


# Wrappers, skeletons, several devices.


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_model_of_images_and_text_loads_from_its_folder(name, tmp_path):
    whole = make(name)
    whole.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.family in FAMILIES
    assert loaded.weights_digest() == Decoder(whole).weights_digest()
    ids = torch.randint(0, VOCAB, (1, 7), generator=torch.Generator().manual_seed(0))
    for key, value in Decoder(whole).capture(ids, {"resid_post": (0, 2)}).items():
        assert torch.equal(loaded.capture(ids, {"resid_post": (0, 2)})[key], value)


def test_a_skeleton_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    skeleton = load_skeleton(folder)
    assert (skeleton.family, skeleton.n_layers, skeleton.width) == ("gpt_neox", 4, 128)
    assert not skeleton.has_weights


def test_a_family_that_is_no_language_model(folder):
    change_config(folder, model_type="clip")
    with pytest.raises(ModelError, match="family 'clip'"):
        load_skeleton(folder)


def test_device_map_spreads_a_model_and_changes_nothing():
    plain, spread = load_model(TINY_NEOX), load_model(TINY_NEOX, device_map="auto")
    assert spread.weights_digest() == plain.weights_digest()
    ids = torch.arange(20).view(2, 10)
    before, after = (d.capture(ids, {"resid_post": (0, 3)}) for d in (plain, spread))
    assert all(torch.equal(before[key], after[key].cpu()) for key in before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kept", ["cpu", "disk"])
def test_weights_that_are_kept_off_the_device(tied, kept, tmp_path):
    """What accelerate does with a model that does not fit: parameters come in when a module runs, and go again."""

    def fresh():
        model = make("llama" if tied else "qwen2")
        assert (len(list(model.parameters())) < len(list(model.state_dict()))) == tied
        return model

    plain, model = Decoder(fresh()), fresh()
    if kept == "cpu":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    else:
        model = accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    away = Decoder(model)
    assert {p.device.type for p in away.base.parameters()} == {"meta"}
    assert away.has_weights
    assert (away.device, away.dtype) == (plain.device, plain.dtype)
    assert away.weights_digest() == plain.weights_digest()
    assert away.hook_width("layers.*.mlp.up_proj:out") == 40
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    hooks = {"resid_post": (0, 1), "attn_out": (1,), "mlp_in": (1,)}
    expected = plain.capture(ids, hooks)
    for _ in range(2):  # ended early, the pass leaves nothing behind that a second one would trip over
        assert all(torch.equal(expected[key], value) for key, value in away.capture(ids, hooks).items())
    away.cut(1)
    assert all(torch.equal(expected[key], value) for key, value in away.capture(ids, hooks).items())
    assert {p.device.type for p in away.base.parameters()} == {"meta"}
    assert (away.n_layers, away.width) == (N_LAYERS, WIDTH)


def test_device_maps_that_are_none():
    with pytest.raises(UsageError, match="device map 'all': expected one of auto, balanced"):
        load_model(TINY_NEOX, device_map="all")


def test_device_map_without_accelerate_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        UsageError,
        match=r"device map 'auto'.*accelerate is not installed; run: pip install 'actcache\[accelerate\]'",
    ):
        load_model(TINY_NEOX, device_map="auto")


def test_capped_scores_are_computed_as_such(tmp_path, monkeypatch):
    """Gemma 2 caps attention scores; an implementation that leaves the cap out would give other rows."""
    whole = make("gemma2")
    whole.config.attn_logit_softcapping = 0.5
    whole.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config._attn_implementation == "eager"
    ids = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    capped = loaded.capture(ids, {"attn_out": (0,)})["attn_out", 0]
    for block in loaded.blocks:
        block.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(loaded.capture(ids, {"attn_out": (0,)})["attn_out", 0], capped, atol=1e-3)


def test_a_skeleton_that_cannot_tell_a_width_says_so(folder, monkeypatch):
    skeleton = load_skeleton(folder)

    def fail(**_):
        raise RuntimeError("unsupported scalarType")

    monkeypatch.setattr(skeleton.base, "forward", fail)
    with pytest.raises(UsageError, match=r"cannot tell the width of a module of gpt_neox without weights"):
        skeleton.hook_width("layers.*.mlp:in")
    assert skeleton.hook_width("mlp_in") == 128
