"""A proxy on loopback that forwards HTTP to a server, counts what passes, and goes wrong on demand.

    proxy.fault = first(2, "503")           the next two GET of chunks are answered 503
    proxy.fault = always("stall")           every one sends half its body, then nothing more

A fault is chosen per request by a function of the path; it applies to GET and HEAD alike. Nothing sleeps: a stalled
answer waits until the client goes away or the proxy is closed.
"""

import http.client
import select
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

FAULTS = ("503", "500", "429", "403", "reset", "truncate", "lie", "flip", "stall", "silent")


class Seen(NamedTuple):
    """A request that was answered."""

    method: str
    path: str
    range: str
    n_bytes: int
    fault: str | None


def first(n: int, fault: str, part: str = "") -> Callable[[str], str | None]:
    """`fault` for the first `n` requests whose path contains `part`."""
    left, lock = [n], threading.Lock()

    def choose(path: str) -> str | None:
        with lock:
            if part not in path or not left[0]:
                return None
            left[0] -= 1
            return fault

    return choose


def always(fault: str, part: str = "") -> Callable[[str], str | None]:
    """`fault` for every request whose path contains `part`."""
    return lambda path: fault if part in path else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Proxy"

    def log_message(self, *_args) -> None:
        pass

    def _forward(self) -> None:
        fault = self.server.fault(self.path)
        status, headers, body = self.server.ask(self.command, self.path, dict(self.headers))
        if fault == "silent":
            self._wait_for_the_client_to_go()
            return
        if fault is not None and fault.isdigit():
            status, headers, body = int(fault), [], b"<Error><Code>SlowDown</Code></Error>"
        elif fault == "flip" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif fault == "lie":
            body = body[: len(body) // 2]
        sent = body if fault not in ("reset", "truncate", "stall") else body[: len(body) // 2]
        self.server.note(Seen(self.command, self.path, self.headers.get("Range", ""), len(sent), fault))
        self.send_response(status)
        dropped = ("content-length", "connection", "transfer-encoding", "server", "date")
        for name, value in headers:
            if name.lower() not in dropped:
                self.send_header(name, value)
        length = str(len(body)) if self.command != "HEAD" else dict(headers).get("Content-Length", "0")
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if fault == "stall":
            self._wait_for_the_client_to_go()
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif fault == "truncate":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = _forward

    def _wait_for_the_client_to_go(self) -> None:
        """Until the client closes its end, or the proxy its own."""
        self.close_connection = True
        select.select([self.connection, self.server.closing], [], [])


class Proxy(ThreadingHTTPServer):
    """Forwards to `upstream` (host, port)."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._upstream, self._local, self._lock = upstream, threading.local(), threading.Lock()
        self._connections: list[http.client.HTTPConnection] = []
        self.fault: Callable[[str], str | None] = lambda _path: None
        self.seen: list[Seen] = []
        self.closing, self._close = socket.socketpair()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ask(self, method: str, path: str, headers: dict[str, str]):
        connection = http.client.HTTPConnection(*self._upstream, timeout=30)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def count(self, part: str = "", method: str = "GET") -> int:
        """Requests whose path contains `part`."""
        return sum(part in seen.path and seen.method == method for seen in self.seen)

    def n_bytes(self, part: str = "") -> int:
        """Bytes of bodies sent for paths that contain `part`."""
        return sum(seen.n_bytes for seen in self.seen if part in seen.path)

    def handle_error(self, *_args) -> None:
        """Clients that went away are what this is for."""

    def close(self) -> None:
        self._close.close()  # wakes every stalled answer
        self.shutdown()
        self.server_close()
        self._thread.join()
        self.closing.close()
