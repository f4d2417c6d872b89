"""Stores served over Arrow Flight: objects as they lie on disk, and shuffled windows decoded once for all who ask.

Every request says all it needs (`actcache.service.wire`), so a server that was restarted goes on as if nothing had been,
and which rows a trainer has had is known by its checkpoint alone. What is kept of a client between two requests only
says which windows are still wanted (`actcache.service.followers`).
"""

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from pyarrow import flight

from actcache.errors import ActcacheError, CursorError, NotFoundError, UnreachableError, UsageError
from actcache.service.access import Access
from actcache.service.numbers import Numbers
from actcache.service.rows import as_json, messages, places
from actcache.service.shelf import Served, Shelf, check_key
from actcache.service.windows import Order, WindowCache
from actcache.service.wire import (
    MESSAGE_BYTES,
    NEAR,
    NamesRequest,
    PutRequest,
    ReadRequest,
    SizeRequest,
    StreamRequest,
    WindowTicket,
    parse,
    to_flight,
)
from actcache.store.live import MOST_BYTES, consumer_file, expired_file
from actcache.store.schema import digest_of
from actcache.version import __version__

logger = logging.getLogger(__name__)

MEMORY_BYTES = 4 << 30
MOST_CALLS = 64
_MOST_RANGE_BYTES = 256 << 20
_STOP_S = 5.0
_MOST_LOGGED = 500

ACTIONS = {
    "read": "bytes of an object, or ranges of it",
    "size": "length of an object",
    "names": "names in a folder of a store",
    "put": "replace or remove the live file of a consumer",
    "list": "the stores and what they hold: JSON",
    "health": "answers while the service does",
    "status": "what it serves, to whom, and how busy it is: JSON",
    "metrics": "the same numbers in Prometheus' text format",
}


