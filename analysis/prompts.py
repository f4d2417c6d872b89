"""What an SAE makes of one text: its latents over layers and positions.

Axes: t tokens of the text, l layers, f latents.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.errors import UsageError
from analysis.entries import Entries
from analysis.layers import LatentLayers, LayerCounts
from analysis.models import Model
from analysis.subject import Subject
from trainer.dead import ACTIVE_ABOVE

PAPER_PROMPT = "When Mary and John went to the store, John gave a drink to"
"""The text of the MLSAE paper's single-prompt heatmap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLatents:
    """The latents of one text.

    text      as given.
    tokens    [t] int64.
    pieces    [t] the text of each token.
    is_kept   [t] bool, whether the plan would keep such a token: not one of the first, not a special one.
    entries   active latents of all tokens; `token` is the position.
    latents   the distribution over layers of the kept tokens' latents.
    """

    text: str
    tokens: NDArray[np.int64]
    pieces: list[str]
    is_kept: NDArray[np.bool_]
    entries: Entries
    latents: LatentLayers


def prompt_latents(subject: Subject, model: Model, text: str) -> PromptLatents:
    """Run a text through the model and its hooks through the SAE.

    The text begins as the store's sequences do: with a BOS token where the plan has one, else bare.

    Raises:
        UsageError: no token of the text would be kept.
    """
    request = subject.store.plan.request
    ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if request.bos and request.tokenizer.bos_id is not None:
        ids = [request.tokenizer.bos_id, *ids]
    tokens = np.array(ids, np.int64)
    is_kept = np.arange(len(tokens)) >= request.exclude_first
    is_kept &= ~np.isin(tokens, request.tokenizer.special_ids)
    if not is_kept.any():
        raise UsageError(f"the prompt {text!r} has no token that the store's plan would keep; write more")
    acts = model.decoder.capture(torch.from_numpy(tokens)[None], {subject.hook: subject.layers})
    counts = LayerCounts(subject.layers, subject.n_latents)
    parts = []
    for i, layer in enumerate(subject.layers):
        code = subject.encode(acts[subject.hook, layer][0].to(torch.float32), layer)
        values, latents = code.values.cpu().numpy(), code.indices.cpu().numpy() + subject.first_latent(layer)
        counts.update(layer, values[is_kept], latents[is_kept])
        token, slot = np.nonzero(values > ACTIVE_ABOVE)
        parts.append(
            (token, np.full(len(token), i), latents[token, slot], values[token, slot].astype(np.float64))
        )
    token, layer_i, latent, activation = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return PromptLatents(
        text=text,
        tokens=tokens,
        pieces=[model.piece(token) for token in ids],
        is_kept=is_kept,
        entries=Entries(token=token, layer_i=layer_i, latent=latent, activation=activation),
        latents=counts.compute(),
    )
