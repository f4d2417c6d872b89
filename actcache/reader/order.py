"""The order of rows: a pure function of what was selected, a seed, the epoch and the window. No files, no clocks.

    chunks of each layer, in a keyed pseudo-random order      (Feistel: O(1) memory at any size)
      -> windows of at most `groups` chunks from every layer  (equal sizes; each layer equally present)
      -> dealt to P partitions                                (what a rank reads)
      -> rows of each partition permuted by a keyed hash
      -> merged: row j of a partition of n rows at virtual time (j + 1/2) / n, ties by partition

Threads, memory, read-ahead, ranks and restarts appear nowhere here, so they cannot change it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.store import keyed

I64 = NDArray[np.int64]


class ChunkList(NamedTuple):
    """The chunks of one layer that hold kept rows; the same list for every layer.

    shard, chunk, n_rows  [c]: where each lies and how many kept rows it holds (they come first in it).
    """

    shard: I64
    chunk: I64
    n_rows: I64

    def __len__(self) -> int:
        return len(self.shard)


def list_chunks(shards: I64, kept: I64, rows_per_chunk: int) -> ChunkList:
    """Chunks of `shards`, whose kept rows are `kept` [shard]."""
    per_shard = -(-kept // rows_per_chunk)
    shard = np.repeat(shards, per_shard)
    first = np.repeat(np.cumsum(per_shard) - per_shard, per_shard)
    chunk = np.arange(len(shard), dtype=np.int64) - first
    n_rows = np.minimum(rows_per_chunk, np.repeat(kept, per_shard) - chunk * rows_per_chunk)
    return ChunkList(shard, chunk, n_rows)


class Members(NamedTuple):
    """The chunks of one window, in the order in which their rows are counted.

    layer_i    [m] index among the selected layers.
    listed     [m] index into the ChunkList.
    partition  [m] in 0..P-1.
    """

    layer_i: I64
    listed: I64
    partition: I64


class GlobalOrder:
    """The `global` order of one epoch.

    n_chunks  chunks per layer.  n_layers  layers streamed side by side.
    groups    the most chunks of each layer in a window; an epoch is cut into windows as equal as can be.
    """

    def __init__(
        self, *, seed: int, epoch: int, n_chunks: int, n_layers: int, groups: int, partitions: int
    ) -> None:
        self.n_chunks, self.n_layers, self.groups, self.partitions = n_chunks, n_layers, groups, partitions
        self._key = keyed.derive(seed, "global", epoch)

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.n_chunks // self.groups)

    def members(self, window: int) -> Members:
        """Which chunks a window holds, and who reads each."""
        slots = np.arange(
            window * self.n_chunks // self.n_windows, (window + 1) * self.n_chunks // self.n_windows
        )
        index = [
            keyed.feistel(keyed.derive(self._key, "chunk", layer_i), slots, self.n_chunks)
            for layer_i in range(self.n_layers)
        ]
        dealt = _deal(self._key, window, len(slots) * self.n_layers, self.partitions)
        layer_i = np.repeat(np.arange(self.n_layers, dtype=np.int64), len(slots))
        return Members(layer_i, np.concatenate(index), dealt)

    def key_of(self, window: int) -> int:
        """The key under which the rows of a window are permuted."""
        return keyed.derive(self._key, "rows", window)


class CommitOrder:
    """The `commit` order of one epoch: what a follower can read while shards are still being committed.

    Shards come in plan order. Each one's chunks, permuted, are spread evenly over `depth * steps` consecutive windows,
    so that a window holds equal parts of the `depth` shards committed last: fewer in the first and last
    `(depth - 1) * steps` windows. Window w needs shards 0 .. w // steps only.

    chunks   the ChunkList, shards ascending.  depth  shards mixed together (K).  steps  windows per shard.
    """

    def __init__(
        self,
        *,
        seed: int,
        epoch: int,
        chunks: ChunkList,
        n_layers: int,
        depth: int,
        steps: int,
        partitions: int,
    ) -> None:
        self._chunks, self.n_layers, self.depth, self.steps = chunks, n_layers, depth, steps
        self.partitions = partitions
        self._shards, self._first, self._count = np.unique(
            chunks.shard, return_index=True, return_counts=True
        )
        self._key = keyed.derive(seed, "commit", epoch)

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return (len(self._shards) + self.depth - 1) * self.steps

    def members(self, window: int) -> Members:
        """Which chunks a window holds, and who reads each."""
        newest, span = window // self.steps, self.depth * self.steps
        layers: list[I64] = []
        listed: list[I64] = []
        for i in range(max(0, newest - self.depth + 1), min(newest + 1, len(self._shards))):
            count, turn = int(self._count[i]), window - i * self.steps
            places = np.arange(turn * count // span, (turn + 1) * count // span)
            for layer_i in range(self.n_layers):
                key = keyed.derive(self._key, "chunk", layer_i, int(self._shards[i]))
                listed.append(self._first[i] + keyed.feistel(key, places, count))
                layers.append(np.full(len(places), layer_i, dtype=np.int64))
        n = sum(len(part) for part in listed)
        return Members(
            np.concatenate(layers), np.concatenate(listed), _deal(self._key, window, n, self.partitions)
        )

    def key_of(self, window: int) -> int:
        """The key under which the rows of a window are permuted."""
        return keyed.derive(self._key, "rows", window)


def _deal(key: int, window: int, n: int, partitions: int) -> I64:
    """A partition for each of the n chunks of a window, as equally often as can be."""
    dealt = np.empty(n, dtype=np.int64)
    dealt[keyed.permutation(keyed.derive(key, "deal", window), n)] = np.arange(n) % partitions
    return dealt


class Arrangement(NamedTuple):
    """Where the rows of a window go.

    slot       [n] slot of each row, rows counted member after member.
    partition  [n] partition of the row in each slot.
    """

    slot: I64
    partition: NDArray[np.int16]


def arrange(key: int, n_rows: I64, partition: I64, partitions: int) -> Arrangement:
    """Permute the rows of each partition and merge the partitions by virtual time. O(n log n), no Python per row."""
    total, starts = int(n_rows.sum()), np.cumsum(n_rows) - n_rows
    # Hash in the upper bits, row number below: unique keys, so any sort gives the same answer.
    row_bits = np.uint64(max(1, total.bit_length()))
    row_mask = (np.uint64(1) << row_bits) - np.uint64(1)
    hash_shift = np.uint64(row_bits + np.uint64(max(1, partitions.bit_length())))
    keys = ((keyed.hash_u64(key, np.arange(total)) >> hash_shift) << row_bits) | np.arange(
        total, dtype=np.uint64
    )
    permuted, times = [], []
    for p in range(partitions):
        mine = np.flatnonzero(partition == p)
        own = np.concatenate([keys[:0], *(keys[starts[m] : starts[m] + n_rows[m]] for m in mine)])
        own.sort()
        permuted.append(own & row_mask)
        times.append(np.arange(1, 2 * len(own), 2) / (2 * max(1, len(own))))
    merged = np.argsort(
        np.concatenate(times), kind="stable"
    )  # equal times stay in the order of their partitions
    slot = np.empty(total, dtype=np.int64)
    slot[np.concatenate(permuted)[merged].astype(np.int64)] = np.arange(total)
    counts = [len(own) for own in permuted]
    return Arrangement(slot, np.repeat(np.arange(partitions, dtype=np.int16), counts)[merged])


def steps_of(window_rows: int, n_layers: int, rows_per_chunk: int, most_chunks: int) -> int:
    """Windows per shard of the `commit` order, for windows of about `window_rows` rows."""
    return max(1, round(most_chunks * n_layers * rows_per_chunk / window_rows))


def groups_of(window_rows: int, n_layers: int, rows_per_chunk: int, n_chunks: int) -> int:
    """Chunks of each layer in a window of `window_rows` rows, rounded up (or all there are)."""
    return min(n_chunks, max(1, -(-window_rows // (n_layers * rows_per_chunk))))
