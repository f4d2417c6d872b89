"""An SAE in its model's place: the model run with reconstructions, zeros or means for the rows the SAE was trained on.

Rows outside the run's filter pass untouched in every condition (unless all positions are asked for), and all conditions are
scored at the same positions.

Axes: q sequences, t positions, l layers, d width, n scored tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from actcache.errors import UsageError
from actcache.patching import CleanRun, Edit, Patcher
from analysis.loss import CONDITIONS, LossScores, LossSums, clean_scores, score, scored_positions
from analysis.subject import Subject

if TYPE_CHECKING:
    from actcache.model import Decoder
    from actcache.reader.access import Split

Positions = Literal["kept", "all"]

_FORWARD_TOKENS = 1024
_HIDDEN_VALUES = 2**26
"""Final hidden states of all conditions held at once: 256 MiB of float32."""
_LOGIT_VALUES = 2**22
"""Logits scored at once: 16 MiB of float32. Larger pieces come from fresh memory each time, which took half of the scoring."""

Sums = dict[Positions, dict[int | None, LossSums]]
"""Per way of patching, per layer; None: all layers at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchedScores:
    """What a model loses.

    positions  "kept": rows that the run's filter lets pass are patched. "all": every position is.
    layers     per layer, that layer alone patched.
    together   all layers patched at once, each re-encoded from the stream as the patches before have left it.
    """

    positions: Positions
    layers: dict[int, LossScores]
    together: LossScores

    def as_json(self) -> dict[str, Any]:
        """Plain values; an estimate is {"value", "se"}."""
        return {
            "positions": self.positions,
            "layers": {str(layer): scores.as_json() for layer, scores in self.layers.items()},
            "together": self.together.as_json(),
        }


class _Tokens(NamedTuple):
    """Some sequences. input_ids [q, t]; mask [l, q, t] rows that pass; sequence [q]; n_kept tokens among them."""

    input_ids: Tensor
    mask: Tensor
    sequence: Tensor
    n_kept: int


def check_model(decoder: Decoder, subject: Subject) -> None:
    """Raises UsageError unless the decoder holds the weights that the store's rows come from."""
    model = subject.store.plan.request.model
    if decoder.weights_digest() != model.digest:
        raise UsageError(
            f"{decoder.name} in {decoder.dtype} has other weights than {model.name} in {model.compute_dtype}, which "
            f"{subject.store.url} was built with; give that model with --model"
        )


