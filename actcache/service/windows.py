"""Windows decoded once and handed out to whoever asks: several trainers, and all ranks of each.

A window is known by its order (the data and the selection, whatever the batch size), epoch and number. Together windows
stay within a bound on memory. One may go once it was handed out, no call is reading it and nobody has touched it for a
moment, or nobody has for longer: a client that stalls loses its place here and nothing else, for what it is sent is a copy.
"""

import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.errors import MemoryBoundError, UnreachableError, UsageError
from actcache.reader.buffers import HostWindow
from actcache.reader.filling import Filling
from actcache.reader.follow import Follower
from actcache.reader.layout import Layout
from actcache.reader.scatter import aligned_empty
from actcache.reader.selection import Delivery, Selection, parse_shards
from actcache.reader.window import Fill
from actcache.service.shelf import Served
from actcache.service.wire import schema_of, selection_json
from actcache.store.open import CaptureCatalog
from actcache.store.schema import digest_of

_SERVED_IDLE_S = 0.2
_IDLE_S = 5.0
"""Shorter, and clients that are merely slow would have windows decoded again for every message."""
_POLL_S = 0.02
_MOST_ORDERS = 12
"""Each keeps up to 64 files open: together they stay below the 1,024 that a process usually may have."""
_LAYOUT_BYTES_PER_ROW = 34
"""What is kept of a window beside its rows: layer, row, own_before, partition, and the work list."""


class Order:
    """One order of one store, as many clients as like may read in it.

    key  digest of the data and the selection.    n_bytes  of a window in memory.
    """

    def __init__(self, served: Served, selection: Selection, threads: int) -> None:
        # Its own view of what is committed: what one order lets go of, or found damaged, is not another's business.
        self.captures = [CaptureCatalog(c.objects, c.plan, c.capture) for c in _captures(served, selection)]
        self.selection = replace(selection, batch_size=1, drop_last=False)
        self.key = order_key(served, selection)
        shards = _shards(served, selection)
        kept = served.catalog.shards.kept
        delivery = Delivery(epochs=None, threads=threads)
        self.filling = Filling(
            self.captures,
            served.provenance,
            self.selection,
            delivery,
            kept=kept,
            shards=np.array(shards, np.int64),
        )
        self.n_bytes = sum(shape.n_bytes for shape in self.filling.shapes)
        self.n_bytes += self.filling.shapes[0].n_rows * _LAYOUT_BYTES_PER_ROW
        self.schema: pa.Schema = schema_of(
            [
                (name, shape.width * shape.dtype.itemsize, found.capture.dtype)
                for name, shape, found in zip(
                    selection.hooks, self.filling.shapes, self.captures, strict=True
                )
            ]
        )
        self._follower = Follower(self.captures) if selection.order == "commit" else None

    def is_ready(self, epoch: int, window: int) -> bool:
        """Whether all that a window draws from is committed."""
        if not self.has(epoch, window):
            return False
        return self._follower is None or self._follower.are_there(self.filling.shards_of(epoch, window))

    def has(self, epoch: int, window: int) -> bool:
        """Whether there is such a window."""
        return 0 <= window < self.filling.order(epoch).n_windows


def order_key(served: Served, selection: Selection) -> str:
    """What two requests have in common when the same windows serve both: how they are cut into batches is not in it."""
    chosen = selection_json(replace(selection, batch_size=1, drop_last=False))
    captures = [found.capture.digest for found in _captures(served, selection)]
    return digest_of([served.name, served.catalog.plan.digest, captures, chosen])


def _captures(served: Served, selection: Selection) -> list[CaptureCatalog]:
    captures = [served.catalog.capture(name) for name in selection.hooks]
    if not captures or len(set(selection.hooks)) != len(captures) or not selection.layers:
        raise UsageError("a selection needs distinct hooks, and layers")
    for found in captures:
        for layer in selection.layers:
            found.layer_index(layer)
    for name in ("window_rows", "partitions", "run_chunks", "batch_size"):
        if not 1 <= getattr(selection, name) <= 1 << 40:
            raise UsageError(f"{name}={getattr(selection, name)}: expected at least 1")
    limits = selection.rules.norm_limits
    if limits is not None and len(limits) != len(selection.layers):
        raise UsageError(f"norm_limits: {len(limits)} for {len(selection.layers)} layers")
    if selection.partitions > 4096 or (selection.order == "commit") != (selection.commit_shards >= 1):
        raise UsageError("the selection's partitions or commit_shards cannot be used")
    return captures


