"""What most tests need: a tiny model with its tokenizer and text, built stores, and stores written from arrays.

`write_store` needs no model: it takes (or makes up) activations, commits them, and returns a `Truth` that still holds
every number in plain arrays, for tests to compare with. Axes: l layers, q sequences, t positions, d width.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which transformers does

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from actcache.model import Decoder
from actcache.producer.build import build
from actcache.producer.corpus import Corpus, open_corpus
from actcache.producer.settings import Settings
from actcache.store import disk as disk_module
from actcache.store.arrays import NO_DOCUMENT, disk_dtype
from actcache.store.create import CaptureRequest, create_plan, staging
from actcache.store.create import Sequences as ShardSequences
from actcache.store.disk import Disk
from actcache.store.dtypes import as_float32
from actcache.store.ledger import ShardCommitter
from actcache.store.mixing import mix
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.schema import CorpusRecord, Grid, ModelRecord, Request, TextRecord, TokenizerRecord

ASSETS = Path(__file__).parent / "assets"
SEPARATOR = "<|endoftext|>"
WIDTH, N_LAYERS = 16, 2

# `make test` tries the same examples every time, so it says the same every time; `make soak` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("new", deadline=None, print_blob=True)
settings.load_profile("same")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tensors here are tiny: handing them to a second thread costs more than the work."""
    torch.set_num_threads(1)


