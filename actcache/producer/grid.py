"""From a number of sequences to a grid: how many in a shard, how many rows in a chunk, how many shards held out."""

import math

from actcache.errors import UsageError
from actcache.store.arrays import disk_dtype
from actcache.store.create import CaptureRequest
from actcache.store.schema import Grid, Request

_TARGET_SHARD_ROWS = 32_768
_LEAST_SHARD_ROWS = 4_096
_LEAST_SHARDS = 16
_LEAST_CHUNK_BYTES = 128 * 1024
_CHUNK_ROWS = 256
_MOST_CHUNK_ROWS = 1_024
_SHORT_SEQUENCE = 512


def choose_grid(
    request: Request,
    captures: list[CaptureRequest],
    n_train: int,
    n_holdout: int,
    *,
    is_known: bool = False,
) -> Grid:
    """Lay out sequences in shards: see the rules for shard and chunk sizes in `docs/format.md`.

    Args:
        request: what was asked for.
        captures: what will be stored of every row.
        n_train: training sequences packed.
        n_holdout: holdout sequences packed.
        is_known: nothing is packed yet, and their sum is known: the holdout is chosen here, as whole shards of it.
    """
    total = n_train + n_holdout
    row_bytes = sum(len(c.layers) * c.width * disk_dtype(c.dtype).itemsize for c in captures)
    per_shard = request.sequences_per_shard or _auto_sequences(request, total, row_bytes)
    if is_known and request.holdout_frac > 0:
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
    n_sequences = total if is_known else n_holdout_sequences + n_train
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
