"""From a source to a plan: the request, who is held out, and the order in which sequences are stored.

The plan's records are strict, so what nobody knows about imported activations has a fixed value in them:

    model.digest, tokenizer.digest   `named_digest`: over the name alone, never over weights
    tokenizer.vocab_size             one more than the largest id
    tokens                           0 where the source has none
    device, batch_size               "import" and 0: no model ran
    text.digest                      the source's fingerprint
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorpusError, PlanMismatchError, UsageError
from actcache.producer.importing.source import TOKENS_AT_A_TIME, Facts, Fingerprint, Source
from actcache.producer.settings import check_same
from actcache.producer.tokens import keep_mask, sequence_order
from actcache.store import keyed
from actcache.store.arrays import NO_DOCUMENT
from actcache.store.create import CaptureRequest, Sequences
from actcache.store.open import Catalog
from actcache.store.schema import (
    CodecName,
    CorpusRecord,
    Grid,
    HookName,
    LogicalDtype,
    ModelRecord,
    Request,
    SourceCount,
    SourceRecord,
    TextRecord,
    TokenizerRecord,
    digest_of,
)

UNKNOWN = "unknown"
DEVICE = "import"
"""`device` of a store whose activations no model of ours computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSettings:
    """What an import is asked for, apart from the source itself. All of it belongs to the plan, but `out`.

    out                  where the store goes.
    layers               the model's layer numbers; None: all the source has.
    dtype                stored as; None: as in the source, bit for bit.
    codec                "zstd", "lz4" or "none".
    holdout_frac         fraction of sequences held out, in whole shards; documents go whole to one side.
    exclude_first        positions at the start of every sequence that are stored but not trained on; None: 1 where
                         sequences are longer than that (saev: 1 where there is a [CLS]).
    special_ids          token ids that are stored but not trained on.
    seed                 decides the holdout, the order of sequences and the mixing of rows.
    model_name, tokenizer_name   what they are called in the plan; None: what the source says, or "unknown".
    sequences_per_shard, rows_per_chunk, shard_memory_bytes   the grid, as in a build.
    """

    out: Path
    layers: tuple[int, ...] | None = None
    dtype: str | None = None
    codec: str = "zstd"
    holdout_frac: float = 0.01
    exclude_first: int | None = None
    special_ids: tuple[int, ...] = ()
    seed: int = 0
    model_name: str | None = None
    tokenizer_name: str | None = None
    sequences_per_shard: int | None = None
    rows_per_chunk: int | None = None
    shard_memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("sequences_per_shard", "rows_per_chunk", "shard_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}: expected at least 1")
        if not 0 <= self.holdout_frac < 1:
            raise UsageError(f"holdout_frac={self.holdout_frac}: expected 0 <= holdout_frac < 1")
        for name, allowed in (("dtype", get_args(LogicalDtype)), ("codec", get_args(CodecName))):
            value = getattr(self, name)
            if value not in (*allowed, *([None] if name == "dtype" else [])):
                raise UsageError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


def named_digest(what: str, name: str) -> str:
    """The digest of a model or tokenizer of which only the name is known; it can equal no digest of weights."""
    return digest_of({"imported": what, "name": name})


