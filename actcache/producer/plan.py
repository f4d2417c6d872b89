"""From arguments to a plan: what is asked is resolved, compared with what is on disk, and laid out in shards."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import CorpusError, DiskFullError, PlanMismatchError, UsageError
from actcache.model import Decoder
from actcache.producer.corpus import Corpus
from actcache.producer.tokens import (
    PackedStream,
    PackedTokens,
    TokenPlan,
    keep_mask,
    pack,
    separator_id,
    sequence_order,
    special_ids,
    tokenizer_digest,
)
from actcache.store.arrays import NO_DOCUMENT, disk_dtype
from actcache.store.codec import expected_ratio
from actcache.store.create import CaptureRequest, Sequences, as_requested, create_plan, staging
from actcache.store.disk import free_bytes
from actcache.store.open import Catalog
from actcache.store.schema import CorpusRecord, Grid, ModelRecord, Plan, Request, TextRecord, TokenizerRecord

_TARGET_SHARD_ROWS = 32_768
_LEAST_SHARD_ROWS = 4_096
_LEAST_SHARDS = 16
_LEAST_CHUNK_BYTES = 128 * 1024
_CHUNK_ROWS = 256
_MOST_CHUNK_ROWS = 1_024
_SHORT_SEQUENCE = 512
_SIDE_BYTES_PER_TOKEN = 24
"""Tokens, document, keep and row numbers, before compression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `actcache build` is asked for, apart from the model, tokenizer and corpus themselves.

    All of it belongs to the plan, but `out`, which is where the store goes. `docs/reference/cli.md` says what each is.
    """

    out: Path
    hooks: tuple[str, ...] = ("resid_post",)
    layers: tuple[int, ...]
    dtype: str = "bfloat16"
    codec: str = "zstd"
    n_tokens: int | None
    seq_len: int = 128
    bos: bool = False
    holdout_frac: float = 0.01
    exclude_first: int = 1
    seed: int = 0
    batch_size: int = 16
    sequences_per_shard: int | None = None
    rows_per_chunk: int | None = None
    shard_memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "shard_memory_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.n_tokens is not None and self.n_tokens < 1:
            raise UsageError(f"tokens={self.n_tokens}: expected at least 1")
        if not 0 <= self.exclude_first < self.seq_len:
            raise UsageError(
                f"exclude_first={self.exclude_first}: expected 0 up to seq_len - 1 = {self.seq_len - 1}; more would keep nothing"
            )
        if len(set(self.hooks)) != len(self.hooks) or not self.hooks:
            raise UsageError(f"hooks {list(self.hooks)}: expected each hook once")


def make_request(settings: Settings, decoder: Decoder, tokenizer: Any, corpus: Corpus, name: str) -> Request:
    """Everything that belongs to the plan, resolved: digests instead of paths."""
    return Request(
        model=ModelRecord(
            name=Path(decoder.name).name if Path(decoder.name).is_dir() else decoder.name,
            revision=decoder.revision,
            family=decoder.family,
            n_layers=decoder.n_layers,
            width=decoder.width,
            compute_dtype=str(decoder.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            digest=decoder.weights_digest(),
        ),
        tokenizer=TokenizerRecord(
            digest=tokenizer_digest(tokenizer),
            vocab_size=decoder.vocab_size,
            separator_id=separator_id(tokenizer),
            bos_id=tokenizer.bos_token_id if settings.bos else None,
            special_ids=special_ids(tokenizer),
        ),
        corpus=CorpusRecord(
            name=name,
            text_column=corpus.text_column,
            files=tuple((file.name, file.n_bytes) for file in corpus.files),
        ),
        n_tokens=settings.n_tokens,
        seq_len=settings.seq_len,
        bos=settings.bos,
        holdout_frac=settings.holdout_frac,
        exclude_first=settings.exclude_first,
        seed=settings.seed,
        layout="mixed",
        batch_size=settings.batch_size,
        device=decoder.device.type,
        sequences_per_shard=settings.sequences_per_shard,
        rows_per_chunk=settings.rows_per_chunk,
        shard_memory_bytes=settings.shard_memory_bytes,
    )


def capture_requests(settings: Settings, decoder: Decoder) -> list[CaptureRequest]:
    """The captures asked for."""
    return [
        CaptureRequest(
            hook=hook,
            layers=settings.layers,
            width=decoder.hook_width(hook),
            dtype=settings.dtype,
            codec=settings.codec,
        )
        for hook in settings.hooks
    ]


def check_same(catalog: Catalog, request: Request, captures: list[CaptureRequest]) -> None:
    """PlanMismatchError naming every argument in which a store on disk differs from what is asked now."""
    differ = _differences(catalog.plan.request.as_json(), request.as_json(), "")
    there = {name: as_requested(found.capture).as_json() for name, found in catalog.captures.items()}
    here = {capture.hook: capture.as_json() for capture in captures}
    differ += _differences(there, here, "capture ")
    if differ:
        raise PlanMismatchError(
            f"{catalog.objects.url} was planned with other arguments: {'; '.join(differ)}. Give the same arguments to "
            f"continue it, or another --out for a new store."
        )


def _differences(there: Any, here: Any, path: str) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in sorted({*there, *here})
            for line in _differences(
                there.get(key),
                here.get(key),
                f"{path}{key}" if path.endswith(" ") or not path else f"{path}.{key}",
            )
        ]
    return [] if there == here else [f"{path} is {_short(there)} there and {_short(here)} here"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def choose_grid(request: Request, captures: list[CaptureRequest], n_train: int, n_holdout: int) -> Grid:
    """Lay out sequences in shards: see the rules for shard and chunk sizes in `docs/format.md`.

    n_train, n_holdout  sequences packed; with n_tokens given only their sum matters here.
    """
    total = n_train + n_holdout
    row_bytes = sum(len(c.layers) * c.width * disk_dtype(c.dtype).itemsize for c in captures)
    per_shard = request.sequences_per_shard or _auto_sequences(request, total, row_bytes)
    if request.n_tokens is not None and request.holdout_frac > 0:
        n_shards = math.ceil(total / per_shard)
        n_holdout_shards = max(1, round(request.holdout_frac * n_shards))
        if n_holdout_shards >= n_shards:
            raise UsageError(
                f"{total} sequences of {request.seq_len} tokens make {n_shards} shards of {per_shard}: none is left to "
                f"train on beside a holdout of whole shards. Ask for more tokens, fewer sequences per shard, or --holdout 0."
            )
    else:
        n_holdout_shards = math.ceil(n_holdout / per_shard)
    n_holdout_sequences = n_holdout_shards * per_shard
    n_sequences = total if request.n_tokens is not None else n_holdout_sequences + n_train
    n_shard_tokens = min(per_shard, n_sequences) * request.seq_len
    chunk = request.rows_per_chunk or _chunk_rows(captures, n_shard_tokens, request.seq_len)
    return Grid(
        seq_len=request.seq_len,
        n_sequences=n_sequences,
        n_holdout_sequences=n_holdout_sequences,
        sequences_per_shard=per_shard,
        rows_per_shard=math.ceil(per_shard * request.seq_len / chunk) * chunk,
        rows_per_chunk=chunk,
        n_shards=math.ceil(n_sequences / per_shard),
        n_holdout_shards=n_holdout_shards,
    )


def _auto_sequences(request: Request, n_sequences: int, row_bytes: int) -> int:
    """Sequences per shard: up to 32,768 rows, what the memory holds twice, and a sixteenth of a small store.

    Large shards mix well: a chunk is a sample of its shard's sequences only. Small stores need a few for the holdout.
    """
    by_memory = request.shard_memory_bytes // (2 * row_bytes)
    by_store = n_sequences * request.seq_len // _LEAST_SHARDS
    rows = min(by_memory, _TARGET_SHARD_ROWS, max(by_store, _LEAST_SHARD_ROWS))
    if by_memory < request.seq_len:
        raise UsageError(
            f"--shard-memory {request.shard_memory_bytes:,} bytes holds {by_memory} rows twice, less than one sequence "
            f"of {request.seq_len}: give at least {2 * row_bytes * request.seq_len:,}"
        )
    most = max(1, n_sequences // 2) if request.holdout_frac else n_sequences
    return max(1, min(int(rows) // request.seq_len, most))


def _chunk_rows(captures: list[CaptureRequest], n_shard_tokens: int, seq_len: int) -> int:
    """Rows per chunk: 256, doubled while the smallest chunk is under 128 KiB, up to 1,024 and to what a shard holds.

    Long sequences keep 256: a shard holds few of them, so a window needs many chunks to see many sequences.
    """
    row_bytes = min(c.width * (1 if c.codec == "uint8" else disk_dtype(c.dtype).itemsize) for c in captures)
    rows, most = _CHUNK_ROWS, _MOST_CHUNK_ROWS if seq_len <= _SHORT_SEQUENCE else _CHUNK_ROWS
    while rows * row_bytes < _LEAST_CHUNK_BYTES and rows < most:
        rows *= 2
    while rows // 2 >= n_shard_tokens and rows > 1:
        rows //= 2
    return rows


@dataclass(frozen=True, slots=True)
class SizeForecast:
    """Bytes a store will take: rows as they are, rows compressed (a forecast), side arrays, and what is free now."""

    raw_bytes: int
    expected_bytes: int
    side_bytes: int
    free_bytes: int


def forecast(grid: Grid, captures: list[CaptureRequest], out: Path) -> SizeForecast:
    """How large the store will be. DiskFullError when even the expected size does not fit."""
    n_tokens = grid.n_sequences * grid.seq_len
    raw = [n_tokens * len(c.layers) * c.width * disk_dtype(c.dtype).itemsize for c in captures]
    expected = [b / expected_ratio(c.codec, c.dtype) for b, c in zip(raw, captures, strict=True)]
    side = n_tokens * _SIDE_BYTES_PER_TOKEN + sum(
        len(c.layers) * (n_tokens * 4 + grid.n_shards * c.width * 32) for c in captures
    )
    found = SizeForecast(sum(raw), int(sum(expected)), side, free_bytes(out))
    if found.expected_bytes + found.side_bytes > found.free_bytes:
        raise DiskFullError(
            f"the store will take about {(found.expected_bytes + found.side_bytes) / 1e9:,.2f} GB and {out.parent} has "
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
) -> Plan:
    """Tokenise, pack, shuffle and write the plan. It appears under `settings.out` whole, or not at all."""
    n_wanted = None if request.n_tokens is None else math.ceil(request.n_tokens / request.seq_len)
    grid = None if n_wanted is None else choose_grid(request, captures, n_wanted, 0)
    if grid is not None:
        on_forecast(grid, forecast(grid, captures, settings.out))
    with staging(settings.out, on_operation) as disk:
        spool = disk.workspace / "spool"
        spool.mkdir()
        packed = pack(
            corpus.documents(),
            tokenizer,
            TokenPlan(
                seq_len=request.seq_len,
                seed=request.seed,
                holdout_frac=request.holdout_frac
                if grid is None
                else grid.n_holdout_sequences / grid.n_sequences,
                n_train=None if grid is None else grid.n_sequences - grid.n_holdout_sequences,
                n_holdout=None if grid is None else grid.n_holdout_sequences,
                bos=request.bos,
            ),
            spool_dir=spool,
            vocab_size=request.tokenizer.vocab_size,
            on_progress=on_tokens,
        )
        if grid is None:
            grid = _grid_of_packed(request, captures, packed)
            on_forecast(grid, forecast(grid, captures, settings.out))
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


def _grid_of_packed(request: Request, captures: list[CaptureRequest], packed: PackedTokens) -> Grid:
    n_train, n_holdout = len(packed.train.tokens), len(packed.holdout.tokens)
    if request.holdout_frac > 0 and n_holdout == 0:
        raise CorpusError(
            f"none of {packed.n_documents_read} documents fell to the holdout of {request.holdout_frac:g}: documents go "
            f"whole to one side. Give more documents, a larger --holdout, another --seed, or --holdout 0."
        )
    return choose_grid(request, captures, n_train, n_holdout)


def _text_record(packed: PackedTokens, corpus: Corpus) -> TextRecord:
    streams = (packed.train, packed.holdout)
    return TextRecord(
        n_documents_read=packed.n_documents_read,
        n_documents_used=sum(s.n_documents for s in streams),
        n_documents_skipped=sum(s.n_skipped for s in streams),
        n_documents_empty=corpus.n_empty,
        n_tokens=sum(s.n_tokens for s in streams),
        digest=packed.text_digest,
    )


class ShuffledSequences:
    """Packed sequences in stored order: holdout first, each part in its own keyed random order."""

    def __init__(self, packed: PackedTokens, request: Request, grid: Grid) -> None:
        self._packed, self._request, self._grid = packed, request, grid
        self._order = {
            "holdout": sequence_order(len(packed.holdout.tokens), request.seed, "holdout"),
            "train": sequence_order(len(packed.train.tokens), request.seed, "train"),
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
        return Sequences(tokens, document, keep_mask(tokens, document, special, self._request.exclude_first))
