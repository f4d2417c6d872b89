"""A store of made-up rows for measuring readers: normal numbers in bfloat16 compress like real activations (1.4x)."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from actcache.store.create import CaptureRequest, Sequences, create_plan, staging
from actcache.store.disk import Disk
from actcache.store.ledger import ShardCommitter
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.schema import CorpusRecord, Grid, ModelRecord, Request, TextRecord, TokenizerRecord


def make_store(
    out: Path,
    *,
    n_tokens: int,
    n_layers: int,
    width: int,
    codec: str,
    seq_len: int = 128,
    shard_rows: int = 32_768,
    spike: float | None = None,
) -> Path:
    """Write a store unless it is there; returns its path.

    spike  a number in the first row of every sequence.
    """
    n_shards = _shards(n_tokens, shard_rows)
    if (out / "zarr.json").exists() and len(
        Catalog(LocalObjects(out)).capture("resid_post").committed()
    ) == n_shards:
        return out
    make_plan(
        out,
        n_tokens=n_tokens,
        layers=tuple(range(n_layers)),
        width=width,
        codec=codec,
        seq_len=seq_len,
        shard_rows=shard_rows,
    )
    catalog = Catalog(LocalObjects(out))
    found = catalog.capture("resid_post")
    rng = np.random.default_rng(0)
    with Disk(out) as disk, ThreadPoolExecutor(2) as pool:
        committer = ShardCommitter(
            disk, catalog.objects, found.capture, found.arrays, pool, "benchmark", lambda _s, _r: ""
        )
        for shard in range(n_shards):
            rows = made_up_rows(rng, (n_layers, shard_rows, width))
            if spike is not None:
                first = catalog.plan_object("row_position", shard)[:shard_rows] == 0
                rows[:, first, width // 2] = np.float32(spike).view(np.uint32) >> 16
            committer.commit(shard, catalog.shards.records[shard], rows)
    return out


def made_up_rows(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """bfloat16 bits of normal numbers, each column with a scale of its own."""
    scale = np.exp(np.random.default_rng(0).normal(0, 0.5, shape[-1])).astype(np.float32)
    return ((rng.standard_normal(shape, dtype=np.float32) * scale).view(np.uint32) >> 16).astype(np.uint16)


def make_plan(
    out: Path,
    *,
    n_tokens: int,
    layers: tuple[int, ...],
    width: int,
    codec: str,
    seq_len: int = 128,
    shard_rows: int = 32_768,
    batch_size: int = 16,
    vocab_size: int = 50_000,
) -> None:
    """Write a plan of random tokens, all kept, none held out."""
    per_shard = shard_rows // seq_len
    grid = Grid(
        seq_len=seq_len,
        n_sequences=n_tokens // seq_len,
        n_holdout_sequences=0,
        sequences_per_shard=per_shard,
        rows_per_shard=shard_rows,
        rows_per_chunk=256,
        n_shards=_shards(n_tokens, shard_rows),
        n_holdout_shards=0,
    )
    zeros = "0" * 64
    request = Request(
        model=ModelRecord(
            name="synthetic",
            revision=None,
            family="none",
            n_layers=max(layers) + 1,
            width=width,
            compute_dtype="float32",
            digest=zeros,
        ),
        tokenizer=TokenizerRecord(
            digest=zeros, vocab_size=vocab_size, bos_id=None, special_ids=(0,), chat_template=None
        ),
        corpus=CorpusRecord(name="synthetic", sources=()),
        n_tokens=n_tokens,
        allow_short=False,
        seq_len=seq_len,
        packing="packed",
        isolate_documents=False,
        bos=False,
        holdout_frac=0.0,
        exclude_first=0,
        seed=0,
        layout="mixed",
        batch_size=batch_size,
        device="cpu",
        sequences_per_shard=per_shard,
        rows_per_chunk=256,
        shard_memory_bytes=1 << 30,
    )
    capture = CaptureRequest(hook="resid_post", layers=layers, width=width, dtype="bfloat16", codec=codec)
    rng = np.random.default_rng(1)

    def sequences(shard: int) -> Sequences:
        chosen = grid.sequences_of(shard)
        ids, shape = np.arange(chosen.start, chosen.stop, dtype=np.uint32), (len(chosen), seq_len)
        tokens = rng.integers(1, vocab_size, shape, dtype=np.uint32)
        return Sequences(tokens, np.repeat(ids[:, None], seq_len, 1), np.ones(shape, np.bool_))

    with staging(out, None) as disk:
        create_plan(
            disk,
            version="benchmark",
            request=request,
            text=TextRecord(
                n_documents_read=grid.n_sequences,
                n_documents_used=grid.n_sequences,
                n_documents_skipped=0,
                n_documents_empty=0,
                n_tokens=n_tokens,
                n_tokens_cut=0,
                sources=(),
                digest=zeros,
            ),
            grid=grid,
            sequences_of=sequences,
            captures=[capture],
            on_shard=lambda: None,
        )


def _shards(n_tokens: int, shard_rows: int) -> int:
    return math.ceil(n_tokens / shard_rows)
