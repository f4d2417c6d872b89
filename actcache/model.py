"""A decoder's blocks: load a causal language model, and capture the vectors at its hooks with nothing run after them.

Axes: q sequences, t positions, d width, v vocabulary. With parallel or sequential attention alike,
`resid_pre + attn_out + mlp_out = resid_post`: the two middle hooks are what a block ADDS to the stream.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from actcache.errors import ModelError, NotFoundError, UsageError

HOOKS = ("resid_post", "resid_pre", "mlp_in", "mlp_out", "attn_out")

OnLayer = Callable[[str, int, Tensor], None]

_DIGEST_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where a family of decoders keeps its blocks. Paths are dotted attribute names.

    blocks   the list of blocks, from the base model (the model without its head).
    attn     from a block: the module whose output the block adds to the stream for attention.
    mlp      from a block: the module whose input is `mlp_in`, after the block's norm.
    mlp_add  from a block: the module whose output the block adds to the stream for the MLP, where that is not
             `mlp` itself (families that normalise once more before adding).
    """

    blocks: str
    attn: str
    mlp: str
    mlp_add: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """One side of a module inside a block. `path` is dotted, from the block; empty for the block itself."""

    path: str
    side: Literal["in", "out"]


FAMILIES: dict[str, Family] = {
    "gpt2": Family(blocks="h", attn="attn", mlp="mlp"),
    "gpt_neox": Family(blocks="layers", attn="attention", mlp="mlp"),
    "llama": Family(blocks="layers", attn="self_attn", mlp="mlp"),
}


class _AllCaptured(Exception):
    """Raised inside the forward pass when nothing is left to capture."""


