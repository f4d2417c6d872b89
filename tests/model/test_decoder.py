"""Every hook of every family against the blocks' modules run by hand, and against transformers' own hidden states."""

import hashlib
import weakref

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, CohereConfig, Gemma3TextConfig, LlavaConfig

from actcache.errors import ModelError, UsageError
from actcache.model import FAMILIES, HOOKS, Decoder
from actcache.model import digest as digest_module
from tests.model.families import (
    CONFIGS,
    N_LAYERS,
    VOCAB,
    WIDTH,
    WRAPPERS,
    CausalLM,
    ImageTextToText,
    blocks_of,
    final_norm,
    make,
    make_decoder,
    run_block_by_hand,
)

ALL = [*CONFIGS, *WRAPPERS]
FEW = ["gpt_neox", "gpt2", "llama", "gemma3_text", "opt, projected"]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=ALL)
def decoder(request):
    return make_decoder(request.param)


@pytest.fixture(params=FEW)
def one_of_few(request):
    """Where the family makes no difference to what is tested."""
    return make_decoder(request.param)


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))


def all_layers(*hooks):
    return {hook: tuple(range(N_LAYERS)) for hook in hooks or HOOKS}


def hidden_states(decoder, ids):
    with torch.inference_mode():
        return decoder.causal_lm(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states


def test_every_family_is_tested():
    assert {name.partition(",")[0] for name in CONFIGS} == set(FAMILIES)
    assert len(FAMILIES) == 11


def test_every_hook_equals_the_blocks_modules_run_by_hand(decoder, ids):
    expected = hidden_states(decoder, ids)
    acts = decoder.capture(ids, all_layers())
    for layer in range(N_LAYERS):
        with torch.inference_mode():
            by_hand = run_block_by_hand(decoder, layer, expected[layer])
        for hook, value in {**by_hand, "resid_pre": expected[layer]}.items():
            torch.testing.assert_close(
                acts[hook, layer], value, **CLOSE, msg=lambda m, at=f"{hook} {layer}": f"{at}: {m}"
            )
        sizes = {hook: value.abs().mean() for hook, value in by_hand.items()}
        assert min(sizes.values()) > 0.05, f"a branch that adds nothing would hide a wrong hook: {sizes}"


def test_resid_equals_transformers_hidden_states(decoder, ids):
    expected = hidden_states(decoder, ids)
    acts = decoder.capture(ids, all_layers("resid_pre", "resid_post"))
    for layer in range(N_LAYERS):
        torch.testing.assert_close(acts["resid_pre", layer], expected[layer], rtol=0, atol=0)
    for layer in range(N_LAYERS - 1):
        torch.testing.assert_close(acts["resid_post", layer], expected[layer + 1], rtol=0, atol=0)


def test_last_block_is_captured_before_the_final_norm_and_projection(decoder, ids):
    with torch.inference_mode():
        last = decoder.base(input_ids=ids, use_cache=False).last_hidden_state
        acts = decoder.capture(ids, {"resid_post": [N_LAYERS - 1]})["resid_post", N_LAYERS - 1]
        norm, project = final_norm(decoder), getattr(decoder.base, "project_out", None)
        after = acts if norm is None else norm(acts)
        assert acts.shape == (2, 9, WIDTH)
        assert norm is None or not torch.allclose(acts, after, atol=1e-2)
        torch.testing.assert_close(after if project is None else project(after), last, rtol=0, atol=0)


def test_a_block_adds_attn_out_and_mlp_out_to_the_stream(decoder, ids):
    acts = decoder.capture(ids, all_layers())
    for layer, block in enumerate(blocks_of(decoder)):
        before, attn, mlp, after = (
            acts[h, layer] for h in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        if getattr(block, "do_layer_norm_before", True):
            total = before + attn + mlp
        else:  # the stream itself is normalised after each addition: the one exception
            with torch.inference_mode():
                total = block.final_layer_norm(block.self_attn_layer_norm(before + attn) + mlp)
        torch.testing.assert_close(total, after, **CLOSE)
        assert {tuple(acts[hook, layer].shape) for hook in HOOKS} == {(2, 9, decoder.hook_width("mlp_in"))}


def test_a_wrapper_captures_what_its_text_decoder_does_when_the_whole_runs(ids):
    for name in WRAPPERS:
        decoder = make_decoder(name)
        assert decoder.family in FAMILIES
        assert (decoder.width, decoder.vocab_size, decoder.n_layers) == (WIDTH, VOCAB, N_LAYERS)
        vision = [w for n, w in decoder.causal_lm.named_parameters() if "vision" in n]
        assert vision
        decoder.cut(0)
        assert decoder.capture(ids, {"resid_post": (0,)})["resid_post", 0].shape == (2, 9, WIDTH)


# What runs, and what does not.


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
    head = decoder.causal_lm.get_output_embeddings()
    for later in (head, blocks_of(decoder)[2], final_norm(decoder)):
        if later is not None:
            later.forward = pytest.fail  # poisoned: they must not be called
    ran = calls(decoder, ids, {"resid_post": [0, 1], "resid_pre": [1]})
    assert any(".1.mlp" in name or ".1.fc2" in name for name in ran)
    assert not any(".2." in name or name.endswith(".2") for name in ran)


def test_a_capture_in_a_block_stops_there(decoder, ids):
    ran = calls(decoder, ids, {"mlp_in": [1]})
    assert any(".0.mlp" in name or ".0.fc2" in name for name in ran)
    assert not any(name.endswith((".1.mlp", ".1.fc1", ".1.fc2")) for name in ran)
    assert not any(".1." in name for name in calls(decoder, ids, {"resid_pre": [1]}))


def test_layers_come_one_by_one_and_need_not_be_held(one_of_few, ids):
    seen, alive = [], []

    def on_layer(hook, layer, acts):
        assert acts.is_inference()
        alive.append(sum(ref() is not None for ref in references))
        seen.append((hook, layer))
        references.append(weakref.ref(acts))

    references = []
    one_of_few.capture_each(ids, {"resid_post": (2, 0, 1)}, on_layer)
    assert seen == [("resid_post", 0), ("resid_post", 1), ("resid_post", 2)]
    assert max(alive) <= 1


def test_an_error_in_the_callback_surfaces_and_leaves_no_hooks(one_of_few, ids):
    def on_layer(hook, layer, acts):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        one_of_few.capture_each(ids, all_layers(), on_layer)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one_of_few.base.modules())
    assert not torch.is_inference_mode_enabled()


def test_cut_frees_later_blocks_and_changes_nothing_else(decoder, ids):
    before, digest = decoder.capture(ids, {"mlp_out": (0, 1)}), decoder.weights_digest()
    dropped = [
        weakref.ref(
            blocks_of(decoder)[2].self_attn
            if hasattr(blocks_of(decoder)[2], "self_attn")
            else blocks_of(decoder)[2]
        )
    ]
    dropped.append(weakref.ref(decoder.causal_lm.get_output_embeddings()))
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


# Digests.


def test_cut_before_any_digest_keeps_the_whole_models(one_of_few):
    expected = Decoder(one_of_few.causal_lm).weights_digest()
    one_of_few.cut(0)
    assert one_of_few.weights_digest() == expected


def test_weights_digest_is_what_it_says(one_of_few, monkeypatch):
    digest = hashlib.sha256()
    for name, parameter in sorted(one_of_few.causal_lm.named_parameters()):
        digest.update(f"{name} float32 {list(parameter.shape)}\n".encode() + parameter.numpy().tobytes())
    monkeypatch.setattr(digest_module, "_DIGEST_ELEMENTS", 7)
    assert one_of_few.weights_digest() == digest.hexdigest()


def test_weights_digest_sees_one_bit_and_the_dtype(one_of_few):
    digest = one_of_few.weights_digest()
    assert Decoder(one_of_few.causal_lm).weights_digest() == digest
    parameter = list(one_of_few.causal_lm.parameters())[-1]
    parameter.view(torch.int32).view(-1)[-1] ^= 1
    flipped = Decoder(one_of_few.causal_lm).weights_digest()
    half = Decoder(one_of_few.causal_lm.to(torch.bfloat16)).weights_digest()
    assert len({digest, flipped, half}) == 3


# Bad input.


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (
            {"resid_mid": (0,)},
            "no hook 'resid_mid'; hooks are resid_post, resid_pre, mlp_in, mlp_out, attn_out, or a module such as h",
        ),
        ({"mlp_in": (0, 3, -1)}, r"mlp_in: no layers \[3, -1\]; the model has 0 to 2"),
        ({"mlp_in": (1, 1)}, "name one twice"),
        ({"mlp_in": ()}, "nothing to capture"),
        ({}, "nothing to capture"),
    ],
)
def test_wrong_hooks(ids, hooks, message):
    with pytest.raises(UsageError, match=message):
        make_decoder("gpt2").capture(ids, hooks)


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
        make_decoder("gpt2").capture(bad_ids, {"resid_post": (0,)})


