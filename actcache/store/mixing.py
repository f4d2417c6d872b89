"""Which token goes to which row of its shard: a pure function of the plan.

Kept rows first, then excluded ones, padding last, each part in an order keyed by (seed, shard) and the same for
every capture: any chunk is then a fair sample of its shard's sequences, and rows of all captures stay aligned.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.store import keyed
from actcache.store.arrays import NO_DOCUMENT
from actcache.store.schema import Grid


class Mixed(NamedTuple):
    """The rows of one shard.

    row_sequence, row_position  [rows_per_shard] uint32, NO_DOCUMENT for padding rows.
    row_of_token                [q, t] int64, the row within the shard of each token, -1 for padding tokens.
    kept, stored                rows [0, kept) are kept, [kept, stored) excluded, the rest padding.
    """

    row_sequence: NDArray[np.uint32]
    row_position: NDArray[np.uint32]
    row_of_token: NDArray[np.int64]
    kept: int
    stored: int


def mix(grid: Grid, seed: int, shard: int, keep: NDArray[np.bool_], document: NDArray[np.uint32]) -> Mixed:
    """Lay out one shard; `keep` and `document` are [q, t] of its sequences."""
    n_tokens = keep.size
    is_stored = (document != NO_DOCUMENT).reshape(-1)
    is_kept = keep.reshape(-1) & is_stored
    order = keyed.permutation(keyed.derive(seed, "mix", shard), n_tokens)
    kept, excluded = order[is_kept[order]], order[(is_stored & ~is_kept)[order]]
    tokens = np.concatenate([kept, excluded])
    row_of_token = np.full(n_tokens, -1, dtype=np.int64)
    row_of_token[tokens] = np.arange(len(tokens))
    columns: list[NDArray[Any]] = []
    for values in (tokens // grid.seq_len + grid.sequences_of(shard).start, tokens % grid.seq_len):
        column = np.full(grid.rows_per_shard, NO_DOCUMENT, dtype=np.uint32)
        column[: len(tokens)] = values
        columns.append(column)
    return Mixed(columns[0], columns[1], row_of_token.reshape(keep.shape), len(kept), len(tokens))
