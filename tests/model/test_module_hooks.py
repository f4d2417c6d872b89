"""Hooks of any module of every block: their spelling, width and values, and what is refused."""

import pytest
import torch
from torch import nn

from actcache.errors import ModelError, UsageError
from actcache.model import FAMILIES, Decoder, Place, load_skeleton
from tests.model.families import CONFIGS, N_LAYERS, VOCAB, WIDTH, WRAPPERS, blocks_of, make, make_decoder

INNER = {
    "gpt_neox": "mlp.dense_h_to_4h",
    "gpt2": "mlp.c_fc",
    "phi": "mlp.fc1",
    "opt": "fc1",
}


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))


def inner_module(decoder) -> str:
    return INNER.get(decoder.family, "mlp.up_proj")


@pytest.mark.parametrize("name", [*CONFIGS, *WRAPPERS])
def test_a_module_hook_is_the_modules_input_and_output(name, ids):
    """Against a torch hook of our own on a whole forward pass, and against the module called on its input."""
    decoder = make_decoder(name)
    path = inner_module(decoder)
    pattern = f"{FAMILIES[decoder.family].blocks}.*.{path}"
    seen = {}
    handles = [
        block.get_submodule(path).register_forward_hook(
            lambda _m, args, out, layer=layer: seen.__setitem__(layer, (args[0], out))
        )
        for layer, block in enumerate(blocks_of(decoder))
    ]
    with torch.inference_mode():
        decoder.base(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    layers = tuple(range(N_LAYERS))
    acts = decoder.capture(ids, {f"{pattern}:in": layers, f"{pattern}:out": layers, "mlp_in": layers})
    width = decoder.hook_width(f"{pattern}:out")
    assert width == seen[0][1].shape[-1] == (64 if decoder.family == "gpt2" else 40)
    assert decoder.hook_width(f"{pattern}:in", (1,)) == WIDTH
    for layer in layers:
        given, got = (x.reshape(2, 9, -1) for x in seen[layer])
        assert torch.equal(acts[f"{pattern}:in", layer], given)
        assert torch.equal(acts[f"{pattern}:out", layer], got)
        assert torch.equal(acts["mlp_in", layer], given)  # the MLP's first layer sees what the MLP sees
        with torch.inference_mode():
            by_hand = blocks_of(decoder)[layer].get_submodule(path)(given)
        torch.testing.assert_close(got, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*CONFIGS, *WRAPPERS])
def test_a_skeleton_knows_the_same_widths_without_weights(name, tmp_path):
    whole = make(name)
    whole.config.save_pretrained(tmp_path)
    decoder, skeleton = Decoder(whole), load_skeleton(tmp_path)
    assert not skeleton.has_weights
    assert decoder.has_weights
    pattern = f"{FAMILIES[decoder.family].blocks}.*.{inner_module(decoder)}"
    for hook in (f"{pattern}:out", f"{pattern}:in", "resid_post"):
        assert skeleton.hook_width(hook) == decoder.hook_width(hook)
    for member in ("family", "width", "n_layers", "vocab_size", "max_positions"):
        assert getattr(skeleton, member) == getattr(decoder, member)


def test_heads_lie_side_by_side(ids):
    """A norm of every head gives [q, t, heads, head]: 4 heads of 6."""
    decoder = make_decoder("qwen3")
    assert decoder.hook_width("layers.*.self_attn.q_norm:out") == 24
    acts = decoder.capture(
        ids, {"layers.*.self_attn.q_norm:out": (1,), "layers.*.self_attn.q_proj:out": (1,)}
    )
    normed, projected = acts["layers.*.self_attn.q_norm:out", 1], acts["layers.*.self_attn.q_proj:out", 1]
    with torch.inference_mode():
        expected = decoder.blocks[1].self_attn.q_norm(projected.view(2, 9, 4, 6)).reshape(2, 9, 24)
    assert torch.equal(normed, expected)


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        ("layers.*.mlp.up_proj:in", "layers.*.mlp.up_proj:in"),
        ("layers.*.mlp.up_proj", "layers.*.mlp.up_proj:out"),
        ("model.layers.*.mlp.up_proj:out", "layers.*.mlp.up_proj:out"),
        ("layers.{}.mlp.up_proj:out", "layers.*.mlp.up_proj:out"),
        ("layers.{layer}.mlp.up_proj", "layers.*.mlp.up_proj:out"),
        ("layers.*:out", "layers.*:out"),
        ("resid_post", "resid_post"),
    ],
)
def test_one_spelling(written, spelled):
    decoder = make_decoder("llama")
    assert decoder.spell(written) == spelled
    assert decoder.spell(spelled) == spelled
    assert decoder.hook_width(written) in (WIDTH, 40)


