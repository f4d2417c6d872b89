"""From a request to a plan: what was packed is laid out in shards, in a keyed random order, and written."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import CorpusError, DiskFullError
from actcache.producer.corpus import Corpus
from actcache.producer.grid import choose_grid
from actcache.producer.mixture import TokenSource
from actcache.producer.packing import PackedTokens, TokenPlan, pack
from actcache.producer.settings import Settings
from actcache.producer.spool import PackedStream
from actcache.producer.tokens import keep_mask, sequence_order
from actcache.store.arrays import NO_DOCUMENT, disk_dtype
from actcache.store.codec import expected_ratio
from actcache.store.create import CaptureRequest, Sequences, create_plan, staging
from actcache.store.disk import free_bytes
from actcache.store.schema import Grid, Plan, Request, SourceCount, TextRecord

_SIDE_BYTES_PER_TOKEN = 24
"""Tokens, document, keep and row numbers, before compression."""


@dataclass(frozen=True, slots=True)
class SizeForecast:
    """Bytes a store will take: rows as they are, rows compressed (a forecast), side arrays, and what is free now."""

    raw_bytes: int
    expected_bytes: int
    side_bytes: int
    free_bytes: int


def estimate_size(grid: Grid, captures: list[CaptureRequest], out: Path) -> SizeForecast:
    """How large the store will be, beside what is free where it goes."""
    n_tokens = grid.n_sequences * grid.seq_len
    raw = [rows_bytes(grid, c) for c in captures]
    expected = [b / expected_ratio(c.codec, c.dtype) for b, c in zip(raw, captures, strict=True)]
    side = n_tokens * _SIDE_BYTES_PER_TOKEN + sum(
        len(c.layers) * (n_tokens * 4 + grid.n_shards * c.width * 32) for c in captures
    )
    return SizeForecast(sum(raw), int(sum(expected)), side, free_bytes(out))


def rows_bytes(grid: Grid, capture: CaptureRequest) -> int:
    """Bytes of a capture's rows before compression."""
    itemsize = disk_dtype(capture.dtype).itemsize
    return grid.n_sequences * grid.seq_len * len(capture.layers) * capture.width * itemsize


def forecast(
    grid: Grid, captures: list[CaptureRequest], out: Path, max_bytes: int | None = None
) -> SizeForecast:
    """How large the store will be. DiskFullError when even the expected size, `max_bytes` at most, does not fit."""
    found = estimate_size(grid, captures, out)
    needed = found.expected_bytes + found.side_bytes
    needed = needed if max_bytes is None else min(needed, max_bytes)
    if needed > found.free_bytes:
        raise DiskFullError(
            f"the store will take about {needed / 1e9:,.2f} GB and {out.parent} has "
            f"{found.free_bytes / 1e9:,.2f} GB free. Nothing was written. Ask for fewer tokens or layers, or another --out."
        )
    return found


def write_plan(
    settings: Settings,
    request: Request,
    captures: list[CaptureRequest],
    tokenizer: Any,
    corpus: Corpus,
    *,
    version: str,
    on_tokens: Callable[[int], None],
    on_forecast: Callable[[Grid, SizeForecast], None],
    on_operation: Callable[[str, str], None] | None,
    max_disk_bytes: int | None = None,
) -> Plan:
    """Tokenise, pack, shuffle and write the plan. It appears under `settings.out` whole, or not at all.

    max_disk_bytes: the store will never take more at once.

    Raises:
        CorpusError: the text cannot be read, or is too short. DiskFullError: the store will not fit.
    """
    first_grid = known_grid(request, captures)
    if first_grid is not None:
        on_forecast(first_grid, forecast(first_grid, captures, settings.out, max_disk_bytes))
    with staging(settings.out, on_operation) as disk:
        spool = disk.workspace / "spool"
        spool.mkdir()
        packed = pack_corpus(request, tokenizer, corpus, first_grid, spool, on_tokens)
        grid = grid_of_packed(request, captures, packed, first_grid)
        if grid is not first_grid:
            on_forecast(grid, forecast(grid, captures, settings.out, max_disk_bytes))
        shuffled = ShuffledSequences(packed, request, grid)
        return create_plan(
            disk,
            version=version,
            request=request,
            text=_text_record(packed, corpus),
            grid=grid,
            sequences_of=shuffled.of_shard,
            captures=captures,
            on_shard=lambda: None,
        )