class Server(flight.FlightServerBase):
    """A service. It listens once made; `stop` ends it.

    Args:
        location: a store, or a folder with stores in it.
        access: who may call.
        host: where to listen; anything but this machine itself needs `access`.
        port: 0 takes a free one, see `port`.
        memory_bytes: bound on decoded windows.
        threads: that decode, per order.

    Raises:
        UsageError: an open address without a way to tell who calls; arguments that cannot be used.
        NotFoundError: there is no store.
    """

    def __init__(
        self,
        location: str,
        access: Access,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        memory_bytes: int = MEMORY_BYTES,
        threads: int | None = None,
    ) -> None:
        access.check_bind(host)
        self.shelf, self.numbers = Shelf(location), Numbers()
        self.cache = WindowCache(memory_bytes, threads or min(2, os.cpu_count() or 1))
        self._is_stopping = threading.Event()
        options = access.server_options(host, port)
        self._door = options["middleware"]["access"]
        try:
            super().__init__(**options)
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"cannot listen on {host}:{port}: {str(error).splitlines()[0]}") from error

    @property
    def n_refused(self) -> int:
        """Calls without the right token."""
        return self._door.n_refused

    # What a client may ask. Whatever goes wrong leaves here as an error with a kind, without paths or traces.

    @contextmanager
    def _answering(self, method: str, context: Any) -> Iterator[Callable[[], bool]]:
        peer = context.peer()
        try:
            with self.numbers.call(method, peer):
                yield lambda: self._is_stopping.is_set() or context.is_cancelled()
        except Exception as error:  # noqa: BLE001 - nothing else may leave
            raise self._as_sent(error, method, peer) from None

    def _as_sent(self, error: Exception, method: str, peer: str) -> Exception:
        if isinstance(error, flight.FlightError):
            return error
        if self._is_stopping.is_set():  # whatever it is: another server will do better
            return to_flight(UnreachableError("the service is stopping"))
        if isinstance(error, ActcacheError | FileNotFoundError):
            if isinstance(error, ActcacheError):  # else it was asked whether an object is there
                said = str(error.args[-1]) if error.args else ""
                logger.warning("%s from %s: %s: %s", method, peer, type(error).__name__, _on_one_line(said))
            return to_flight(error)
        number = secrets.token_hex(4)
        logger.error("%s from %s failed (%s)", method, peer, number, exc_info=error)
        return to_flight(
            ActcacheError(f"the service failed ({type(error).__name__}); its log says more under {number}")
        )

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.FlightDataStream:
        """Rows of a window."""
        with self._answering("do_get", context):
            asked: WindowTicket = parse(WindowTicket, ticket.ticket)
            order = self._order(asked)
        schema = NEAR if asked.near else order.schema
        return flight.GeneratorStream(schema, self._rows(context, order, asked))

    def _rows(self, context: Any, order: Order, asked: WindowTicket) -> Iterator[Any]:
        with self._answering("do_get rows", context) as is_over:
            answer = places if asked.near else messages
            yield from answer(self.cache, order, asked, is_over, self.numbers)

    def _order(self, asked: WindowTicket) -> Order:
        served = self.shelf.open(asked.store)
        selection = asked.selected()
        if selection.partitions % asked.world_size or asked.rank >= asked.world_size:
            raise UsageError(
                f"rank {asked.rank} of {asked.world_size}: world_size must divide partitions={selection.partitions}"
            )
        order = self.cache.order(served, selection)
        captures = digest_of([found.capture.digest for found in order.captures])
        if (asked.plan, asked.captures) != (served.catalog.plan.digest, captures):
            raise CursorError(
                f"{asked.store} is another store than the one this stream was opened on: it was replaced. Open it again."
            )
        if asked.part >= asked.parts:
            raise UsageError(f"part {asked.part} of {asked.parts}: parts are counted from 0")
        if not order.has(asked.epoch, asked.window):
            raise UsageError(f"there is no window {asked.window} in epoch {asked.epoch} of {asked.store}")
        return order

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[flight.FlightInfo]:  # noqa: ARG002
        """The stores."""
        with self._answering("list_flights", context):
            found = [self._info(name) for name in self.shelf.names()]
        yield from (one for one in found if one is not None)

    def get_flight_info(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.FlightInfo:
        """What a store holds, by its name; or by a StreamRequest the tickets of one epoch of a stream."""
        with self._answering("get_flight_info", context):
            if descriptor.descriptor_type == flight.DescriptorType.PATH:
                name = "/".join(part.decode("utf-8", "replace") for part in descriptor.path)
                info = self._info(name)
                if info is None:
                    raise NotFoundError(f"{name[:200]!r} cannot be opened; the service's log says why")
                return info
            return self._epoch(descriptor)

    def get_schema(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.SchemaResult:
        """Of the messages that `get_flight_info` leads to."""
        return flight.SchemaResult(self.get_flight_info(context, descriptor).schema)

    def do_put(self, context: Any, *_stream: Any) -> None:
        """Nothing is written this way."""
        with self._answering("do_put", context):
            raise UsageError("nothing can be written here")

    def do_exchange(self, context: Any, *_stream: Any) -> None:
        """Nothing is written this way."""
        with self._answering("do_exchange", context):
            raise UsageError("nothing can be written here")

    def _facts(self, name: str) -> dict[str, Any] | None:
        """What a store holds; None where it cannot be opened."""
        try:
            served = self.shelf.open(name)
            hooks = {n: list(c.capture.layers) for n, c in served.catalog.captures.items()}
        except NotFoundError:
            raise
        except ActcacheError as error:  # one bad store does not hide the others
            logger.warning("%s cannot be listed: %s", name, error)
            return None
        plan = served.catalog.plan
        found = {"model": plan.request.model.name, "tokens": int(served.catalog.shards.stored.sum())}
        return found | {"kept_tokens": plan.n_kept, "hooks": hooks, "plan": plan.digest}

    def _info(self, name: str) -> flight.FlightInfo | None:
        said = self._facts(name)
        if said is None:
            return None
        schema = pa.schema([], metadata={"actcache": json.dumps(said)})
        n_rows = sum(said["kept_tokens"] * len(layers) for layers in said["hooks"].values())
        return flight.FlightInfo(schema, flight.FlightDescriptor.for_path(name), [], n_rows, -1)

    def _epoch(self, descriptor: flight.FlightDescriptor) -> flight.FlightInfo:
        asked: StreamRequest = parse(StreamRequest, descriptor.command)
        served = self.shelf.open(asked.store)
        chosen = {
            "store": asked.store,
            "selection": asked.selection,
            "epoch": asked.epoch,
            "rank": asked.rank,
        }
        chosen |= {"world_size": asked.world_size, "plan": served.catalog.plan.digest}
        selection = WindowTicket(**chosen, captures="", window=0).selected()
        order = self.cache.order(served, selection)
        captures = digest_of([found.capture.digest for found in order.captures])
        n_windows = order.filling.order(asked.epoch).n_windows
        tickets = [
            WindowTicket(**chosen, captures=captures, window=window).encode() for window in range(n_windows)
        ]
        endpoints = [flight.FlightEndpoint(ticket, []) for ticket in tickets]
        return flight.FlightInfo(order.schema, descriptor, endpoints, -1, -1)

    def list_actions(self, context: Any) -> list[tuple[str, str]]:  # noqa: ARG002
        """What `do_action` does."""
        return list(ACTIONS.items())

    def do_action(self, context: Any, action: flight.Action) -> Iterator[flight.Result]:
        """Objects of stores, live files, and how the service is."""
        body = b"" if action.body is None else action.body.to_pybytes()
        with self._answering(action.type if action.type in ACTIONS else "do_action", context) as is_over:
            if action.type == "read":
                yield from self._read(parse(ReadRequest, body), is_over)
            elif action.type in ("size", "names", "put"):
                yield _result(getattr(self, f"_{action.type}")(body))
            elif action.type == "list":
                found = [(name, self._facts(name)) for name in self.shelf.names()]
                yield _result({"stores": [{"name": n, **facts} for n, facts in found if facts is not None]})
            elif action.type == "health":
                yield _result(
                    {"status": "stopping" if self._is_stopping.is_set() else "ok", "version": __version__}
                )
            elif action.type == "status":
                yield _result(self.status())
            elif action.type == "metrics":
                from actcache.service.metrics import text

                yield flight.Result(pa.py_buffer(text(self)))
            else:
                raise UsageError(f"no action {action.type[:100]!r}; there are {', '.join(ACTIONS)}")

    # Objects.

    def _object(self, store: str, key: str) -> tuple[Served, str]:
        served = self.shelf.open(store)
        return served, self.shelf.object_key(served, key)

    def _read(self, asked: ReadRequest, is_over: Callable[[], bool]) -> Iterator[flight.Result]:
        """First the lengths of the ranges, then their bytes, one after the other, in pieces."""
        served, key = self._object(asked.store, asked.key)
        objects, size = served.objects, served.objects.size(key)
        ranges = ((0, size),) if asked.ranges is None else asked.ranges
        whole = [(start, max(0, min(n, size - start))) for start, n in ranges if start >= 0 and n >= 0]
        if len(whole) != len(ranges) or (asked.ranges and sum(n for _start, n in whole) > _MOST_RANGE_BYTES):
            raise UsageError(f"these ranges of {key} cannot be read")
        yield _result({"lengths": [n for _start, n in whole]})
        for start, n_bytes in whole:
            for at in range(0, n_bytes, MESSAGE_BYTES):
                if is_over():
                    return
                piece = objects.read_range(key, start + at, min(MESSAGE_BYTES, n_bytes - at))
                self.numbers.add(object_bytes=len(piece))
                yield flight.Result(pa.py_buffer(piece))

    def _size(self, body: bytes) -> dict[str, Any]:
        asked: SizeRequest = parse(SizeRequest, body)
        served, key = self._object(asked.store, asked.key)
        return {"size": served.objects.size(key)}

    def _names(self, body: bytes) -> dict[str, Any]:
        asked: NamesRequest = parse(NamesRequest, body)
        if not asked.store and not asked.key:
            return {"names": list(self.shelf.names())}
        served, key = self._object(asked.store, asked.key)
        return {"names": served.objects.names(key)}

    def _put(self, body: bytes) -> dict[str, Any]:
        asked: PutRequest = parse(PutRequest, body)
        live = self.shelf.live(self.shelf.open(asked.store))
        kind, _, rest = check_key(asked.name).partition("-")
        name = rest.removesuffix(".json")
        files = {"consumer": consumer_file, "expired": expired_file}
        if (
            kind not in files
            or files[kind](name) != asked.name
            or (kind == "expired" and asked.text is not None)
        ):
            raise UsageError(f"{asked.name[:200]!r} is not a file that a consumer may write")
        if asked.text is None:
            live.drop(asked.name)
        elif len(asked.text) > MOST_BYTES:
            raise UsageError(f"a state of {len(asked.text):,} characters: at most {MOST_BYTES:,} are kept")
        else:
            live.put(asked.name, asked.text.encode())
        return {}

    # How it is.

    def status(self) -> dict[str, Any]:
        """What it serves, to whom, and how busy it is."""
        numbers, tally = self.numbers, self.cache.tally
        return {
            "version": __version__,
            "up_s": round(time.monotonic() - numbers.began, 1),
            "stores": list(self.shelf.names()),
            "active_calls": numbers.active,
            "peers": sorted(numbers.peers.values()),
            "calls": dict(numbers.calls),
            "failed": dict(numbers.failed),
            "refused": self.n_refused,
            "rows": numbers.rows,
            "row_bytes": numbers.row_bytes,
            "object_bytes": numbers.object_bytes,
            "windows": self.cache.n_windows,
            "window_bytes": self.cache.used_bytes,
            "window_limit_bytes": self.cache.limit_bytes,
            "windows_decoded": tally.decoded,
            "windows_reused": tally.reused,
            "windows_evicted": tally.evicted,
            "waited_for_room_s": round(tally.waited_s, 3),
        }

    def stop(self) -> bool:
        """End all calls and stop listening; False where some client kept a call open for longer than a few seconds."""
        self._is_stopping.set()
        self.cache.close()
        stopper = threading.Thread(target=self.shutdown, name="actcache-stop", daemon=True)
        stopper.start()
        stopper.join(_STOP_S)
        return not stopper.is_alive()


def _result(value: Any) -> flight.Result:
    return flight.Result(as_json(value))


def _on_one_line(text: str) -> str:
    """What a client had a part in, as the log may show it: short, and no line of its own making."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:_MOST_LOGGED])