def test_place_says_which_module_and_side():
    decoder = make_decoder("gemma2")
    module, place = decoder.place("attn_out", 1)
    assert (module, place) == (
        decoder.base.layers[1].post_attention_layernorm,
        Place("post_attention_layernorm", "out"),
    )
    module, place = decoder.place("model.layers.*.self_attn.o_proj:in", 2)
    assert (module, place.side) == (decoder.base.layers[2].self_attn.o_proj, "in")


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("layers.*.mlp.nose:out", r"block 0 of llama has no module 'mlp\.nose'; it has .*mlp\.up_proj"),
        ("layers.3.mlp:out", r"write \* for the layer's number.*--layers 0,3"),
        ("layers.*.mlp:up", r"'up' is no side of a module; write :in or :out"),
        ("embed_tokens:out", r"expected a module of every block, layers\.\*\.NAME.*resid_pre of layer 0"),
        ("layers.*.mlp.*:out", "expected a module of every block"),
        ("layers.*mlp:out", "expected a module of every block"),
        ("h.*.mlp:out", "expected a module of every block"),
        (":out", "expected a module of every block"),
    ],
)
def test_what_is_no_hook(hook, message, ids):
    decoder = make_decoder("llama")
    for use in (lambda: decoder.hook_width(hook), lambda: decoder.capture(ids, {hook: (0,)})):
        with pytest.raises(UsageError, match=message):
            use()


class _Gate(nn.Module):
    """Stands for an MLP, and does with its own one what a test wants."""

    def __init__(self, mlp, kind):
        super().__init__()
        self.mlp, self.kind, self.probe = mlp, kind, nn.Identity()

    def forward(self, x):
        if self.kind == "twice":
            return self.mlp(self.probe(x) + self.probe(x))
        if self.kind == "never":
            return self.mlp(x)
        if self.kind == "integers":
            self.probe(x.argmax(-1, keepdim=True))
        if self.kind == "summed":
            self.probe(x.sum(1))
        if self.kind == "widths":
            self.probe(x[..., : x.shape[-1] - int(self.mlp.layer)])
        return self.mlp(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("twice", r"2 calls in a forward pass for \[2, 3\] tokens"),
        ("never", r"0 calls in a forward pass"),
        ("integers", r"torch\.int64 \[2, 3, 1\]"),
        ("summed", r"torch\.float32 \[2, 16\]"),
        ("widths", "its width differs between layers"),
    ],
)
def test_modules_that_give_no_rows(kind, message):
    decoder = make_decoder("llama")
    for layer, block in enumerate(decoder.blocks):
        block.mlp.layer = layer
        block.mlp = _Gate(block.mlp, kind)
    with pytest.raises(UsageError, match=message):
        decoder.hook_width("layers.*.mlp.probe:out")


def test_a_hook_that_is_not_reached_or_gives_something_else_is_an_error_of_the_model(ids):
    decoder = make_decoder("llama")
    for block in decoder.blocks:
        block.mlp = _Gate(block.mlp, "never")
    with pytest.raises(ModelError, match="ended with 1 captures missing"):
        decoder.capture(ids, {"layers.*.mlp.probe:out": (1,)})
    for block in decoder.blocks:
        block.mlp.kind = "summed"
    with pytest.raises(ModelError, match=r"layer 1: torch\.float32 \[2, 16\] where \[q, t, d\]"):
        decoder.capture(ids, {"layers.*.mlp.probe:out": (1,)})
