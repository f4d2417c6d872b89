"""Shuffled batches from a store: windows filled ahead by threads, handed out as slices, with an exact cursor."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import CursorError, MemoryBoundError, UsageError
from actcache.flow import Batch
from actcache.reader.filters import NormFilter
from actcache.reader.order import GlobalOrder, arrange, groups_of, list_chunks
from actcache.reader.provenance import Provenance
from actcache.reader.window import BufferPool, Fill, Layout, lay_out
from actcache.store.open import CaptureCatalog
from actcache.store.schema import digest_of

CURSOR_VERSION = 1
_MAX_BUFFERS = 3
_MIN_BUFFERS = 2
_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the order of rows depends on besides the data: another value, another order.

    layers       the model's layer numbers.      split  "train" or "holdout".
    batch_size   b, over all ranks.              window_rows, partitions  how rows are mixed.
    norm_limits  per layer, rows of a greater norm are dropped; None keeps all.
    drop_last    whether a short last batch of an epoch is left out.
    """

    layers: tuple[int, ...]
    split: str
    seed: int
    batch_size: int
    window_rows: int
    partitions: int
    norm_limits: tuple[float, ...] | None
    drop_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How rows reach the consumer: nothing here changes which rows come, or when.

    epochs        how many; None goes on for ever.
    threads       that read and decode.          memory_bytes  bound on window buffers; None for three windows.
    dtype         of the batches; None: as stored.  device     of the batches.
    rank, world_size  this reader's share: partitions p with p % world_size == rank.
    """

    epochs: int | None = 1
    threads: int = 2
    memory_bytes: int | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    rank: int = 0
    world_size: int = 1


class Cursor(NamedTuple):
    """Where the next batch begins: slot `slot` of window `window` of epoch `epoch`."""

    epoch: int
    window: int
    slot: int


class _Part(NamedTuple):
    """Rows in slot order, ready to be cut into batches.

    rows  [n, d].   layer, row  [n], the model layer and global row number of each.
    own_before  [s + 1], how many of this rank's rows come before each slot of all ranks.
    """

    rows: Tensor
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
        return _Part(self.rows[a:z], self.layer[a:z], self.row[a:z], self.own_before[start : stop + 1] - a)


class Stream:
    """Batches of shuffled rows; a `BatchSource`. Close it, or use it in a `with` block. Made by `Store.stream`.

    The rows, their order and the batches are a function of the store and the selection alone: threads, memory, read-
    ahead, ranks and restarts change nothing. Iterating again goes on from the cursor.
    """

    def __init__(
        self,
        catalog: CaptureCatalog,
        provenance: Provenance,
        selection: Selection,
        delivery: Delivery,
        kept: NDArray[np.int64],
    ) -> None:
        self.selection, self.delivery = selection, delivery
        self._catalog, self._provenance, self._kept = catalog, provenance, kept
        grid, n_layers = catalog.plan.grid, len(selection.layers)
        first, stop = (
            (0, grid.n_holdout_shards)
            if selection.split == "holdout"
            else (grid.n_holdout_shards, grid.n_shards)
        )
        self._rows_per_chunk = grid.rows_per_chunk
        self._chunks = list_chunks(np.arange(first, stop), kept[first:stop], grid.rows_per_chunk)
        if len(self._chunks) == 0:
            raise UsageError(
                f"the {selection.split} split of {catalog.objects.url} holds no kept rows"
                + ("; it was built with --holdout 0" if selection.split == "holdout" else "")
            )
        self._layer_index = np.array([catalog.layer_index(layer) for layer in selection.layers])
        self._filter = (
            None
            if selection.norm_limits is None
            else NormFilter(catalog, kept, self._layer_index, selection.norm_limits)
        )
        self._groups = groups_of(selection.window_rows, n_layers, grid.rows_per_chunk, len(self._chunks))
        self._is_mine = np.arange(selection.partitions) % delivery.world_size == delivery.rank
        spec = catalog.arrays["rows"]
        assert spec.dtype is not None
        n_window_rows = self._groups * n_layers * grid.rows_per_chunk
        self._buffers = BufferPool(selection.batch_size + n_window_rows, catalog.capture.width, spec.dtype)
        self._max_buffers = self._affordable_buffers()
        self._cursor = Cursor(0, 0, 0)
        self._fills: dict[tuple[int, int], Fill] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self._waited_s = 0.0

    def _affordable_buffers(self) -> int:
        """How many window buffers the memory bound allows; MemoryBoundError states the least that would do."""
        bound = self.delivery.memory_bytes
        if bound is None:
            return _MAX_BUFFERS
        decoded = self.delivery.threads * self._rows_per_chunk * self.width * 8
        n_buffers = (bound - decoded) // self._buffers.buffer_bytes
        if n_buffers < _MIN_BUFFERS:
            least = _MIN_BUFFERS * self._buffers.buffer_bytes + decoded
            raise MemoryBoundError(
                f"memory={bound:,} bytes is too little for windows of {self.selection.window_rows:,} rows: two windows "
                f"take {least:,} bytes. Give that much, or a smaller window_rows= (another order, less mixed)."
            )
        return int(min(n_buffers, _MAX_BUFFERS))

    # What a consumer may ask.

    @property
    def width(self) -> int:
        """D."""
        return self._catalog.capture.width

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layer numbers that occur."""
        return self.selection.layers

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the order depends on, by name."""
        chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.selection).items()}
        return {
            "plan": self._catalog.plan.digest,
            "capture": self._catalog.capture.digest,
            "order": "global",
            **chosen,
        }

    @property
    def fingerprint(self) -> str:
        """Digest of everything the order depends on, the data included."""
        return digest_of(self.settings)

    @property
    def n_rows(self) -> int:
        """Rows of one epoch over all ranks, after filters. With a norm limit every shard's norms are read for it."""
        return int(self._chunks.n_rows.sum()) * len(self.layers) - self.n_dropped

    @property
    def n_dropped(self) -> int:
        """Kept rows of one epoch that the norm limit leaves out."""
        if self._filter is None:
            return 0
        return sum(
            len(rows) for shard in np.unique(self._chunks.shard) for rows in self._filter.dropped(int(shard))
        )

    def __len__(self) -> int:
        """Batches in all epochs together; TypeError where they never end."""
        if self.delivery.epochs is None:
            raise TypeError("a stream with epochs=None never ends, so it has no length")
        whole, rest = divmod(self.n_rows, self.selection.batch_size)
        return self.delivery.epochs * (whole + (1 if rest and not self.selection.drop_last else 0))

    def waited_s(self) -> float:
        """Seconds the consumer has waited for windows so far."""
        return self._waited_s

    def peek(self, n_rows: int) -> Batch:
        """The first `n_rows` rows of epoch 0 (fewer if there are fewer), copied. Moves no cursor."""
        batches: list[Batch] = []
        with Stream(self._catalog, self._provenance, self.selection, self.delivery, self._kept) as fresh:
            for batch in fresh:
                batches.append(batch)
                if sum(len(b) for b in batches) >= n_rows:
                    break
        rows, layer, sequence, position = (
            torch.cat([getattr(batch, name) for batch in batches])[:n_rows]
            for name in ("rows", "layer", "sequence", "position")
        )
        return Batch(rows, layer, sequence, position)

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
        here, there = self.settings, dict(state["settings"])
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
            yield from self._rest_of_epoch()

    def _order(self, epoch: int) -> GlobalOrder:
        return GlobalOrder(
            seed=self.selection.seed,
            epoch=epoch,
            n_chunks=len(self._chunks),
            n_layers=len(self.layers),
            groups=self._groups,
            partitions=self.selection.partitions,
        )

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
                yield self._batch(part.cut(at, end))
                at = end
            carried = part.cut(at, part.n_slots) if at < part.n_slots else None
        self._cursor = Cursor(epoch + 1, 0, 0)

    def _part(self, epoch: int, window: int, skipped: int, carried: _Part | None) -> _Part:
        """The window's rows from slot `skipped` on, behind what was carried over from the window before."""
        fill = self._fill(epoch, window)
        started = time.perf_counter()
        layout = fill.wait()
        self._waited_s += time.perf_counter() - started
        head = fill.head
        mine = self._is_mine[layout.partition]
        own_before = np.concatenate([[0], np.cumsum(mine)])
        rows = fill.rows[head : head + len(layout.row)]
        part = _Part(rows, layout.layer, layout.row, own_before).cut(skipped, len(mine))
        if carried is None:
            return part
        n = len(carried.rows)
        fill.rows[head - n : head] = carried.rows
        return _Part(
            fill.rows[head - n : head + len(layout.row)],
            np.concatenate([carried.layer, part.layer]),
            np.concatenate([carried.row, part.row]),
            np.concatenate([carried.own_before[:-1], part.own_before + n]),
        )

    def _fill(self, epoch: int, window: int) -> Fill:
        """The fill of a window: the one read ahead, or one started now in whatever buffer it takes."""
        self._check_process()
        found = self._fills.pop((epoch, window), None)
        if found is not None:
            return found
        buffer = self._buffers.take(limit=None)
        assert buffer is not None
        return self._start(buffer, epoch, window)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                "this stream was opened in another process: its threads did not survive the fork. Open the store in "
                "the process that reads it (a DataLoader needs num_workers=0, or a 'spawn' context)."
            )

    def _start(self, buffer: NDArray[Any], epoch: int, window: int) -> Fill:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.delivery.threads, thread_name_prefix="actcache-stream")
        return Fill(
            buffer,
            self.selection.batch_size,
            lambda: self._lay_out(epoch, window),
            self._pool,
            chunk_bytes=self._catalog.arrays["rows"].codec.n_bytes,
        )

    def _read_ahead(self, epoch: int, window: int) -> None:
        """Start the window after this one where a buffer is free; raise what went wrong in one already started."""
        self._check_process()
        for key, fill in list(self._fills.items()):
            if fill.error is not None:
                del self._fills[key]  # whoever iterates again tries it again
                raise fill.error
        following = (epoch, window + 1) if window + 1 < self._order(epoch).n_windows else (epoch + 1, 0)
        if following in self._fills or following[0] == self.delivery.epochs:
            return
        buffer = self._buffers.take(limit=self._max_buffers)
        if buffer is not None:
            self._fills[following] = self._start(buffer, *following)

    def _lay_out(self, epoch: int, window: int) -> Layout:
        """What goes where in a window. Runs on a thread of the pool."""
        order, chunks = self._order(epoch), self._chunks
        members = order.members(window)
        shard, chunk = chunks.shard[members.listed], chunks.chunk[members.listed]
        selected = [
            self._selected(int(s), int(c) * self._rows_per_chunk, int(n), int(i))
            for s, c, n, i in zip(shard, chunk, chunks.n_rows[members.listed], members.layer_i, strict=True)
        ]
        counts = np.array([len(rows) for rows in selected], dtype=np.int64)
        arrangement = arrange(order.key_of(window), counts, members.partition, self.selection.partitions)
        return lay_out(
            members,
            arrangement,
            selected,
            readers=[self._catalog.reader(int(s)) for s in shard],
            chunk=chunk,
            layer_index=self._layer_index[members.layer_i],
            layer=np.array(self.layers)[members.layer_i],
            first_row=shard * self._catalog.plan.grid.rows_per_shard + chunk * self._rows_per_chunk,
            is_mine=self._is_mine,
        )

    def _selected(self, shard: int, start: int, n: int, layer_i: int) -> NDArray[np.int64]:
        """Which of the first `n` rows of a chunk, which begins at row `start` of its shard, pass the filters."""
        rows = np.arange(n)
        if self._filter is None:
            return rows
        dropped = self._filter.dropped(shard)[layer_i]
        a, z = np.searchsorted(dropped, (start, start + n))
        return np.delete(rows, dropped[a:z] - start) if z > a else rows

    def _batch(self, part: _Part) -> Batch:
        rows, row = part.rows.view(_TORCH_DTYPES[self._catalog.capture.dtype]), part.row
        rows = rows.to(
            device=self.delivery.device, dtype=self.delivery.dtype or rows.dtype, non_blocking=True
        )
        return Batch(
            rows,
            torch.from_numpy(part.layer).to(self.delivery.device),
            lookup=lambda name: torch.from_numpy(self._provenance.look_up(name, row)).to(
                self.delivery.device
            ),
        )

    # The end.

    def _forget_ahead(self) -> None:
        for fill in self._fills.values():
            fill.cancel("the stream moved elsewhere")
        self._fills.clear()

    def close(self) -> None:
        """Stop reading ahead at once and let go of threads and buffers. Batches handed out stay valid."""
        self._forget_ahead()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._catalog.files is not None:
            self._catalog.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
