"""Who may talk to a service: tokens, certificates, and where it may listen.

A token goes in the header `authorization: Bearer TOKEN` of every call. Over TLS the client knows the server by its
certificate; with `client_ca` the server also lets in only clients that show one signed by it (mTLS).
"""

import hmac
import ipaddress
import logging
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import flight

from actcache.errors import NotFoundError, RefusedError, UsageError
from actcache.service.wire import to_flight

logger = logging.getLogger(__name__)

_LEAST_TOKEN = 16
_BEARER = "Bearer "


def read_pem(path: Path | str, what: str) -> bytes:
    """A file of certificates or keys."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"{what}: there is no file {path}") from error
    if b"-----BEGIN " not in data:
        raise UsageError(f"{what}: {path} is not a PEM file (it has no -----BEGIN line)")
    return data


def check_token(token: str) -> str:
    """A token that can be used; UsageError where it is too easily guessed or cannot travel in a header."""
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"a token needs at least {_LEAST_TOKEN} printable ASCII characters without spaces; this one has {len(token)}. "
            f"'openssl rand -hex 32' makes one."
        )
    return token


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How clients prove who they are. None of it: everybody on this machine is let in, and nobody else.

    token       what every call must carry.
    cert, key   PEM, the server's own: TLS.    client_ca  PEM, who signs clients' certificates: mTLS.
    """

    token: str | None = field(default=None, repr=False)
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    client_ca: bytes | None = None

    def __post_init__(self) -> None:
        if self.token is not None:
            check_token(self.token)
        if (self.cert is None) != (self.key is None):
            raise UsageError("TLS needs both: a certificate and its key (--tls-cert and --tls-key)")
        if self.client_ca is not None and self.cert is None:
            raise UsageError("clients' certificates (--client-ca) need TLS: --tls-cert and --tls-key")

    def check_bind(self, host: str) -> None:
        """UsageError where the address can be reached from elsewhere and nothing says who may come."""
        if is_loopback(host):
            return
        if self.token is None and self.client_ca is None:
            raise UsageError(
                f"--host {host} can be reached from other machines, and nothing says who may come: give a token "
                f"(--token-file), or clients' certificates (--client-ca with TLS). Without --host only this machine is served."
            )
        if self.cert is None:
            raise UsageError(
                f"--host {host} can be reached from other machines, and without TLS the token could be read on the way: give "
                f"--tls-cert and --tls-key. Or serve this machine only, and reach it through ssh -L."
            )

    def server_options(self, host: str, port: int) -> dict[str, Any]:
        """What `FlightServerBase` takes."""
        name = f"[{host}]" if ":" in host else host
        options: dict[str, Any] = {
            "location": f"{'grpc' if self.cert is None else 'grpc+tls'}://{name}:{port}",
            "middleware": {"access": _Door(self.token)},
        }
        if self.cert is not None:
            options["tls_certificates"] = [(self.cert, self.key)]
        if self.client_ca is not None:
            options |= {"verify_client": True, "root_certificates": self.client_ca}
        return options


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. A name is looked up: all it stands for must be."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UsageError(f"--host {host}: no such address ({error})") from error
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


class _Door(flight.ServerMiddlewareFactory):
    """Looks at every call before anything else does."""

    def __init__(self, token: str | None) -> None:
        super().__init__()
        self._token = None if token is None else token.encode()
        self.n_refused = 0

    def start_call(self, info: flight.CallInfo, headers: dict[str, list[Any]]) -> None:
        """Refuses a call without the right token; says nothing about anything."""
        if self._token is None:
            return
        given = [
            value for name, values in headers.items() if name.lower() == "authorization" for value in values
        ]
        sent = given[0] if given else ""
        text = sent.decode("latin-1") if isinstance(sent, bytes) else str(sent)
        is_right = text.startswith(_BEARER) and hmac.compare_digest(
            text.removeprefix(_BEARER).encode("utf-8", "replace"), self._token
        )
        if not is_right:
            self.n_refused += 1
            logger.warning("refused a call of %s: %s token", info.method, "a wrong" if given else "no")
            raise to_flight(
                RefusedError("this service wants a token, and the right one (storage_options token=)")
            )
