"""A causal language model seen as a stack of blocks: capture the vectors at its hooks, and run nothing after them.

Axes: q sequences, t positions, d width, v vocabulary. Where hooks are is in `families`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actcache.errors import ModelError, UsageError
from actcache.model.digest import digest_parameters
from actcache.model.families import Family, Place, find_family, text_config
from actcache.model.isolation import isolating_arguments

OnLayer = Callable[[str, int, Tensor], None]

_DRY_SHAPES = ((2, 3), (3, 5))
"""Two shapes [q, t] without a number in common: a dimension that fits both is sequence or position."""


class _AllCaptured(Exception):
    """Raised inside the forward pass when nothing is left to capture."""


class Decoder:
    """A causal language model seen as a stack of blocks, for inference only.

    A hook is a name of `HOOKS`, or one side of any module of every block, such as `layers.*.mlp.up_proj:out`.

    Args:
        causal_lm: a loaded transformers model, or one that also sees images around a text decoder. It is put in
            evaluation mode and its gradients are switched off.
        name: what the model is called in the plan: a hub id or a local folder's name.
        revision: the commit the weights came from; None for local folders.

    Attributes:
        causal_lm: the whole model; None once it is cut.
        base: its text decoder, without the head.
        config: the configuration of the text decoder.
        family: its `model_type`, a key of `FAMILIES`.
        width: d of the residual stream.
        vocab_size: v.
        max_positions: the longest sequence; None where the model sets no bound.
        n_layers: blocks of the whole model.

    Raises:
        ModelError: the family is not one of `FAMILIES`, or looks ahead.
    """

    def __init__(self, causal_lm: PreTrainedModel, *, name: str = "", revision: str | None = None) -> None:
        self._family: Family = find_family(causal_lm.config, name or type(causal_lm).__name__)
        self.config: Any = text_config(causal_lm.config)
        self.causal_lm: PreTrainedModel | None = causal_lm.eval().requires_grad_(requires_grad=False)
        self.base = _find_decoder(causal_lm, self._family.blocks)
        self._prefix = next(path for path, module in causal_lm.named_modules() if module is self.base)
        self.name = name
        self.revision = revision
        self.family: str = self.config.model_type
        self.width: int = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        self.max_positions: int | None = getattr(self.config, "max_position_embeddings", None)
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
        """Where token ids go: the device that looks up their embeddings."""
        embedding = self.base.get_input_embeddings()
        moved_to = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        if moved_to is not None:  # accelerate loads it there when it is needed
            return torch.device(moved_to)
        return next(embedding.parameters()).device

    @property
    def has_weights(self) -> bool:
        """Whether it can run: a skeleton cannot."""
        return self.device.type != "meta"

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order; fewer than `n_layers` after `cut`."""
        blocks = self.base.get_submodule(self._family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def spell(self, hook: str) -> str:
        """The one spelling of a hook, as the plan has it. Raises UsageError where it is none."""
        return self._family.spell(hook, self._prefix)

    def place(self, hook: str, layer: int) -> tuple[nn.Module, Place]:
        """The module of one layer whose input or output a hook is.

        Raises:
            UsageError: the block has no such module.
        """
        place, block = self._family.place(self.spell(hook)), self.blocks[layer]
        try:
            return block.get_submodule(place.path), place
        except AttributeError as error:
            inside = ", ".join(path for path, _module in block.named_modules() if path)
            raise UsageError(
                f"hook {hook}: block {layer} of {self.name or self.family} has no module {place.path!r}; it has {inside}"
            ) from error

    def hook_width(self, hook: str, layers: Sequence[int] | None = None) -> int:
        """Width d of a hook's rows: the stream's, or what a module gives in a forward pass of a few tokens.

        Args:
            hook: a name or a module.
            layers: where a module is looked at; None: all layers.

        Raises:
            UsageError: an unknown hook or layer, or a module whose input or output is not one vector for every token.
        """
        spelled = self.spell(hook)
        layers = range(len(self.blocks)) if layers is None else layers
        self._check_layers(spelled, layers)
        if ":" not in spelled:
            return self.width
        found = [self._dry_widths(spelled, layers, *shape) for shape in _DRY_SHAPES]
        widths = {width for widths in found for width in widths.values()}
        if len(widths) != 1:
            raise UsageError(
                f"hook {spelled}: its width differs between layers {found[0]}; capture layers of one width at a time"
            )
        return widths.pop()

    def weights_digest(self) -> str:
        """Sha256 over name, dtype, shape and bytes of every parameter, in order of their names.

        Tied parameters count once. The digest is of the parameters as loaded: another dtype is another digest.
        Memory beyond the model's own: 64 MB or so, and one parameter where one is not contiguous.
        """
        if self._weights_digest is None:
            assert self.causal_lm is not None  # cut() asks for the digest first
            self._weights_digest = digest_parameters(self.causal_lm)
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

    def capture(
        self, input_ids: Tensor, hooks: Mapping[str, Sequence[int]], positions: Tensor | None = None
    ) -> dict[tuple[str, int], Tensor]:
        """All captured layers at once. See `capture_each`, which need not hold them all.

        Args:
            input_ids: [q, t] integers.
            hooks: the layers wanted of each hook.
            positions: see `capture_each`.

        Returns:
            [q, t, d] for each (hook, layer), in the compute dtype, on the model's device. Some may share memory
            (`resid_pre` of a layer is `resid_post` of the one before): read them, do not write to them.
        """
        captured: dict[tuple[str, int], Tensor] = {}

        def keep(hook: str, layer: int, acts_qtd: Tensor) -> None:
            captured[hook, layer] = acts_qtd

        self.capture_each(input_ids, hooks, keep, positions)
        return captured

    def capture_each(
        self,
        input_ids: Tensor,
        hooks: Mapping[str, Sequence[int]],
        on_layer: OnLayer,
        positions: Tensor | None = None,
    ) -> None:
        """Run the model and hand over each wanted vector as it is computed.

        The forward pass ends at the last one wanted: no later block, final norm or head runs. Attention is causal
        over the whole sequence, nothing is masked. `resid_post` of the last block is the value before the final norm.

        Args:
            input_ids: [q, t] integers; moved to the model's device.
            hooks: the layers wanted of each hook, e.g. `{"resid_post": (0, 3)}`.
            on_layer: called as `on_layer(hook, layer, acts)` once for each, in the order of computation. `acts` is
                [q, t, d], made under inference mode: copy what is kept, write to nothing.
            positions: [q, t] integers, the place of each token in its document, from 0. Documents then do not see each
                other: every one is as if it were run alone. None: a sequence is one document.

        Raises:
            UsageError: an unknown hook, a layer out of range or cut away, ids of another shape or range.
            ModelError: a hook that was not reached, or gave something else than a vector for every token.
        """
        ids_qt = self._check_input(input_ids)
        n_wanted = self._check_wanted(hooks)
        arguments = {} if positions is None else self._isolating(positions, ids_qt)

        def hand_over(hook: str, layer: int, value: Any) -> None:
            nonlocal n_wanted
            acts_qtd = _as_rows(value, *ids_qt.shape)
            if acts_qtd is None:
                raise ModelError(f"{hook}, layer {layer}: {_shape_of(value)} where [q, t, d] was expected")
            on_layer(hook, layer, acts_qtd)
            n_wanted -= 1
            if n_wanted == 0:
                raise _AllCaptured

        with torch.inference_mode(), self._listening(hooks, hand_over):
            try:
                self.base(input_ids=ids_qt.to(self.device), use_cache=False, **arguments)
            except _AllCaptured:
                return
        raise ModelError(
            f"{self.name or self.family}: the forward pass ended with {n_wanted} captures missing; "
            f"the {self.family} blocks of this transformers version do not call {self._family}"
        )

    def _isolating(self, positions: Tensor, ids_qt: Tensor) -> dict[str, Tensor]:
        if positions.shape != ids_qt.shape:
            raise UsageError(
                f"positions {tuple(positions.shape)}: expected the shape of input_ids, {tuple(ids_qt.shape)}"
            )
        return isolating_arguments(positions.to(self.device), self._family, self.config, self.dtype)

    @contextmanager
    def _listening(
        self, hooks: Mapping[str, Sequence[int]], on_value: Callable[[str, int, Any], None]
    ) -> Iterator[None]:
        """Torch hooks on the wanted places, removed again on leaving."""
        handles = []
        try:
            for hook, layers in hooks.items():
                handles.extend(self._listen(hook, layer, on_value) for layer in layers)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _listen(self, hook: str, layer: int, on_value: Callable[[str, int, Any], None]) -> Any:
        module, place = self.place(hook, layer)

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001 - torch's signature
            on_value(
                hook,
                layer,
                args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)),
            )

        def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - torch's signature
            on_value(hook, layer, output[0] if isinstance(output, tuple | list) and output else output)

        if place.side == "in":
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(on_output)

    def _dry_widths(self, hook: str, layers: Sequence[int], q: int, t: int) -> dict[int, int]:
        """The width of a module hook in each layer, from a whole forward pass of a few tokens."""
        seen: dict[int, list[Any]] = {layer: [] for layer in layers}
        ids = torch.zeros(q, t, dtype=torch.int64, device=self.device)
        arguments: dict[str, Tensor] = {}
        if (
            self.device.type == "meta"
        ):  # whether a mask can be left out depends on numbers, and there are none
            arguments["attention_mask"] = torch.zeros(q, 1, t, t, dtype=self.dtype, device="meta")
            arguments["position_ids"] = torch.arange(t, device="meta").expand(q, t)
        with (
            torch.inference_mode(),
            self._listening({hook: layers}, lambda _hook, layer, value: seen[layer].append(value)),
        ):
            try:
                self.base(input_ids=ids, use_cache=False, **arguments)
            except RuntimeError as error:
                if self.has_weights:
                    raise
                raise UsageError(
                    f"hook {hook}: this version of transformers cannot tell the width of a module of {self.family} without "
                    f"weights ({error}). Upgrade transformers to 5, or build without the dry run"
                ) from error
        widths = {}
        for layer, values in seen.items():
            rows = _as_rows(values[0], q, t) if len(values) == 1 else None
            if rows is None:
                got = f"{len(values)} calls in a forward pass" if len(values) != 1 else _shape_of(values[0])
                raise UsageError(
                    f"hook {hook}, layer {layer}: {got} for [{q}, {t}] tokens; a hook is a module that is called once and "
                    f"takes or gives one vector of floating-point numbers for every token"
                )
            widths[layer] = rows.shape[-1]
        return widths

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
            self.spell(hook)
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


def _find_decoder(causal_lm: PreTrainedModel, blocks: str) -> PreTrainedModel:
    """The part of a model that holds the blocks; versions of transformers differ in what they call the decoder."""
    base = causal_lm.base_model
    named = (getattr(base, name, None) for name in ("decoder", "language_model", "text_model"))
    for candidate in (causal_lm.get_decoder(), base, *named):
        if isinstance(getattr(candidate, blocks, None), nn.ModuleList):
            return cast(PreTrainedModel, candidate)
    raise ModelError(f"{type(causal_lm).__name__}: no blocks ({blocks}) in it, nor in its decoder")


def _as_rows(value: Any, q: int, t: int) -> Tensor | None:
    """A module's value as [q, t, d]: heads side by side, flattened sequences apart again; None where it is neither."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return None
    if value.shape[:2] == (q, t) or value.shape[0] == q * t:
        return value.reshape(q, t, -1)
    return None


def _shape_of(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
