"""Where each family of decoders has its hooks, and how a hook of any module is written.

`attn_out` and `mlp_out` are what a block ADDS to the stream: after the norms that some families put between a branch and
the stream. So `resid_pre + attn_out + mlp_out = resid_post`, with attention and MLP in sequence or side by side. The one
exception are OPT models that normalise the stream itself after each addition (`do_layer_norm_before=False`, opt-350m):
there `resid_post = norm(norm(resid_pre + attn_out) + mlp_out)`.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from actcache.errors import ModelError, UsageError

HOOKS = ("resid_post", "resid_pre", "mlp_in", "mlp_out", "attn_out")

_LAYER = re.compile(r"\*|\{\}|\{layer\}")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True, slots=True)
class Place:
    """One side of a module inside a block. `path` is dotted, from the block; empty for the block itself."""

    path: str
    side: Literal["in", "out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where a family of decoders keeps its blocks and what its blocks add to the stream. Paths are dotted names.

    blocks         the list of blocks, from the decoder (the model without its head).
    attn_out       from a block: the module whose output the block adds to the stream for attention.
    mlp_in         from a block: the module whose input is what the MLP sees.
    mlp_out        from a block: the module whose output the block adds to the stream for the MLP.
    masks_by_position  whether transformers keeps packed documents apart when it is told their positions.
    """

    blocks: str
    attn_out: str
    mlp_in: str
    mlp_out: str
    masks_by_position: bool = True

    def place(self, hook: str) -> Place:
        """Where a hook is: a name of `HOOKS`, or a module hook as `spell` writes it."""
        if ":" in hook:
            pattern, _, side = hook.rpartition(":")
            path = pattern.removeprefix(f"{self.blocks}.*").removeprefix(".")
            return Place(path, "in" if side == "in" else "out")
        return {
            "resid_post": Place("", "out"),
            "resid_pre": Place("", "in"),
            "mlp_in": Place(self.mlp_in, "in"),
            "mlp_out": Place(self.mlp_out, "out"),
            "attn_out": Place(self.attn_out, "out"),
        }[hook]

    def spell(self, hook: str, prefix: str = "") -> str:
        """The one spelling of a hook: a name of `HOOKS` as it is, a module hook as `layers.*.mlp.up_proj:out`.

        Args:
            hook: a name, or a module's path from the decoder or from the whole model, with `*`, `{}` or `{layer}` for
                the layer's number and `:in` or `:out` (the default) for the side.
            prefix: where in the whole model the decoder is, such as `model`.

        Raises:
            UsageError: it is neither; the message says how it is written.
        """
        if not re.search(r"[.:*{]", hook):
            if hook in HOOKS:
                return hook
            raise UsageError(
                f"no hook {hook!r}; hooks are {', '.join(HOOKS)}, or a module such as {self.blocks}.*.{self.mlp_in}:in"
            )
        pattern, colon, side = hook.rpartition(":")
        if not colon:
            pattern, side = hook, "out"
        example = f"{self.blocks}.*.{self.mlp_in}:{'in' if side == 'in' else 'out'}"
        if side not in ("in", "out"):
            raise UsageError(
                f"hook {hook!r}: {side!r} is no side of a module; write :in or :out, as in {example}"
            )
        path = _LAYER.sub("*", pattern).removeprefix(f"{prefix}." if prefix else "")
        if re.match(rf"{re.escape(self.blocks)}\.\d", path):
            raise UsageError(
                f"hook {hook!r}: write * for the layer's number and choose layers apart, as in {example} with --layers 0,3"
            )
        rest = path.removeprefix(f"{self.blocks}.*")
        if rest == path or not (rest == "" or (rest.startswith(".") and _PATH.fullmatch(rest[1:]))):
            raise UsageError(
                f"hook {hook!r}: expected a module of every block, {self.blocks}.*.NAME, such as {example}. "
                f"(What goes into the first block is resid_pre of layer 0.)"
            )
        return f"{path}:{side}"


_PLAIN = Family(blocks="layers", attn_out="self_attn", mlp_in="mlp", mlp_out="mlp")
_NORMED_BRANCHES = Family(
    blocks="layers",
    attn_out="post_attention_layernorm",
    mlp_in="mlp",
    mlp_out="post_feedforward_layernorm",
)

FAMILIES: dict[str, Family] = {
    "gemma2": _NORMED_BRANCHES,
    "gemma3_text": _NORMED_BRANCHES,
    "gpt2": Family(blocks="h", attn_out="attn", mlp_in="mlp", mlp_out="mlp"),
    "gpt_neox": Family(blocks="layers", attn_out="attention", mlp_in="mlp", mlp_out="mlp"),
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "olmo2": _NORMED_BRANCHES,
    "opt": Family(
        blocks="layers", attn_out="self_attn", mlp_in="fc1", mlp_out="fc2", masks_by_position=False
    ),
    "phi": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
}
"""By `model_type` of the configuration; of a model that also sees images, that of its text part."""


def text_config(config: Any) -> Any:
    """The configuration of a model's text decoder: itself, or a part of it where the model is more than a decoder."""
    return config if config.model_type in FAMILIES else config.get_text_config(decoder=True)


def find_family(config: Any, name: str) -> Family:
    """The family of a model.

    Raises:
        ModelError: it is not known, or its text decoder looks ahead.
    """
    text = text_config(config)
    family = FAMILIES.get(text.model_type)
    if family is None:
        part = f" (its text part is {text.model_type!r})" if text.model_type != config.model_type else ""
        raise ModelError(
            f"{name}: a model of family {config.model_type!r}{part}, whose blocks are not known; known are "
            f"{', '.join(sorted(FAMILIES))}. A family is one entry of FAMILIES in actcache/model/families.py"
        )
    if getattr(text, "use_bidirectional_attention", False) or not getattr(text, "is_causal", True):
        raise ModelError(
            f"{name}: its attention looks ahead (use_bidirectional_attention), so a row would depend on the tokens after "
            f"it and on padding; expected a causal decoder"
        )
    return family
