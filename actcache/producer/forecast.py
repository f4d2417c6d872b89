"""The dry run: what a build would make, how large it would be and how well it could be shuffled. Writes nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actcache.model import Decoder
from actcache.producer.corpus import Corpus
from actcache.producer.packing import PackedTokens
from actcache.producer.plan import (
    estimate_size,
    grid_of_packed,
    known_grid,
    pack_corpus,
    rows_bytes,
)
from actcache.producer.settings import Settings, capture_requests, make_request
from actcache.store.codec import EXPECTED_RATIO, expected_ratio
from actcache.store.create import CaptureRequest
from actcache.store.schema import Grid

RHO = 0.045
"""Correlation of two rows of one layer and sequence. Worked out from the measured shuffle of the toy model in sequences of
128 tokens. On SmolLM2-135M it grows with depth, from 0.006 at layer 0 to 0.09 at layer 25, 0.036 on average."""

WINDOW_ROWS, BATCH_ROWS = 131_072, 8_192


@dataclass(frozen=True, slots=True, kw_only=True)
class ShuffleForecast:
    """How well a stream of one capture would be shuffled, at the default settings of a stream.

    variance_ratio   variance of batch means over that of batches drawn from all rows at random.
    n_window_rows    N, rows of a window.        n_window_sequences   M, as many sequences as it effectively has.
    batch_rows       b.                          rho  correlation of two rows of one sequence.
    """

    variance_ratio: float
    n_window_rows: int
    n_window_sequences: float
    batch_rows: int
    rho: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureForecast:
    """One capture: `bytes_by_codec` is what its rows are expected to take with each codec; `codec` is the one asked for."""

    name: str
    hook: str
    layers: tuple[int, ...]
    width: int
    dtype: str
    codec: str
    raw_bytes: int
    bytes_by_codec: dict[str, int]
    shuffle: ShuffleForecast


@dataclass(frozen=True, slots=True, kw_only=True)
class TextForecast:
    """What the corpus gave, read as a build would read it.

    n_documents_read   documents taken.
    tokens_by_source   name and tokens of each source.
    n_tokens_cut       tokens of documents longer than the sequence they have to themselves.
    is_short           less than was asked for, and that was allowed.
    """

    n_documents_read: int
    tokens_by_source: tuple[tuple[str, int], ...]
    n_tokens_cut: int
    is_short: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanForecast:
    """What a build would make.

    grid             every shape.
    n_tokens         tokens in the store, padding not; at most one sequence more than asked for.
    text             what reading the corpus gave; None where it was not read: whether it has so many is then not known.
    side_bytes       tokens, row numbers, norms and statistics.
    expected_bytes   of the whole store, with the codecs asked for.   free_bytes   where it would go.
    n_forward_tokens positions the model runs on, padding included.   seconds  at `tokens_per_s`, if given.
    """

    grid: Grid
    n_tokens: int
    text: TextForecast | None
    captures: tuple[CaptureForecast, ...]
    side_bytes: int
    expected_bytes: int
    free_bytes: int
    n_forward_tokens: int
    tokens_per_s: float | None
    seconds: float | None


def make_forecast(
    settings: Settings,
    decoder: Decoder,
    tokenizer: Any,
    corpus: Corpus,
    *,
    read: bool = False,
    tokens_per_s: float | None = None,
    on_tokens: Callable[[int], None] = lambda _n: None,
) -> PlanForecast:
    """What `build` would make of the same arguments.

    Args:
        settings: as for a build.
        decoder: the model, or its skeleton.
        tokenizer: the tokenizer that belongs to it.
        corpus: the text. It is read, and tokenised as a build would, where the number of tokens does not say all.
        read: read it anyway, to know whether it has as many tokens as are asked for.
        tokens_per_s: at which the model is expected to run.
        on_tokens: told how many tokens were packed.

    Raises:
        CorpusError, UsageError, ModelError: as a build would.
    """
    request = make_request(settings, decoder, tokenizer, corpus, "")
    captures = capture_requests(settings, decoder)
    known = known_grid(request, captures)
    packed = None
    if known is None or read:
        packed = pack_corpus(request, tokenizer, corpus, known, None, on_tokens)
    grid = known if packed is None else grid_of_packed(request, captures, packed, known)
    assert grid is not None
    size = estimate_size(grid, captures, settings.out)
    n_forward = grid.n_sequences * grid.seq_len
    return PlanForecast(
        grid=grid,
        n_tokens=n_forward if packed is None else packed.train.n_tokens + packed.holdout.n_tokens,
        text=None if packed is None else _text_forecast(packed, corpus),
        captures=tuple(_capture_forecast(grid, capture) for capture in captures),
        side_bytes=size.side_bytes,
        expected_bytes=size.expected_bytes + size.side_bytes,
        free_bytes=size.free_bytes,
        n_forward_tokens=n_forward,
        tokens_per_s=tokens_per_s,
        seconds=None if tokens_per_s is None else n_forward / tokens_per_s,
    )


def _text_forecast(packed: PackedTokens, corpus: Corpus) -> TextForecast:
    names = (source.name for source in corpus.sources)
    return TextForecast(
        n_documents_read=sum(packed.n_documents_read),
        tokens_by_source=tuple(zip(names, packed.by_source.tolist(), strict=True)),
        n_tokens_cut=packed.train.n_cut + packed.holdout.n_cut,
        is_short=packed.is_short,
    )


def _capture_forecast(grid: Grid, capture: CaptureRequest) -> CaptureForecast:
    raw = rows_bytes(grid, capture)
    return CaptureForecast(
        name=capture.group,
        hook=capture.hook,
        layers=capture.layers,
        width=capture.width,
        dtype=capture.dtype,
        codec=capture.codec,
        raw_bytes=raw,
        bytes_by_codec={codec: int(raw / expected_ratio(codec, capture.dtype)) for codec in EXPECTED_RATIO},
        shuffle=forecast_shuffle(grid, len(capture.layers)),
    )


def forecast_shuffle(
    grid: Grid,
    n_layers: int,
    *,
    batch_rows: int = BATCH_ROWS,
    window_rows: int = WINDOW_ROWS,
    rho: float = RHO,
) -> ShuffleForecast:
    """How well the rows of `n_layers` layers would be shuffled by the `global` order.

    A window of N rows holds g chunks of each layer, drawn from all chunks of the training part, each layer by itself. Its
    mean varies by `s^2 (1/N + rho (1/M - 1/N))`, where 1/M - 1/N is the chance that two of its rows are of one sequence:

        1/M - 1/N = 1/l * (1/g + (1 - 1/g) (c - 1)/(c n - 1)) * (t - 1)/(S t)  +  (1 - 1/l) / (n S)

    with l layers, c chunks of a layer in a shard, n shards, S sequences of t tokens in each. A batch is b rows of a window,
    so the variance of batch means over that of random batches is

        1 + rho b ((1/M - 1/N) - (1/l * (t - 1)/(n S t) + (1 - 1/l) / (n S)))

    where the last term is what 1/M - 1/N is of a window that holds everything: such a one is as good as random.
    """
    n_shards = grid.n_shards - grid.n_holdout_shards
    n_chunks, per_shard = grid.chunks_per_shard, min(grid.sequences_per_shard, grid.n_sequences)
    groups = min(-(-window_rows // (n_layers * grid.rows_per_chunk)), n_shards * n_chunks)
    n_rows = groups * n_layers * grid.rows_per_chunk
    same_shard = 1.0
    if n_shards * n_chunks > 1:
        same_shard = 1 / groups + (1 - 1 / groups) * (n_chunks - 1) / (n_chunks * n_shards - 1)
    in_shard = (grid.seq_len - 1) / (per_shard * grid.seq_len)
    of_others = (1 - 1 / n_layers) / (n_shards * per_shard)
    same_sequence = same_shard * in_shard / n_layers + of_others
    everywhere = in_shard / n_shards / n_layers + of_others
    return ShuffleForecast(
        variance_ratio=1 + rho * batch_rows * max(0.0, same_sequence - everywhere),
        n_window_rows=n_rows,
        n_window_sequences=1 / (same_sequence + 1 / n_rows),
        batch_rows=batch_rows,
        rho=rho,
    )