def _shards(served: Served, selection: Selection) -> list[int]:
    grid = served.catalog.grid
    if selection.split not in ("train", "holdout"):
        raise UsageError(f"split={selection.split!r}: expected train or holdout")
    held = grid.n_holdout_shards
    split = range(held) if selection.split == "holdout" else range(held, grid.n_shards)
    numbers = [] if selection.shards is None else re.findall(r"\d+", selection.shards)
    if any(len(n) > 9 or int(n) >= grid.n_shards for n in numbers):  # before anything is made of them
        raise UsageError(f"shards {str(selection.shards)[:100]!r}: there are {grid.n_shards}")
    chosen = list(split) if selection.shards is None else parse_shards(selection.shards)
    if not set(chosen) <= set(split):
        raise UsageError(f"shards {selection.shards!r} are not all in the {selection.split} split")
    return chosen


@dataclass(slots=True)
class Entry:
    """A window in memory. Whole once `layout` is there."""

    key: tuple[str, int, int]
    fill: Fill
    rows: list[NDArray[Any]]
    n_bytes: int
    touched: float
    layout: Layout | None = None
    n_users: int = 0
    was_served: bool = False
    own: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict)

    def own_slots(self, rank: int, world_size: int) -> NDArray[np.int64]:
        """Slots of the window that belong to a rank, ascending."""
        assert self.layout is not None
        key = (rank, world_size)
        if key not in self.own:
            self.own[key] = np.flatnonzero(self.layout.partition % world_size == rank)
        return self.own[key]


@dataclass(slots=True)
class Tally:
    """What the cache did: windows decoded, asked for when they were there, thrown out; seconds waited for room."""

    decoded: int = 0
    reused: int = 0
    evicted: int = 0
    waited_s: float = 0.0


