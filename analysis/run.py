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
from analysis.cross import Matrix, cross_layers
from analysis.dictionary import (
    CosineByDistance,
    NearestTokens,
    cosine_by_distance,
    max_cosines,
    nearest_tokens,
)
from analysis.examples import Examples
from analysis.latents import encode_store
from analysis.layers import Spread, spread
from analysis.metrics import Evaluation
from analysis.models import Model
from analysis.passes import View, make_views, read_means, read_rows
from analysis.patched import PatchedScores, Positions, evaluate_patched
from analysis.prompts import PAPER_PROMPT, PromptLatents, prompt_latents
from analysis.reporter import Reporter
from analysis.similarity import StreamSimilarity
from analysis.subject import Subject
from analysis.trace import TracePoint
from analysis.variance import VarianceShares, Weighting
from trainer.heldout import HeldOut

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


class Between(NamedTuple):
    """MMCS of one dictionary with another: the spread over its latents of their largest cosine with a latent of the other."""

    of: str
    other: str
    cosine: Spread


class InLens(NamedTuple):
    """What a run with a lens looks like in the lens's space: where it was trained. condition: of each layer's matrix."""

    scores: HeldOut
    stream: StreamSimilarity
    condition: dict[int, float]


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
    matrix        scores of every layer's SAE on every layer's rows; None where one SAE serves all.
    in_lens       scores and stream in the space of the run's lens; None where it has none.
    variance      per weighting.
    pairs         [l + 1] (token, latent) pairs by the number of layers they are active on.
    trace         how the mean spread over layers settled.
    stream        norms and cosines of the residual stream.
    max_cosine    [f] of every latent with any other.
    between       cosines with other dictionaries: of this run's layers, where each has its own, and of runs compared with.
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
    matrix: Matrix | None
    in_lens: InLens | None
    variance: dict[Weighting, VarianceShares]
    pairs: np.ndarray
    trace: list[TracePoint]
    stream: StreamSimilarity
    max_cosine: np.ndarray
    between: list[Between]
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
    views = make_views(subject)
    said.on_stage("means of layers", n_rows, "rows")
    read_means(views, subject.shards(request.split, request.n_tokens), said.on_advance)
    said.on_stage("rows and latents", n_rows, "rows")
    shards = subject.shards(request.split, request.n_tokens)
    rows = read_rows(views, shards, latents, request.n_examples, said.on_advance)
    evaluation = views[0].reconstruction.compute()
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
    matrix = _matrix(subject, request, n_rows, said)
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
        stream=views[0].cosines.compute(),
        matrix=matrix,
        in_lens=_in_lens(subject, views[1]) if len(views) > 1 else None,
        max_cosine=max_cosines(directions, on_rows=said.on_advance).cpu().numpy(),
        between=_between_layers(subject),
        by_distance=cosine_by_distance(
            directions[is_alive], evaluation.latents.mean[alive], on_rows=said.on_advance
        ),
        decoder_norm=torch.linalg.vector_norm(directions, dim=1).cpu().numpy(),
        examples=examples,
        examples_path=examples_path,
        pieces=(lambda token: f"<{token}>") if model is None else model.piece,
        model=None if model is None else _ask_model(subject, request, model, said),
    )


def _count_rows(subject: Subject, request: Request) -> int:
    return sum(shard.passes.size for shard in subject.shards(request.split, request.n_tokens))


def _matrix(subject: Subject, request: Request, n_rows: int, said: Reporter) -> Matrix | None:
    if subject.is_shared:
        return None
    said.on_stage("matrix", n_rows, "rows")
    return cross_layers(subject, request.split, request.n_tokens, said.on_advance)


def _between_layers(subject: Subject) -> list[Between]:
    if subject.is_shared:
        return []
    rows = {layer: sae.sae.w_dec.detach() for layer, sae in subject.saes.items()}
    return [
        Between(f"layer {i}", f"layer {j}", spread(max_cosines(rows[i], rows[j]).cpu().numpy()))
        for i in rows
        for j in rows
        if i != j
    ]


def _in_lens(subject: Subject, view: View) -> InLens:
    assert subject.lens is not None
    return InLens(view.reconstruction.compute().scores, view.cosines.compute(), subject.lens.conditions())


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
