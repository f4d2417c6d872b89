"""A store behind a service: `actcache.open("grpc://host:port/name")`.

Objects come as they lie on disk and are checked here, against the plan and the ledger, like any others. Windows of a
stream come decoded and shuffled, each message with its crc32c; order, batches and cursors are made here, by the same code
as of a local store, so a run may change from one to the other at any batch.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.errors import ActcacheError, DamageError, NotFoundError
from actcache.reader.access import Store
from actcache.reader.buffers import Window
from actcache.reader.counters import Counters
from actcache.reader.layout import Lane, Layout
from actcache.reader.selection import Delivery, Selection
from actcache.reader.stream import Connect
from actcache.service.link import Credentials, Hold, Link, parse_address
from actcache.service.wire import (
    NamesRequest,
    PutRequest,
    ReadRequest,
    SizeRequest,
    WindowTicket,
    checksum,
    rows_of,
    selection_json,
)
from actcache.store.chunk_cache import CachedObjects, ChunkCache
from actcache.store.dtypes import disk_dtype
from actcache.store.objects import CACHE_BYTES, Objects
from actcache.store.open import CaptureCatalog, Catalog
from actcache.store.quantise import Quantised
from actcache.store.remote import Range
from actcache.store.schema import digest_of

_FIRST_CONTACT_S = 10.0
_IN_FLIGHT = 8
_THREADS = 2
_LIVENESS_S = 5.0
_CLOSE_S = 5.0


class ServedObjects:
    """`Objects` of one store of a service."""

    n_in_flight = _IN_FLIGHT

    def __init__(self, link: Link, store: str) -> None:
        self._link, self._store = link, store
        self.url = f"{link.location}/{store}"

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        return b"".join(self._link.call("read", ReadRequest(store=self._store, key=key))[1:])

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes | memoryview:
        """Bytes [start, start + n_bytes); fewer where the object ends before."""
        return self.read_ranges(key, [(start, n_bytes)])[0]

    def read_ranges(
        self,
        key: str,
        ranges: Sequence[Range],
        *,
        fresh: bool = False,  # noqa: ARG002 - nothing is kept here
    ) -> list[bytes | memoryview]:
        """Several ranges of an object, in one call."""
        wanted = tuple((int(start), int(n_bytes)) for start, n_bytes in ranges)
        first, *pieces = self._link.call("read", ReadRequest(store=self._store, key=key, ranges=wanted))
        data, found = memoryview(b"".join(pieces)), []
        for length in json.loads(first)["lengths"]:
            found.append(data[:length])
            data = data[length:]
        return found

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        return self._link.ask("size", SizeRequest(store=self._store, key=key))["size"]

    def names(self, key: str) -> list[str]:
        """Names directly inside a folder, sorted."""
        return self._link.ask("names", NamesRequest(store=self._store, key=key))["names"]

    def live_writer(self) -> "ServedLive":
        """Who writes the state of a consumer."""
        return ServedLive(self._link, self._store)


class ServedLive:
    """`LiveWriter` through a service."""

    def __init__(self, link: Link, store: str) -> None:
        self._link, self._store = link, store

    def put(self, name: str, data: bytes) -> None:
        """Replace the file `name`."""
        self._link.call("put", PutRequest(store=self._store, name=name, text=data.decode()))

    def drop(self, name: str) -> None:
        """Remove the file `name`, if it is there."""
        self._link.call("put", PutRequest(store=self._store, name=name, text=None))


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
    chosen: None = None


class _Received:
    """The parts of a column, one after the other."""

    def __init__(self, rows: NDArray[Any], per_part: int) -> None:
        self._rows, self._per_part = rows, per_part

    def rows_of(self, number: int, out: NDArray[Any] | None) -> NDArray[Any]:
        """Rows of a part, where they were received; or in `out`."""
        found = self._rows[number * self._per_part : (number + 1) * self._per_part]
        if out is None:
            return found
        out[: len(found)] = found
        return out

    def codes_of(self, number: int) -> Quantised:
        """A service sends no codes."""
        raise AssertionError(number)


class ServedFill:
    """A window on its way from a service."""

    def __init__(
        self, source: "ServedWindows", into: Window, epoch: int, window: int, counters: Counters
    ) -> None:
        self.window: Window = into
        self.error: BaseException | None = None
        self._source, self._counters, self._hold = source, counters, Hold()
        self._name = f"window {window} of epoch {epoch}"
        self._at = (epoch, window)
        self._done = threading.Event()
        self._layout: Layout | None = None
        self._slot = self._layer = self._row = np.empty(0, np.int64)
        self._n_slots, self._n_own, self._n_landed = 0, -1, 0
        source.pool.submit(self._run)

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not have to wait."""
        return self._done.is_set()

    def _run(self) -> None:
        try:
            if self.error is None:
                self._source.link.messages(self._ticket, self._take, self._hold)
                is_own = np.zeros(self._n_slots, np.int64)
                is_own[self._slot] = 1
                own_before = np.concatenate([[0], np.cumsum(is_own)])
                self._layout = Layout([], self._layer, self._row, own_before, np.empty(0, np.int16))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self.error = self.error or error
        self.window.seal()
        self._done.set()

    def _ticket(self) -> bytes | None:
        return None if self._n_landed == self._n_own else self._source.ticket(*self._at, self._n_landed)

    def _take(self, batch: pa.RecordBatch, said: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        begun = perf_counter()
        if checksum(batch) != said["crc32c"]:
            raise DamageError(
                f"a message of {self._name} from {self._source.link.location} was altered on the way"
            )
        if self._n_own < 0:
            self._n_own, self._n_slots = said["n_own"], said["n_slots"]
            self._slot, self._layer, self._row = (np.empty(self._n_own, np.int64) for _ in range(3))
        n, first = batch.num_rows, self._n_landed
        if (said["n_own"], said["n_slots"], said["first"]) != (
            self._n_own,
            self._n_slots,
            first,
        ) or first + n > self._n_own:
            raise DamageError(f"{self._source.link.location} answers for another window than {self._name}")
        for to, column in zip((self._slot, self._layer, self._row), batch.columns[:3], strict=True):
            to[first : first + n] = column.to_numpy()
        for buffer, column in enumerate(batch.columns[3:]):
            self._land(buffer, column, first)
        self._n_landed += n
        self._counters.add(scatter_s=perf_counter() - begun, row_bytes=batch.nbytes, read_bytes=batch.nbytes)

    def _land(self, buffer: int, column: pa.Array, first: int) -> None:
        dtype, per_part = self._source.dtypes[buffer], self._source.rows_per_part
        rows = rows_of(column, dtype)
        rows.flags.writeable = False
        kind, lane = _Rows((per_part, rows.shape[1]), dtype), Lane(buffer, 0, 0)
        parts = [
            _Part(kind, lane, np.arange(first + at, first + min(at + per_part, len(rows))))
            for at in range(0, len(rows), per_part)
        ]
        self.window.land(parts, _Received(rows, per_part))

    def cancel(self, reason: str) -> None:
        """Stop; whoever waits gets an error."""
        self.error = self.error or ActcacheError(reason)
        self._hold.end()
        self._done.set()

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

    dtypes  of the hooks, on disk.    rows_per_part  rows that land together.
    """

    def __init__(
        self, link: Link, store: str, captures: list[CaptureCatalog], selection: Selection, delivery: Delivery
    ) -> None:
        self.link = link
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="actcache-link")
        self.dtypes = [disk_dtype(found.capture.dtype) for found in captures]
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
            first=0,
        )
        self._fills: list[ServedFill] = []

    def ticket(self, epoch: int, window: int, first: int) -> bytes:
        """Asks for the rows of a window from this rank's slot `first` on."""
        return self._draft.model_copy(update={"epoch": epoch, "window": window, "first": first}).encode()

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


def connect(url: str, storage_options: Mapping[str, Any] | None) -> tuple[Link, str]:
    """A connection to a service, and the name of the store meant by `url`; NotFoundError lists those there are."""
    address = parse_address(url)
    link = Link(address.location, Credentials.of(storage_options or {}))
    names = link.ask("names", NamesRequest(store="", key=""), patience_s=_FIRST_CONTACT_S)["names"]
    if address.store:
        if address.store in names:
            return link, address.store
    elif len(names) == 1:
        return link, names[0]
    raise NotFoundError(
        f"no store {address.store!r} at {address.location}; it serves {', '.join(names) or 'none'}"
    )


def open_objects(
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Objects:
    """The objects of a store behind a service."""
    return _objects(*connect(url, storage_options), cache_dir, cache_bytes)


def _objects(
    link: Link, store: str, cache_dir: str | os.PathLike[str] | None, cache_bytes: int | None
) -> Objects:
    objects = ServedObjects(link, store)
    if cache_dir is None:
        return objects
    digest = hashlib.sha256(objects.url.encode() + b"\n" + objects.read("zarr.json")).hexdigest()
    cache = ChunkCache(Path(cache_dir), CACHE_BYTES if cache_bytes is None else cache_bytes)
    return CachedObjects(objects, cache, digest)


def open_catalog(url: str, storage_options: Mapping[str, Any] | None = None) -> Catalog:
    """A store behind a service, without what reading rows takes."""
    return Catalog(open_objects(url, storage_options))


def open_remote(
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Store:
    """Open a store behind a service.

    Args:
        url: grpc://HOST:PORT/NAME, or grpc+tls:// for TLS; without a name, the only store there is.
        storage_options: `token`; `ca`, `cert`, `key` (PEM, bytes or files); `server_name`.
        cache_dir: a local folder where chunks read one by one are kept.
        cache_bytes: the most that folder may hold.

    Raises:
        RefusedError: the service does not let this client in. UnreachableError: nobody answers there.
        NotFoundError: there is no such store; lists those there are.
    """
    link, name = connect(url, storage_options)
    return Store.of(_objects(link, name, cache_dir, cache_bytes), _connector(link, name))


def _connector(link: Link, name: str) -> Connect:
    def make(captures: list[CaptureCatalog], selection: Selection, delivery: Delivery) -> ServedWindows:
        return ServedWindows(link, name, captures, selection, delivery)

    return make