@contextmanager
def no_sync():
    """Leave out fsync: it protects against a power cut, which no test makes, and takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_module.os, "fsync", lambda _fd: None)
        yield


@pytest.fixture
def fast_disk():
    with no_sync():
        yield


# A model, its tokenizer and text.


def read_texts(n_documents: int, n_characters: int) -> list[str]:
    """The beginnings of the first speeches."""
    with (ASSETS / "text" / "sotu.jsonl").open(encoding="utf-8") as lines:
        return [
            json.loads(line)["text"][:n_characters]
            for line, _ in zip(lines, range(n_documents), strict=False)
        ]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; takes some milliseconds, always the same."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(read_texts(4, 500), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SEPARATOR, bos_token=SEPARATOR)


def make_decoder(seed: int = 0, name: str = "random-neox") -> Decoder:
    """A random GPT-NeoX of 2 layers and width 16. `build` cuts it, so make a new one for other layers."""
    config = GPTNeoXConfig(
        vocab_size=300,
        hidden_size=WIDTH,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(GPTNeoXForCausalLM(config), name=name)


def write_corpus(folder: Path, texts: Sequence[str]) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_corpus(folder)


def small_settings(out: Path, **changes) -> Settings:
    """Three shards of 8 sequences of 16 tokens, the first held out; 2 layers, 4 chunks each."""
    chosen = {
        "layers": (0, 1),
        "n_tokens": 3 * 8 * 16,
        "seq_len": 16,
        "holdout_frac": 0.3,
        "exclude_first": 0,
        "batch_size": 4,
        "sequences_per_shard": 8,
        "rows_per_chunk": 32,
    }
    return Settings(out=out, **chosen | changes)


@dataclass(frozen=True)
class Kit:
    """Everything `build` needs beside its settings."""

    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus

    def build(self, settings: Settings, decoder: Decoder | None = None, **options):
        return build(
            settings,
            decoder or make_decoder(),
            self.tokenizer,
            self.corpus,
            corpus_name="speeches",
            **options,
        )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="session")
def kit(tokenizer, tmp_path_factory) -> Kit:
    """A corpus of 24 short documents, some 1,500 tokens."""
    return Kit(tokenizer, write_corpus(tmp_path_factory.mktemp("corpus"), read_texts(24, 120)))


@pytest.fixture(scope="session")
def make_store(kit, tmp_path_factory) -> Callable[..., Path]:
    """`make_store(folder, **settings)`: a finished store, built once a session and copied."""
    made: dict[str, Path] = {}

    def make(folder: Path, **changes) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("built") / "store.zarr"
            with no_sync():
                kit.build(small_settings(made[key], **changes))
        shutil.copytree(made[key], folder / "store.zarr")
        return folder / "store.zarr"

    return make


# Stores from arrays, without a model.


@dataclass(frozen=True)
class Truth:
    """What a store holds, in plain arrays.

    given  capture -> [l, q, t, d] in the dtype on disk: what was committed.
    acts   the same as it is to be read. Other numbers only where rows are quantised; then zarr-python has read them.
    """

    root: Path
    grid: Grid
    tokens: np.ndarray
    document: np.ndarray
    keep: np.ndarray
    acts: dict[str, np.ndarray]
    layers: tuple[int, ...]
    dtype: str
    given: dict[str, np.ndarray]

    @property
    def is_stored(self) -> np.ndarray:
        return self.document != NO_DOCUMENT

    def bits(self, layer, sequence, position, hook: str = "resid_post") -> np.ndarray:
        """Rows by layer number, sequence and position, as integers."""
        at = np.searchsorted(self.layers, np.asarray(layer))
        return as_bits(self.acts[hook][at, np.asarray(sequence), np.asarray(position)])

    def sequences(self, split: str | None) -> range:
        n_held_out = min(self.grid.n_holdout_sequences, self.grid.n_sequences)
        return {
            None: range(self.grid.n_sequences),
            "holdout": range(n_held_out),
            "train": range(n_held_out, self.grid.n_sequences),
        }[split]

    def kept(self, layers: Sequence[int] | None = None, split: str | None = "train") -> np.ndarray:
        """[n, 3] layer, sequence, position of every kept row, ascending."""
        q, t = np.nonzero(self.keep)
        chosen = np.isin(q, self.sequences(split))
        q, t = q[chosen], t[chosen]
        parts = [np.stack([np.full_like(q, layer), q, t], 1) for layer in layers or self.layers]
        return np.concatenate(parts)

    def floats(self, hook: str = "resid_post") -> np.ndarray:
        """[l, q, t, d] float64."""
        flat = self.acts[hook].reshape(-1, self.acts[hook].shape[-1])
        return as_float32(flat, self.dtype).astype(np.float64).reshape(self.acts[hook].shape)


def as_bits(values) -> np.ndarray:
    """Numbers as unsigned integers, for comparing NaN and -0 too."""
    if isinstance(values, torch.Tensor):
        width = {2: torch.int16, 4: torch.int32}[values.element_size()]
        values = values.view(width).numpy()
    values = np.ascontiguousarray(values)
    return values.view({2: np.uint16, 4: np.uint32}[values.dtype.itemsize])


def random_acts(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random activations in the dtype on disk."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(disk_dtype(dtype))


def make_grid(
    n_sequences: int, seq_len: int, per_shard: int, rows_per_chunk: int, n_holdout_shards: int
) -> Grid:
    return Grid(
        seq_len=seq_len,
        n_sequences=n_sequences,
        n_holdout_sequences=n_holdout_shards * per_shard,
        sequences_per_shard=per_shard,
        rows_per_shard=-(-per_shard * seq_len // rows_per_chunk) * rows_per_chunk,
        rows_per_chunk=rows_per_chunk,
        n_shards=-(-n_sequences // per_shard),
        n_holdout_shards=n_holdout_shards,
    )


def _request(grid: Grid, width: int, n_layers: int, seed: int, device: str) -> Request:
    nothing = "0" * 64
    return Request(
        model=ModelRecord(
            name="arrays",
            revision=None,
            family="gpt_neox",
            n_layers=n_layers,
            width=width,
            compute_dtype="float32",
            digest=nothing,
        ),
        tokenizer=TokenizerRecord(
            digest=nothing, vocab_size=1000, bos_id=None, special_ids=(0,), chat_template=None
        ),
        corpus=CorpusRecord(name="arrays", sources=()),
        n_tokens=None,
        allow_short=False,
        seq_len=grid.seq_len,
        packing="packed",
        isolate_documents=False,
        bos=False,
        holdout_frac=0.0,
        exclude_first=0,
        seed=seed,
        layout="mixed",
        batch_size=1,
        device=device,
        sequences_per_shard=grid.sequences_per_shard,
        rows_per_chunk=grid.rows_per_chunk,
        shard_memory_bytes=1,
    )


def write_store(
    root: Path,
    *,
    n_sequences: int = 12,
    seq_len: int = 8,
    per_shard: int = 4,
    rows_per_chunk: int = 8,
    layers: tuple[int, ...] = (0, 3),
    width: int = 4,
    dtype: str = "bfloat16",
    codec: str = "zstd",
    n_holdout_shards: int = 1,
    drop: float = 0.2,
    n_padding: int = 0,
    hooks: tuple[str, ...] = ("resid_post",),
    acts: np.ndarray | None = None,
    commit: Sequence[int] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Truth:
    """Write a store from arrays.

    Args:
        root: where.
        drop: share of tokens that are not kept.
        n_padding: tokens of padding at the end of the training part, and of the holdout where there is one.
        acts: [l, q, t, d] as on disk, of every hook; made up when left out.
        commit: which shards are committed; all when left out.
        device: the class of the one that made the activations, as the plan has it.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    grid = make_grid(n_sequences, seq_len, per_shard, rows_per_chunk, n_holdout_shards)
    shape = (n_sequences, seq_len)
    tokens = rng.integers(1, 1000, shape, dtype=np.uint32)
    document = np.arange(n_sequences, dtype=np.uint32)[:, None] // 2 * 10 + (
        np.arange(seq_len, dtype=np.uint32) > seq_len // 2
    )
    keep = rng.random(shape) >= drop
    for end in {grid.n_holdout_sequences, n_sequences} - {0}:
        at = slice(max(0, end * seq_len - n_padding), end * seq_len)
        tokens.reshape(-1)[at], document.reshape(-1)[at], keep.reshape(-1)[at] = 0, NO_DOCUMENT, False
    keep[0, 0] = keep[grid.n_holdout_sequences, 0] = True  # a part without any kept row is refused
    if acts is None:
        every = {h: random_acts(rng, (len(layers), *shape, width), dtype) for h in hooks}
    else:
        every = dict.fromkeys(hooks, acts)
    truth = Truth(root, grid, tokens, document, keep, every, layers, dtype, every)
    captures = [CaptureRequest(hook=h, layers=layers, width=width, dtype=dtype, codec=codec) for h in hooks]
    with no_sync():
        with staging(root, None) as disk:
            create_plan(
                disk,
                version="test",
                request=_request(grid, width, max(layers) + 1, seed, device),
                text=TextRecord(
                    n_documents_read=1,
                    n_documents_used=1,
                    n_documents_skipped=0,
                    n_documents_empty=0,
                    n_tokens=int(truth.is_stored.sum()),
                    n_tokens_cut=0,
                    sources=(),
                    digest="0" * 64,
                ),
                grid=grid,
                sequences_of=lambda s: ShardSequences(
                    *(a[_rows_of(grid, s)] for a in (tokens, document, keep))
                ),
                captures=captures,
                on_shard=lambda: None,
            )
        commit_shards(truth, range(grid.n_shards) if commit is None else commit)
    if codec == "uint8":
        return replace(truth, acts={h: _as_others_read(truth, h) for h in hooks})
    return truth