class WindowCache:
    """Decoded windows of any orders, within `limit_bytes`.

    threads  that decode, per order.
    """

    def __init__(self, limit_bytes: int, threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_bytes, self.tally = limit_bytes, Tally()
        self._threads, self._clock = threads, clock
        self._orders: OrderedDict[str, Order] = OrderedDict()
        self._entries: OrderedDict[tuple[str, int, int], Entry] = OrderedDict()
        self._calls = Counter[tuple[str, int, int]]()
        self._changed = threading.Condition()
        self._free: list[NDArray[np.uint8]] = []
        self._is_closed = False

    @property
    def used_bytes(self) -> int:
        """Of windows, and of memory kept for the next ones."""
        with self._changed:
            return self._used() + sum(buffer.nbytes for buffer in self._free)

    def _used(self) -> int:
        return sum(entry.n_bytes for entry in self._entries.values())

    @property
    def n_windows(self) -> int:
        """In memory now."""
        return len(self._entries)

    def order(self, served: Served, selection: Selection) -> Order:
        """The order of a selection: the one that is known, or a new one.

        Raises:
            MemoryBoundError: two of its windows do not fit the bound.
        """
        key = order_key(served, selection)
        with self._changed:
            if key not in self._orders:
                made = Order(served, selection, self._threads)
                if 2 * made.n_bytes > self.limit_bytes:
                    raise MemoryBoundError(
                        f"two windows of this stream take {2 * made.n_bytes:,} bytes; the service has {self.limit_bytes:,} for "
                        f"windows. Ask for a smaller window_rows= (another order, less mixed), or serve with a larger --memory."
                    )
                self._orders[key] = made
            self._orders.move_to_end(key)
            busy = {entry.key[0] for entry in self._entries.values()}
            for old in [k for k in self._orders if k not in busy and k != key][
                : max(0, len(self._orders) - _MOST_ORDERS)
            ]:
                self._orders.pop(old).filling.close()
            return self._orders[key]

    @contextmanager
    def use(
        self, order: Order, epoch: int, window: int, is_over: Callable[[], bool], seconds: float
    ) -> Iterator[Entry | None]:
        """A whole window, which stays while this block runs; decoded first, where it is not there.

        is_over  whether the caller has gone: then waiting ends.    seconds  None after so long: it is not there yet.
        """
        until = self._clock() + seconds
        entry = self._take(order, epoch, window, is_over, until)
        if entry is None:
            yield None
            return
        try:
            yield entry if self._wait(entry, is_over, until) else None
        finally:
            with self._changed:
                entry.n_users -= 1
                entry.touched = self._clock()
                self._changed.notify_all()

    @contextmanager
    def call(self, order: Order, epoch: int, window: int) -> Iterator[None]:
        """A call that hands out a window, message by message: it is kept a while longer when the client is slow."""
        key = (order.key, epoch, window)
        with self._changed:
            self._calls[key] += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls[key] -= 1
                if not self._calls[key]:
                    del self._calls[key]

    def served(self, entry: Entry) -> None:
        """All that somebody wanted of a window was handed out."""
        entry.was_served = True

    def prepare(self, order: Order, epoch: int, window: int) -> None:
        """Begin to decode a window that will be asked for soon, if there is room and all of it is committed."""
        key = (order.key, epoch, window)
        if key in self._entries or not order.is_ready(epoch, window):
            return
        with self._changed:
            if key not in self._entries and self._make_room(order):
                self._begin(order, key)

    def _take(
        self, order: Order, epoch: int, window: int, is_over: Callable[[], bool], until: float
    ) -> Entry | None:
        key, began = (order.key, epoch, window), self._clock()
        with self._changed:
            while key not in self._entries:
                if self._is_closed or is_over():
                    raise UnreachableError(
                        "the service is stopping" if self._is_closed else "the client has gone"
                    )
                if self._make_room(order):
                    self._begin(order, key)
                    break
                if self._clock() > until:
                    self.tally.waited_s += self._clock() - began
                    return None
                self._changed.wait(_POLL_S)
            else:
                self.tally.reused += 1
            self.tally.waited_s += self._clock() - began
            entry = self._entries[key]
            self._entries.move_to_end(key)
            entry.n_users += 1
            entry.touched = self._clock()
            return entry

    def _wait(self, entry: Entry, is_over: Callable[[], bool], until: float) -> bool:
        while not entry.fill.is_done_within(_POLL_S):
            if self._clock() > until:
                return False
            if self._is_closed or is_over():
                raise UnreachableError(
                    "the service is stopping" if self._is_closed else "the client has gone"
                )
        if entry.layout is None:
            try:
                entry.layout = entry.fill.wait()
            except BaseException:
                with self._changed:  # whoever asks next tries again, with what is on disk by then
                    self._entries.pop(entry.key, None)
                    self._orders.pop(entry.key[0], None)
                raise
        return True

    def _begin(self, order: Order, key: tuple[str, int, int]) -> None:
        order.filling.forget_before(*key[1:])
        rows = [self._buffer(shape.n_rows, shape.width, shape.dtype) for shape in order.filling.shapes]
        fill = order.filling.fill(HostWindow(rows, 0), key[1], key[2])
        self._entries[key] = Entry(key, fill, rows, order.n_bytes, self._clock())
        self.tally.decoded += 1

    def _buffer(self, n_rows: int, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        n_bytes = n_rows * width * dtype.itemsize
        fitting = next((b for b in self._free if b.nbytes == n_bytes), None)
        if fitting is None:
            fitting = aligned_empty((1, n_bytes), np.dtype(np.uint8))[0]
        else:
            self._free = [b for b in self._free if b is not fitting]
        return fitting.view(dtype).reshape(n_rows, width)

    def _make_room(self, order: Order) -> bool:
        """Throw out what may go, the longest untouched first, until a window fits; memory of the right size is kept."""
        moment, n_bytes = self._clock(), order.n_bytes
        for key, entry in list(self._entries.items()):
            if self._used() + n_bytes <= self.limit_bytes:
                break
            is_over = entry.was_served and key not in self._calls
            idle_s = moment - entry.touched
            if entry.n_users or not entry.fill.is_done or idle_s < (_SERVED_IDLE_S if is_over else _IDLE_S):
                continue
            del self._entries[key]
            self._free += [rows.reshape(-1).view(np.uint8) for rows in entry.rows]
            self.tally.evicted += 1
        if self._used() + n_bytes > self.limit_bytes:
            return False
        wanted = [shape.n_bytes for shape in order.filling.shapes]
        while self._free:
            reused = sum(
                min(wanted.count(n), [b.nbytes for b in self._free].count(n)) * n for n in set(wanted)
            )
            if self._used() + n_bytes + sum(b.nbytes for b in self._free) - reused <= self.limit_bytes:
                break
            other = next((i for i, b in enumerate(self._free) if b.nbytes not in wanted), 0)
            self._free.pop(other)
        return True

    def close(self) -> None:
        """Stop decoding; wake whoever waits."""
        with self._changed:
            self._is_closed = True
            orders, self._orders = list(self._orders.values()), OrderedDict()
            self._changed.notify_all()
        for order in orders:
            order.filling.close()
        with self._changed:
            self._entries.clear()
            self._free.clear()
