"""The passes over a store's rows: means first, then rows and their latents together. Each holds one shard, two layers at most.

Rows are looked at as the model has them, and, where a run was trained through a lens, as the lens shows them too.

Axes: b rows, d width, l layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from analysis.examples import TopExamples
from analysis.latents import ENCODE_ROWS, Codes, LatentStore
from analysis.layers import LayerCounts
from analysis.metrics import Reconstruction
from analysis.similarity import LayerMeans, NeighbourCosines
from analysis.subject import Subject
from analysis.trace import Trace, TracePoint
from analysis.variance import LayerVariance

if TYPE_CHECKING:
    from actcache.reader.shard_rows import ShardRows

OnRows = Callable[[int], None]


class View:
    """One way to look at the rows: the SAE of that space, and what was accumulated there.

    subject  the SAE: raw rows in and out, or rows of the lens's space in and out.
    see      from raw rows of a layer to rows of this space.
    """

    def __init__(self, subject: Subject, see: Callable[[Tensor, int], Tensor]) -> None:
        self.subject, self.see = subject, see
        self.means = LayerMeans(subject.layers, subject.out_width)
        self.cosines = NeighbourCosines(self.means)
        self.reconstruction = Reconstruction(
            subject.layers, subject.out_width, subject.n_latents, str(subject.directions.device)
        )


class RowFindings(NamedTuple):
    """What the passes found. views: the model's space, then the lens's where there is one."""

    views: list[View]
    variance: LayerVariance
    examples: TopExamples
    trace: list[TracePoint]


def make_views(subject: Subject) -> list[View]:
    """The model's space, and the lens's."""
    raw = View(subject, lambda rows, _layer: rows)
    return [raw] if subject.lens is None else [raw, View(subject.inside, subject.see)]


def read_means(views: list[View], shards: Iterator[ShardRows], on_rows: OnRows) -> None:
    """First pass: means and norms of rows that pass."""
    hook = views[0].subject.target_hook
    for shard in shards:
        for i, layer in enumerate(shard.layers):
            x = shard.rows(layer, hook, torch.float32)[torch.from_numpy(shard.passes[i])]
            for view in views:
                view.means.update(layer, view.see(x, layer))
            on_rows(len(shard))


def read_rows(
    views: list[View], shards: Iterator[ShardRows], latents: LatentStore, n_examples: int, on_rows: OnRows
) -> RowFindings:
    """Second pass: everything that needs rows beside their latents, or latents in the order of the text."""
    layers, n_latents = latents.layers, latents.n_latents
    variance = LayerVariance(layers, n_latents)
    examples = TopExamples(len(layers), n_latents, n_examples)
    trace = Trace(LayerCounts(layers, n_latents), latents.n_tokens)
    for codes, shard in zip(latents, shards, strict=True):
        before: Tensor | None = None
        for i in range(len(layers)):
            before = _read_layer(views, shard, codes, i, before)
            on_rows(len(shard))
        variance.update(codes.entries(aligned=True), int(codes.passes.all(1).sum()))
        examples.update(codes.entries(), codes.sequence, codes.position, codes.token, codes.document)
        trace.update(codes)
    return RowFindings(views, variance, examples, trace.points)


def _read_layer(views: list[View], shard: ShardRows, codes: Codes, i: int, before: Tensor | None) -> Tensor:
    """One layer of a shard; `before` are the raw rows of the layer before. Returns this one's."""
    subject, layer = views[0].subject, codes.layers[i]
    into = shard.rows(layer, subject.hook, torch.float32)
    predicts = subject.hook != subject.target_hook
    x = shard.rows(layer, subject.target_hook, torch.float32) if predicts else into
    passes = torch.from_numpy(codes.passes[:, i])
    values, chosen = (torch.from_numpy(column) for column in codes.padded(i))
    for at in torch.arange(len(x))[passes].split(ENCODE_ROWS):
        for view in views:
            rows = view.see(into[at], layer)
            xhat, nothing = view.subject.reconstruct(rows, layer, values[at], chosen[at])
            target = x[at] if predicts else rows
            view.reconstruction.update(layer, target, xhat, nothing, values[at], chosen[at])
    if before is not None:
        both = passes & torch.from_numpy(codes.passes[:, i - 1])
        pair = (codes.layers[i - 1], layer)
        for view in views:
            view.cosines.update(pair, view.see(before[both], pair[0]), view.see(x[both], layer))
    return x