class Decoder:
    """A causal language model seen as a stack of blocks, for inference only.

    Args:
        causal_lm: a loaded transformers model. It is put in evaluation mode and its gradients are switched off.
        name: what the model is called in the plan: a hub id or a local folder's name.
        revision: the commit the weights came from; None for local folders.

    Raises:
        ModelError: the family is not one of `FAMILIES`.
    """

    def __init__(self, causal_lm: PreTrainedModel, *, name: str = "", revision: str | None = None) -> None:
        config = causal_lm.config
        self._family = _find_family(config, name or type(causal_lm).__name__)
        self.causal_lm: PreTrainedModel | None = causal_lm.eval().requires_grad_(requires_grad=False)
        self.base = cast(PreTrainedModel, causal_lm.base_model)
        self.name = name
        self.revision = revision
        self.family: str = config.model_type
        self.width: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.n_layers = len(self.blocks)
        self._weights_digest: str | None = None

    def __repr__(self) -> str:
        return f"Decoder({self.name!r}, {self.family}, {self.n_layers} layers, width {self.width}, {self.dtype} on {self.device})"

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: that of the parameters."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.base.device

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order; fewer than `n_layers` after `cut`."""
        blocks = self.base.get_submodule(self._family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def place(self, hook: str, layer: int) -> tuple[nn.Module, Place]:
        """The module of one layer whose input or output a hook is."""
        _check_hook(hook)
        family = self._family
        place = {
            "resid_post": Place("", "out"),
            "resid_pre": Place("", "in"),
            "mlp_in": Place(family.mlp, "in"),
            "mlp_out": Place(family.mlp_add or family.mlp, "out"),
            "attn_out": Place(family.attn, "out"),
        }[hook]
        return self.blocks[layer].get_submodule(place.path), place

    def hook_width(self, hook: str) -> int:
        """Width d of one hook's rows. Raises UsageError for an unknown hook."""
        _check_hook(hook)
        return self.width

    def weights_digest(self) -> str:
        """Sha256 over name, dtype, shape and bytes of every parameter, in order of their names.

        Tied parameters count once. The digest is of the parameters as loaded: another dtype is another digest.
        Memory beyond the model's own: 64 MB or so, and one parameter where one is not contiguous.
        """
        if self._weights_digest is None:
            assert self.causal_lm is not None  # cut() asks for the digest first
            self._weights_digest = _digest_parameters(self.causal_lm)
        return self._weights_digest

    def cut(self, last_layer: int) -> None:
        """Drop the head and every block after `last_layer` for good, to free their memory.

        `capture` runs nothing after the last captured layer with or without this. `n_layers` and
        `weights_digest()` go on describing the whole model; `causal_lm` becomes None.

        Raises:
            UsageError: `last_layer` is not a layer of the model.
        """
        self._check_layers("cut", [last_layer])
        self.weights_digest()
        self.base.set_submodule(self._family.blocks, self.blocks[: last_layer + 1])
        self.causal_lm = None

    def capture(self, input_ids: Tensor, hooks: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], Tensor]:
        """All captured layers at once. See `capture_each`, which need not hold them all.

        Args:
            input_ids: [q, t] integers.
            hooks: the layers wanted of each hook.

        Returns:
            [q, t, d] for each (hook, layer), in the compute dtype, on the model's device. Some may share memory
            (`resid_pre` of a layer is `resid_post` of the one before): read them, do not write to them.
        """
        captured: dict[tuple[str, int], Tensor] = {}

        def keep(hook: str, layer: int, acts_qtd: Tensor) -> None:
            captured[hook, layer] = acts_qtd

        self.capture_each(input_ids, hooks, keep)
        return captured

    def capture_each(self, input_ids: Tensor, hooks: Mapping[str, Sequence[int]], on_layer: OnLayer) -> None:
        """Run the model and hand over each wanted vector as it is computed.

        The forward pass ends at the last one wanted: no later block, final norm or head runs. Attention is causal
        over the whole sequence, nothing is masked. `resid_post` of the last block is the value before the final norm.

        Args:
            input_ids: [q, t] integers; moved to the model's device.
            hooks: the layers wanted of each hook, e.g. `{"resid_post": (0, 3)}`.
            on_layer: called as `on_layer(hook, layer, acts)` once for each, in the order of computation. `acts` is
                [q, t, d], made under inference mode: copy what is kept, write to nothing.

        Raises:
            UsageError: an unknown hook, a layer out of range or cut away, ids of another shape or range.
        """
        ids_qt = self._check_input(input_ids)
        n_wanted = self._check_wanted(hooks)

        def hand_over(hook: str, layer: int, acts_qtd: Tensor) -> None:
            nonlocal n_wanted
            on_layer(hook, layer, acts_qtd)
            n_wanted -= 1
            if n_wanted == 0:
                raise _AllCaptured

        with torch.inference_mode(), self._listening(hooks, hand_over):
            try:
                self.base(input_ids=ids_qt.to(self.device), use_cache=False)
            except _AllCaptured:
                return
        raise ModelError(
            f"{self.name or self.family}: the forward pass ended with {n_wanted} captures missing; "
            f"the {self.family} blocks of this transformers version do not call {self._family}"
        )

    @contextmanager
    def _listening(self, hooks: Mapping[str, Sequence[int]], on_layer: OnLayer) -> Iterator[None]:
        """Torch hooks on the wanted places, removed again on leaving."""
        handles = []
        try:
            for hook, layers in hooks.items():
                handles.extend(self._listen(hook, layer, on_layer) for layer in layers)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _listen(self, hook: str, layer: int, on_layer: OnLayer) -> Any:
        module, place = self.place(hook, layer)

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001 - torch's signature
            on_layer(hook, layer, args[0] if args else kwargs["hidden_states"])

        def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - torch's signature
            on_layer(hook, layer, output[0] if isinstance(output, tuple) else output)

        if place.side == "in":
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(on_output)

    def _check_input(self, input_ids: Tensor) -> Tensor:
        shape = tuple(input_ids.shape)
        if len(shape) != 2 or 0 in shape or input_ids.dtype not in (torch.int64, torch.int32):
            raise UsageError(
                f"input_ids must be [q, t] of int64, none of them 0; got {shape} of {input_ids.dtype}"
            )
        if self.max_positions is not None and shape[1] > self.max_positions:
            raise UsageError(
                f"sequences of {shape[1]} tokens; {self.name or self.family} has {self.max_positions} positions: "
                f"use a seq_len of at most {self.max_positions}"
            )
        if input_ids.device.type == "cpu":
            lowest, highest = (int(x) for x in torch.aminmax(input_ids))
            if lowest < 0 or highest >= self.vocab_size:
                raise UsageError(
                    f"token ids from {lowest} to {highest}; {self.name or self.family} knows 0 to {self.vocab_size - 1}: "
                    "use the tokenizer that belongs to the model"
                )
        return input_ids

    def _check_wanted(self, hooks: Mapping[str, Sequence[int]]) -> int:
        for hook, layers in hooks.items():
            _check_hook(hook)
            self._check_layers(hook, layers)
        n_wanted = sum(len(layers) for layers in hooks.values())
        if n_wanted == 0:
            raise UsageError('nothing to capture; name a hook and its layers, e.g. {"resid_post": (0, 3)}')
        return n_wanted

    def _check_layers(self, what: str, layers: Sequence[int]) -> None:
        n_left = len(self.blocks)
        wrong = [layer for layer in layers if not 0 <= layer < n_left]
        if wrong:
            was_cut = f" ({self.n_layers} before it was cut)" if n_left < self.n_layers else ""
            raise UsageError(f"{what}: no layers {wrong}; the model has 0 to {n_left - 1}{was_cut}")
        if len(set(layers)) != len(layers):
            raise UsageError(f"{what}: layers {list(layers)} name one twice; give each once")


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> Decoder:
    """Load a causal language model from safetensors, for inference.

    Args:
        name: a local folder, or a model's id on the hub.
        revision: a commit, tag or branch on the hub.
        dtype: the compute dtype, as a torch dtype or its name ("float32"); "auto" is what the weights are stored in.
        device: where to put it.

    Raises:
        NotFoundError: neither a folder here nor a model that can be had from the hub.
        ModelError: another family than `FAMILIES`, no safetensors, or weights that do not fill the model.
        UsageError: an unknown dtype.
    """
    torch_dtype = _parse_dtype(dtype)
    source = _find_source(name)
    config = _load_config(source, revision)
    _find_family(config, source)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=revision or "main",
            dtype=torch_dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{source}: the weights cannot be loaded: {_first_line(error)} Expected model.safetensors (or its shards and "
            "their index) beside config.json; convert other formats with save_pretrained(safe_serialization=True)"
        ) from error
    causal_lm, report = loaded
    mismatched = (key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    lacking = sorted([*report["missing_keys"], *mismatched])
    if lacking:
        raise ModelError(
            f"{source}: {len(lacking)} parameters are not in the weights or have another shape there, such as "
            f"{lacking[:3]}; they would be random. Use weights that belong to this config.json"
        )
    commit = getattr(config, "_commit_hash", None)
    return Decoder(causal_lm.to(device), name=str(name), revision=commit or revision)


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder or of a model's id on the hub.

    Raises:
        NotFoundError: neither a folder here nor a model that can be had from the hub.
        ModelError: no tokenizer there that can be loaded.
    """
    source = _find_source(name)
    expected = "Expected tokenizer.json and tokenizer_config.json; name a folder or model that has them"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError, KeyError, ImportError) as error:
        kind = ModelError if Path(source).is_dir() else NotFoundError
        raise kind(f"{source}: no tokenizer can be loaded: {_first_line(error)} {expected}") from error
    if tokenizer.vocab_size <= len(
        tokenizer.all_special_ids
    ):  # what transformers makes up where it finds no files
        raise ModelError(f"{source}: no vocabulary there, special tokens only. {expected}")
    return tokenizer


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Layer numbers from `"all"`, or from numbers and half-open ranges such as `"0,3,5"`, `"0:6"` and `"0:6,11"`.

    Returns:
        The layer numbers, ascending, each once.

    Raises:
        UsageError: empty, not numbers, out of range, a range with nothing in it, or a layer named twice.
    """
    if text.strip() == "all":
        return tuple(range(n_layers))
    layers: list[int] = []
    for part in text.split(","):
        layers.extend(_parse_range(part.strip(), text))
    wrong = sorted({layer for layer in layers if layer >= n_layers})
    if wrong:
        raise UsageError(f"layers {text!r}: no layer {wrong[0]}; the model has 0 to {n_layers - 1}")
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise UsageError(f"layers {text!r}: layer {twice[0]} is named twice; name each once")
    return tuple(sorted(layers))


def _parse_range(part: str, text: str) -> range:
    first, colon, end = part.partition(":")
    if not (first.isdecimal() and (end.isdecimal() if colon else True)):
        raise UsageError(
            f'layers {text!r}: {part!r} is neither a layer nor a range; write "all", "0,3,5" or "0:6"'
        )
    layers = range(int(first), int(end) if colon else int(first) + 1)
    if not layers:
        raise UsageError(f"layers {text!r}: {part!r} is empty; a:b goes from a to b - 1")
    return layers


def _find_family(config: PretrainedConfig, name: str) -> Family:
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"{name}: a model of family {config.model_type!r}, whose blocks are not known; known are "
            f"{', '.join(sorted(FAMILIES))}. A family is one entry of FAMILIES in actcache/model.py"
        )
    return family


