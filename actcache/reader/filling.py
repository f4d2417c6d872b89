"""Which window comes when, and getting it filled ahead of time: threads, buffers and orders behind a stream."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.loops.compiled import Told
from actcache.reader.buffers import Shape, Window
from actcache.reader.counters import Counters
from actcache.reader.device import Chunk
from actcache.reader.fetching import (
    AROUND_THREADS,
    AroundCache,
    Fetching,
    Requests,
    is_on_a_disk,
    machine_bytes,
    shut,
)
from actcache.reader.filters import RowFilter
from actcache.reader.follow import Follower
from actcache.reader.layout import Lane, Layout, Places, lay_out
from actcache.reader.order import (
    CommitOrder,
    GlobalOrder,
    arrange,
    groups_of,
    list_chunks,
    runs_of,
    steps_of,
)
from actcache.reader.placement import place
from actcache.reader.provenance import Provenance
from actcache.reader.selection import Delivery, Selection
from actcache.reader.window import Fill, Filled, WindowSource
from actcache.store.dtypes import disk_dtype
from actcache.store.local import LocalFiles
from actcache.store.open import CaptureCatalog
from actcache.store.shard import ShardReader

_CLOSE_S = 5.0
_OPEN_FILES = 128
"""More than chunks are asked for ahead: one that was opened to be asked for is still open when it is read."""
_CACHED_SHARE = 0.5
"""Of memory: rows that take more are read around the page cache, where not most of them are in it."""


class Filling:
    """Fills windows of a selection, one at a time or ahead.

    captures  one per hook.    kept  [shard] kept rows.    shards  those that are streamed, ascending.
    follower  waits for shards that are not committed yet; None: all are.
    shapes    of a window's buffers, one per hook.
    source    fills windows; None: threads of this process do, from what they read.
    """

    def __init__(
        self,
        captures: list[CaptureCatalog],
        provenance: Provenance,
        selection: Selection,
        delivery: Delivery,
        *,
        kept: NDArray[np.int64],
        shards: NDArray[np.int64],
        follower: Follower | None = None,
        source: WindowSource | None = None,
    ) -> None:
        self.counters, self._follower, self._source = Counters(), follower, source
        self._captures, self._selection, self._delivery = captures, selection, delivery
        self._grid = grid = captures[0].plan.grid
        self.chunks = list_chunks(shards, kept[shards], grid.rows_per_chunk)
        if len(self.chunks) == 0:
            raise UsageError(
                f"the {selection.split} split of {captures[0].objects.url} holds no kept rows"
                + ("; it was built with --holdout 0" if selection.split == "holdout" else "")
            )
        self._runs = runs_of(self.chunks, selection.run_chunks)
        self.lanes = _lanes(captures, selection)
        self.filter = self._make_filter(provenance, kept)
        self._is_mine = np.arange(selection.partitions) % delivery.world_size == delivery.rank
        self._orders: dict[int, GlobalOrder | CommitOrder] = {}
        width = max(c.capture.width for c in captures)
        itemsize = max(disk_dtype(c.capture.dtype).itemsize for c in captures)
        is_quantised = any(c.capture.codec == "uint8" for c in captures)
        chunk = Chunk(grid.rows_per_chunk, width, itemsize, is_quantised)
        self._chunk_bytes = chunk.n_bytes
        self.shapes = self._shapes()
        files = captures[0].files
        self._files = None if files is None else LocalFiles(files.root, _OPEN_FILES, is_random=True)
        self._fetching = self._make_fetching()
        fetched_bytes = 0 if self._fetching is None else self._fetching.room.limit
        self.windows, self.courier = place(self.shapes, chunk, delivery, fetched_bytes=fetched_bytes)
        self._fills: dict[tuple[int, int], Filled] = {}
        self._awaited: Filled | None = None
        self._ending = threading.RLock()  # another thread may close while the consumer waits
        self._taken = (0, -1)
        self._pool: ThreadPoolExecutor | None = None
        self._first_open = 0
        self._pid = os.getpid()

    def _make_fetching(self) -> Fetching | None:
        """What waits for bytes, if not the threads that decode."""
        n_threads, in_flight = self._delivery.io_threads, self._captures[0].objects.n_in_flight
        if in_flight:
            return Requests(n_threads or in_flight)
        if self._files is None or self._delivery.page_cache or not hasattr(os, "O_DIRECT"):
            return None
        if self._delivery.page_cache is None and not (self._is_large() and is_on_a_disk(self._files.root)):
            return None
        return AroundCache(self._files, self._chunk_bytes, n_threads or AROUND_THREADS)

    def _is_large(self) -> bool:
        """Whether the page cache could not keep the rows until they are read again."""
        row_bytes = sum(c.capture.width * disk_dtype(c.capture.dtype).itemsize for c in self._captures)
        n_rows = int(self.chunks.n_rows.sum()) * len(self._selection.layers)
        return n_rows * row_bytes > _CACHED_SHARE * machine_bytes()

    def _make_filter(self, provenance: Provenance, kept: NDArray[np.int64]) -> RowFilter | None:
        rules = self._selection.rules
        if rules.is_empty:
            return None
        layers = [np.array([lane.layer_index for lane in lanes if lane.buffer == 0]) for lanes in self.lanes]
        return RowFilter(self._captures[0], provenance.plan_object, kept, rules, layers)

    def _shapes(self) -> list[Shape]:
        """Of the buffers, one per hook: the largest window, with room for a batch in front."""
        chosen = self._selection
        n_rows = self.order(0).most_runs * chosen.run_chunks * len(self.lanes) * self._grid.rows_per_chunk
        n_layers = 1 if chosen.stack == "data" else len(chosen.layers)
        return [
            Shape(chosen.batch_size + n_rows, found.capture.width * n_layers, disk_dtype(found.capture.dtype))
            for found in self._captures
        ]

    @property
    def n_chunk_rows(self) -> int:
        """Rows of one epoch before filters."""
        return int(self.chunks.n_rows.sum()) * len(self.lanes)

    def order(self, epoch: int) -> GlobalOrder | CommitOrder:
        """The order of one epoch."""
        if epoch not in self._orders:
            made = self._make_order(epoch)
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1} | {epoch: made}
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> GlobalOrder | CommitOrder:
        chosen, r, n_lanes = self._selection, self._grid.rows_per_chunk, len(self.lanes)
        if chosen.order == "global":
            return GlobalOrder(
                seed=chosen.seed,
                epoch=epoch,
                runs=self._runs,
                n_layers=n_lanes,
                groups=groups_of(chosen.window_rows, n_lanes, r * chosen.run_chunks, len(self._runs)),
                partitions=chosen.partitions,
            )
        most_chunks = int(np.bincount(self.chunks.shard).max())
        return CommitOrder(
            seed=chosen.seed,
            epoch=epoch,
            chunks=self.chunks,
            runs=self._runs,
            n_layers=n_lanes,
            depth=chosen.commit_shards,
            steps=steps_of(chosen.window_rows, n_lanes, r, most_chunks),
            partitions=chosen.partitions,
        )

    def rows_of(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Global row numbers of a window's rows, once per layer, before filters, in no order."""
        listed = self.order(epoch).members(window).listed
        counts = self.chunks.n_rows[listed]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(self._first_row(listed), counts) + within

    def rows_before_filters(self, epoch: int, window: int) -> int:
        """Rows of a window, over all layers, before filters."""
        return int(self.chunks.n_rows[self.order(epoch).members(window).listed].sum())

    def _first_row(self, listed: NDArray[np.int64]) -> NDArray[np.int64]:
        shard, chunk = self.chunks.shard[listed], self.chunks.chunk[listed]
        return shard * self._grid.rows_per_shard + chunk * self._grid.rows_per_chunk

    # Filling.

    def is_done(self, epoch: int, window: int) -> bool:
        """Whether `wait` would not have to wait. Begins to fill the window where that is possible now."""
        return self._can_begin(epoch, window) and self.get(epoch, window).is_done

    def _can_begin(self, epoch: int, window: int) -> bool:
        return self._follower is None or self._follower.are_there(self.shards_of(epoch, window))

    def shards_of(self, epoch: int, window: int) -> list[int]:
        """The shards a window draws from, ascending."""
        order = self.order(epoch)
        found = order.shards_of(window) if isinstance(order, CommitOrder) else np.unique(self.chunks.shard)
        return found.tolist()

    def first_shard(self, epoch: int, window: int) -> int:
        """The lowest shard that this window and those after it draw from; past the last where there is none."""
        order = self.order(epoch)
        if window >= order.n_windows:
            return int(self.chunks.shard[-1]) + 1
        return self.shards_of(epoch, window)[0]

    def forget_before(self, epoch: int, window: int) -> None:
        """What is known of shards that the `commit` order has left behind is let go of: a plan may have any number."""
        if isinstance(self.order(epoch), CommitOrder):
            first = self.first_shard(epoch, window)
            for found in self._captures:
                found.forget_before(first)
            if self._files is not None and first > self._first_open:
                self._files.close()  # a file that is deleted takes disk until it is closed; those needed open again
                self._first_open = first
            if self.filter is not None:
                self.filter.forget_before(first)

    def get(self, epoch: int, window: int) -> Filled:
        """The fill of a window: the one begun ahead, or one begun now, in whatever memory it takes."""
        self._check_process()
        if (epoch, window) not in self._fills:
            if self._follower is not None:
                self._follower.wait_for(self.shards_of(epoch, window))
            if self.courier is not None and not self.windows.has_room:
                self.courier.settle(wait=True)  # copies under way keep memory that is free otherwise
                self.windows.wait_for_room()
            self._fills[epoch, window] = self._begin(epoch, window)
        return self._fills[epoch, window]

    def wait(self, epoch: int, window: int) -> tuple[Filled, Layout]:
        """The window, whole; forgotten here, so that whoever holds its tensors decides how long they live."""
        started = perf_counter()
        self.forget_before(epoch, window)
        try:
            self._awaited = fill = self.get(epoch, window)
            del self._fills[epoch, window]
            self._taken = (epoch, window)
            if not fill.is_done:  # the disk has work until the last chunk has landed, and beyond
                fill.wait_until_begun()
                with self._ending:
                    if fill.error is None:  # else nobody wants it any more
                        self.read_ahead(epoch, window)
            return fill, fill.wait()
        except BaseException:
            self.forget()  # what else was begun may have failed of the same: whoever iterates again tries it again
            raise
        finally:
            self._awaited = None
            self.counters.add(waited_s=perf_counter() - started)

    def read_ahead(self, epoch: int, window: int) -> None:
        """Begin the window after this one where there is room; raise what went wrong in one already begun.

        Batches on their way to a device may be of a window further on than the one handed out: then the one after that.
        """
        self._check_process()
        if self.courier is not None:
            self.courier.settle()
        for fill in list(self._fills.values()):
            if fill.error is not None:
                self.forget()
                raise fill.error
        epoch, window = max((epoch, window), self._taken)
        following = (epoch, window + 1) if window + 1 < self.order(epoch).n_windows else (epoch + 1, 0)
        if following in self._fills or following[0] == self._delivery.epochs:
            return
        if self.windows.has_room and self._can_begin(*following):
            self._fills[following] = self._begin(*following)

    def _begin(self, epoch: int, window: int) -> Filled:
        into = self.windows.take(self._selection.batch_size)
        if self._source is not None:
            return self._source.begin(into, epoch, window, self.counters)
        return self.fill(into, epoch, window)

    def fill(self, into: Window, epoch: int, window: int) -> Fill:
        """Begin to fill a window in memory of the caller's choice."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._delivery.threads, thread_name_prefix="actcache-stream")
            self._fetching = self._fetching or self._make_fetching()
        return Fill(
            into,
            lambda: self._lay_out(epoch, window),
            self._pool,
            self.counters,
            chunk_bytes=self._chunk_bytes,
            files=self._files,
            fetching=self._fetching,
            name=f"window {window} of epoch {epoch}",
        )

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                "this stream was opened in another process: its threads did not survive the fork. Open the store in "
                "the process that reads it (a DataLoader needs num_workers=0, or a 'spawn' context)."
            )

    def _lay_out(self, epoch: int, window: int) -> Layout:
        """What goes where in a window. Runs on a thread of the pool."""
        order, chunks, r = self.order(epoch), self.chunks, self._grid.rows_per_chunk
        members = order.members(window)
        shard, chunk, counts = (of[members.listed] for of in chunks)
        selected = None
        if self.filter is not None:
            selected = [
                np.flatnonzero(self.filter.passing(s, lane)[c * r : c * r + n])
                for s, c, n, lane in zip(
                    *(x.tolist() for x in (shard, chunk, counts, members.layer_i)), strict=True
                )
            ]
            counts = np.array([len(rows) for rows in selected], dtype=np.int64)
        layer, first_row = (
            np.array(self._selection.layers, np.int16)[members.layer_i],
            self._first_row(members.listed),
        )
        tell = Told(first_row, layer) if selected is None and self._is_mine.all() else None
        arrangement = arrange(
            order.key_of(window), counts, members.partition, self._selection.partitions, tell
        )
        return lay_out(
            members,
            arrangement,
            counts,
            selected,
            places=Places(shard, chunk, layer, first_row),
            lanes=self.lanes,
            readers=self._reader,
            is_mine=self._is_mine,
        )

    def _reader(self, buffer: int, shard: int) -> ShardReader:
        return self._captures[buffer].reader(shard)

    # The end.

    def forget(self) -> None:
        """Let go of what was begun ahead; wake a consumer that waits in another thread."""
        with self._ending:
            for fill in [*self._fills.values(), *([self._awaited] if self._awaited else [])]:
                fill.cancel("the stream was closed, or moved, while its consumer was waiting for a window")
            self._fills.clear()
            self._taken = (0, -1)

    def close(self) -> None:
        """Stop at once; let go of threads, buffers and files. One that is stuck in a read ends when the read does."""
        self.forget()
        if self._follower is not None:
            self._follower.close()
        if self._source is not None:
            self._source.close()
        if self._fetching is not None:
            self._fetching.close(_CLOSE_S)
            self._fetching = None
        if self._pool is not None:
            shut(self._pool, _CLOSE_S)
            self._pool = None
        if self._files is not None:
            self._files.close()


def _lanes(captures: list[CaptureCatalog], selection: Selection) -> list[list[Lane]]:
    """What each lane of the order reads: one layer of every hook, or, where layers are stacked, all of them."""
    per_layer = [
        [
            Lane(
                buffer, found.layer_index(layer), 0 if selection.stack == "data" else i * found.capture.width
            )
            for buffer, found in enumerate(captures)
        ]
        for i, layer in enumerate(selection.layers)
    ]
    return per_layer if selection.stack == "data" else [[lane for lanes in per_layer for lane in lanes]]