def evaluate_patched(
    subject: Subject,
    patcher: Patcher,
    *,
    n_tokens: int,
    split: Split = "holdout",
    positions: tuple[Positions, ...] = ("kept",),
    on_tokens: Callable[[int], None] = lambda _n: None,
) -> list[PatchedScores]:
    """Cross-entropy, KL and logits with each layer patched alone, then all at once.

    Args:
        subject: the SAE and its store.
        patcher: of the store's model.
        n_tokens: kept tokens to run, to the end of a sequence; the plan put sequences in a random order, so the first are a
            fair sample.
        split: "holdout" or "train".
        positions: ways to patch.
        on_tokens: called with how many more kept tokens are done.

    Raises:
        UsageError: the model is not the store's.
    """
    check_model(patcher.decoder, subject)
    means = {
        layer: torch.from_numpy(stats.mean).to(patcher.decoder.device)
        for layer, stats in subject.store.stats(subject.target_hook, "train").items()
    }
    sums: Sums = {way: {layer: LossSums() for layer in (*subject.layers, None)} for way in positions}
    n_states = len(CONDITIONS) * (len(subject.layers) + 1)
    at_once = min(_FORWARD_TOKENS, _HIDDEN_VALUES // (n_states * patcher.decoder.width))
    for tokens in _batches(subject, split, n_tokens, at_once):
        add_batch(sums, subject, patcher, means, tokens.input_ids, tokens.mask, tokens.sequence)
        on_tokens(tokens.n_kept)
    return [
        PatchedScores(
            positions=way,
            layers={layer: of_layer[layer].compute() for layer in subject.layers},
            together=of_layer[None].compute(),
        )
        for way, of_layer in sums.items()
    ]


def add_batch(
    sums: Sums,
    subject: Subject,
    patcher: Patcher,
    means: Mapping[int, Tensor],
    input_ids: Tensor,
    mask: Tensor,
    sequence: Tensor,
) -> None:
    """Run some sequences under every condition and add their scores.

    Args:
        sums: per way of patching and layer.
        subject: the SAE.
        patcher: of the model.
        means: [d] per layer, the mean that stands in for a row.
        input_ids: [q, t] int64.
        mask: [l, q, t] bool, rows that pass the run's filter.
        sequence: [q] what each sequence is called.
    """
    layers = subject.layers
    clean = patcher.run_clean(input_ids, subject.target_hook, layers)
    mask = mask.to(clean.hidden.device)
    chosen_of: dict[int | None, list[int]] = {layer: [i] for i, layer in enumerate(layers)}
    chosen_of[None] = list(range(len(layers)))
    scored = {key: scored_positions(mask[chosen].all(0)) for key, chosen in chosen_of.items()}
    for way, of_layer in sums.items():
        patched = mask if way == "kept" else torch.ones_like(mask)
        hidden = {
            (key, condition): patcher.run_edited(
                clean, _edits(condition, subject, means, {layers[i]: patched[i] for i in chosen})
            )
            for key, chosen in chosen_of.items()
            for condition in CONDITIONS
        }
        for key, per_token in _score(patcher, clean, hidden, scored).items():
            at = scored[key].nonzero()[:, 0].cpu()
            of_layer[key].update(per_token, sequence[at])


def _edits(
    condition: str, subject: Subject, means: Mapping[int, Tensor], rows: Mapping[int, Tensor]
) -> dict[tuple[str, int], Edit]:
    """What is done at each layer, to the rows [q, t] of it that are patched."""
    edits: dict[tuple[str, int], Edit] = {}
    for layer, patched in rows.items():
        if condition == "sae":
            edits |= subject.edits(layer, patched)
        else:
            value = means[layer] if condition == "mean" else torch.zeros_like(means[layer])
            edits[subject.target_hook, layer] = partial(_put, value=value, at=patched)
    return edits


def _put(acts: Tensor, *, value: Tensor, at: Tensor) -> Tensor:
    return torch.where(at[..., None], value.to(acts.dtype), acts)


def _score(
    patcher: Patcher,
    clean: CleanRun,
    hidden: Mapping[tuple[int | None, str], Tensor],
    scored: Mapping[int | None, Tensor],
) -> dict[int | None, dict[str, Tensor]]:
    """Every quantity of `LossSums` but "n" at each key's scored positions [q, t], in their order.

    The model's own logits are made once for all keys, some positions at a time.
    """
    some = torch.stack(list(scored.values())).any(0)
    target = clean.input_ids[:, 1:][some[:, :-1]]
    unpatched_states = clean.hidden[some]
    states = {at: values[some] for at, values in hidden.items()}
    is_scored = {key: positions[some] for key, positions in scored.items()}
    parts: dict[int | None, dict[str, list[Tensor]]] = {key: {} for key in scored}
    size = max(1, _LOGIT_VALUES // patcher.decoder.vocab_size)
    for start in range(0, len(target), size):
        rows = slice(start, start + size)
        unpatched = clean_scores(patcher.logits(unpatched_states[rows]))
        loss = score(unpatched.logits, target[rows], unpatched).loss
        for key, found in parts.items():
            found.setdefault("clean", []).append(loss[is_scored[key][rows]])
        for (key, condition), values in states.items():
            scores = score(patcher.logits(values[rows]), target[rows], unpatched)
            for name, value in scores._asdict().items():
                parts[key].setdefault(f"{condition}_{name}", []).append(value[is_scored[key][rows]])
    return {
        key: {name: torch.cat(values) for name, values in found.items()}
        for key, found in parts.items()
        if found
    }


def _batches(subject: Subject, split: Split, n_tokens: int, at_once: int) -> Iterator[_Tokens]:
    """Sequences with kept tokens, `at_once` tokens or so at a time, with the rows of each layer that pass."""
    for shard in subject.shards(split, n_tokens):
        first = shard.sequences.start
        mask = torch.zeros(len(subject.layers), *shard.tokens.shape, dtype=torch.bool)
        mask[:, shard.sequence - first, shard.position] = torch.from_numpy(shard.passes)
        ids = torch.from_numpy(shard.tokens)
        known, n_kept = torch.unique(torch.from_numpy(shard.sequence - first), return_counts=True)
        for part in torch.arange(len(known)).split(max(1, at_once // ids.shape[1])):
            chosen = known[part]
            yield _Tokens(ids[chosen], mask[:, chosen], chosen + first, int(n_kept[part].sum()))
