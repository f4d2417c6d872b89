"""Shuffled batches from a store: windows filled ahead by threads, handed out as slices, with an exact cursor."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import UsageError
from actcache.flow import Batch
from actcache.reader.counters import Counters
from actcache.reader.courier import BATCHES_AHEAD, Courier, Parcel
from actcache.reader.cursor import Cursor, from_state, to_state
from actcache.reader.filling import Filling
from actcache.reader.follow import Follower
from actcache.reader.provenance import Provenance
from actcache.reader.quality import Expected, Quality, QualityMeter, expected
from actcache.reader.selection import Delivery, Selection, shards_text
from actcache.reader.window import WindowSource
from actcache.store.open import CaptureCatalog
from actcache.store.schema import digest_of

if TYPE_CHECKING:
    from actcache.reader.dataset import StreamDataset

Connect = Callable[[list[CaptureCatalog], Selection, Delivery], WindowSource]
_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class _Part(NamedTuple):
    """Rows in slot order, ready to be cut into batches.

    rows  per hook, [n, columns].   layer, row  [n], the model layer and global row number of each.
    own_before  [s + 1], how many of this rank's rows come before each slot of all ranks, counted from anywhere.
    """

    rows: list[Tensor]
    layer: NDArray[np.int16]
    row: NDArray[np.int64]
    own_before: NDArray[np.int64]

    @property
    def n_slots(self) -> int:
        """Slots over all ranks."""
        return len(self.own_before) - 1

    def cut(self, start: int, stop: int) -> "_Part":
        """Slots [start, stop)."""
        first, before, behind = (self.own_before.item(slot) for slot in (0, start, stop))
        a, z = before - first, behind - first
        return _Part(
            [rows[a:z] for rows in self.rows],
            self.layer[a:z],
            self.row[a:z],
            self.own_before[start : stop + 1],
        )


class _Next(NamedTuple):
    """What comes next. after: the cursor once it is handed out. part: a batch; None: an epoch is over.

    parcel  of rows and layer numbers, where they are on their way to a device.
    """

    after: Cursor
    part: _Part | None = None
    parcel: Parcel | None = None


class Stream:
    """Batches of shuffled rows; a `BatchSource`. Close it, or use it in a `with` block. Made by `Store.stream`.

    The rows, their order and the batches are a function of the store and the selection alone: threads, memory, read-
    ahead, devices, ranks and restarts change nothing. Iterating again goes on from the cursor.

    captures  one per hook of the selection.    kept  [shard] kept rows.    shards  those of the selection, ascending.
    follower  waits for shards that are not committed yet; None: all are.
    connect   makes what fills windows, where a service does; None: threads of this process do.
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
        connect: Connect | None = None,
    ) -> None:
        self.selection, self.delivery, self.follower, self._connect = selection, delivery, follower, connect
        self._captures, self._provenance, self._kept, self._shards = captures, provenance, kept, shards
        self._filling = Filling(
            captures,
            provenance,
            selection,
            delivery,
            kept=kept,
            shards=shards,
            follower=follower,
            source=None if connect is None else connect(captures, selection, delivery),
        )
        self._cursor = Cursor(0, 0, 0)
        self._handed_out: NDArray[np.int64] | None = None

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
    def shards(self) -> str:
        """The shards that are streamed: what `partial=` takes to stream exactly them again."""
        return shards_text(self._shards.tolist())

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
    def counters(self) -> Counters:
        """Where the time goes."""
        return self._filling.counters

    @property
    def n_rows(self) -> int:
        """Rows of one epoch over all ranks, after filters. With filters every shard's side arrays are read for it.

        In the `commit` order what only those side arrays say is left out, because a follower cannot know it yet: with norm
        limits this is the most there can be.
        """
        filling = self._filling
        if filling.filter is None:
            return filling.n_chunk_rows
        if self.selection.order == "commit":
            return sum(filling.filter.n_planned(int(s)) for s in self._shards) * len(filling.lanes)
        return sum(
            int(filling.filter.passing(int(shard), lane).sum())
            for shard in np.unique(filling.chunks.shard)
            for lane in range(len(filling.lanes))
        )

    @property
    def n_dropped(self) -> int:
        """Kept rows of one epoch that the filters leave out."""
        return self._filling.n_chunk_rows - self.n_rows

    def __len__(self) -> int:
        """Batches in all epochs together, by `n_rows`; TypeError where they never end."""
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
        with self._copy(self.delivery) as fresh:
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

    def _copy(self, delivery: Delivery) -> "Stream":
        return Stream(
            self._captures,
            self._provenance,
            self.selection,
            delivery,
            kept=self._kept,
            shards=self._shards,
            follower=None if self.follower is None else self.follower.again(),
            connect=self._connect,
        )

    def quality(self, n_batches: int = 64) -> Quality:
        """How well the next `n_batches` batches are shuffled. Reads them again for it; moves no cursor.

        Expectations count kept rows before filters by norm, position or token.
        """
        meter, windows = QualityMeter(self.n_rows), dict[tuple[int, int], None]()
        with self._copy(replace(self.delivery, device="cpu", dtype=None)) as copy:
            copy._cursor = self._cursor
            for batch in copy:
                windows[copy._cursor.epoch, copy._cursor.window] = None
                meter.update(batch)
                if meter.n_batches == n_batches:
                    break
        if not meter.n_batches:
            raise UsageError("the stream is at its end: no batch is left to measure; `set_epoch` goes back")
        rows_of, n_windows = self._filling.rows_of, self._filling.order(0).n_windows
        pairs = [self._expected(rows_of(e, w)) for e, w in windows if w < n_windows]
        everything = self._expected(np.concatenate([rows_of(0, w) for w in range(n_windows)]))
        return meter.result(pairs or [everything], everything)

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
        return to_state(self._cursor, self.settings)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken. CursorError names every setting that differs."""
        cursor = from_state(state, self.settings)
        self._filling.forget()
        self._cursor = cursor

    def first_shard(self, state: dict[str, Any] | None = None) -> int:
        """The lowest shard that is needed from the cursor on, or from a saved one; one past the last where none is."""
        epoch, window, _slot = self._cursor if state is None else from_state(state, self.settings)
        if self.delivery.epochs is not None and epoch >= self.delivery.epochs:
            return int(self._shards[-1]) + 1
        return self._filling.first_shard(epoch, window)

    def glance(self) -> dict[str, float]:
        """How mixed the batch handed out last is, by where its rows come from; cheap, and safe from another thread."""
        row = self._handed_out
        if row is None or not len(row):
            return {}
        sequence, document = (self._provenance.look_up(name, row) for name in ("sequence", "document"))
        largest = np.unique(document, return_counts=True)[1].max() / len(row)
        return {"sequences": float(len(np.unique(sequence))), "largest_document": float(largest)}

    @property
    def shard_numbers(self) -> list[int]:
        """The shards that are streamed, ascending."""
        return self._shards.tolist()

    def is_within_reach(self) -> bool:
        """Whether no shard that is needed from the cursor on was retired."""
        first = self.first_shard()
        return not any(first <= shard <= self._shards[-1] for shard in self._captures[0].retired())

    @property
    def shards_per_window(self) -> int:
        """Shards that a window mixes."""
        return min(self.selection.commit_shards or len(self._shards), len(self._shards))

    def shards_for(self, n_rows: int) -> int:
        """Shards that the first `n_rows` rows of an epoch come from, about: norms are not known before."""
        order, n_seen = self._filling.order(0), 0
        for window in range(order.n_windows):
            n_seen += self._filling.rows_before_filters(0, window)
            if n_seen * self.n_rows >= n_rows * self._filling.n_chunk_rows:
                last = self._filling.shards_of(0, window)[-1]
                return int(np.searchsorted(self._shards, last)) + 1
        return len(self._shards)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`, counted from 0."""
        self._filling.forget()
        self._cursor = Cursor(epoch, 0, 0)

    # Iteration.

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the cursor to the end of the last epoch."""
        n_ahead = 0 if self._filling.courier is None else BATCHES_AHEAD
        ahead: deque[_Next] = deque()
        for found in self._cuts():
            if found is not None:
                ahead.append(self._sent(found))
            while len(ahead) > n_ahead or (ahead and found is None):
                after, part, parcel = ahead.popleft()
                if part is not None:
                    # May raise what went wrong further on: the cursor is still before this batch.
                    self._filling.read_ahead(after.epoch, after.window)
                self._cursor = after
                self._handed_out = None if part is None else part.row
                if part is not None:
                    handed_out = time.perf_counter()
                    yield self._batch(part, parcel)
                    self.counters.add(consumer_s=time.perf_counter() - handed_out)

    def _cuts(self) -> Iterator[_Next | None]:
        """Batches and ends of epochs from the cursor on; None before one that has to be waited for, and at the end."""
        epoch, window, slot = self._cursor
        while self.delivery.epochs is None or epoch < self.delivery.epochs:
            starts_whole, n_batches = (window, slot) == (0, 0), 0
            for cut in self._cuts_of_epoch(Cursor(epoch, window, slot)):
                n_batches += cut is not None
                yield cut
            if starts_whole and not n_batches and self.delivery.epochs is None:
                raise UsageError(
                    f"an epoch of {self.n_rows} rows holds no batch of {self.selection.batch_size}: an endless stream of "
                    f"it would never hand one out. Lower batch_size, loosen the filters, or drop_last=False"
                )
            epoch, window, slot = epoch + 1, 0, 0
            yield _Next(Cursor(epoch, window, slot))
        yield None

    def _cuts_of_epoch(self, cursor: Cursor) -> Iterator[_Next | None]:
        """Batches from the cursor to the end of its epoch. A batch may span windows, never epochs."""
        (epoch, first_window, first_slot), size = cursor, self.selection.batch_size
        n_windows = self._filling.order(epoch).n_windows
        carried: _Part | None = None
        for window in range(first_window, n_windows):
            skipped = first_slot if window == first_window else 0
            n_carried = 0 if carried is None else carried.n_slots
            if not self._filling.is_done(epoch, window):
                yield None
            part = self._part(epoch, window, skipped, carried)
            carried = None  # lets go of the window before
            takes_rest = window == n_windows - 1 and not self.selection.drop_last
            at = 0
            while part.n_slots - at >= size or (takes_rest and at < part.n_slots):
                end = min(at + size, part.n_slots)
                yield _Next(Cursor(epoch, window, skipped + end - n_carried), part.cut(at, end))
                at = end
            carried = part.cut(at, part.n_slots) if at < part.n_slots else None

    def _part(self, epoch: int, window: int, skipped: int, carried: _Part | None) -> _Part:
        """The window's rows from slot `skipped` on, behind what was carried over from the window before."""
        fill, layout = self._filling.wait(epoch, window)
        head, end = self.selection.batch_size, self.selection.batch_size + len(layout.row)
        tensors = fill.window.tensors
        part = _Part([tensor[head:end] for tensor in tensors], layout.layer, layout.row, layout.own_before)
        part = part.cut(skipped, part.n_slots)
        if carried is None:
            return part
        n = len(carried.row)
        fill.window.carry(carried.rows)
        return _Part(
            [tensor[head - n : end] for tensor in tensors],
            np.concatenate([carried.layer, part.layer]),
            np.concatenate([carried.row, part.row]),
            np.concatenate(
                [
                    carried.own_before[:-1] - carried.own_before[0],
                    part.own_before + (n - part.own_before[0]),
                ]
            ),
        )

    def _sent(self, found: _Next) -> _Next:
        """The same, its rows as the consumer wants them; on their way, where they have to be taken to a device."""
        if found.part is None:
            return found
        started = time.perf_counter()
        stacked, courier, part = self.selection.stack != "data", self._filling.courier, found.part
        rows, dtypes = [], []
        for numbers, of in zip(part.rows, self._captures, strict=True):
            typed = numbers.view(_TORCH_DTYPES[of.capture.dtype])
            if self.selection.stack == "layers":
                typed = typed.unflatten(1, (len(self.layers), of.capture.width))
            rows.append(typed)
            dtypes.append(self.delivery.dtype or typed.dtype)
        part = part._replace(layer=np.array(self.layers, np.int16) if stacked else part.layer)
        if courier is None:
            device = self.delivery.device
            rows = [one.to(device=device, dtype=dtype) for one, dtype in zip(rows, dtypes, strict=True)]
            found = _Next(found.after, part._replace(rows=rows))
        else:
            found = _Next(found.after, part, courier.send(rows, dtypes, *self._numbers(part)))
        self.counters.add(copy_s=time.perf_counter() - started)
        return found

    def _batch(self, part: _Part, parcel: Parcel | None) -> Batch:
        courier, row, device = self._filling.courier, part.row, self.delivery.device
        if courier is None or parcel is None:
            there = [*part.rows, *(torch.from_numpy(one).to(device) for one in self._numbers(part))]
        else:
            there = courier.hand_over(parcel)
        n_hooks = len(self.selection.hooks)
        rows, layer = there[:n_hooks], there[n_hooks]
        return Batch(
            rows[0],
            layer,
            lookup=partial(_look_up, self._provenance, courier, device, row),
            hooks=dict(zip(self.selection.hooks, rows, strict=True)),
            slot=there[-1] if self.delivery.world_size > 1 else None,
        )

    def _numbers(self, part: _Part) -> list[NDArray[np.int64]]:
        """The layer of each row; and its place in the batch of all ranks, where this reader does not get all of it."""
        if self.delivery.world_size == 1:
            return [part.layer.astype(np.int64)]
        return [part.layer.astype(np.int64), np.flatnonzero(np.diff(part.own_before))]

    # The end.

    def close(self) -> None:
        """Stop reading ahead at once and let go of threads, buffers and files. Batches handed out stay valid."""
        self._filling.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _look_up(
    provenance: Provenance, courier: Courier | None, device: str, row: NDArray[np.int64], name: str
) -> Tensor:
    """What a batch looks up when it is asked. It holds no stream: a batch that is kept keeps no threads."""
    found = provenance.look_up(name, row)
    if courier is None:
        return torch.from_numpy(found).to(device)
    return courier.hand_over(courier.send([], [], found))[0]