def known_grid(request: Request, captures: list[CaptureRequest]) -> Grid | None:
    """The grid, where it is known before a document is read; else None."""
    if request.n_tokens is None or request.packing == "document":
        return None
    return choose_grid(request, captures, math.ceil(request.n_tokens / request.seq_len), 0, is_known=True)


def pack_corpus(
    request: Request,
    tokenizer: Any,
    corpus: Corpus,
    grid: Grid | None,
    spool_dir: Path | None,
    on_tokens: Callable[[int], None],
) -> PackedTokens:
    """Tokenise and pack a corpus as the request says; without a folder sequences are only counted."""
    sources = [
        TokenSource(
            name=source.name,
            documents=source.documents(),
            weight=record.weight,
            separator=record.separator_id,
        )
        for source, record in zip(corpus.sources, request.corpus.sources, strict=True)
    ]
    plan = TokenPlan(
        seq_len=request.seq_len,
        seed=request.seed,
        holdout_frac=request.holdout_frac if grid is None else grid.n_holdout_sequences / grid.n_sequences,
        n_train=None if grid is None else grid.n_sequences - grid.n_holdout_sequences,
        n_holdout=None if grid is None else grid.n_holdout_sequences,
        n_tokens=request.n_tokens if grid is None else None,
        bos=request.bos,
        is_packed=request.packing == "packed",
        allow_short=request.allow_short,
    )
    return pack(
        sources,
        tokenizer,
        plan,
        spool_dir=spool_dir,
        vocab_size=request.tokenizer.vocab_size,
        on_progress=on_tokens,
    )


def grid_of_packed(
    request: Request, captures: list[CaptureRequest], packed: PackedTokens, known: Grid | None
) -> Grid:
    """The grid that was known, or the one of what was packed, where nothing was known or the corpus was short."""
    if known is not None and not packed.is_short:
        return known
    if request.holdout_frac > 0 and packed.holdout.n_sequences == 0:
        raise CorpusError(
            f"none of {sum(packed.n_documents_read)} documents fell to the holdout of {request.holdout_frac:g}: documents go "
            f"whole to one side. Give more documents, a larger --holdout, another --seed, or --holdout 0."
        )
    return choose_grid(request, captures, packed.train.n_sequences, packed.holdout.n_sequences)


def _text_record(packed: PackedTokens, corpus: Corpus) -> TextRecord:
    streams = (packed.train, packed.holdout)
    return TextRecord(
        n_documents_read=sum(packed.n_documents_read),
        n_documents_used=sum(s.n_documents for s in streams),
        n_documents_skipped=sum(s.n_skipped for s in streams),
        n_documents_empty=corpus.n_empty,
        n_tokens=sum(s.n_tokens for s in streams),
        n_tokens_cut=sum(s.n_cut for s in streams),
        sources=tuple(
            SourceCount(n_documents_read=n_read, n_tokens=int(n_tokens))
            for n_read, n_tokens in zip(packed.n_documents_read, packed.by_source, strict=True)
        ),
        digest=packed.text_digest,
    )


class ShuffledSequences:
    """Packed sequences in stored order: holdout first, each part in its own keyed random order."""

    def __init__(self, packed: PackedTokens, request: Request, grid: Grid) -> None:
        self._packed, self._request, self._grid = packed, request, grid
        self._order = {
            "holdout": sequence_order(packed.holdout.n_sequences, request.seed, "holdout"),
            "train": sequence_order(packed.train.n_sequences, request.seed, "train"),
        }

    def of_shard(self, shard: int) -> Sequences:
        """The sequences of one shard. A holdout that ends inside its last shard is filled up with padding."""
        grid, sequences = self._grid, self._grid.sequences_of(shard)
        is_holdout = shard < grid.n_holdout_shards
        name, first = ("holdout", 0) if is_holdout else ("train", grid.n_holdout_sequences)
        stream: PackedStream = getattr(self._packed, name)
        index = self._order[name][sequences.start - first : sequences.stop - first]
        shape = (len(sequences), grid.seq_len)
        tokens, document = np.zeros(shape, np.uint32), np.full(shape, NO_DOCUMENT, np.uint32)
        tokens[: len(index)], document[: len(index)] = stream.tokens[index], stream.document[index]
        special = self._request.tokenizer.special_ids
        keep = keep_mask(
            tokens,
            document,
            special,
            self._request.exclude_first,
            is_isolated=self._request.isolate_documents,
        )
        return Sequences(tokens, document, keep)
