"""Edited runs against whole forward passes of transformers with the same edits made by hand, for every family at hand."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from actcache import model as model_module
from actcache.errors import UsageError
from actcache.model import HOOKS, Decoder
from actcache.patching import Patcher

N_LAYERS, WIDTH, VOCAB = 3, 16, 50

SMALL = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
CONFIGS = {
    "gpt_neox": {**SMALL, "use_parallel_residual": True},
    "gpt_neox, sequential": {**SMALL, "use_parallel_residual": False},
    "gpt2": {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "mistral": {**GROUPED, "sliding_window": 4},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "gemma2": {**GROUPED, "final_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8},
}  # fmt: skip
"""With sliding windows in some layers, soft-capped logits and tied heads: what a hand-written head or mask gets wrong."""


def make_decoder(name: str, monkeypatch) -> Decoder:
    family = name.split(",")[0]
    if family not in model_module.FAMILIES:
        normed = (
            {"mlp_add": "post_feedforward_layernorm", "attn": "post_attention_layernorm"}
            if family == "gemma2"
            else {"attn": "self_attn"}
        )
        monkeypatch.setitem(model_module.FAMILIES, family, model_module.Family(blocks="layers", mlp="mlp", **normed))  # fmt: skip
    causal_lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **CONFIGS[name]), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in causal_lm.parameters():  # large enough that a misplaced edit shows
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return Decoder(causal_lm, name=name)


@pytest.fixture(params=CONFIGS)
def patcher(request, monkeypatch):
    return Patcher(make_decoder(request.param, monkeypatch))


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))


def by_hand(decoder, ids, edits):
    """Logits of the whole model, every block run, with plain torch hooks."""
    handles = []
    for (hook, layer), edit in edits.items():
        module, place = decoder.place(hook, layer)
        if place.side == "in":

            def before(_module, args, kwargs, edit=edit):
                return ((edit(args[0]), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])})  # fmt: skip

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(_module, _args, output, edit=edit):
                return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

            handles.append(module.register_forward_hook(after))
    with torch.inference_mode():
        logits = decoder.causal_lm(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def logits_of(patcher, hidden):
    return patcher.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


@pytest.mark.parametrize("hook", HOOKS)
def test_nothing_changes_where_an_edit_gives_back_what_it_got(patcher, ids, hook):
    clean = patcher.run_clean(ids, hook, range(N_LAYERS))
    expected = by_hand(patcher.decoder, ids, {})
    torch.testing.assert_close(logits_of(patcher, clean.hidden), expected)
    every = {(hook, layer): lambda x: x for layer in range(N_LAYERS)}
    for edits in (*({at: edit} for at, edit in every.items()), every):
        assert torch.equal(patcher.run_edited(clean, edits), clean.hidden)


@pytest.mark.parametrize("hook", HOOKS)
def test_edits_equal_a_whole_forward_pass_with_the_same_edits(patcher, ids, hook):
    clean = patcher.run_clean(ids, hook, range(N_LAYERS))
    before = logits_of(patcher, clean.hidden)
    for layers in ([0], [1], [2], [0, 2], [1, 2], [0, 1, 2]):
        edits = {(hook, layer): (lambda x, layer=layer: x.flip(-1) * 0.5 + layer) for layer in layers}
        found = logits_of(patcher, patcher.run_edited(clean, edits))
        assert torch.equal(found, by_hand(patcher.decoder, ids, edits))
        assert not torch.allclose(found, before), "the edit did nothing"


def test_edits_at_two_hooks_of_a_layer(patcher, ids):
    """As a transcoder is patched: what goes into the MLP is looked at, what comes out is replaced."""
    for hook in ("mlp_out", "resid_post"):
        clean = patcher.run_clean(ids, hook, [1])
        seen = {}

        def look(x, seen=seen):
            seen["in"] = x
            return x

        edits = {("mlp_in", 1): look, ("mlp_out", 1): lambda _x, seen=seen: seen["in"] * 2}
        edits |= {("resid_post", 1): torch.neg} if hook == "resid_post" else {}
        found = logits_of(patcher, patcher.run_edited(clean, edits))
        torch.testing.assert_close(found, by_hand(patcher.decoder, ids, edits))


def test_later_edits_see_what_earlier_ones_did(patcher, ids):
    seen = {}
    clean = patcher.run_clean(ids, "resid_post", range(N_LAYERS))
    look = {("resid_post", 0): torch.zeros_like, ("resid_post", 2): lambda x: seen.setdefault(2, x)}
    patcher.run_edited(clean, look)
    assert not torch.allclose(seen[2], clean.acts[2])


def test_captured_vectors_are_those_of_the_decoder(patcher, ids):
    for hook in HOOKS:
        clean = patcher.run_clean(ids, hook, range(N_LAYERS))
        for (_hook, layer), acts in patcher.decoder.capture(ids, {hook: range(N_LAYERS)}).items():
            assert torch.equal(clean.acts[layer], acts)


def test_reading_out_the_last_blocks_output_gives_the_models_logits_and_gradients(patcher, ids):
    clean = patcher.run_clean(ids, "resid_post", [N_LAYERS - 1])
    stream = clean.acts[N_LAYERS - 1].flatten(0, 1).clone().requires_grad_()
    logits = patcher.read_out(stream)
    torch.testing.assert_close(logits.detach(), by_hand(patcher.decoder, ids, {}).flatten(0, 1))
    logits[:, 3].sum().backward()
    assert stream.grad is not None
    assert (stream.grad != 0).any(1).all()
    assert all(parameter.grad is None for parameter in patcher.decoder.causal_lm.parameters())


def test_embeddings_are_the_models_and_one_where_they_are_tied(patcher):
    into, out_of = patcher.embeddings()
    assert into.shape == out_of.shape == (VOCAB, WIDTH)
    assert torch.equal(into, patcher.decoder.causal_lm.get_input_embeddings().weight)
    assert torch.equal(out_of, patcher.decoder.causal_lm.get_output_embeddings().weight)
    assert (into is out_of) == patcher.decoder.causal_lm.config.tie_word_embeddings


def test_the_model_is_as_before_even_after_an_edit_that_fails(patcher, ids):
    expected = by_hand(patcher.decoder, ids, {})
    clean = patcher.run_clean(ids, "resid_post", [0, 1])

    def fail(_x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        patcher.run_edited(clean, {("resid_post", 0): lambda x: x, ("resid_post", 1): fail})
    assert torch.equal(by_hand(patcher.decoder, ids, {}), expected)
    assert not any("forward" in module.__dict__ for module in patcher.decoder.causal_lm.modules())


def test_a_forward_that_another_library_wrapped_is_put_back(monkeypatch, ids):
    patcher = Patcher(make_decoder("llama", monkeypatch))
    block: nn.Module = patcher.decoder.blocks[0]
    wrapped = block.forward
    block.forward = wrapped
    clean = patcher.run_clean(ids, "resid_post", [1])
    patcher.run_edited(clean, {("resid_post", 1): lambda x: x})
    assert block.__dict__["forward"] is wrapped


def test_refusals(monkeypatch, ids):
    decoder = make_decoder("llama", monkeypatch)
    patcher = Patcher(decoder)
    with pytest.raises(UsageError, match=r"no layers \[3\]"):
        patcher.run_clean(ids, "resid_post", [0, 3])
    clean = patcher.run_clean(ids, "resid_post", [1])
    with pytest.raises(UsageError, match=r"edits at layers \[0\]; the clean run kept \[1\]"):
        patcher.run_edited(clean, {("resid_post", 0): lambda x: x})
    decoder.cut(1)
    with pytest.raises(UsageError, match="was cut"):
        Patcher(decoder)
