"""A store of made-up rows for measuring readers: normal numbers in bfloat16 compress like real activations (1.4x)."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from actcache.store.arrays import capture_arrays
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
) -> Path:
    """Write a store unless it is there; returns its path."""
    if (out / "zarr.json").exists() and len(
        Catalog(LocalObjects(out)).capture("resid_post").committed()
    ) == _shards(n_tokens, shard_rows):
        return out
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
            n_layers=n_layers,
            width=width,
            compute_dtype="float32",
            digest=zeros,
        ),
        tokenizer=TokenizerRecord(
            digest=zeros, vocab_size=50_000, bos_id=None, special_ids=(0,), chat_template=None
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
        batch_size=1,
        device="cpu",
        sequences_per_shard=per_shard,
        rows_per_chunk=256,
        shard_memory_bytes=1 << 30,
    )
    captures = [
        CaptureRequest(
            hook="resid_post", layers=tuple(range(n_layers)), width=width, dtype="bfloat16", codec=codec
        )
    ]

    def sequences(shard: int) -> Sequences:
        ids = np.arange(shard * per_shard, (shard + 1) * per_shard, dtype=np.uint32)
        shape = (per_shard, seq_len)
        return Sequences(
            np.ones(shape, np.uint32), np.repeat(ids[:, None], seq_len, 1), np.ones(shape, np.bool_)
        )

    with staging(out, None) as disk:
        text = TextRecord(
            n_documents_read=grid.n_sequences,
            n_documents_used=grid.n_sequences,
            n_documents_skipped=0,
            n_documents_empty=0,
            n_tokens=n_tokens,
            n_tokens_cut=0,
            sources=(),
            digest=zeros,
        )
        create_plan(
            disk,
            version="benchmark",
            request=request,
            text=text,
            grid=grid,
            sequences_of=sequences,
            captures=captures,
            on_shard=lambda: None,
        )
    catalog = Catalog(LocalObjects(out))
    capture = catalog.capture("resid_post").capture
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 0.5, width)).astype(np.float32)
    with Disk(out) as disk, ThreadPoolExecutor(2) as pool:
        committer = ShardCommitter(
            disk,
            catalog.objects,
            capture,
            capture_arrays(grid, capture),
            pool,
            "benchmark",
            lambda _s, _r: "",
        )
        for shard in range(grid.n_shards):
            x = rng.standard_normal((n_layers, shard_rows, width), dtype=np.float32) * scale
            bits = (x.view(np.uint32) >> 16).astype(np.uint16)
            committer.commit(shard, catalog.shards.records[shard], bits)
    return out


def _shards(n_tokens: int, shard_rows: int) -> int:
    return math.ceil(n_tokens / shard_rows)
