"""Windows that a service decoded, landing here: from messages, each checked, or from the memory of a service on this machine."""

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.errors import ActcacheError, DamageError
from actcache.reader.buffers import Window
from actcache.reader.counters import Counters
from actcache.reader.layout import Lane, Layout
from actcache.reader.scatter import Target
from actcache.reader.selection import Delivery, Selection
from actcache.service.link import Hold, Link
from actcache.service.near import OthersMemory, Where
from actcache.service.wire import (
    MEMORY,
    WAITING,
    WindowTicket,
    checksum,
    part_of,
    rows_of,
    selection_json,
)
from actcache.store.codec import extend_crc32c
from actcache.store.dtypes import disk_dtype
from actcache.store.open import CaptureCatalog
from actcache.store.quantise import Quantised
from actcache.store.schema import digest_of

_PARTS = 1
"""Of a window, each received by a thread of its own. On one machine two are no faster and take a tenth more CPU (measured)."""
_THREADS = 2 * _PARTS
_LIVENESS_S = 5.0
_CLOSE_S = 5.0


class _Rows(NamedTuple):
    """What the rows of a part are."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    quantised: None = None


class _Part(NamedTuple):
    """Some rows of a message, as many as a chunk may have: what a `Window` takes."""

    reader: _Rows
    lane: Lane
    slots: NDArray[np.int64]
    chosen: NDArray[np.int64] | None = None


class _Received:
    """The parts of a column, one after the other.

    crc  of what came before them; and, once all were asked for, with them.
    """

    def __init__(self, rows: NDArray[Any], per_part: int, crc: int) -> None:
        self._rows, self._per_part, self.crc = rows, per_part, crc

    def bring(self, target: Target) -> int:  # noqa: ARG002 - nothing is read here
        """None."""
        return 0

    def rows_of(self, number: int, out: NDArray[Any] | None) -> NDArray[Any]:  # noqa: ARG002 - nothing is decoded here
        """Rows of a part, where they were received; added to the checksum, while they are in the processor's cache."""
        found = self._rows[number * self._per_part : (number + 1) * self._per_part]
        self.crc = extend_crc32c(found, self.crc)
        return found

    def codes_of(self, number: int) -> Quantised:
        """A service sends no codes."""
        raise AssertionError(number)


class _Read:
    """The parts of a window in another process's memory, one after the other: `columns` numbers of a dtype in a row."""

    def __init__(
        self, memory: OthersMemory, pieces: list["_Part"], first_rows: list[int], n_rows: int
    ) -> None:
        self._memory, self._pieces, self._first_rows, self._n_rows = memory, pieces, first_rows, n_rows

    def bring(self, target: Target) -> int:  # noqa: ARG002 - not by a compiled loop
        """None."""
        return 0

    def rows_of(self, number: int, out: NDArray[Any] | None) -> NDArray[Any]:
        """Rows of a part: in `out`, where there is one."""
        kind, first = self._pieces[number].reader, self._first_rows[number]
        found = np.empty(kind.shape, kind.dtype) if out is None else out
        found = found[: min(kind.shape[0], self._n_rows - first)]
        self._memory.read(first * kind.shape[1] * kind.dtype.itemsize, found.reshape(-1).view(np.uint8))
        return found

    def codes_of(self, number: int) -> Quantised:
        """A service sends no codes."""
        raise AssertionError(number)


