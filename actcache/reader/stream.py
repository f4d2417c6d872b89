"""Shuffled batches from a store: windows filled ahead by threads, handed out as slices, with an exact cursor."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import CursorError, MemoryBoundError, UsageError
from actcache.flow import Batch
from actcache.reader.counters import Counters
from actcache.reader.filters import RowFilter
from actcache.reader.order import CommitOrder, GlobalOrder, arrange, groups_of, list_chunks, steps_of
from actcache.reader.provenance import Provenance
from actcache.reader.quality import Expected, Quality, QualityMeter, expected
from actcache.reader.selection import Delivery, Selection
from actcache.reader.window import BufferPool, Fetching, Fill, Lane, Layout, Room, lay_out
from actcache.store.open import CaptureCatalog
from actcache.store.schema import digest_of
from actcache.store.shard import ShardReader

if TYPE_CHECKING:
    from actcache.reader.dataset import StreamDataset

CURSOR_VERSION = 1
_MAX_BUFFERS = 3
_MIN_BUFFERS = 2
_FETCHED_BYTES = 64 << 20
_ORDER_BYTES_PER_ROW = 160
"""Of a window: while it is laid out, and what is kept of two."""
_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Cursor(NamedTuple):
    """Where the next batch begins: slot `slot` of window `window` of epoch `epoch`."""

    epoch: int
    window: int
    slot: int


class _Part(NamedTuple):
    """Rows in slot order, ready to be cut into batches.

    rows  per hook, [n, columns].   layer, row  [n], the model layer and global row number of each.
    own_before  [s + 1], how many of this rank's rows come before each slot of all ranks.
    """

    rows: list[Tensor]
    layer: NDArray[np.int64]
    row: NDArray[np.int64]
    own_before: NDArray[np.int64]

    @property
    def n_slots(self) -> int:
        """Slots over all ranks."""
        return len(self.own_before) - 1

    def cut(self, start: int, stop: int) -> "_Part":
        """Slots [start, stop)."""
        a, z = int(self.own_before[start]), int(self.own_before[stop])
        return _Part(
            [rows[a:z] for rows in self.rows],
            self.layer[a:z],
            self.row[a:z],
            self.own_before[start : stop + 1] - a,
        )


class Stream:
    """Batches of shuffled rows; a `BatchSource`. Close it, or use it in a `with` block. Made by `Store.stream`.

    The rows, their order and the batches are a function of the store and the selection alone: threads, memory, read-
    ahead, ranks and restarts change nothing. Iterating again goes on from the cursor.

    captures  one per hook of the selection.    kept  [shard] kept rows.
    """

    def __init__(
        self,
        captures: list[CaptureCatalog],
        provenance: Provenance,
        selection: Selection,
        delivery: Delivery,
        kept: NDArray[np.int64],
    ) -> None:
        self.selection, self.delivery, self.counters = selection, delivery, Counters()
        self._captures, self._provenance, self._kept = captures, provenance, kept
        self._grid = grid = captures[0].plan.grid
        holdout = selection.split == "holdout"
        first, stop = (0, grid.n_holdout_shards) if holdout else (grid.n_holdout_shards, grid.n_shards)
        self._chunks = list_chunks(np.arange(first, stop), kept[first:stop], grid.rows_per_chunk)
        if len(self._chunks) == 0:
            raise UsageError(
                f"the {selection.split} split of {captures[0].objects.url} holds no kept rows"
                + ("; it was built with --holdout 0" if holdout else "")
            )
        self._lanes = _lanes(captures, selection)
        self._filter = self._make_filter()
        self._is_mine = np.arange(selection.partitions) % delivery.world_size == delivery.rank
        n_lanes = len(self._lanes)
        most_chunks = int(np.bincount(self._chunks.shard).max())
        self._groups = groups_of(selection.window_rows, n_lanes, grid.rows_per_chunk, len(self._chunks))
        self._steps = steps_of(selection.window_rows, n_lanes, grid.rows_per_chunk, most_chunks)
        self._orders: dict[int, GlobalOrder | CommitOrder] = {}
        in_flight = captures[0].objects.n_in_flight
        self._io_threads = (delivery.io_threads or in_flight) if in_flight else 0
        self._buffers = self._make_buffers(most_chunks)
        self._max_buffers = self._affordable_buffers()
        self._cursor = Cursor(0, 0, 0)
        self._fills: dict[tuple[int, int], Fill] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._fetching: Fetching | None = None
        self._pid = os.getpid()

    def _make_filter(self) -> RowFilter | None:
        rules = self.selection.rules
        if rules.is_empty:
            return None
        layers = [np.array([lane.layer_index for lane in lanes if lane.buffer == 0]) for lanes in self._lanes]
        return RowFilter(self._captures[0], self._provenance.plan_object, self._kept, rules, layers)

    def _make_buffers(self, most_chunks: int) -> list[BufferPool]:
        """A pool per hook, of buffers that hold the largest window with room for a batch in front."""
        if self.selection.order == "global":
            n_chunks = self._groups
        else:
            per_step = -(-most_chunks // (self.selection.commit_shards * self._steps))
            n_chunks = per_step * self.selection.commit_shards
        n_rows = self.selection.batch_size + n_chunks * len(self._lanes) * self._grid.rows_per_chunk
        n_layers = 1 if self.selection.stack == "data" else len(self.layers)
        pools = []
        for found in self._captures:
            dtype = found.arrays["rows"].dtype
            assert dtype is not None
            pools.append(BufferPool(n_rows, found.capture.width * n_layers, dtype))
        return pools

    def _affordable_buffers(self) -> int:
        """How many window buffers the memory bound allows; MemoryBoundError states the least that would do."""
        bound = self.delivery.memory_bytes
        if bound is None:
            return _MAX_BUFFERS
        window_bytes = sum(pool.buffer_bytes for pool in self._buffers)
        besides = self.delivery.threads * self._grid.rows_per_chunk * self.width * 8
        besides += self._buffers[0].n_rows * _ORDER_BYTES_PER_ROW
        besides += _FETCHED_BYTES if self._io_threads else 0
        n_buffers = (bound - besides) // window_bytes
        if n_buffers < _MIN_BUFFERS:
            least = _MIN_BUFFERS * window_bytes + besides
            raise MemoryBoundError(
                f"memory={bound:,} bytes is too little for windows of {self.selection.window_rows:,} rows: two windows "
                f"take {least:,} bytes. Give that much, or a smaller window_rows= (another order, less mixed)."
            )
        return int(min(n_buffers, _MAX_BUFFERS))

    # What a consumer may ask.

    @property
    def width(self) -> int:
        """Numbers in a row of the first hook: d, or l * d where layers are stacked as features."""
        width = self._captures[0].capture.width
        return width * len(self.layers) if self.selection.stack == "feature" else width

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layer numbers that occur."""
        return self.selection.layers

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the order depends on, by name."""
        plan = self._captures[0].plan.digest
        captures = digest_of([found.capture.digest for found in self._captures])
        return {"plan": plan, "captures": captures, **self.selection.as_json()}

    @property
    def fingerprint(self) -> str:
        """Digest of everything the order depends on, the data included."""
        return digest_of(self.settings)

    @property
    def n_rows(self) -> int:
        """Rows of one epoch over all ranks, after filters. With filters every shard's side arrays are read for it."""
        if self._filter is None:
            return int(self._chunks.n_rows.sum()) * len(self._lanes)
        return sum(
            int(self._filter.passing(int(shard), lane).sum())
            for shard in np.unique(self._chunks.shard)
            for lane in range(len(self._lanes))
        )

    @property
    def n_dropped(self) -> int:
        """Kept rows of one epoch that the filters leave out."""
        return int(self._chunks.n_rows.sum()) * len(self._lanes) - self.n_rows

    def __len__(self) -> int:
        """Batches in all epochs together; TypeError where they never end."""
        if self.delivery.epochs is None:
            raise TypeError("a stream with epochs=None never ends, so it has no length")
        whole, rest = divmod(self.n_rows, self.selection.batch_size)
        return self.delivery.epochs * (whole + (1 if rest and not self.selection.drop_last else 0))

    def as_dataset(self) -> "StreamDataset":
        """For code that insists on a DataLoader: `DataLoader(stream.as_dataset(), batch_size=None)`."""
        from actcache.reader.dataset import StreamDataset

        return StreamDataset(self)

    def waited_s(self) -> float:
        """Seconds the consumer has waited for windows so far."""
        return self.counters.waited_s

    def peek(self, n_rows: int) -> Batch:
        """The first `n_rows` rows of epoch 0 (fewer if there are fewer), copied. Moves no cursor."""
        batches: list[Batch] = []
        with self._copy() as fresh:
            for batch in fresh:
                batches.append(batch)
                if sum(len(b) for b in batches) >= n_rows:
                    break
        rows, sequence, position = (
            torch.cat([getattr(batch, name) for batch in batches])[:n_rows]
            for name in ("rows", "sequence", "position")
        )
        if self.selection.stack == "data":
            layer = torch.cat([batch.layer for batch in batches])[:n_rows]
        else:
            layer = batches[0].layer
        hooks = {name: torch.cat([b.hooks[name] for b in batches])[:n_rows] for name in batches[0].hooks}
        return Batch(rows, layer, sequence, position, hooks=hooks)

    def _copy(self) -> "Stream":
        return Stream(self._captures, self._provenance, self.selection, self.delivery, self._kept)

    def quality(self, n_batches: int = 64) -> Quality:
        """How well the next `n_batches` batches are shuffled. Reads them again for it; moves no cursor.

        Expectations count kept rows before filters by norm, position or token.
        """
        meter, windows = QualityMeter(self.n_rows), dict[tuple[int, int], None]()
        with self._copy() as copy:
            copy._cursor = self._cursor
            for batch in copy:
                windows[copy._cursor.epoch, copy._cursor.window] = None
                meter.update(batch)
                if meter.n_batches == n_batches:
                    break
        if not meter.n_batches:
            raise UsageError("the stream is at its end: no batch is left to measure; `set_epoch` goes back")
        n_windows = self._order(0).n_windows
        pairs = [self._expected(self._window_rows(e, w)) for e, w in windows if w < n_windows]
        everything = self._expected(np.concatenate([self._window_rows(0, w) for w in range(n_windows)]))
        return meter.result(pairs or [everything], everything)

    def _window_rows(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Global row numbers of a window's rows, once per layer, in no order."""
        members, chunks, r = self._order(epoch).members(window), self._chunks, self._grid.rows_per_chunk
        starts = chunks.shard[members.listed] * self._grid.rows_per_shard + chunks.chunk[members.listed] * r
        counts = chunks.n_rows[members.listed]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(starts, counts) + within

    def _expected(self, rows: NDArray[np.int64]) -> tuple[Expected, Expected]:
        """Expectations of a perfect shuffle of these rows, for sequences and for documents."""
        sequence, document = (
            expected(
                np.unique(self._provenance.look_up(name, rows), return_counts=True)[1],
                self.selection.batch_size,
            )
            for name in ("sequence", "document")
        )
        return sequence, document

    # The cursor.

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins: JSON, under 4 KiB. What was read ahead does not show in it."""
        return {"version": CURSOR_VERSION, "settings": self.settings, **self._cursor._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken. CursorError names every setting that differs."""
        if state.get("version") != CURSOR_VERSION:
            raise CursorError(
                f"cursor version {state.get('version')!r}; this actcache reads version {CURSOR_VERSION}"
            )
        if not {"settings", *Cursor._fields} <= set(state) or not isinstance(state["settings"], dict):
            raise CursorError(f"not a cursor: it has {sorted(state)}; expected what `state_dict` returned")
        here, there = self.settings, state["settings"]
        differ = [
            f"{name} is {there.get(name)!r} in the cursor and {here.get(name)!r} here"
            for name in sorted({*here, *there})
            if here.get(name) != there.get(name)
        ]
        if differ:
            raise CursorError(f"this cursor is of another stream: {'; '.join(differ)}")
        self._forget_ahead()
        self._cursor = Cursor(int(state["epoch"]), int(state["window"]), int(state["slot"]))

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`, counted from 0."""
        self._forget_ahead()
        self._cursor = Cursor(epoch, 0, 0)

    # Iteration.

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the cursor to the end of the last epoch."""
        while self.delivery.epochs is None or self._cursor.epoch < self.delivery.epochs:
            starts_whole, n_batches = self._cursor[1:] == (0, 0), 0
            for batch in self._rest_of_epoch():
                n_batches += 1
                yield batch
            if starts_whole and not n_batches and self.delivery.epochs is None:
                raise UsageError(
                    f"an epoch of {self.n_rows} rows holds no batch of {self.selection.batch_size}: an endless stream of "
                    f"it would never hand one out. Lower batch_size, loosen the filters, or drop_last=False"
                )

    def _order(self, epoch: int) -> GlobalOrder | CommitOrder:
        if epoch not in self._orders:
            chosen = self.selection
            if chosen.order == "global":
                made = GlobalOrder(
                    seed=chosen.seed,
                    epoch=epoch,
                    n_chunks=len(self._chunks),
                    n_layers=len(self._lanes),
                    groups=self._groups,
                    partitions=chosen.partitions,
                )
            else:
                made = CommitOrder(
                    seed=chosen.seed,
                    epoch=epoch,
                    chunks=self._chunks,
                    n_layers=len(self._lanes),
                    depth=chosen.commit_shards,
                    steps=self._steps,
                    partitions=chosen.partitions,
                )
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1} | {epoch: made}
        return self._orders[epoch]

    def _rest_of_epoch(self) -> Iterator[Batch]:
        """Batches from the cursor to the end of its epoch. A batch may span windows, never epochs."""
        (epoch, first_window, first_slot), size = self._cursor, self.selection.batch_size
        n_windows = self._order(epoch).n_windows
        carried: _Part | None = None
        for window in range(first_window, n_windows):
            skipped = first_slot if window == first_window else 0
            n_carried = 0 if carried is None else carried.n_slots
            part = self._part(epoch, window, skipped, carried)
            carried = None  # lets go of the window before
            takes_rest = window == n_windows - 1 and not self.selection.drop_last
            at = 0
            while part.n_slots - at >= size or (takes_rest and at < part.n_slots):
                end = min(at + size, part.n_slots)
                self._read_ahead(epoch, window)  # may raise: the cursor is still before this batch
                self._cursor = Cursor(epoch, window, skipped + end - n_carried)
                handed_out = time.perf_counter()
                yield self._batch(part.cut(at, end))
                self.counters.add(consumer_s=time.perf_counter() - handed_out)
                at = end
            carried = part.cut(at, part.n_slots) if at < part.n_slots else None
        self._cursor = Cursor(epoch + 1, 0, 0)

    def _part(self, epoch: int, window: int, skipped: int, carried: _Part | None) -> _Part:
        """The window's rows from slot `skipped` on, behind what was carried over from the window before."""
        fill = self._fill(epoch, window)
        started = time.perf_counter()
        layout = fill.wait()
        self.counters.add(waited_s=time.perf_counter() - started)
        head, end = fill.head, fill.head + len(layout.row)
        mine = self._is_mine[layout.partition]
        own_before = np.concatenate([[0], np.cumsum(mine)])
        rows = [tensor[head:end] for tensor in fill.tensors]
        part = _Part(rows, layout.layer, layout.row, own_before).cut(skipped, len(mine))
        if carried is None:
            return part
        n = len(carried.row)
        for tensor, left in zip(fill.tensors, carried.rows, strict=True):
            tensor[head - n : head] = left
        return _Part(
            [tensor[head - n : end] for tensor in fill.tensors],
            np.concatenate([carried.layer, part.layer]),
            np.concatenate([carried.row, part.row]),
            np.concatenate([carried.own_before[:-1], part.own_before + n]),
        )

    def _fill(self, epoch: int, window: int) -> Fill:
        """The fill of a window: the one read ahead, or one started now in whatever buffers it takes."""
        self._check_process()
        found = self._fills.pop((epoch, window), None)
        return self._start(epoch, window) if found is None else found

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                "this stream was opened in another process: its threads did not survive the fork. Open the store in "
                "the process that reads it (a DataLoader needs num_workers=0, or a 'spawn' context)."
            )

    def _start(self, epoch: int, window: int) -> Fill:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.delivery.threads, thread_name_prefix="actcache-stream")
            if self._io_threads:
                waiting = ThreadPoolExecutor(self._io_threads, thread_name_prefix="actcache-fetch")
                self._fetching = Fetching(waiting, Room(_FETCHED_BYTES))
        return Fill(
            [pool.take() for pool in self._buffers],
            self.selection.batch_size,
            lambda: self._lay_out(epoch, window),
            self._pool,
            self.counters,
            chunk_bytes=self._captures[0].arrays["rows"].codec.n_bytes,
            fetching=self._fetching,
        )

    def _read_ahead(self, epoch: int, window: int) -> None:
        """Start the window after this one where buffers are free; raise what went wrong in one already started."""
        self._check_process()
        for key, fill in list(self._fills.items()):
            if fill.error is not None:
                del self._fills[key]  # whoever iterates again tries it again
                raise fill.error
        following = (epoch, window + 1) if window + 1 < self._order(epoch).n_windows else (epoch + 1, 0)
        if following in self._fills or following[0] == self.delivery.epochs:
            return
        if all(pool.n_free or pool.n_allocated < self._max_buffers for pool in self._buffers):
            self._fills[following] = self._start(*following)

    def _lay_out(self, epoch: int, window: int) -> Layout:
        """What goes where in a window. Runs on a thread of the pool."""
        order, chunks, r = self._order(epoch), self._chunks, self._grid.rows_per_chunk
        members = order.members(window)
        shard, chunk = chunks.shard[members.listed], chunks.chunk[members.listed]
        selected = [
            self._selected(int(s), int(c) * r, int(n), int(i))
            for s, c, n, i in zip(shard, chunk, chunks.n_rows[members.listed], members.layer_i, strict=True)
        ]
        counts = np.array([len(rows) for rows in selected], dtype=np.int64)
        arrangement = arrange(order.key_of(window), counts, members.partition, self.selection.partitions)
        return lay_out(
            members,
            arrangement,
            selected,
            lanes=self._lanes,
            readers=self._reader,
            shard=shard,
            chunk=chunk,
            layer=np.array(self.layers)[members.layer_i],
            first_row=shard * self._grid.rows_per_shard + chunk * r,
            is_mine=self._is_mine,
        )

    def _reader(self, buffer: int, shard: int) -> ShardReader:
        return self._captures[buffer].reader(shard)

    def _selected(self, shard: int, start: int, n: int, lane: int) -> NDArray[np.int64]:
        """Which of the first `n` rows of a chunk, which begins at row `start` of its shard, pass the filters."""
        if self._filter is None:
            return np.arange(n)
        return np.flatnonzero(self._filter.passing(shard, lane)[start : start + n])

    def _batch(self, part: _Part) -> Batch:
        device, row = self.delivery.device, part.row
        hooks: dict[str, Tensor] = {}
        for name, found, numbers in zip(self.selection.hooks, self._captures, part.rows, strict=True):
            rows = numbers.view(_TORCH_DTYPES[found.capture.dtype])
            if self.selection.stack == "layers":
                rows = rows.unflatten(1, (len(self.layers), found.capture.width))
            hooks[name] = rows.to(device=device, dtype=self.delivery.dtype or rows.dtype, non_blocking=True)
        layer = part.layer if self.selection.stack == "data" else np.array(self.layers)
        return Batch(
            hooks[self.selection.hooks[0]],
            torch.from_numpy(layer).to(device),
            lookup=lambda name: torch.from_numpy(self._provenance.look_up(name, row)).to(device),
            hooks=hooks,
            slot=torch.from_numpy(np.flatnonzero(np.diff(part.own_before))).to(device),
        )

    # The end.

    def _forget_ahead(self) -> None:
        for fill in self._fills.values():
            fill.cancel("the stream moved elsewhere")
        self._fills.clear()

    def close(self) -> None:
        """Stop reading ahead at once and let go of threads, buffers and files. Batches handed out stay valid."""
        self._forget_ahead()
        if self._fetching is not None:  # not waited for: a request may take until its deadline
            self._fetching.pool.shutdown(wait=False, cancel_futures=True)
            self._fetching = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


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