def make_request(source: Source, settings: ImportSettings, fingerprint: Fingerprint) -> Request:
    """Everything that belongs to the plan. UsageError where the settings do not fit the source."""
    facts = source.facts
    exclude_first = facts.exclude_first if settings.exclude_first is None else settings.exclude_first
    if not 0 <= exclude_first < facts.seq_len:
        raise UsageError(
            f"exclude_first={exclude_first}: expected 0 to {facts.seq_len - 1}; sequences of {facts.name} have "
            f"{facts.seq_len} positions"
        )
    if settings.special_ids and not facts.has_tokens:
        raise UsageError(
            f"special ids {list(settings.special_ids)}: {facts.name} holds no tokens to compare them with"
        )
    model, tokenizer = settings.model_name or facts.model or UNKNOWN, settings.tokenizer_name or UNKNOWN
    return Request(
        model=ModelRecord(
            name=model,
            revision=None,
            family=facts.family or UNKNOWN,
            n_layers=max(facts.layers) + 1,
            width=facts.width,
            compute_dtype="float32" if facts.dtype == "float64" else facts.dtype,  # type: ignore[arg-type]
            digest=named_digest("model", model),
        ),
        tokenizer=TokenizerRecord(
            digest=named_digest("tokenizer", tokenizer),
            vocab_size=_greatest_id(source) + 1,
            bos_id=None,
            special_ids=tuple(sorted(set(settings.special_ids))),
            chat_template=None,
        ),
        corpus=CorpusRecord(name=facts.name, sources=(_source_record(facts, fingerprint),)),
        n_tokens=None,
        allow_short=False,
        seq_len=facts.seq_len,
        packing="packed",
        isolate_documents=False,
        bos=False,
        holdout_frac=settings.holdout_frac,
        exclude_first=exclude_first,
        seed=settings.seed,
        layout="mixed",
        batch_size=0,
        device=DEVICE,
        sequences_per_shard=settings.sequences_per_shard,
        rows_per_chunk=settings.rows_per_chunk,
        shard_memory_bytes=settings.shard_memory_bytes,
    )


def _source_record(facts: Facts, fingerprint: Fingerprint) -> SourceRecord:
    return SourceRecord(
        name=facts.name,
        kind="activations",
        column=facts.format,
        weight=None,
        separator_id=None,
        token_dtype=None,
        document_tokens=None,
        files=fingerprint.sizes,
    )


def make_capture(facts: Facts, settings: ImportSettings) -> CaptureRequest:
    """The one capture. UsageError for layers the source lacks, an unknown hook, or float64 without a dtype."""
    layers = facts.layers if settings.layers is None else tuple(sorted(settings.layers))
    if not layers or not set(layers) <= set(facts.layers) or len(set(layers)) != len(layers):
        raise UsageError(f"layers {list(layers)}: expected distinct layers among {list(facts.layers)}")
    if facts.hook not in get_args(HookName):
        raise UsageError(f"hook {facts.hook!r}: expected one of {', '.join(get_args(HookName))}")
    if settings.dtype is None and facts.dtype not in get_args(LogicalDtype):
        raise UsageError(
            f"{facts.name} holds {facts.dtype}, which a store does not; choose --dtype float32, say"
        )
    return CaptureRequest(
        hook=facts.hook,
        layers=layers,
        width=facts.width,
        dtype=settings.dtype or facts.dtype,
        codec=settings.codec,
    )


def make_text(facts: Facts, fingerprint: Fingerprint) -> TextRecord:
    """What was read, in the words of a build: documents and tokens, and the source's fingerprint."""
    n_documents = facts.n_sequences if facts.document is None else len(np.unique(facts.document))
    return TextRecord(
        n_documents_read=n_documents,
        n_documents_used=n_documents,
        n_documents_skipped=0,
        n_documents_empty=0,
        n_tokens=facts.n_sequences * facts.seq_len,
        n_tokens_cut=0,
        sources=(SourceCount(n_documents_read=n_documents, n_tokens=facts.n_sequences * facts.seq_len),),
        digest=fingerprint.digest,
    )


def check_same_import(
    catalog: Catalog, request: Request, capture: CaptureRequest, facts: Facts, fingerprint: Fingerprint
) -> None:
    """PlanMismatchError naming every argument that differs, or that the content of the source does."""
    check_same(catalog, request, [capture])
    if catalog.plan.text.digest != fingerprint.digest:
        raise PlanMismatchError(
            f"{catalog.objects.url} was imported from other content: {facts.name} has files of the same names and sizes, but "
            f"their bytes, or which layer, hook or dtype they are said to hold, differ. Give the same source to continue it, "
            f"or another --out for a new store."
        )


