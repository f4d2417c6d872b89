"""A tiny random model of every family, with weights large enough that a misplaced hook shows; and its blocks run by hand.

`run_block_by_hand` is the oracle: the modules of a block called one after the other, as the family's paper has it, with a
mask made here. It knows nothing of hooks or of `actcache.model.families`.
"""

import torch
from transformers import AutoModelForCausalLM as CausalLM
from transformers import AutoModelForImageTextToText as ImageTextToText
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from actcache.model import Decoder

N_LAYERS, WIDTH, VOCAB, POSITIONS, SLIDING = 3, 16, 50, 32, 4

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": SLIDING}
_OPT = {k: v for k, v in _SIZES.items() if k not in ("intermediate_size", "pad_token_id")} | {
    "ffn_dim": 40,
    "pad_token_id": 1,
    "dropout": 0.5,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _neox(**changes):
    sizes = {k: v for k, v in _SIZES.items() if k != "pad_token_id"}
    return GPTNeoXConfig(**sizes, hidden_dropout=0.5, **changes)


def _gpt2():
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=N_LAYERS,
        n_head=2,
        n_positions=POSITIONS,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.5,
        attn_pdrop=0.5,
    )


def _sliding_qwen(config, **more):
    return config(**_GROUPED, use_sliding_window=True, sliding_window=SLIDING, max_window_layers=1, **more)


CONFIGS = {
    "gpt_neox": _neox,
    "gpt_neox, sequential": lambda: _neox(use_parallel_residual=False),
    "gpt2": _gpt2,
    "llama": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen2, sliding": lambda: _sliding_qwen(Qwen2Config),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=6),
    "qwen3, sliding": lambda: _sliding_qwen(Qwen3Config, head_dim=6),
    "gemma2": lambda: Gemma2Config(**_GEMMA),
    "gemma3_text": lambda: Gemma3TextConfig(**_GEMMA),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=None),
    "mistral, sliding": lambda: MistralConfig(**_GROUPED, sliding_window=SLIDING),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "phi": lambda: PhiConfig(**_SIZES, resid_pdrop=0.5, partial_rotary_factor=0.5),
    "opt": lambda: OPTConfig(**_OPT),
    "opt, projected": lambda: OPTConfig(**_OPT, word_embed_proj_dim=8),
    "opt, norm after": lambda: OPTConfig(**_OPT, word_embed_proj_dim=8, do_layer_norm_before=False),
}
"""Every family, and the variants whose blocks compute something else."""

WRAPPERS = {
    "gemma3": (
        CausalLM,
        lambda: Gemma3Config(
            text_config=CONFIGS["gemma3_text"]().to_dict(),
            vision_config=SiglipVisionConfig(**_VISION).to_dict(),
            mm_tokens_per_image=4,
        ),
    ),
    "llava": (
        ImageTextToText,
        lambda: LlavaConfig(
            text_config=CONFIGS["llama"]().to_dict(), vision_config=CLIPVisionConfig(**_VISION).to_dict()
        ),
    ),
}
"""Models that also see images, around a decoder of a known family."""


def randomise(model) -> None:
    """Weights of a fifth or so, gains about 1: residual streams grow, and every branch counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))


def make(name: str):
    """The whole model of a family or wrapper."""
    if name in WRAPPERS:
        auto, config = WRAPPERS[name]
        model = auto.from_config(config())
    else:
        model = CausalLM.from_config(CONFIGS[name]())
    randomise(model)
    return model


def make_decoder(name: str) -> Decoder:
    return Decoder(make(name), name=name)


def final_norm(decoder: Decoder):
    """The norm after the last block; None where there is none."""
    names = {
        "gpt_neox": "final_layer_norm",
        "gpt2": "ln_f",
        "phi": "final_layernorm",
        "opt": "final_layer_norm",
    }
    return getattr(decoder.base, names.get(decoder.family, "norm"))


def blocks_of(decoder: Decoder):
    return decoder.base.h if decoder.family == "gpt2" else decoder.base.layers


def _mask(decoder: Decoder, layer: int, t: int) -> torch.Tensor:
    """[1, 1, t, t] added to scores: causal, and within the window where the layer has one."""
    config = decoder.config
    distance = torch.arange(t)[:, None] - torch.arange(t)
    is_seen = distance >= 0
    kinds = getattr(config, "layer_types", None)
    slides = kinds[layer] == "sliding_attention" if kinds else decoder.family == "mistral"
    if slides and config.sliding_window is not None:
        is_seen &= distance < config.sliding_window
    return torch.zeros(1, 1, t, t).masked_fill(~is_seen, torch.finfo(torch.float32).min)


def _rotary(decoder: Decoder, layer: int, x: torch.Tensor):
    positions = torch.arange(x.shape[1])[None]
    if decoder.family == "gemma3_text":
        return decoder.base.rotary_emb(x, positions, decoder.config.layer_types[layer])
    return decoder.base.rotary_emb(x, positions)


def run_block_by_hand(decoder: Decoder, layer: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """attn_out, mlp_in, mlp_out and the block's output, from its own modules."""
    block, mask, family = blocks_of(decoder)[layer], _mask(decoder, layer, x.shape[1]), decoder.family
    if family == "gpt2":
        attn = block.attn(block.ln_1(x), attention_mask=mask)[0]
        mlp_in = block.ln_2(x + attn)
        mlp = block.mlp(mlp_in)
        return {"attn_out": attn, "mlp_in": mlp_in, "mlp_out": mlp, "resid_post": x + attn + mlp}
    if family == "opt":
        return _opt_by_hand(block, mask, x)
    rotary = _rotary(decoder, layer, x)
    if family == "gpt_neox":
        attn = block.attention(block.input_layernorm(x), attention_mask=mask, position_embeddings=rotary)[0]
        parallel = decoder.config.use_parallel_residual
        mlp_in = block.post_attention_layernorm(x if parallel else x + attn)
        mlp = block.mlp(mlp_in)
    elif family == "phi":
        mlp_in = block.input_layernorm(x)
        attn = block.self_attn(mlp_in, attention_mask=mask, position_embeddings=rotary)[0]
        mlp = block.mlp(mlp_in)
    elif family in ("gemma2", "gemma3_text", "olmo2"):
        normed = x if family == "olmo2" else block.input_layernorm(x)
        inner = block.self_attn(normed, attention_mask=mask, position_embeddings=rotary)[0]
        attn = block.post_attention_layernorm(inner)
        mlp_in = x + attn if family == "olmo2" else block.pre_feedforward_layernorm(x + attn)
        mlp = block.post_feedforward_layernorm(block.mlp(mlp_in))
    else:  # llama, mistral, qwen2, qwen3
        attn = block.self_attn(block.input_layernorm(x), attention_mask=mask, position_embeddings=rotary)[0]
        mlp_in = block.post_attention_layernorm(x + attn)
        mlp = block.mlp(mlp_in)
    return {"attn_out": attn, "mlp_in": mlp_in, "mlp_out": mlp, "resid_post": x + attn + mlp}


def _opt_by_hand(block, mask, x):
    normalised_before = block.do_layer_norm_before
    attn = block.self_attn(block.self_attn_layer_norm(x) if normalised_before else x, attention_mask=mask)[0]
    stream = x + attn if normalised_before else block.self_attn_layer_norm(x + attn)
    mlp_in = block.final_layer_norm(stream) if normalised_before else stream
    mlp = block.fc2(block.activation_fn(block.fc1(mlp_in)))
    out = stream + mlp if normalised_before else block.final_layer_norm(stream + mlp)
    return {"attn_out": attn, "mlp_in": mlp_in, "mlp_out": mlp, "resid_post": out}
