"""Windows decoded once and handed out to whoever asks: several trainers, and all ranks of each.

A window is known by its order (the data and the selection, whatever the batch size), epoch and number. Together windows
stay within a bound on memory. When there is no room for another one, those that no live client (`Followers`) still needs
go, the longest unused first; where all are needed, whoever is ahead waits. So clients of one order have every window decoded
once for all of them, as long as memory holds what lies between the first and the last.

A client holds the window it is at and those after it that are there without a gap, nothing beyond: somebody who begins
anew, or fell behind for good, stops nobody. Nor can clients wait for each other for ever: if all memory is held, then by one
whose window is there, so it goes on, or stalls and is soon not counted any more. It loses its place here and nothing
else.

A client on the same machine reads windows where they are (see near.py). One that it was told of is kept for it (`keep`)
until it has read, or for some seconds; after that it will notice that it was too slow, and ask for messages.
"""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
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
from actcache.reader.selection import Delivery, Selection, parse_shards
from actcache.reader.window import Fill
from actcache.service.followers import IDLE_S, Followers, Key
from actcache.service.near import Shareable
from actcache.service.shelf import Served
from actcache.service.wire import schema_of, selection_json
from actcache.store.open import CaptureCatalog
from actcache.store.schema import digest_of

_POLL_S = 0.02
_MOST_ORDERS = 12
"""That nobody reads, kept for whoever comes back. Each has some 150 files open at most, more together than the 1,024 that a
process may have by default: `actcache serve` asks for more."""
_LAYOUT_BYTES_PER_ROW = 34
"""What is kept of a window beside its rows: layer, row, own_before, partition, and the work list."""


