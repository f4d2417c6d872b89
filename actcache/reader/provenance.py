"""Where rows came from: from row numbers to sequence, position, token and document."""

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.store.open import Catalog

_CACHE_BYTES = 64 * 1024 * 1024


class Provenance:
    """Looks up rows by number. Keeps the plan objects it read last, up to 64 MiB; safe to share among threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._cache: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def plan_object(self, name: str, shard: int) -> NDArray[Any]:
        """A shard's part of a plan array, checked when it is read."""
        key = (name, shard)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        values = self._catalog.plan_object(name, shard)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = values
                self._n_bytes += values.nbytes
            while self._n_bytes > _CACHE_BYTES and len(self._cache) > 1:
                self._n_bytes -= self._cache.popitem(last=False)[1].nbytes
        return values

    def look_up(self, name: str, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """`sequence`, `position`, `token` or `document` of global row numbers [b]; int64 [b]."""
        grid = self._catalog.grid
        out = np.empty(row.shape, np.int64)
        shard_of = row // grid.rows_per_shard
        for shard in np.unique(shard_of):
            at = shard_of == shard
            local = row[at] - shard * grid.rows_per_shard
            out[at] = self._in_shard(name, int(shard), local)
        return out

    def _in_shard(self, name: str, shard: int, local: NDArray[np.int64]) -> NDArray[Any]:
        if name in ("sequence", "position"):
            return self.plan_object(f"row_{name}", shard)[local]
        sequence = self.plan_object("row_sequence", shard)[local].astype(np.int64)
        position = self.plan_object("row_position", shard)[local]
        values = self.plan_object({"token": "tokens"}.get(name, name), shard)
        return values[sequence - self._catalog.grid.sequences_of(shard).start, position]

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """Row within the shard of each of its tokens [q, t]; -1 for padding."""
        grid = self._catalog.grid
        sequence, position = (self.plan_object(f"row_{n}", shard) for n in ("sequence", "position"))
        sequences = grid.sequences_of(shard)
        stored = int(self._catalog.shards.stored[shard])
        rows = np.full((len(sequences), grid.seq_len), -1, np.int64)
        rows[sequence[:stored].astype(np.int64) - sequences.start, position[:stored]] = np.arange(stored)
        return rows