def _as_others_read(truth: Truth, hook: str) -> np.ndarray:
    """[l, q, t, d] of a quantised capture, by the rule of docs/format.md; zero where nothing is stored."""
    q, t = (
        np.asarray(zarr.open_array(truth.root / f"row_{x}", mode="r")[...]) for x in ("sequence", "position")
    )
    stored = np.flatnonzero(q != NO_DOCUMENT)
    found = np.zeros_like(truth.given[hook])
    found[:, q[stored], t[stored]] = dequantised_by_zarr(truth.root / f"acts/{hook}")[:, stored]
    return found


def dequantised_by_zarr(group: Path) -> np.ndarray:
    """[l, row, d] in the dtype on disk: `where(code == 255, exact, offset + scale * code)`."""
    rows, scale, offset, exact = (
        np.asarray(zarr.open_array(group / name, mode="r")[...])
        for name in ("rows", "scale", "offset", "exact")
    )
    dtype = json.loads((group / "rows/zarr.json").read_bytes())["attributes"]["actcache"]["dtype"]
    chunk = np.arange(rows.shape[1]) // (rows.shape[1] // scale.shape[1])
    values = (offset[:, chunk] + scale[:, chunk] * rows.astype(np.float32)).astype(np.float32)
    with np.errstate(over="ignore"):
        rounded = (
            values.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == "bfloat16" else values.astype(dtype)
        )
    return np.where(rows == 255, exact, rounded)


