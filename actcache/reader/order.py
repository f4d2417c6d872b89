"""The order of rows: a pure function of what was selected, a seed, the epoch and the window. No files, no clocks.

    runs of adjacent chunks of each layer, in a keyed pseudo-random order  (Feistel: O(1) memory at any size)
      -> windows of at most `groups` runs from every layer    (equal sizes; each layer equally present)
      -> dealt to P partitions                                (what a rank reads)
      -> rows of each partition permuted by a keyed hash
      -> merged: row j of a partition of n rows at virtual time (j + 1/2) / n, ties by partition

Threads, memory, read-ahead, ranks and restarts appear nowhere here, so they cannot change it.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.loops.compiled import Told, compiled, permuted
from actcache.store import keyed

I64 = NDArray[np.int64]

_BLOCK_RUNS = 4096
"""Of a layer, looked up at a time."""


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


class Runs(NamedTuple):
    """Adjacent chunks of one shard that stay together, so that they can be read together; mostly one chunk each.

    first, n_chunks  [r]: index into the ChunkList of the first chunk, and how many.
    """

    first: I64
    n_chunks: I64

    def __len__(self) -> int:
        return len(self.first)

    def listed(self, runs: I64) -> I64:
        """Indices into the ChunkList of the chunks of some runs, run after run."""
        counts = self.n_chunks[runs]
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(self.first[runs], counts) + within


def runs_of(chunks: ChunkList, run_chunks: int) -> Runs:
    """Chunks in runs of `run_chunks`, fewer at the end of a shard."""
    first = np.flatnonzero(chunks.chunk % run_chunks == 0)
    return Runs(first, np.diff(np.append(first, len(chunks))))


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

    runs    of each layer, the same for all.  n_layers  layers streamed side by side.
    groups  the most runs of each layer in a window; an epoch is cut into windows as equal as can be.
    """

    def __init__(
        self, *, seed: int, epoch: int, runs: Runs, n_layers: int, groups: int, partitions: int
    ) -> None:
        self.runs, self.n_layers, self.groups, self.partitions = runs, n_layers, groups, partitions
        self._key = keyed.derive(seed, "global", epoch)
        self._block = (-1, np.empty((n_layers, 0), np.int64))

    @property
    def most_runs(self) -> int:
        """The most runs of each layer in a window."""
        return self.groups

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return -(-len(self.runs) // self.groups)

    def members(self, window: int) -> Members:
        """Which chunks a window holds, and who reads each."""
        per_block = max(1, _BLOCK_RUNS // self.groups)
        first = window // per_block * per_block
        start, end = (self._first_place(w) - self._first_place(first) for w in (window, window + 1))
        block = self._block
        if block[0] != first:
            self._block = block = (first, self._choose(first, min(first + per_block, self.n_windows)))
        chosen = block[1][:, start:end]
        layer_i = np.repeat(np.arange(self.n_layers, dtype=np.int64), chosen.shape[1])
        return _members(self.runs, layer_i, chosen.reshape(-1), self._key, window, self.partitions)

    def _first_place(self, window: int) -> int:
        return window * len(self.runs) // self.n_windows

    def _choose(self, first: int, end: int) -> I64:
        """[layer, places] runs of some windows, one after the other: together they cost little more than one."""
        places = np.arange(self._first_place(first), self._first_place(end))
        keys = [keyed.derive(self._key, "chunk", layer_i) for layer_i in range(self.n_layers)]
        return keyed.feistel_each(keys, np.tile(places, (self.n_layers, 1)), len(self.runs))

    def key_of(self, window: int) -> int:
        """The key under which the rows of a window are permuted."""
        return keyed.derive(self._key, "rows", window)


class CommitOrder:
    """The `commit` order of one epoch: what a follower can read while shards are still being committed.

    Shards come in plan order. Each one's runs, permuted, are spread evenly over `depth * steps` consecutive windows,
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
        runs: Runs,
        n_layers: int,
        depth: int,
        steps: int,
        partitions: int,
    ) -> None:
        self.runs, self.n_layers, self.depth, self.steps = runs, n_layers, depth, steps
        self.partitions = partitions
        self._shards, self._first, self._count = np.unique(
            chunks.shard[runs.first], return_index=True, return_counts=True
        )
        self._key = keyed.derive(seed, "commit", epoch)

    @property
    def most_runs(self) -> int:
        """The most runs of each layer in a window."""
        return self.depth * -(-int(self._count.max()) // (self.depth * self.steps))

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return (len(self._shards) + self.depth - 1) * self.steps

    def shards_of(self, window: int) -> I64:
        """The shards a window draws from, ascending."""
        newest = window // self.steps
        return self._shards[max(0, newest - self.depth + 1) : newest + 1]

    def members(self, window: int) -> Members:
        """Which chunks a window holds, and who reads each."""
        newest, span = window // self.steps, self.depth * self.steps
        layers: list[I64] = []
        chosen: list[I64] = []
        for i in range(max(0, newest - self.depth + 1), min(newest + 1, len(self._shards))):
            count, turn = int(self._count[i]), window - i * self.steps
            places = np.arange(turn * count // span, (turn + 1) * count // span)
            for layer_i in range(self.n_layers):
                key = keyed.derive(self._key, "chunk", layer_i, int(self._shards[i]))
                chosen.append(self._first[i] + keyed.feistel(key, places, count))
                layers.append(np.full(len(places), layer_i, dtype=np.int64))
        layer_i, runs = np.concatenate(layers), np.concatenate(chosen)
        return _members(self.runs, layer_i, runs, self._key, window, self.partitions)

    def key_of(self, window: int) -> int:
        """The key under which the rows of a window are permuted."""
        return keyed.derive(self._key, "rows", window)


def _members(runs: Runs, layer_i: I64, chosen: I64, key: int, window: int, partitions: int) -> Members:
    """The chunks of the runs `chosen` of layers `layer_i`; a run is read by one partition."""
    counts = runs.n_chunks[chosen]
    dealt = _deal(key, window, len(chosen), partitions)
    return Members(np.repeat(layer_i, counts), runs.listed(chosen), np.repeat(dealt, counts))


def _deal(key: int, window: int, n: int, partitions: int) -> I64:
    """A partition for each of the n runs of a window, as equally often as can be."""
    dealt = np.empty(n, dtype=np.int64)
    dealt[keyed.permutation(keyed.derive(key, "deal", window), n)] = np.arange(n) % partitions
    return dealt


class Arrangement(NamedTuple):
    """Where the rows of a window go.

    slot       [n] slot of each row, rows counted member after member.
    partition  [n] partition of the row in each slot.
    told       what `arrange` was asked to tell each slot, where it could.
    """

    slot: I64
    partition: NDArray[np.int16]
    told: Told | None = None


def arrange(key: int, n_rows: I64, partition: I64, partitions: int, tell: Told | None = None) -> Arrangement:
    """Permute the rows of each partition and merge the partitions by virtual time. No Python per row.

    tell  of each member [m], the global number of its first row and its layer, for `Arrangement.told`.
    """
    total = int(n_rows.sum())
    counts = np.zeros(partitions, np.int64)
    np.add.at(counts, partition, n_rows)
    merge, loops = _merge(tuple(counts.tolist())), compiled()
    # Partition, hash, row number, from the upper bits down: unique, so any sort gives the same answer.
    row_bits, partition_bits = max(1, total.bit_length()), max(1, partitions.bit_length())
    if loops is not None:
        slot, told = permuted(loops, key, n_rows, partition, (row_bits, partition_bits), merge.slot, tell)
        return Arrangement(slot, merge.partition, told)
    number = np.arange(total, dtype=np.uint64)
    keys = keyed.hash_u64(key, number)
    keys >>= np.uint64(row_bits + partition_bits)
    keys <<= np.uint64(row_bits)
    keys |= number
    keys |= np.repeat(partition.astype(np.uint64) << np.uint64(64 - partition_bits), n_rows)
    keys.sort()
    keys &= np.uint64((1 << row_bits) - 1)
    slot = np.empty(total, dtype=np.int64)
    slot[keys.view(np.int64)] = merge.slot
    return Arrangement(slot, merge.partition)


@lru_cache(maxsize=4)
def _merge(counts: tuple[int, ...]) -> Arrangement:
    """Partitions of so many rows merged by virtual time: the slot of each row of each, and whose each slot is. Read-only."""
    times = [np.arange(1, 2 * n, 2) / (2 * max(1, n)) for n in counts]
    # Equal times stay in the order of their partitions.
    merged = np.argsort(np.concatenate(times), kind="stable")
    slot = np.empty(len(merged), np.int64)
    slot[merged] = np.arange(len(merged))
    partition = np.repeat(np.arange(len(counts), dtype=np.int16), counts)[merged]
    slot.flags.writeable = partition.flags.writeable = False
    return Arrangement(slot, partition)


def steps_of(window_rows: int, n_layers: int, rows_per_chunk: int, most_chunks: int) -> int:
    """Windows per shard of the `commit` order, for windows of about `window_rows` rows."""
    return max(1, round(most_chunks * n_layers * rows_per_chunk / window_rows))


def groups_of(window_rows: int, n_layers: int, rows_per_run: int, n_runs: int) -> int:
    """Runs of each layer in a window of `window_rows` rows, rounded up (or all there are)."""
    return min(n_runs, max(1, -(-window_rows // (n_layers * rows_per_run))))
