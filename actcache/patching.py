"""The patched forward: a decoder run with the vectors at a hook edited, from where the first edit is, to its logits.

Blocks before the first edit do not run again: what left them is known from a clean run of the same tokens.

Axes: q sequences, t positions, d width, n chosen tokens, v vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actcache.errors import UsageError
from actcache.model import Decoder

Edit = Callable[[Tensor], Tensor]
"""From [q, t, d] at a hook to what takes its place, in the same dtype. It must not write to its argument."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanRun:
    """A forward pass with nothing edited.

    input_ids  [q, t] int64.
    hook       where vectors were captured.
    acts       [q, t, d] there, per layer.
    entering   [q, t, d] what goes into the block of each of those layers.
    hidden     [q, t, d] after the final norm.
    """

    input_ids: Tensor
    hook: str
    acts: dict[int, Tensor]
    entering: dict[int, Tensor]
    hidden: Tensor


class Patcher:
    """Runs a whole decoder with edits.

    Args:
        decoder: with its head, so not cut.

    Raises:
        UsageError: the decoder was cut.
    """

    def __init__(self, decoder: Decoder) -> None:
        if decoder.causal_lm is None:
            raise UsageError(f"{decoder.name or decoder.family} was cut: it has no head left. Load it again")
        self.decoder = decoder
        self._causal_lm: PreTrainedModel = decoder.causal_lm
        self._is_tuple, self._output_type = self._find_types()

    @torch.inference_mode()
    def run_clean(self, input_ids: Tensor, hook: str, layers: Sequence[int]) -> CleanRun:
        """Run the model, and keep what edits at `hook` may begin from.

        Args:
            input_ids: [q, t] integers.
            hook: where edits will be, or the first of several such places.
            layers: of which layers.

        Raises:
            UsageError: an unknown hook, or layers that the model does not have.
        """
        wrong = [layer for layer in layers if not 0 <= layer < self.decoder.n_layers]
        if wrong:
            raise UsageError(f"no layers {wrong}; the model has 0 to {self.decoder.n_layers - 1}")
        ids = input_ids.to(self.decoder.device)
        acts: dict[int, Tensor] = {}
        entering: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer in layers:
                for name, found in ((hook, acts), ("resid_pre", entering)):
                    stack.enter_context(self._editing(name, layer, _recorder(found, layer)))
            hidden = self._run_base(ids)
        return CleanRun(input_ids=ids, hook=hook, acts=acts, entering=entering, hidden=hidden)

    @torch.inference_mode()
    def run_edited(self, clean: CleanRun, edits: Mapping[tuple[str, int], Edit]) -> Tensor:
        """The final hidden states [q, t, d] with the vectors at some (hook, layer) replaced by their edits.

        Every edit sees the running stream: what earlier edits did has reached it. One that gives back what it got is a
        way to look at the stream on its way.

        Raises:
            UsageError: no edits, or the first is of a layer that the clean run did not keep.
        """
        first = min((layer for _hook, layer in edits), default=-1)
        if first not in clean.acts:
            raise UsageError(
                f"edits at layers {sorted({layer for _hook, layer in edits})}; the clean run kept {sorted(clean.acts)}"
            )
        rest = dict(edits)
        if clean.hook == "resid_post" and {hook for hook, layer in edits if layer == first} == {clean.hook}:
            n_skipped, state = first + 1, rest.pop((clean.hook, first))(clean.acts[first])
        else:
            n_skipped, state = first, clean.entering[first]
        with ExitStack() as stack:
            stack.enter_context(self._skipping(n_skipped, state))
            for (hook, layer), edit in rest.items():
                stack.enter_context(self._editing(hook, layer, edit))
            return self._run_base(clean.input_ids)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, v] of final hidden states [n, d]: the model's own head, and whatever its family does after it."""
        return self._head(hidden)

    def read_out(self, stream: Tensor) -> Tensor:
        """Logits [n, v] of vectors [n, d] of the residual stream, as if they had left the last block.

        Differentiable: gradients reach `stream`, not the model.
        """
        ids = torch.zeros(len(stream), 1, dtype=torch.int64, device=self.decoder.device)
        with self._skipping(self.decoder.n_layers, stream[:, None]):
            hidden = self._run_base(ids)[:, 0]
        return self._head(hidden)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """The token embedding and the unembedding, [v, d] each; one and the same tensor where they are tied."""
        modules: tuple[Any, Any] = (
            self._causal_lm.get_input_embeddings(),
            self._causal_lm.get_output_embeddings(),
        )
        into, out_of = (module.weight for module in modules)
        return (into, into) if out_of.data_ptr() == into.data_ptr() else (into, out_of)

    def _head(self, hidden: Tensor) -> Tensor:
        """The head without the decoder under it: the decoder's output is what is given."""
        output = self._output_type(last_hidden_state=hidden[:, None])
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=self.decoder.device)
        with _instead(self.decoder.base, lambda *_args, **_kwargs: output):
            return self._causal_lm(input_ids=ids, use_cache=False).logits[:, 0]

    def _run_base(self, input_ids: Tensor) -> Tensor:
        return self.decoder.base(input_ids=input_ids, use_cache=False).last_hidden_state

    def _find_types(self) -> tuple[bool, type]:
        """Whether blocks return tuples, and what the decoder returns, in this family and version of transformers."""
        found: list[bool] = []
        handle = self.decoder.blocks[0].register_forward_hook(
            lambda _module, _args, output: found.append(isinstance(output, tuple))
        )
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.decoder.device)
        try:
            with torch.inference_mode():
                output = self.decoder.base(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        return found[0], type(output)

    @contextmanager
    def _skipping(self, n_blocks: int, state: Tensor) -> Iterator[None]:
        """The first blocks compute nothing, and `state` leaves the last of them."""

        def skip(*args: Any, **kwargs: Any) -> Any:
            return self._as_returned(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as stack:
            for layer in range(n_blocks):
                is_last = layer == n_blocks - 1
                forward = (lambda *_args, **_kwargs: self._as_returned(state)) if is_last else skip
                stack.enter_context(_instead(self.decoder.blocks[layer], forward))
            yield

    def _as_returned(self, stream: Tensor) -> Any:
        return (stream,) if self._is_tuple else stream

    @contextmanager
    def _editing(self, hook: str, layer: int, edit: Edit) -> Iterator[None]:
        """The vector at a hook passes through `edit`."""
        module, place = self.decoder.place(hook, layer)

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001 - torch's signature
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG001 - torch's signature
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        if place.side == "in":
            handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
        else:
            handle = module.register_forward_hook(on_output)
        try:
            yield
        finally:
            handle.remove()


def _recorder(found: dict[int, Tensor], layer: int) -> Edit:
    def keep(acts_qtd: Tensor) -> Tensor:
        found[layer] = acts_qtd
        return acts_qtd

    return keep


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` while this lasts; its place in the model and its attributes stay as they are."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:  # a wrapper that another library had put there
            module.__dict__["forward"] = before
