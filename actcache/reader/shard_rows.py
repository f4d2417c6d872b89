"""Kept rows in the order of the text, one shard at a time: what an evaluation reads, where a trainer wants them shuffled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import UsageError
from actcache.reader.filters import RowFilter
from actcache.reader.provenance import Provenance
from actcache.store.open import CaptureCatalog, Catalog

_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRows:
    """The kept tokens of one shard, by sequence and position; their activations are read one layer at a time.

    shard     its number.
    layers    the model's layer numbers selected.
    sequence, position, token, document  [n] int64, where each row comes from.
    passes    [l, n] bool, whether the row of that layer passes the filters.
    sequences the shard's sequences.
    tokens    [q, t] int64, all tokens of those sequences, excluded ones and padding too.
    """

    shard: int
    layers: tuple[int, ...]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    token: NDArray[np.int64]
    document: NDArray[np.int64]
    passes: NDArray[np.bool_]
    sequences: range
    tokens: NDArray[np.int64]
    _captures: dict[str, CaptureCatalog]
    _rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ShardRows(shard={self.shard}, {len(self):,} tokens, layers={self.layers})"

    def rows(self, layer: int, hook: str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Activations [n, d] of one layer, as stored unless `dtype` is given. Holds n rows and one chunk.

        hook: one of those asked for; None: the first.

        Raises:
            UsageError: a layer or hook that was not asked for.
            DamageError: a chunk is not what was committed.
        """
        if hook is None:
            hook = next(iter(self._captures))
        if hook not in self._captures:
            raise UsageError(f"hook {hook!r} was not asked for; these were: {list(self._captures)}")
        capture = self._captures[hook]
        reader, layer_i = capture.reader(self.shard), capture.layer_index(layer)
        rows_per_chunk = capture.plan.grid.rows_per_chunk
        out = np.empty((len(self), capture.capture.width), capture.arrays["rows"].dtype)
        chunk_of = self._rows // rows_per_chunk
        for chunk in np.unique(chunk_of):
            at = np.flatnonzero(chunk_of == chunk)
            out[at] = reader.read(layer_i, int(chunk))[self._rows[at] - chunk * rows_per_chunk]
        rows = torch.from_numpy(out).view(_TORCH_DTYPES[capture.capture.dtype])
        return rows if dtype is None else rows.to(dtype)


def iter_shard_rows(
    catalog: Catalog,
    provenance: Provenance,
    captures: Sequence[CaptureCatalog],
    layers: tuple[int, ...],
    shards: Sequence[int],
    row_filter: RowFilter,
    n_tokens: int | None,
) -> Iterator[ShardRows]:
    """Shard after shard, until `n_tokens` kept tokens have been handed out: whole sequences, so it may be a few more."""
    grid, n_left = catalog.grid, n_tokens
    for shard in shards:
        n_kept = int(catalog.shards.kept[shard])
        row_of_token = provenance.rows_of(shard)
        is_kept = (row_of_token >= 0) & (row_of_token < n_kept)
        if n_left is not None:
            tokens_before = np.cumsum(is_kept.sum(1)) - is_kept.sum(1)
            is_kept &= (tokens_before < n_left)[:, None]
            n_left -= int(is_kept.sum())
        sequence, position = np.nonzero(is_kept)
        rows = row_of_token[sequence, position]
        tokens = provenance.plan_object("tokens", shard).astype(np.int64)
        document = provenance.plan_object("document", shard)[sequence, position].astype(np.int64)
        yield ShardRows(
            shard=shard,
            layers=layers,
            sequence=sequence + grid.sequences_of(shard).start,
            position=position,
            token=tokens[sequence, position],
            document=document,
            passes=np.stack([row_filter.passing(shard, lane)[rows] for lane in range(len(layers))]),
            sequences=grid.sequences_of(shard),
            tokens=tokens,
            _captures={found.capture.name: found for found in captures},
            _rows=rows,
        )
        if n_left is not None and n_left <= 0:
            return