class Order:
    """One order of one store, as many clients as like may read in it.

    key  digest of the data and the selection.    n_bytes  of a window in memory.    row_bytes  of a row of all hooks.
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
        self.row_bytes = sum(shape.width * shape.dtype.itemsize for shape in self.filling.shapes)
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

    def following(self, epoch: int, window: int) -> tuple[int, int]:
        """Epoch and number of the next window."""
        return (epoch, window + 1) if self.has(epoch, window + 1) else (epoch + 1, 0)


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
    """A window in memory. Whole once `layout` is there.

    following  the key of the window after it.    checksums  of messages made of it, by rank, world size, first row and rows.
    memory     per hook, what rows are in.    kept  until when, for clients that read it there.
    """

    key: Key
    following: Key
    fill: Fill
    memory: list[Shareable]
    rows: list[NDArray[Any]]
    n_bytes: int
    layout: Layout | None = None
    n_users: int = 0
    kept: dict[Hashable, float] = field(default_factory=dict)
    own: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict)
    checksums: dict[tuple[int, int, int, int], int] = field(default_factory=dict)

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
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._followers = Followers(clock)
        self._waiting: list[
            Key
        ] = []  # for room, in this order: else small windows would always get in before large ones
        self._changed = threading.Condition()
        self._free: list[Shareable] = []
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
        self,
        order: Order,
        epoch: int,
        window: int,
        client: Hashable,
        is_over: Callable[[], bool],
        seconds: float,
    ) -> Iterator[Entry | None]:
        """A whole window, which stays while this block runs; decoded first, where it is not there.

        is_over  whether the caller has gone: then waiting ends.    seconds  None after so long: it is not there yet.
        """
        until = self._clock() + seconds
        entry = self._take(order, (order.key, epoch, window), client, is_over, until)
        if entry is None:
            yield None
            return
        try:
            yield entry if self._wait(entry, is_over, until) else None
        finally:
            with self._changed:
                entry.n_users -= 1
                self._followers.lives(client)
                self._changed.notify_all()

    @contextmanager
    def call(self, client: str | None) -> Iterator[Hashable]:
        """A call of a client, known by the result. For one that breaks off nothing is kept until it asks again.

        client  None, where it does not say: then it is another one with each call.
        """
        known = client or object()
        try:
            yield known
        except BaseException:
            with self._changed:
                self._followers.leaves(known)
                self._changed.notify_all()
            raise

    def had(self, client: Hashable, entry: Entry, part: int, parts: int) -> None:
        """A part of a window was handed out to a client to the end."""
        with self._changed:
            self._followers.had(client, entry.key, part, parts, entry.following)

    def keep(self, client: Hashable, entry: Entry) -> float:
        """A client is told where a window is: it stays for some seconds, or until `done_with`. Says until when."""
        with self._changed:
            entry.kept[client] = self._clock() + IDLE_S
            return entry.kept[client]

    def wait(self, until: float, is_over: Callable[[], bool]) -> None:
        """Until then, or until the caller has gone."""
        with self._changed:
            while not (self._is_closed or is_over()) and self._clock() < until:
                self._changed.wait(_POLL_S)

    def done_with(self, client: Hashable, entry: Entry) -> None:
        """It has read the window, or will not."""
        with self._changed:
            entry.kept.pop(client, None)
            self._changed.notify_all()

    def prepare(self, order: Order, epoch: int, window: int) -> None:
        """Begin to decode a window that will be asked for soon, if there is room and all of it is committed."""
        key = (order.key, epoch, window)
        if key in self._entries or not order.is_ready(epoch, window):
            return
        with self._changed:  # nobody waits who needs the room now
            if key not in self._entries and not self._waiting and self._make_room(order):
                self._begin(order, key)

    def _take(
        self, order: Order, key: Key, client: Hashable, is_over: Callable[[], bool], until: float
    ) -> Entry | None:
        began = self._clock()
        with self._changed:
            self._followers.asks(client, key)
            is_there = key in self._entries or self._wait_for_room(order, key, is_over, until)
            self.tally.waited_s += self._clock() - began
            if not is_there:
                return None
            if key in self._entries:
                self.tally.reused += 1
            else:
                self._begin(order, key)
            entry = self._entries[key]
            self._entries.move_to_end(key)
            entry.n_users += 1
            return entry

    def _wait_for_room(self, order: Order, key: Key, is_over: Callable[[], bool], until: float) -> bool:
        """Until there is room for a window, or somebody else began it; False when neither came in time."""
        try:
            while key not in self._entries:
                self._check_goes_on(is_over)
                if key not in self._waiting:
                    self._waiting.append(key)
                if self._waiting[0] == key and self._make_room(order):
                    return True
                if self._clock() > until:
                    return False
                self._changed.wait(_POLL_S)
            return True
        finally:
            if key in self._waiting:  # those that wait for the same one put it back
                self._waiting.remove(key)

    def _check_goes_on(self, is_over: Callable[[], bool]) -> None:
        if self._is_closed or is_over():
            raise UnreachableError("the service is stopping" if self._is_closed else "the client has gone")

    def _wait(self, entry: Entry, is_over: Callable[[], bool], until: float) -> bool:
        while not entry.fill.is_done_within(_POLL_S):
            if self._clock() > until:
                return False
            self._check_goes_on(is_over)
        if entry.layout is None:
            try:
                entry.layout = entry.fill.wait()
            except BaseException:
                with self._changed:  # whoever asks next tries again, with what is on disk by then
                    self._entries.pop(entry.key, None)
                    self._orders.pop(entry.key[0], None)
                raise
        return True

    def _begin(self, order: Order, key: Key) -> None:
        order.filling.forget_before(*key[1:])
        shapes = order.filling.shapes
        memory = [self._memory(shape.n_bytes) for shape in shapes]
        rows = [
            found.bytes.view(shape.dtype).reshape(shape[:2])
            for found, shape in zip(memory, shapes, strict=True)
        ]
        fill = order.filling.fill(HostWindow(rows, 0), key[1], key[2])
        following = (key[0], *order.following(*key[1:]))
        self._entries[key] = Entry(key, following, fill, memory, rows, order.n_bytes)
        self.tally.decoded += 1

    def _memory(self, n_bytes: int) -> Shareable:
        fitting = next((found for found in self._free if found.nbytes == n_bytes), None)
        if fitting is None:
            return Shareable(n_bytes)
        self._free.remove(fitting)
        fitting.use_again()
        return fitting

    def _make_room(self, order: Order) -> bool:
        """Throw out what may go, the longest unused first, until a window fits; memory of the right size is kept."""
        n_bytes, needed, now = order.n_bytes, self._needed(), self._clock()
        for key, entry in list(self._entries.items()):
            if self._used() + n_bytes <= self.limit_bytes:
                break
            is_kept = any(until > now for until in entry.kept.values())
            if entry.n_users or is_kept or not entry.fill.is_done or key in needed:
                continue
            del self._entries[key]
            self._free += entry.memory
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

    def _needed(self) -> set[Key]:
        """Windows that clients are at, and those after them that are there without a gap."""
        needed: set[Key] = set()
        for key in self._followers.places():
            while key in self._entries and key not in needed:
                needed.add(key)
                key = self._entries[key].following
        return needed

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
