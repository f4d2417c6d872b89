"""What is written down about a store: the plan, a capture's record, a shard's ledger record.

JSON only. `digest_of` is the one way an identity is computed: SHA-256 over canonical JSON.
The field tables of `docs/format.md` are held against these classes by a test.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1
LEDGER_GENERATIONS = 16  # one build and up to fifteen repairs of the same shard

LogicalDtype = Literal["bfloat16", "float16", "float32"]
CodecName = Literal["zstd", "lz4", "none", "uint8"]
HookName = Literal["resid_post", "resid_pre", "mlp_in", "mlp_out", "attn_out"]
ModuleHook = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+\.\*(\.[A-Za-z0-9_]+)*:(in|out)$")]
SourceKind = Literal["text", "chat", "ids", "activations"]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


class Record(BaseModel):
    """A frozen, strict record: an unknown or missing field is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")


class ModelRecord(Record):
    """The language model. `digest` is over its weights, so a renamed or moved folder is the same model."""

    name: str
    revision: str | None
    family: str
    n_layers: int
    width: int
    compute_dtype: LogicalDtype
    digest: Hex


class TokenizerRecord(Record):
    """The tokenizer and the ids that matter here."""

    digest: Hex
    vocab_size: int
    bos_id: int | None
    special_ids: tuple[int, ...]
    chat_template: Hex | None


class SourceRecord(Record):
    """One corpus: what it is read as, its share, and its file names and sizes, without absolute paths."""

    name: str
    kind: SourceKind
    column: str | None
    weight: float | None
    separator_id: int | None
    token_dtype: str | None
    document_tokens: int | None
    files: tuple[tuple[str, int], ...]


class CorpusRecord(Record):
    """Which text: one source, or several in given shares."""

    name: str
    sources: tuple[SourceRecord, ...]


class Request(Record):
    """Every argument that belongs to the plan: with another value the store would hold other bytes.

    Thread counts, progress, memory for reading and the path of the store belong to a run, not here.
    """

    model: ModelRecord
    tokenizer: TokenizerRecord
    corpus: CorpusRecord
    n_tokens: int | None
    allow_short: bool
    seq_len: int
    packing: Literal["packed", "document"]
    isolate_documents: bool
    bos: bool
    holdout_frac: float
    exclude_first: int
    seed: int
    layout: Literal["mixed"]
    batch_size: int
    device: str
    sequences_per_shard: int | None
    rows_per_chunk: int | None
    shard_memory_bytes: int


class Grid(Record):
    """Every shape, known before the first forward pass.

    A shard holds `sequences_per_shard` sequences in `rows_per_shard` rows: the next multiple of
    `rows_per_chunk`; rows left over are padding and are never stored. Holdout shards come first.
    """

    seq_len: int
    n_sequences: int
    n_holdout_sequences: int
    sequences_per_shard: int
    rows_per_shard: int
    rows_per_chunk: int
    n_shards: int
    n_holdout_shards: int

    @property
    def n_rows(self) -> int:
        """Length of every row axis, padding included."""
        return self.n_shards * self.rows_per_shard

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks of one layer in one shard."""
        return self.rows_per_shard // self.rows_per_chunk

    def sequences_of(self, shard: int) -> range:
        """The sequences whose rows lie in `shard`."""
        start = shard * self.sequences_per_shard
        return range(start, min(start + self.sequences_per_shard, self.n_sequences))


class SourceCount(Record):
    """What one source gave: documents read, and tokens in the store with the BOS before them."""

    n_documents_read: int
    n_tokens: int


class TextRecord(Record):
    """What was read. `digest` is SHA-256 over the length-prefixed documents, in the order in which they were read.

    With `s` sources, document number `d` is number `d // s` of source `d % s`.
    """

    n_documents_read: int
    n_documents_used: int
    n_documents_skipped: int
    n_documents_empty: int
    n_tokens: int
    n_tokens_cut: int
    sources: tuple[SourceCount, ...]
    digest: Hex


class Plan(Record):
    """Everything decided before the first forward pass. Its digest is the store's identity."""

    format: Literal[1]
    actcache_version: str
    request: Request
    text: TextRecord
    grid: Grid
    n_kept: int
    shards_digest: Hex
    metadata: dict[str, Hex]

    @property
    def digest(self) -> str:
        """The plan's identity."""
        return digest_of(self.as_json())


class PlannedShard(Record):
    """The plan's own facts of one shard: how many rows are kept and stored, and its plan objects.

    objects: array name -> (bytes on disk, crc32c of all of them but the trailer of 4).
    """

    kept: int
    stored: int
    objects: dict[str, tuple[int, int]]


class Capture(Record):
    """One hook with its layers, stored together: the group `acts/<name>`."""

    name: str
    hook: HookName | ModuleHook
    layers: tuple[int, ...]
    width: int
    dtype: LogicalDtype
    codec: CodecName
    plan_digest: Hex
    metadata: dict[str, Hex]

    @property
    def digest(self) -> str:
        """The capture's identity; it binds the plan's."""
        return digest_of(self.as_json())


class ChunkTable(Record):
    """Length and crc32c of every chunk of a shard, layer by layer; base64 of little-endian uint32.

    A length counts the chunk's own 4-byte crc32c trailer; the crc32c is over the bytes before it.
    """

    lengths: str
    crc32c: str


class ScaleTable(Record):
    """What lies in a quantised shard beside its codes: a block behind every chunk, and one of errors.

    Lengths and crc32c as in ChunkTable; `errors` is the crc32c of the block of errors.
    """

    lengths: str
    crc32c: str
    errors: int


class Producer(Record):
    """Who committed a shard. Never part of a digest."""

    nonce: str
    actcache_version: str
    committed_at: str


class ShardRecord(Record):
    """One committed shard: all a reader trusts."""

    format: Literal[1]
    capture_digest: Hex
    shard: int
    generation: int
    rows_bytes: int
    chunks: ChunkTable
    scales: ScaleTable | None
    side: dict[str, tuple[int, int]]
    digest: Hex
    producer: Producer

    def expected_digest(self) -> str:
        """The digest this record should carry: over every field but `digest` and `producer`."""
        return digest_of(self.model_dump(mode="json", exclude={"digest", "producer"}))


class Retirement(Record):
    """A shard whose rows were deleted, in every capture, to make room. Written before they are.

    consumers: who was waited for -> the first shard it still needed, by its last saved checkpoint.
    """

    format: Literal[1]
    plan_digest: Hex
    shard: int
    consumers: dict[str, int]
    digest: Hex
    producer: Producer

    def expected_digest(self) -> str:
        """The digest this record should carry: over every field but `digest` and `producer`."""
        return digest_of(self.model_dump(mode="json", exclude={"digest", "producer"}))
