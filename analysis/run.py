"""Everything that is asked of one SAE, in a few passes over a store's rows; each pass holds one shard.

Pass 1 encodes and writes the latents (or finds them written). Pass 2 reads rows for the layers' means. Pass 3 reads rows and
latents together: reconstruction, neighbouring layers, distributions, variance, examples. What follows needs no rows: contexts
come from the latents, directions from the weights; the model is run on a stated number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from actcache.patching import Patcher
from analysis.contexts import iter_contexts, write_examples
from analysis.dictionary import (
    CosineByDistance,
    NearestTokens,
    cosine_by_distance,
    max_cosines,
    nearest_tokens,
)
from analysis.examples import Examples, TopExamples
from analysis.latents import ENCODE_ROWS, LatentStore, encode_store
from analysis.layers import LayerCounts
from analysis.metrics import Evaluation, Reconstruction
from analysis.models import Model
from analysis.patched import PatchedScores, Positions, evaluate_patched
from analysis.prompts import PAPER_PROMPT, PromptLatents, prompt_latents
from analysis.similarity import LayerMeans, NeighbourCosines, StreamSimilarity
from analysis.subject import Subject
from analysis.trace import Trace, TracePoint
from analysis.variance import LayerVariance, VarianceShares, Weighting

if TYPE_CHECKING:
    from actcache.reader.access import Split

WEIGHTINGS: tuple[Weighting, ...] = ("mass", "latent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for.

    split         "holdout" or "train".
    n_tokens      kept tokens analysed, to the end of a sequence; None: all.
    min_tokens    active tokens from which a latent counts in the variance decomposition.
    n_examples    per (latent, layer).
    context       tokens to either side of an example.
    model_tokens  kept tokens the model is run on.
    positions     ways to patch.
    prompts       texts to look at.
    n_nearest     tokens named per latent.
    """

    split: Split = "holdout"
    n_tokens: int | None = None
    min_tokens: int = 10
    n_examples: int = 8
    context: int = 10
    model_tokens: int = 1000
    positions: tuple[Positions, ...] = ("kept", "all")
    prompts: tuple[str, ...] = (PAPER_PROMPT,)
    n_nearest: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporter:
    """Hears how far the work is: a stage begins with its size (None: not known) and unit, then advances."""

    on_stage: Callable[[str, int | None, str], None] = lambda _name, _total, _unit: None
    on_advance: Callable[[int], None] = lambda _n: None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFindings:
    """What the model said. patched: per way to patch. nearest: by "embedding" and "unembedding"."""

    patched: list[PatchedScores]
    nearest: dict[str, NearestTokens]
    prompts: list[PromptLatents]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything found about one SAE.

    n_tokens      kept tokens analysed.
    evaluation    reconstruction, and the latents' distributions over layers.
    variance      per weighting.
    pairs         [l + 1] (token, latent) pairs by the number of layers they are active on.
    trace         how the mean spread over layers settled.
    stream        norms and cosines of the residual stream.
    max_cosine    [f] of every latent with any other.
    by_distance   decoder cosines of alive latents by distance of mean layers.
    decoder_norm  [f].
    examples      the most active rows.
    pieces        the text of a token id; its number in angle brackets where the tokenizer was not at hand.
    model         None where the model was not at hand.
    """

    subject: Subject
    request: Request
    n_tokens: int
    evaluation: Evaluation
    variance: dict[Weighting, VarianceShares]
    pairs: np.ndarray
    trace: list[TracePoint]
    stream: StreamSimilarity
    max_cosine: np.ndarray
    by_distance: CosineByDistance
    decoder_norm: np.ndarray
    examples: Examples
    examples_path: Path
    pieces: Callable[[int], str]
    model: ModelFindings | None


def analyse(
    subject: Subject,
    out: Path,
    request: Request,
    model: Model | None = None,
    latents_path: Path | None = None,
    reporter: Reporter | None = None,
) -> Findings:
    """Find everything out. Writes latents (unless they are elsewhere) and examples; the rest is returned.

    Args:
        subject: the SAE and its store.
        out: folder for `latents/` and `dataset/examples.parquet`.
        request: what is asked for.
        model: for losses, nearest tokens, prompts and the text of examples.
        latents_path: where the latents are, or are to be; None: in `out`.
        reporter: hears of progress.

    Raises:
        UsageError: the model is not the store's; the split has too few rows.
        PlanMismatchError: `latents_path` holds latents of something else.
    """
    said = reporter or Reporter()
    n_rows = _count_rows(subject, request)
    said.on_stage("encode", n_rows, "rows")
    latents = encode_store(
        subject,
        latents_path or out / "latents",
        split=request.split,
        n_tokens=request.n_tokens,
        on_rows=said.on_advance,
    )
    said.on_stage("means of layers", n_rows, "rows")
    means = LayerMeans(subject.layers, subject.out_width)
    for shard in subject.shards(request.split, request.n_tokens):
        for i, layer in enumerate(subject.layers):
            means.update(
                layer,
                shard.rows(layer, subject.target_hook, torch.float32)[torch.from_numpy(shard.passes[i])],
            )
            said.on_advance(len(shard))
    said.on_stage("rows and latents", n_rows, "rows")
    rows = _read_rows(subject, request, latents, means, said)
    evaluation = rows.reconstruction.compute()
    examples = rows.examples.compute()
    said.on_stage("examples", len(examples), "rows")
    examples_path = out / "dataset" / "examples.parquet"
    examples_path.parent.mkdir(parents=True, exist_ok=True)
    write_examples(
        examples_path,
        examples,
        iter_contexts(examples, subject, latents, request.context),
        subject.layers,
        request.context,
        None if model is None else functools.cache(model.piece),
        said.on_advance,
    )
    directions, alive = subject.directions, evaluation.latents.is_alive
    said.on_stage("directions", len(directions) + int(alive.sum()), "latents")
    is_alive = torch.from_numpy(alive).to(directions.device)
    return Findings(
        subject=subject,
        request=request,
        n_tokens=latents.n_tokens,
        evaluation=evaluation,
        variance={w: rows.variance.compute(w, request.min_tokens) for w in WEIGHTINGS},
        pairs=rows.variance.pairs,
        trace=rows.trace,
        stream=rows.cosines.compute(),
        max_cosine=max_cosines(directions, on_rows=said.on_advance).cpu().numpy(),
        by_distance=cosine_by_distance(
            directions[is_alive], evaluation.latents.mean[alive], on_rows=said.on_advance
        ),
        decoder_norm=torch.linalg.vector_norm(directions, dim=1).cpu().numpy(),
        examples=examples,
        examples_path=examples_path,
        pieces=(lambda token: f"<{token}>") if model is None else model.piece,
        model=None if model is None else _ask_model(subject, request, model, said),
    )


class _Rows(NamedTuple):
    reconstruction: Reconstruction
    cosines: NeighbourCosines
    variance: LayerVariance
    examples: TopExamples
    trace: list[TracePoint]


def _count_rows(subject: Subject, request: Request) -> int:
    return sum(shard.passes.size for shard in subject.shards(request.split, request.n_tokens))


def _read_rows(
    subject: Subject, request: Request, latents: LatentStore, means: LayerMeans, said: Reporter
) -> _Rows:
    """One pass over rows and latents together."""
    layers, n_latents = subject.layers, subject.n_latents
    found = _Rows(
        Reconstruction(layers, subject.out_width, n_latents, str(subject.directions.device)),
        NeighbourCosines(means),
        LayerVariance(layers, n_latents),
        TopExamples(len(layers), n_latents, request.n_examples),
        [],
    )
    trace = Trace(LayerCounts(layers, n_latents), latents.n_tokens)
    for codes, shard in zip(latents, subject.shards(request.split, request.n_tokens), strict=True):
        before: torch.Tensor | None = None
        for i, layer in enumerate(layers):
            into = shard.rows(layer, subject.hook, torch.float32)
            x = (
                into
                if subject.hook == subject.target_hook
                else shard.rows(layer, subject.target_hook, torch.float32)
            )
            passes = torch.from_numpy(codes.passes[:, i])
            values, chosen = (torch.from_numpy(column) for column in codes.padded(i))
            for at in torch.arange(len(x))[passes].split(ENCODE_ROWS):
                xhat, nothing = subject.reconstruct(into[at], layer, values[at], chosen[at])
                found.reconstruction.update(layer, x[at], xhat, nothing, values[at], chosen[at])
            if before is not None:
                both = passes & torch.from_numpy(codes.passes[:, i - 1])
                found.cosines.update((layers[i - 1], layer), before[both], x[both])
            before = x
            said.on_advance(len(x))
        found.variance.update(codes.entries(aligned=True), int(codes.passes.all(1).sum()))
        found.examples.update(codes.entries(), codes.sequence, codes.position, codes.token, codes.document)
        trace.update(codes)
    return found._replace(trace=trace.points)


def _ask_model(subject: Subject, request: Request, model: Model, said: Reporter) -> ModelFindings:
    patcher = Patcher(model.decoder)
    said.on_stage("model with patches", request.model_tokens, "tok")
    patched = evaluate_patched(
        subject,
        patcher,
        n_tokens=request.model_tokens,
        split=request.split,
        positions=request.positions,
        on_tokens=said.on_advance,
    )
    embeddings = patcher.embeddings()
    n_different = 1 if embeddings[0] is embeddings[1] else 2
    said.on_stage("nearest tokens", n_different * subject.n_latents, "latents")
    nearest = {}
    for name, embedding in zip(("embedding", "unembedding"), embeddings, strict=True):
        if name == "unembedding" and n_different == 1:
            nearest[name] = nearest["embedding"]
        else:
            nearest[name] = nearest_tokens(
                subject.directions, embedding, request.n_nearest, on_rows=said.on_advance
            )
    said.on_stage("prompts", len(request.prompts), "texts")
    prompts = []
    for text in request.prompts:
        prompts.append(prompt_latents(subject, model, text))
        said.on_advance(1)
    return ModelFindings(patched=patched, nearest=nearest, prompts=prompts)