class ServedFill:
    """A window on its way from a service, in parts that come at once."""

    def __init__(
        self, source: "ServedWindows", into: Window, epoch: int, window: int, counters: Counters
    ) -> None:
        self.window: Window = into
        self.error: BaseException | None = None
        self._source, self._counters = source, counters
        self._holds = [Hold() for _part in range(_PARTS)]
        self._name = f"window {window} of epoch {epoch}"
        self._at = (epoch, window)
        self._done, self._lock = threading.Event(), threading.Lock()
        self._layout: Layout | None = None
        self._slot = self._row = np.empty(0, np.int64)
        self._layer = np.empty(0, np.int16)
        self._n_slots, self._n_own = 0, -1
        self._n_landed, self._n_running = [0] * _PARTS, _PARTS
        self._is_near = source.link.is_near
        for part in range(_PARTS):
            source.pool.submit(self._run, part)

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not have to wait."""
        return self._done.is_set()

    def _run(self, part: int) -> None:
        try:
            if self.error is None:
                self._source.link.messages(
                    lambda: self._ticket(part),
                    lambda batch, said: self._take(part, batch, said),
                    self._holds[part],
                )
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self.cancel(error)
        with self._lock:
            self._n_running -= 1
            is_last = self._n_running == 0
        if is_last:
            self._finish()

    def _finish(self) -> None:
        if self.error is None:
            is_own = np.zeros(self._n_slots, np.int64)
            is_own[self._slot] = 1
            own_before = np.concatenate([[0], np.cumsum(is_own)])
            self._layout = Layout([], self._layer, self._row, own_before, np.empty(0, np.int16))
        self.window.seal()
        self._done.set()

    def _part(self, part: int) -> range:
        return part_of(max(0, self._n_own), part, _PARTS)

    def _ticket(self, part: int) -> bytes | None:
        landed = self._n_landed[part]
        if self._n_own >= 0 and landed == len(self._part(part)):
            return None
        return self._source.ticket(*self._at, part, landed, near=self._is_near)

    def _take(self, part: int, batch: pa.RecordBatch, said: dict[str, Any]) -> bool:
        """Take a message; says whether another one of this call is wanted."""
        if self.error is not None:
            raise self.error
        if WAITING in said:
            return True
        begun = perf_counter()
        with self._lock:
            if self._n_own < 0:
                n_own = said["n_own"]
                self._slot, self._row = np.empty((2, n_own), np.int64)
                self._layer = np.empty(n_own, np.int16)
                self._n_own, self._n_slots = said["n_own"], said["n_slots"]
        n, mine = batch.num_rows, self._part(part)
        first = mine.start + self._n_landed[part]
        expected = (self._n_own, self._n_slots, first)
        if (said["n_own"], said["n_slots"], said["first"]) != expected or first + n > mine.stop:
            raise DamageError(f"{self._source.link.location} answers for another window than {self._name}")
        for to, column in zip((self._slot, self._layer, self._row), batch.columns[:3], strict=True):
            to[first : first + n] = column.to_numpy()
        crc = checksum(batch.columns[:3])
        for buffer, column in enumerate(batch.columns[3:]):
            crc = self._land(buffer, column, first, crc)
        if crc != said["crc32c"]:  # nobody is handed a window that ended with an error
            raise DamageError(
                f"a message of {self._name} from {self._source.link.location} was altered on the way"
            )
        if MEMORY in said and not self._reads(range(first, first + n), said[MEMORY]):
            self._is_near, self._n_landed[part] = False, 0
            return False
        self._n_landed[part] += n
        n_bytes = n * self._source.row_bytes
        self._counters.add(scatter_s=perf_counter() - begun, row_bytes=n_bytes, read_bytes=n_bytes)
        return MEMORY not in said or self._n_landed[part] < len(mine)

    def _reads(self, own: range, said: list[list[int]] | None) -> bool:
        """Bring some of this rank's rows to their place from the service's memory; False where it cannot be read, or not any more."""
        try:
            for buffer, where in enumerate(said or ()):
                with OthersMemory(Where(*where)) as memory:
                    self._read(buffer, own, memory)
                    if not memory.is_as_told:
                        return False
        except OSError:  # another container, another user; or the service has been restarted
            self._source.link.is_near = self._source.link.was_near
            return False
        self._source.link.was_near |= said is not None
        return said is not None

    def _read(self, buffer: int, own: range, memory: OthersMemory) -> None:
        per_part, width = self._source.rows_per_part, self._source.widths[buffer]
        kind, lane = _Rows((per_part, width), self._source.dtypes[buffer]), Lane(buffer, 0, 0)
        slots = self._slot[own.start : own.stop]
        edges = np.arange(0, self._n_slots + per_part, per_part)
        cuts = np.searchsorted(slots, edges).tolist()
        pieces, first_rows = [], []
        for first, start, stop in zip(edges.tolist(), cuts, cuts[1:], strict=False):
            if start < stop:
                chosen = slots[start:stop] - first
                are_first = int(chosen[-1]) == stop - start - 1
                to = np.arange(own.start + start, own.start + stop)
                pieces.append(_Part(kind, lane, to, None if are_first else chosen))
                first_rows.append(first)
        self.window.land(pieces, _Read(memory, pieces, first_rows, self._n_slots))

    def _land(self, buffer: int, column: pa.Array, first: int, crc: int) -> int:
        dtype, per_part = self._source.dtypes[buffer], self._source.rows_per_part
        rows = rows_of(column, dtype)
        rows.flags.writeable = False
        kind, lane = _Rows((per_part, rows.shape[1]), dtype), Lane(buffer, 0, 0)
        parts = [
            _Part(kind, lane, np.arange(first + at, first + min(at + per_part, len(rows))))
            for at in range(0, len(rows), per_part)
        ]
        received = _Received(rows, per_part, crc)
        self.window.land(parts, received)
        return received.crc

    def cancel(self, reason: str | BaseException) -> None:
        """Stop; whoever waits gets an error."""
        self.error = self.error or (ActcacheError(reason) if isinstance(reason, str) else reason)
        for hold in self._holds:
            hold.end()
        self._done.set()

    def wait_until_begun(self) -> None:
        """Wait until it is whole, not for ever: who asks for the next window is taken to be done with this one."""
        self._done.wait(_LIVENESS_S)

    def wait(self) -> Layout:
        """Wait until the window is whole."""
        while not self._done.wait(_LIVENESS_S):
            if self._source.pool._shutdown:
                raise ActcacheError("the stream was closed while its consumer was waiting for a window")
        if self.error is not None:
            raise self.error
        assert self._layout is not None
        return self._layout


class ServedWindows:
    """`WindowSource`: a service decodes, this process lands what comes.

    dtypes, widths  of the hooks, as they land.    rows_per_part  rows that land together.    row_bytes  of all hooks.
    """

    def __init__(
        self, link: Link, store: str, captures: list[CaptureCatalog], selection: Selection, delivery: Delivery
    ) -> None:
        self.link = link
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="actcache-link")
        self.dtypes = [disk_dtype(found.capture.dtype) for found in captures]
        self.widths = [
            found.capture.width * (1 if selection.stack == "data" else len(selection.layers))
            for found in captures
        ]
        self.row_bytes = sum(n * dtype.itemsize for n, dtype in zip(self.widths, self.dtypes, strict=True))
        n_stacked = 1 if selection.stack == "data" else len(selection.layers)
        self.rows_per_part = max(1, captures[0].plan.grid.rows_per_chunk // n_stacked)
        self._draft = WindowTicket(
            store=store,
            plan=captures[0].plan.digest,
            captures=digest_of([found.capture.digest for found in captures]),
            selection=selection_json(selection),
            epoch=0,
            window=0,
            rank=delivery.rank,
            world_size=delivery.world_size,
            parts=_PARTS,
            client=secrets.token_hex(8),
        )
        self._fills: list[ServedFill] = []

    def ticket(self, epoch: int, window: int, part: int, first: int, *, near: bool = False) -> bytes:
        """Asks for this rank's rows of a window: those of a part, from the `first`-th on; near: for where all of them are."""
        asked = {"epoch": epoch, "window": window, "part": part, "first": 0 if near else first, "near": near}
        return self._draft.model_copy(update=asked).encode()

    def begin(self, into: Window, epoch: int, window: int, counters: Counters) -> ServedFill:
        """Begin to fetch a window."""
        self._fills = [fill for fill in self._fills if not fill.is_done]
        self._fills.append(fill := ServedFill(self, into, epoch, window, counters))
        return fill

    def close(self) -> None:
        """Stop what is under way."""
        for fill in self._fills:
            if not fill.is_done:
                fill.cancel("the stream was closed while its consumer was waiting for a window")
        self.pool.shutdown(wait=False, cancel_futures=True)
        for thread in list(self.pool._threads):
            thread.join(_CLOSE_S)