def _rows_of(grid: Grid, shard: int) -> slice:
    return slice(grid.sequences_of(shard).start, grid.sequences_of(shard).stop)


def commit_shards(truth: Truth, shards: Sequence[int], on_operation=None) -> None:
    """Commit some shards of a store that `write_store` planned."""
    catalog = Catalog(LocalObjects(truth.root))
    with (
        ThreadPoolExecutor(1) as pool,
        Disk(truth.root, on_operation) as disk,
    ):
        for name, found in catalog.captures.items():
            committer = ShardCommitter(
                disk,
                catalog.objects,
                found.capture,
                found.arrays,
                pool,
                "test",
                lambda s, r: f"shard {s}, row {r}",
            )
            for shard in shards:
                committer.commit(shard, catalog.shards.records[shard], mixed_rows(truth, shard, name))


def mixed_rows(truth: Truth, shard: int, hook: str) -> np.ndarray:
    """[l, stored, d]: a shard's rows in their mixed place."""
    at = _rows_of(truth.grid, shard)
    seed = Catalog(LocalObjects(truth.root)).plan.request.seed
    mixed = mix(truth.grid, seed, shard, truth.keep[at], truth.document[at])
    acts = truth.given[hook][:, at].reshape(len(truth.layers), -1, truth.given[hook].shape[-1])
    rows = np.empty((acts.shape[0], mixed.stored, acts.shape[2]), acts.dtype)
    row_of_token = mixed.row_of_token.reshape(-1)
    is_stored = row_of_token >= 0
    rows[:, row_of_token[is_stored]] = acts[:, is_stored]
    return rows


def check_rows(truth: Truth, batch, hook: str = "resid_post") -> np.ndarray:
    """Assert that a batch holds what it says it does; returns [b, 3] layer, sequence, position."""
    layer, sequence, position = (x.numpy() for x in (batch.layer, batch.sequence, batch.position))
    assert truth.keep[sequence, position].all(), "a row that is not kept was handed out"
    assert np.array_equal(as_bits(batch.rows), truth.bits(layer, sequence, position, hook))
    assert np.array_equal(batch.token.numpy(), truth.tokens[sequence, position])
    assert np.array_equal(batch.document.numpy(), truth.document[sequence, position])
    return np.stack([layer, sequence, position], 1)


def sorted_rows(ids: np.ndarray) -> np.ndarray:
    return ids[np.lexsort(ids.T[::-1])]


def all_files(root: Path) -> dict[str, bytes]:
    """Every file of a folder by its name, with its bytes; ledger records without who wrote them, and when."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            name = path.relative_to(root).as_posix()
            found[name] = _without_producer(path.read_bytes()) if "/ledger/c." in name else path.read_bytes()
    return found


def _without_producer(data: bytes) -> bytes:
    record = json.loads(data[8:])
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    assert set(record.pop("producer")) == {"nonce", "actcache_version", "committed_at"}
    return json.dumps(record, sort_keys=True).encode()