def _check_hook(hook: str) -> None:
    if hook not in HOOKS:
        raise UsageError(f"no hook {hook!r}; hooks are {', '.join(HOOKS)}")


def _parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    if found is None:
        raise UsageError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
    return found


def _find_source(name: str | Path) -> str:
    """A folder's path, or a hub id; what can be neither is refused without asking the hub."""
    text = str(name)
    path = Path(name).expanduser()
    if text and path.is_dir():
        return str(path)
    if text and path.exists():
        raise ModelError(
            f"{text}: a file; expected a folder with config.json and model.safetensors, or a hub id"
        )
    if not text or isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise NotFoundError(
            f"{text or '(empty)'}: no such folder; expected a folder with config.json, or a hub id"
        )
    return text


def _load_config(source: str, revision: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main")
    except ValueError as error:
        raise ModelError(
            f"{source}: config.json names no model that transformers knows: {_first_line(error)} "
            f"Known families are {', '.join(sorted(FAMILIES))}"
        ) from error
    except OSError as error:
        if Path(source).is_dir():
            raise ModelError(
                f"{source}: no config.json that can be read: {_first_line(error)} Expected a folder as "
                "save_pretrained writes it"
            ) from error
        raise NotFoundError(
            f"{source}: not a folder here, and the hub does not give it: {_first_line(error)} Check the name and "
            "revision and that the hub can be reached, or give the path of a local folder"
        ) from error


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, ended with a full stop."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith(".") else line + "."


def _digest_parameters(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        header = f"{name} {str(parameter.dtype).removeprefix('torch.')} {list(parameter.shape)}\n"
        digest.update(header.encode())
        flat = parameter.detach().reshape(-1)
        for start in range(0, flat.numel(), _DIGEST_ELEMENTS):
            part = flat[start : start + _DIGEST_ELEMENTS].cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()
