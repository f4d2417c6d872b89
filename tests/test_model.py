"""Captured vectors against transformers' own hidden states and against the blocks' modules run by hand."""

import hashlib
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from actcache import model as subject
from actcache.errors import ModelError, NotFoundError, UsageError
from actcache.model import HOOKS, Decoder, load_model, load_tokenizer, parse_layers

ASSETS = Path(__file__).parent / "assets"
TINY_NEOX = ASSETS / "tiny-neox"
N_LAYERS, WIDTH, VOCAB, POSITIONS = 3, 16, 50, 32


def _neox(parallel):
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=N_LAYERS, num_attention_heads=2, intermediate_size=40,
            max_position_embeddings=POSITIONS, use_parallel_residual=parallel,
        )
    )  # fmt: skip


def _gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=WIDTH,
            n_layer=N_LAYERS,
            n_head=2,
            n_positions=POSITIONS,
            pad_token_id=None,
        )
    )


def _llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=N_LAYERS, num_attention_heads=4, intermediate_size=40,
            num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
        )
    )  # fmt: skip


MAKERS = {
    "gpt_neox": lambda: _neox(True),
    "gpt_neox, sequential": lambda: _neox(False),
    "gpt2": _gpt2,
    "llama": _llama,
}


@pytest.fixture(params=MAKERS)
def decoder(request):
    causal_lm = MAKERS[request.param]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in causal_lm.parameters():  # large enough that a misplaced hook shows
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return Decoder(causal_lm, name=request.param)


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))


def all_layers(*hooks):
    return {hook: tuple(range(N_LAYERS)) for hook in hooks or HOOKS}


def hidden_states(decoder, ids):
    with torch.inference_mode():
        return decoder.base(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states


def final_norm(decoder):
    return {"gpt_neox": "final_layer_norm", "gpt2": "ln_f", "llama": "norm"}[decoder.family]


def blocks(decoder):
    return decoder.base.h if decoder.family == "gpt2" else decoder.base.layers


def run_block_by_hand(decoder, block, x):
    """attn_out, mlp_in, mlp_out and the block's output, from its own modules."""
    positions = torch.arange(x.shape[1])[None]
    if decoder.family == "gpt2":
        attn = block.attn(block.ln_1(x), attention_mask=None)[0]
        mlp_in = block.ln_2(x + attn)
    elif decoder.family == "llama":
        rotary = decoder.base.rotary_emb(x, positions)
        attn = block.self_attn(block.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
        mlp_in = block.post_attention_layernorm(x + attn)
    else:
        rotary = decoder.base.rotary_emb(x, positions)
        attn = block.attention(block.input_layernorm(x), attention_mask=None, position_embeddings=rotary)[0]
        parallel = decoder.base.config.use_parallel_residual
        mlp_in = block.post_attention_layernorm(x if parallel else x + attn)
    mlp = block.mlp(mlp_in)
    return {"attn_out": attn, "mlp_in": mlp_in, "mlp_out": mlp, "resid_post": x + attn + mlp}


def test_resid_equals_transformers_hidden_states(decoder, ids):
    expected = hidden_states(decoder, ids)
    acts = decoder.capture(ids, all_layers("resid_pre", "resid_post"))
    for layer in range(N_LAYERS):
        torch.testing.assert_close(acts["resid_pre", layer], expected[layer], rtol=0, atol=0)
    for layer in range(N_LAYERS - 1):
        torch.testing.assert_close(acts["resid_post", layer], expected[layer + 1], rtol=0, atol=0)


def test_last_block_is_captured_before_the_final_norm(decoder, ids):
    expected = hidden_states(decoder, ids)
    acts = decoder.capture(ids, {"resid_post": [N_LAYERS - 1]})["resid_post", N_LAYERS - 1]
    with torch.inference_mode():
        by_hand = run_block_by_hand(decoder, blocks(decoder)[-1], expected[N_LAYERS - 1])["resid_post"]
        normed = decoder.base.get_submodule(final_norm(decoder))(acts)
    torch.testing.assert_close(acts, by_hand, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normed, expected[-1], rtol=0, atol=0)
    assert not torch.allclose(acts, expected[-1], atol=1e-2)


def test_inner_hooks_equal_the_blocks_modules_run_by_hand(decoder, ids):
    acts = decoder.capture(ids, all_layers())
    for layer, block in enumerate(blocks(decoder)):
        with torch.inference_mode():
            by_hand = run_block_by_hand(decoder, block, acts["resid_pre", layer])
        for hook, expected in by_hand.items():
            torch.testing.assert_close(
                acts[hook, layer], expected, rtol=1e-6, atol=1e-6, msg=f"{hook} {layer}"
            )


def test_a_block_adds_attn_out_and_mlp_out_to_the_stream(decoder, ids):
    acts = decoder.capture(ids, all_layers())
    for layer in range(N_LAYERS):
        total = acts["resid_pre", layer] + acts["attn_out", layer] + acts["mlp_out", layer]
        torch.testing.assert_close(total, acts["resid_post", layer], rtol=1e-6, atol=1e-5)
        assert {tuple(acts[hook, layer].shape) for hook in HOOKS} == {(2, 9, decoder.hook_width("mlp_in"))}


def calls(decoder, ids, hooks):
    """Names of the modules that ran."""
    ran = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in decoder.causal_lm.named_modules()
    ]
    decoder.capture(ids, hooks)
    for handle in handles:
        handle.remove()
    return ran


def test_nothing_runs_after_the_last_captured_layer(decoder, ids):
    decoder.causal_lm.get_output_embeddings().forward = pytest.fail  # poisoned: they must not be called
    blocks(decoder)[2].forward = pytest.fail
    decoder.base.get_submodule(final_norm(decoder)).forward = pytest.fail
    ran = calls(decoder, ids, {"resid_post": [0, 1], "resid_pre": [1]})
    assert any(".1.mlp" in name for name in ran)
    assert not any(".2" in name or name.endswith((f".{final_norm(decoder)}", "lm_head")) for name in ran)


def test_a_capture_in_a_block_stops_there(decoder, ids):
    ran = calls(decoder, ids, {"attn_out": [1]})
    assert any(".0.mlp" in name for name in ran)
    assert not any(".1.mlp" in name for name in ran)
    assert not any(".1." in name for name in calls(decoder, ids, {"resid_pre": [1]}))


def test_layers_come_one_by_one_and_need_not_be_held(decoder, ids):
    seen, alive = [], []

    def on_layer(hook, layer, acts):
        assert acts.is_inference()
        alive.append(sum(ref() is not None for ref in references))
        seen.append((hook, layer))
        references.append(weakref.ref(acts))

    references = []
    decoder.capture_each(ids, {"resid_post": (2, 0, 1)}, on_layer)
    assert seen == [("resid_post", 0), ("resid_post", 1), ("resid_post", 2)]
    assert max(alive) <= 1


def test_an_error_in_the_callback_surfaces_and_leaves_no_hooks(decoder, ids):
    def on_layer(hook, layer, acts):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decoder.capture_each(ids, all_layers(), on_layer)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.base.modules())
    assert not torch.is_inference_mode_enabled()