def test_unknown_family_names_those_known():
    bloom = BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=1, n_head=2)
    known = ", ".join(sorted(FAMILIES))
    with pytest.raises(
        ModelError, match=rf"family 'bloom'.*known are {known}\. .*actcache/model/families\.py"
    ):
        Decoder(BloomForCausalLM(bloom))
    _auto, config = WRAPPERS["llava"]
    text = {k: v for k, v in CONFIGS["llama"]().to_dict().items() if k != "model_type"}
    wrapped = LlavaConfig(
        text_config=CohereConfig(**text).to_dict(), vision_config=config().vision_config.to_dict()
    )
    with pytest.raises(
        ModelError, match=r"family 'llava' \(its text part is 'cohere'\), whose blocks are not known"
    ):
        Decoder(ImageTextToText.from_config(wrapped))


def test_a_decoder_that_looks_ahead_is_refused():
    config = CONFIGS["gemma3_text"]().to_dict() | {"use_bidirectional_attention": True}
    with pytest.raises(ModelError, match="its attention looks ahead"):
        Decoder(CausalLM.from_config(Gemma3TextConfig(**config)), name="embedder")


def test_no_dropout_is_at_work(ids):
    """Models come as they were trained, with dropout of a half."""
    for name in ("gpt_neox", "gpt2", "phi", "opt"):
        model = make(name).train()
        decoder = Decoder(model)
        first, second = (decoder.capture(ids, all_layers()) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
