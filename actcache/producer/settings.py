"""What a build is asked for, resolved to what the plan says, and compared with a store that is there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actcache.errors import PlanMismatchError, UsageError
from actcache.model import Decoder, check_isolation
from actcache.producer.corpus import Corpus, Source
from actcache.producer.corpus.chat import template_digest
from actcache.producer.tokens import Separator, bos_id, separator_id, special_ids, tokenizer_digest
from actcache.store.create import CaptureRequest, as_requested
from actcache.store.open import Catalog
from actcache.store.schema import CorpusRecord, ModelRecord, Request, SourceRecord, TokenizerRecord

NO_DIGEST = "0" * 64
"""Of a model whose weights were not loaded; no store has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `actcache build` is asked for, apart from the model, tokenizer and corpus themselves.

    All of it belongs to the plan, but `out`, which is where the store goes. `docs/reference/plan.md` says what each is.
    """

    out: Path
    hooks: tuple[str, ...] = ("resid_post",)
    layers: tuple[int, ...]
    dtype: str = "bfloat16"
    codec: str = "zstd"
    n_tokens: int | None
    allow_short: bool = False
    seq_len: int = 128
    packing: Literal["packed", "document"] = "packed"
    isolate_documents: bool = False
    bos: bool = False
    separator: Separator = "auto"
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
        if self.allow_short and self.n_tokens is None:
            raise UsageError(
                "allow_short without tokens: the whole corpus is never too short; give --tokens too"
            )
        if self.isolate_documents and self.packing == "document":
            raise UsageError(
                "isolate_documents with packing='document': a sequence holds one document already; leave one of them out"
            )


def make_request(settings: Settings, decoder: Decoder, tokenizer: Any, corpus: Corpus, name: str) -> Request:
    """Everything that belongs to the plan, resolved: digests instead of paths.

    Raises:
        UsageError: arguments that do not go together, or that the tokenizer or the model has nothing for.
        ModelError: documents are to be isolated, and this model cannot do it.
    """
    _check_corpus(settings, corpus)
    if decoder.max_positions is not None and settings.seq_len > decoder.max_positions:
        raise UsageError(
            f"seq_len={settings.seq_len}: {decoder.name or decoder.family} has {decoder.max_positions} positions; use at most "
            f"{decoder.max_positions}"
        )
    if settings.isolate_documents and decoder.has_weights:
        check_isolation(decoder)
    sources = tuple(_source_record(settings, tokenizer, corpus, i) for i in range(len(corpus.sources)))
    separators = {source.separator_id for source in sources if source.separator_id is not None}
    templates = {source.fields.template for source in corpus.sources if source.fields.template is not None}
    return Request(
        model=ModelRecord(
            name=Path(decoder.name).name if Path(decoder.name).is_dir() else decoder.name,
            revision=decoder.revision,
            family=decoder.family,
            n_layers=decoder.n_layers,
            width=decoder.width,
            compute_dtype=str(decoder.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            digest=decoder.weights_digest() if decoder.has_weights else NO_DIGEST,
        ),
        tokenizer=TokenizerRecord(
            digest=tokenizer_digest(tokenizer),
            vocab_size=decoder.vocab_size,
            bos_id=bos_id(tokenizer) if settings.bos else None,
            special_ids=tuple(sorted({*special_ids(tokenizer), *separators})),
            chat_template=template_digest(templates.pop()) if templates else None,
        ),
        corpus=CorpusRecord(name=name, sources=sources),
        n_tokens=settings.n_tokens,
        allow_short=settings.allow_short,
        seq_len=settings.seq_len,
        packing=settings.packing,
        isolate_documents=settings.isolate_documents,
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


def _check_corpus(settings: Settings, corpus: Corpus) -> None:
    if len(corpus.sources) > 1 and (corpus.weights is None) != (settings.n_tokens is None):
        names = ", ".join(source.name for source in corpus.sources)
        raise UsageError(
            f"corpora {names} with tokens={settings.n_tokens} and "
            + (
                "no weights: the first would give all. Give each a share, such as a.jsonl:0.7"
                if corpus.weights is None
                else "weights: shares are of a number of tokens. Give --tokens, or leave the weights out to read all of each"
            )
        )


def _source_record(settings: Settings, tokenizer: Any, corpus: Corpus, at: int) -> SourceRecord:
    source, fields = corpus.sources[at], corpus.sources[at].fields
    is_text = fields.kind == "text"
    return SourceRecord(
        name=source.name,
        kind=fields.kind,
        column=fields.column if _has_files(source, (".parquet", ".jsonl", ".json", ".gz", ".zst")) else None,
        weight=None if corpus.weights is None else corpus.weights[at],
        separator_id=None
        if settings.separator == "auto" and not is_text
        else separator_id(tokenizer, settings.separator),
        token_dtype=fields.token_dtype if _has_files(source, (".bin",)) else None,
        document_tokens=fields.document_tokens if _has_files(source, (".bin", ".npy")) else None,
        files=tuple((file.name, file.n_bytes) for file in source.files),
    )


def _has_files(source: Source, suffixes: tuple[str, ...]) -> bool:
    return any(file.name.lower().endswith(suffixes) for file in source.files)


def capture_requests(settings: Settings, decoder: Decoder) -> list[CaptureRequest]:
    """The captures asked for. UsageError for a hook the model does not have."""
    hooks = [decoder.spell(hook) for hook in settings.hooks]
    if len(set(hooks)) != len(hooks):
        raise UsageError(f"hooks {hooks}: expected each hook once")
    return [
        CaptureRequest(
            hook=hook,
            layers=settings.layers,
            width=decoder.hook_width(hook, settings.layers),
            dtype=settings.dtype,
            codec=settings.codec,
        )
        for hook in hooks
    ]


def check_same(catalog: Catalog, request: Request, captures: list[CaptureRequest]) -> None:
    """PlanMismatchError naming every argument in which a store on disk differs from what is asked now.

    Captures that were added to the store later are none of its business.
    """
    differ = list_differences(catalog.plan.request.as_json(), request.as_json(), "")
    for capture in captures:
        name = capture.group
        found = catalog.captures.get(name)
        if found is None:
            differ.append(f"capture {name} is not there (--add adds one)")
        else:
            here = capture.model_copy(update={"name": name}).as_json()
            differ += list_differences(as_requested(found.capture).as_json(), here, f"capture {name}")
    if differ:
        raise PlanMismatchError(
            f"{catalog.objects.url} was planned with other arguments: {'; '.join(differ)}. Give the same arguments to "
            f"continue it, or another --out for a new store."
        )


def list_differences(there: Any, here: Any, path: str) -> list[str]:
    """What differs between two JSON values, field by field, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in sorted({*there, *here})
            for line in list_differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
        ]
    if _are_records(there) and _are_records(here) and len(there) == len(here):
        return [
            line
            for i, pair in enumerate(zip(there, here, strict=True))
            for line in list_differences(*pair, f"{path}.{i}" if len(here) > 1 else path)
        ]
    return [] if there == here else [f"{path} is {_short(there)} there and {_short(here)} here"]


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