def test_cut_frees_later_blocks_and_changes_nothing_else(decoder, ids):
    before, digest = decoder.capture(ids, {"mlp_out": (0, 1)}), decoder.weights_digest()
    dropped = weakref.ref(blocks(decoder)[2].mlp), weakref.ref(decoder.causal_lm.get_output_embeddings())
    decoder.cut(1)
    assert decoder.causal_lm is None
    assert [ref() for ref in dropped] == [None, None]
    after = decoder.capture(ids, {"mlp_out": (0, 1)})
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (decoder.n_layers, decoder.weights_digest()) == (N_LAYERS, digest)
    with pytest.raises(
        UsageError, match=r"mlp_out: no layers \[2\]; the model has 0 to 1 \(3 before it was cut\)"
    ):
        decoder.capture(ids, {"mlp_out": (2,)})


def test_cut_before_any_digest_keeps_the_whole_models(decoder):
    expected = Decoder(decoder.causal_lm).weights_digest()
    decoder.cut(0)
    assert decoder.weights_digest() == expected


def test_weights_digest_is_what_it_says(decoder, monkeypatch):
    digest = hashlib.sha256()
    for name, parameter in sorted(decoder.causal_lm.named_parameters()):
        digest.update(f"{name} float32 {list(parameter.shape)}\n".encode() + parameter.numpy().tobytes())
    monkeypatch.setattr(subject, "_DIGEST_ELEMENTS", 7)
    assert decoder.weights_digest() == digest.hexdigest()


def test_weights_digest_sees_one_bit_and_the_dtype(decoder):
    digest = decoder.weights_digest()
    assert Decoder(decoder.causal_lm).weights_digest() == digest
    parameter = list(decoder.causal_lm.parameters())[-1]
    parameter.view(torch.int32).view(-1)[-1] ^= 1
    flipped = Decoder(decoder.causal_lm).weights_digest()
    half = Decoder(decoder.causal_lm.to(torch.bfloat16)).weights_digest()
    assert len({digest, flipped, half}) == 3


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (
            {"resid_mid": (0,)},
            "no hook 'resid_mid'; hooks are resid_post, resid_pre, mlp_in, mlp_out, attn_out",
        ),
        ({"mlp_in": (0, 3, -1)}, r"mlp_in: no layers \[3, -1\]; the model has 0 to 2"),
        ({"mlp_in": (1, 1)}, "name one twice"),
        ({"mlp_in": ()}, "nothing to capture"),
        ({}, "nothing to capture"),
    ],
)
def test_wrong_hooks(ids, hooks, message):
    with pytest.raises(UsageError, match=message):
        Decoder(_gpt2()).capture(ids, hooks)


@pytest.mark.parametrize(
    ("bad_ids", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"must be \[q, t\]"),
        (torch.zeros(1, 0, dtype=torch.int64), "none of them 0"),
        (torch.zeros(1, 4), "float32"),
        (torch.zeros(1, 33, dtype=torch.int64), "33 tokens; gpt2 has 32 positions"),
        (torch.tensor([[0, 50]]), "ids from 0 to 50; gpt2 knows 0 to 49"),
        (torch.tensor([[0, -1]]), "ids from -1 to 0"),
    ],
)
def test_wrong_ids(bad_ids, message):
    with pytest.raises(UsageError, match=message):
        Decoder(_gpt2()).capture(bad_ids, {"resid_post": (0,)})


def test_unknown_family_names_those_known():
    causal_lm = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"family 'bloom'.*known are gpt2, gpt_neox, llama"):
        Decoder(causal_lm)


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


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_no_such_folder_never_asks_the_hub(tmp_path, load):
    for name in (tmp_path / "gone", str(tmp_path / "gone"), "./gone", "a/b/c", ""):
        with pytest.raises(NotFoundError, match="no such folder"):
            load(name)
    with pytest.raises(ModelError, match="a file; expected a folder"):
        load(TINY_NEOX / "config.json")


def test_a_folder_without_a_tokenizer_gives_none_that_is_made_up(folder):
    with pytest.raises(ModelError, match=r"Expected tokenizer\.json"):
        load_tokenizer(folder)