def _greatest_id(source: Source) -> int:
    """The largest token id; 0 where tokens are unknown. Every id is checked on the way."""
    if not source.facts.has_tokens:
        return 0
    q, step = source.facts.n_sequences, max(1, TOKENS_AT_A_TIME // source.facts.seq_len)
    return max(int(source.tokens(np.arange(at, min(at + step, q))).max()) for at in range(0, q, step))


class Order:
    """Which sequence of the source is stored where: holdout first, each part in a keyed random order.

    n_holdout, n_train  sequences of either part.

    Where every sequence is a document of its own the order is a Feistel permutation of all of them, whose first
    sequences are held out, and takes no memory. Else documents are held out in the order of their keyed hashes until
    there are enough sequences.
    """

    def __init__(self, facts: Facts, seed: int, holdout_frac: float) -> None:
        self._n, self._seed = facts.n_sequences, seed
        self._key = keyed.derive(seed, "import_order")
        self._parts: dict[bool, NDArray[np.int64]] | None = None
        n_wanted = max(1, round(holdout_frac * self._n)) if holdout_frac > 0 else 0
        if facts.document is None:
            self.n_holdout = n_wanted
        else:
            held_out = self._hold_out(facts.document, n_wanted)
            self.n_holdout = int(held_out.sum())
            self._parts = {is_holdout: np.flatnonzero(held_out == is_holdout) for is_holdout in (True, False)}
        self.n_train = self._n - self.n_holdout
        if self.n_train < 1:
            raise CorpusError(
                f"{facts.name} has {self._n} sequences, all of which a holdout of {holdout_frac:g} would take: documents go "
                f"whole to one side. Give a smaller --holdout, or 0."
            )

    def _hold_out(self, document: NDArray[np.uint32], n_wanted: int) -> NDArray[np.bool_]:
        """[q] whether a sequence is held out."""
        numbers, which, counts = np.unique(document, return_inverse=True, return_counts=True)
        order = np.argsort(keyed.hash_u64(keyed.derive(self._seed, "holdout"), numbers), kind="stable")
        before = np.cumsum(counts[order]) - counts[order]
        chosen = np.zeros(len(numbers), bool)
        chosen[order[before < n_wanted]] = True
        return chosen[which]

    def of(self, start: int, stop: int, *, is_holdout: bool) -> NDArray[np.int64]:
        """The source's numbers of the stored sequences [start, stop) of one part."""
        if self._parts is None:
            first = 0 if is_holdout else self.n_holdout
            return keyed.feistel(self._key, np.arange(first + start, first + stop), self._n)
        part = self._parts[is_holdout]
        order = sequence_order(len(part), self._seed, "holdout" if is_holdout else "train")
        return part[order[start:stop]]


class StoredSequences:
    """The sequences of every shard: their numbers in the source, tokens, documents, and which positions are kept."""

    def __init__(self, source: Source, order: Order, request: Request, grid: Grid) -> None:
        self._source, self._order, self._request, self._grid = source, order, request, grid

    def numbers(self, shard: int) -> NDArray[np.int64]:
        """The source's numbers of a shard's sequences; fewer than the shard has where it ends in padding."""
        grid, sequences = self._grid, self._grid.sequences_of(shard)
        is_holdout = shard < grid.n_holdout_shards
        first = 0 if is_holdout else grid.n_holdout_sequences
        n = self._order.n_holdout if is_holdout else self._order.n_train
        return self._order.of(sequences.start - first, min(sequences.stop - first, n), is_holdout=is_holdout)

    def of_shard(self, shard: int) -> Sequences:
        """What the plan holds of one shard."""
        facts, numbers = self._source.facts, self.numbers(shard)
        shape = (len(self._grid.sequences_of(shard)), self._grid.seq_len)
        tokens, document = np.zeros(shape, np.uint32), np.full(shape, NO_DOCUMENT, np.uint32)
        document[: len(numbers)] = (numbers if facts.document is None else facts.document[numbers])[:, None]
        if facts.has_tokens:
            ascending = np.argsort(numbers)
            tokens[ascending] = self._source.tokens(numbers[ascending])
        keep = keep_mask(tokens, document, self._request.tokenizer.special_ids, self._request.exclude_first)
        return Sequences(tokens, document, keep)


def blocks(numbers: NDArray[np.int64], n_bytes_per_sequence: int, most_bytes: int) -> Iterator[NDArray[Any]]:
    """Indices into `numbers`, in the order of the source, in parts of at most `most_bytes` (or of one sequence)."""
    ascending = np.argsort(numbers)
    step = max(1, most_bytes // n_bytes_per_sequence)
    for part in range(math.ceil(len(ascending) / step)):
        yield ascending[part * step : (part + 1) * step]
