"""A client's connection to a service: every call has a deadline, and is made again while there is hope.

A server that restarts, a connection that breaks and one that is too slow are the same thing here: ask again, from where
it broke off. What a server says it will not do is never asked twice.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import flight
from pydantic import BaseModel

from actcache.errors import ActcacheError, NotFoundError, RefusedError, UnreachableError, UsageError
from actcache.service.access import check_token, read_pem
from actcache.service.wire import from_flight

SCHEMES = ("grpc://", "grpc+tls://", "grpc+tcp://")
_CALL_S = 30.0
_STREAM_S = 60.0
_FIRST_PAUSE_S = 0.05
_LAST_PAUSE_S = 2.0
_OPTIONS = {
    "grpc.http2.bdp_probe": 0,  # with it gRPC takes in tens of messages that nobody has asked for yet (measured)
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2000,
    "grpc.use_local_subchannel_pool": 1,  # a new client tries at once, whatever others found before
}

T = TypeVar("T")


class Address(NamedTuple):
    """Where a service is, and the name of a store in it ("" where none was given)."""

    location: str
    store: str


def is_service(location: Any) -> bool:
    """Whether a location is that of a service."""
    return isinstance(location, str) and location.startswith(SCHEMES)


def parse_address(url: str) -> Address:
    """grpc://host:port/name, or grpc+tls://; UsageError where it is neither."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{url}: {error}") from error
    if not is_service(url) or not parts.hostname or port is None or parts.query or "@" in parts.netloc:
        raise UsageError(
            f"{url}: expected grpc://HOST:PORT/NAME or grpc+tls://HOST:PORT/NAME (a token is not part of it)"
        )
    return Address(f"{parts.scheme}://{parts.netloc}", parts.path.strip("/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """How a client proves who it is, and what it trusts.

    shared_memory  rows from a service on this machine may come through memory.
    token  sent with every call.    ca  PEM, who signed the server's certificate; None: whom this system trusts.
    cert, key  PEM, this client's own (mTLS).    server_name  in the server's certificate, where the address is another.
    """

    token: str | None = field(default=None, repr=False)
    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    shared_memory: bool = True

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Credentials":
        """From `storage_options`, where certificates may be given by their files; UsageError for what is not known."""
        known = {"token", "ca", "cert", "key", "server_name", "shared_memory"}
        if set(options) - known:
            raise UsageError(
                f"storage_options {sorted(set(options) - known)}: for a service there are {', '.join(sorted(known))}"
            )
        chosen = {name: value for name, value in options.items() if value is not None}
        for name in {"ca", "cert", "key"} & set(chosen):
            if not isinstance(chosen[name], bytes):
                chosen[name] = read_pem(Path(chosen[name]), name)
        if "token" in chosen:
            check_token(chosen["token"])
        if ("cert" in chosen) != ("key" in chosen):
            raise UsageError(
                "a client's certificate needs its key, and the key its certificate (cert and key)"
            )
        return cls(**chosen)


class Link:
    """Calls of one service. Safe to share among threads.

    patience_s  a call is made again until so long after the last sign of life of the service.
    """

    def __init__(self, location: str, credentials: Credentials, *, patience_s: float = 120.0) -> None:
        self.location, self.patience_s = location, patience_s
        self._credentials = credentials
        self._lock = threading.Lock()
        self._client: flight.FlightClient | None = None
        self._closed = threading.Event()
        self._headers = (
            [] if credentials.token is None else [(b"authorization", b"Bearer " + credentials.token.encode())]
        )
        self._heard = 0.0
        self.is_near = credentials.shared_memory and _is_local(location)
        """Whether its memory may be within reach."""
        self.was_near = False
        """Whether it was: then what cannot be read has gone, and the next will be found."""

    def _connected(self) -> flight.FlightClient:
        with self._lock:
            if self._client is None:
                found = self._credentials
                options: dict[str, Any] = {"generic_options": list(_OPTIONS.items())}
                if self._is_tls:
                    options |= {
                        "tls_root_certs": found.ca,
                        "cert_chain": found.cert,
                        "private_key": found.key,
                    }
                    options |= {"override_hostname": found.server_name}
                elif found.token is not None and not _is_local(self.location):
                    raise UsageError(f"{self.location}: a token is not sent without TLS; use grpc+tls://")
                try:
                    self._client = flight.FlightClient(
                        self.location, **{name: value for name, value in options.items() if value is not None}
                    )
                except (pa.ArrowException, ValueError) as error:
                    raise UsageError(f"{self.location} cannot be used: {_first_line(error)}") from error
            return self._client

    @property
    def _is_tls(self) -> bool:
        return self.location.startswith("grpc+tls")

    def _again(self, client: flight.FlightClient) -> None:
        with self._lock:
            if self._client is client:
                self._client = None

    def call(
        self, kind: str, request: BaseModel | None = None, *, patience_s: float | None = None
    ) -> list[bytes]:
        """All results of an action."""
        body = b"{}" if request is None else request.model_dump_json().encode()

        def attempt(client: flight.FlightClient) -> list[bytes]:
            options = flight.FlightCallOptions(timeout=_CALL_S, headers=self._headers)
            return [found.body.to_pybytes() for found in client.do_action(flight.Action(kind, body), options)]

        return self._until(attempt, kind, patience_s)

    def ask(self, kind: str, request: BaseModel | None = None, *, patience_s: float | None = None) -> Any:
        """The JSON that an action answers with."""
        return json.loads(b"".join(self.call(kind, request, patience_s=patience_s)))

    def messages(
        self,
        ticket_of: Callable[[], bytes | None],
        take: Callable[[pa.RecordBatch, dict[str, Any]], bool],
        hold: "Hold",
    ) -> None:
        """Hand messages to `take` until `ticket_of`, asked before every call and after every break, says None.

        take  says whether more of this call is wanted.
        """

        def attempt(client: flight.FlightClient) -> bool:
            ticket = ticket_of()
            if ticket is None:
                return True
            options = flight.FlightCallOptions(timeout=_STREAM_S, headers=self._headers)
            reader = client.do_get(flight.Ticket(ticket), options)
            hold.reader = reader
            try:
                for batch, said in _chunks(reader):
                    is_more_wanted = take(batch, said)
                    self._heard = time.monotonic()
                    if not is_more_wanted:
                        reader.cancel()
                        break
            finally:
                hold.reader = None
            return False

        while not self._until(attempt, "do_get", None, hold):
            pass

    def _until(
        self,
        attempt: Callable[[flight.FlightClient], T],
        what: str,
        patience_s: float | None,
        hold: "Hold | None" = None,
    ) -> T:
        patience_s = self.patience_s if patience_s is None else patience_s
        began, n_tries, pause_s = time.monotonic(), 0, _FIRST_PAUSE_S
        while True:
            client, heard = self._connected(), self._heard
            n_tries += 1
            try:
                return attempt(client)
            except ActcacheError:
                raise  # found on this side
            except (flight.FlightError, pa.ArrowException, OSError) as error:
                if hold is not None and hold.is_over:
                    raise UnreachableError(f"a call of {self.location} was given up") from error
                self._judge(error)
                if self._heard != heard:  # it came along for a while
                    began, n_tries, pause_s = time.monotonic(), 1, _FIRST_PAUSE_S
                if time.monotonic() - began > patience_s:
                    wants = (
                        " Does it want a certificate of this client (cert=, key=)?" if self._is_tls else ""
                    )
                    raise UnreachableError(
                        f"{self.location} does not answer ({what}): {_first_line(error)}. Asked {n_tries} times in "
                        f"{time.monotonic() - began:.0f} s. Is 'actcache serve' running there?{wants} Go on from the last cursor."
                    ) from error
                self._again(client)
                if self._closed.wait(pause_s):
                    raise UnreachableError(f"the connection to {self.location} was closed") from error
                pause_s = min(_LAST_PAUSE_S, 2 * pause_s)

    def _judge(self, error: Exception) -> None:
        """Raise what it makes no sense to ask for again."""
        said = from_flight(error) if isinstance(error, flight.FlightError) else None
        if isinstance(said, UnreachableError):
            return
        if said is not None:
            raise said from None
        text = _first_line(error)
        if isinstance(error, flight.FlightUnauthenticatedError | flight.FlightUnauthorizedError):
            raise RefusedError(f"{self.location} refuses: {text}") from error
        if _is_about_certificates(str(error)):
            raise RefusedError(
                f"no connection to {self.location}: {text}. The certificates of the two sides do not fit: look at their dates, "
                f"at who signed the server's (storage_options ca=), and at whether it wants one of yours (cert=, key=)."
            ) from error
        if isinstance(error, FileNotFoundError):
            raise NotFoundError(text) from error

    def close(self) -> None:
        """Let go of the connection."""
        self._closed.set()
        with self._lock:
            self._client = None


@dataclass(slots=True)
class Hold:
    """A stream of messages that somebody else may end."""

    reader: Any = None
    is_over: bool = False

    def end(self) -> None:
        """Stop it, from any thread."""
        self.is_over = True
        reader = self.reader
        if reader is not None:
            reader.cancel()


def _chunks(reader: flight.FlightStreamReader) -> Iterator[tuple[pa.RecordBatch, dict[str, Any]]]:
    while True:
        try:
            found = reader.read_chunk()
        except StopIteration:
            return
        yield found.data, json.loads(found.app_metadata.to_pybytes())


def _is_local(location: str) -> bool:
    host = urlsplit(location).hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _is_about_certificates(text: str) -> bool:
    return any(word in text.lower() for word in ("certificate", "handshake", "ssl_", "tls_"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
