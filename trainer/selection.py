"""Which latents are active: k of every row, k times the batch's rows, or all that are positive.

Training may need to look at a whole batch before any of its rows can be encoded (`prepare`); evaluation takes every row by
itself (`infer`), whatever the batch it comes in.

Axes: b rows, d width, f latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.codes import Code, Dense, Fixed, Listed
from trainer.config import MULTI_TOPK, TrainConfig
from trainer.kernels import Selected, ragged
from trainer.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from trainer.sae import Dictionary


class Wanted(NamedTuple):
    """What a training step asks for.

    k       active latents per row now.
    n_rows  rows of the batch over all ranks.
    dead    [n_dead] int64, ascending.
    n_aux   how many of them to select for every row.
    ranks   who else has rows of the batch.
    """

    k: int
    n_rows: int
    dead: Tensor
    n_aux: int = 0
    ranks: Ranks = ALONE


class Found(NamedTuple):
    """The codes of some rows, with gradients: the active latents, Multi-TopK's, and the auxiliary ones."""

    code: Code
    wide: Code | None = None
    aux: Code | None = None


class Prepared(NamedTuple):
    """A batch that can be encoded: `encode(i, z)` for its part i; the threshold that was used, where there is one."""

    encode: Callable[[int, Tensor], Found]
    threshold: float | None = None


class Selection(Protocol):
    """A rule for which latents are active."""

    @property
    def k(self) -> int | None:
        """Active latents per row, on average at least; None where the penalty decides."""
        ...

    def prepare(self, dictionary: Dictionary, parts: Iterable[Tensor], wanted: Wanted) -> Prepared:
        """Get ready to encode a batch.

        Args:
            dictionary: whose weights.
            parts: the batch's standardised rows [b, d], part by part.
            wanted: what the step asks for.
        """
        ...

    def infer(self, dictionary: Dictionary, z: Tensor) -> Selected:
        """The active latents of rows z [b, d], as evaluation has them, without auxiliary ones."""
        ...


class TopK:
    """The k largest of every row; with `multi` also the 4k largest, from the same product."""

    def __init__(self, k: int, *, multi: bool = False) -> None:
        self.k = k
        self.multi = multi

    def prepare(self, dictionary: Dictionary, parts: Iterable[Tensor], wanted: Wanted) -> Prepared:  # noqa: ARG002
        """See `Selection`. Rows do not depend on each other."""

        def encode(_part: int, z: Tensor) -> Found:
            count = wanted.k * (MULTI_TOPK if self.multi else 1)
            count = min(count, dictionary.n_latents)
            found = dictionary.select(z, count, wanted.dead, wanted.n_aux)
            everything = Fixed(found.values, found.indices, dictionary.kernels)
            aux = None
            if wanted.n_aux:
                aux = Fixed(found.aux_values, found.aux_indices, dictionary.kernels, wanted.dead)
            if not self.multi:
                return Found(everything, aux=aux)
            best = Fixed(found.values[:, : wanted.k], found.indices[:, : wanted.k], dictionary.kernels)
            return Found(best, wide=everything, aux=aux)

        return Prepared(encode)

    def infer(self, dictionary: Dictionary, z: Tensor) -> Selected:
        """See `Selection`."""
        return dictionary.select(z, self.k, torch.empty(0, dtype=torch.int64, device=z.device), 0)


class BatchTopK:
    """The k * B largest of a batch of B rows, over all ranks and micro-batches; equal ones at the edge all or none.

    Evaluation uses the dictionary's `threshold`, a moving average of the smallest value selected.

    Source: Bussmann et al. (arXiv 2412.06410).
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def prepare(self, dictionary: Dictionary, parts: Iterable[Tensor], wanted: Wanted) -> Prepared:
        """See `Selection`. Every product is made once: what may be chosen is kept, `encode` gives it gradients."""
        candidates = ragged.Candidates(wanted.k * wanted.n_rows)
        with torch.no_grad(), dictionary.products():
            for z in parts:
                candidates.add(*dictionary.encoder(z), wanted.dead, wanted.n_aux)
        threshold = candidates.threshold(lambda counts: wanted.ranks.sum_([counts]))

        def encode(part: int, z: Tensor) -> Found:
            chosen = candidates.parts[part].at_least(threshold)
            weights = dictionary.encoder(z)
            if not wanted.n_aux:
                values = ragged.attach(chosen.values, chosen.rows, chosen.latents, *weights)
                return Found(Listed(chosen._replace(values=values), len(z)))
            aux_values, aux_latents = candidates.aux[part]
            of = torch.arange(len(z), device=z.device).repeat_interleave(wanted.n_aux)
            attached = ragged.attach(
                torch.cat([chosen.values, aux_values.flatten()]),
                torch.cat([chosen.rows, of]),
                torch.cat([chosen.latents, aux_latents.flatten()]),
                *weights,
            )
            values, aux = attached.split([len(chosen.values), len(of)])
            return Found(
                Listed(chosen._replace(values=values), len(z)),
                aux=Fixed(aux.view(len(z), wanted.n_aux), aux_latents, dictionary.kernels, wanted.dead),
            )

        return Prepared(encode, threshold)

    def infer(self, dictionary: Dictionary, z: Tensor) -> Selected:
        """See `Selection`."""
        return _above(dictionary, z, float(dictionary.get_buffer("threshold")))


class ReLU:
    """All that are positive; an L1 penalty keeps them few. Source: the plain SAE of later tim-lawson/mlsae."""

    k = None

    def prepare(self, dictionary: Dictionary, parts: Iterable[Tensor], wanted: Wanted) -> Prepared:  # noqa: ARG002
        """See `Selection`. Holds dense activations: at the start half of them are positive."""

        def encode(_part: int, z: Tensor) -> Found:
            full, w_enc, bias = dictionary.encoder(z)
            with dictionary.products():
                pre = (full - bias) @ w_enc.T
            return Found(Dense(torch.relu(pre).to(z.dtype)))

        return Prepared(encode)

    def infer(self, dictionary: Dictionary, z: Tensor) -> Selected:
        """See `Selection`."""
        return _above(dictionary, z, 0.0)


def make_selection(config: TrainConfig) -> Selection:
    """The rule that a run's configuration names."""
    if config.activation == "topk":
        return TopK(config.k, multi=config.multi_topk)
    return BatchTopK(config.k) if config.activation == "batchtopk" else ReLU()


def _above(dictionary: Dictionary, z: Tensor, threshold: float) -> Selected:
    with torch.no_grad(), dictionary.products():
        values, indices = ragged.pad(ragged.select(*dictionary.encoder(z), threshold), len(z))
    return Selected(values, indices, values.new_empty(len(z), 0), indices.new_empty(len(z), 0))
