"""Objects behind a network: adjacent ranges in one request, every request with a deadline, bounded retries.

    read_ranges -> merge_ranges -> request -> Client.get    (one attempt, with its own deadline)
                                      `-- on a 5xx, a reset, a short body or a deadline: wait, try again

A missing object is a FileNotFoundError at once, a refusal (credentials, permissions) an UnreachableError at once. What
cannot be reached within the attempts and the time allowed is an UnreachableError that says what was tried.
"""

import io
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeVar

from actcache.errors import ActcacheError, UnreachableError, UsageError
from actcache.store.keyed import derive

GAP_BYTES = 256 * 1024
FREE_GAP_BYTES = 16
WASTE = 0.03
REQUEST_BYTES = 8 * 2**20
IN_FLIGHT = 16
_PARTS_AT_ONCE = 4
_CAUSE_CHARACTERS = 300

T = TypeVar("T")
Range = tuple[int, int]  # first byte, number of bytes


class RefusedError(Exception):
    """What a client raises where trying again cannot help: credentials, permissions, a request that is wrong."""


class Client(Protocol):
    """One attempt at a time, each within the deadline the client was made with; may be called from many threads.

    A missing object is FileNotFoundError, a refusal RefusedError; any other exception may pass if tried again.
    """

    name: ClassVar[str]

    def get_whole(self, key: str, most: int) -> bytes | int:
        """All bytes of an object, or its length where that is more than `most`."""
        ...

    def get(self, key: str, start: int, n_bytes: int) -> bytes | memoryview:
        """Bytes [start, start + n_bytes), n_bytes > 0; fewer where the object ends before."""
        ...

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        ...

    def names(self, key: str) -> list[str]:
        """Names directly inside a folder, in any order. May be FileNotFoundError where there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to try.

    attempts      at each request.         attempt_s  deadline of one.
    first_wait_s  before the second attempt, twice that before the third, and so on up to `most_wait_s`; each wait is
                  half fixed, half a hash of machine, process and request, so that readers do not come back together.
    total_s       no attempt is begun that could end later than this after the first began.
    """

    attempts: int = 6
    attempt_s: float = 30.0
    first_wait_s: float = 0.2
    most_wait_s: float = 10.0
    total_s: float = 120.0

    def wait_s(self, what: str, attempt: int) -> float:
        """Seconds to wait after failed attempt number `attempt`, counted from 1."""
        longest = min(self.most_wait_s, self.first_wait_s * 2.0 ** (attempt - 1))
        jitter = derive(os.getpid(), "retry", socket.gethostname(), what, attempt) / 2.0**64
        return longest * (0.5 + 0.5 * jitter)


class Merged(NamedTuple):
    """One request that covers several ranges: those numbered `parts` in the list asked for."""

    start: int
    n_bytes: int
    parts: list[int]


def merge_ranges(
    ranges: Sequence[Range],
    *,
    gap_bytes: int = GAP_BYTES,
    waste: float = WASTE,
    request_bytes: int = REQUEST_BYTES,
) -> list[Merged]:
    """Few requests that cover all ranges, in order of their first byte.

    Neighbours share a request while the gap between them is under `gap_bytes`, all gaps of the request together stay
    within the share `waste` of what was asked for, and the request within `request_bytes`. (A gap of 256 KiB costs
    less than a request; without the share, reading few chunks of each shard would read nearly all of it. The four
    bytes behind each chunk do not count.)
    """
    merged: list[Merged] = []
    end = asked = wasted = 0
    for part in sorted(range(len(ranges)), key=ranges.__getitem__):
        start, n_bytes = ranges[part]
        new_end = max(end, start + n_bytes)
        gap, fresh = max(0, start - end), new_end - max(end, start) if merged else n_bytes
        lost = gap if gap > FREE_GAP_BYTES else 0
        if (
            merged
            and gap < gap_bytes
            and wasted + lost <= waste * (asked + fresh)
            and new_end - merged[-1].start <= request_bytes
        ):
            merged[-1].parts.append(part)
            merged[-1] = merged[-1]._replace(n_bytes=new_end - merged[-1].start)
            end, asked, wasted = new_end, asked + fresh, wasted + lost
        else:
            merged.append(Merged(start, n_bytes, [part]))
            end, asked, wasted = start + n_bytes, n_bytes, 0
    return merged


def short_cause(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split("Debug source")[0].split())
    return f"{type(error).__name__}: {text[:_CAUSE_CHARACTERS]}".rstrip(": ")


class RemoteObjects:
    """Objects behind a `Client`."""

    n_in_flight = IN_FLIGHT

    def __init__(self, url: str, client: Client, patience: Patience | None = None) -> None:
        self.url, self.client = url, client
        self._patience = patience or Patience()
        self._pid = os.getpid()

    def read(self, key: str) -> bytes:
        """All bytes of an object; a large one in parts, each with its own attempts."""
        found = self._try("read", key, lambda: self.client.get_whole(key, REQUEST_BYTES))
        if isinstance(found, bytes):
            return found
        starts = range(0, found, REQUEST_BYTES)
        whole = io.BytesIO()
        with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="actcache-parts") as pool:
            for part in pool.map(lambda s: self._get(key, s, min(REQUEST_BYTES, found - s)), starts):
                whole.write(part)
        return whole.getvalue()

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
        """Several ranges of an object in the order given, one request after the other for those that lie apart."""
        found: list[bytes | memoryview] = [b""] * len(ranges)
        for request in merge_ranges(ranges):
            if not request.n_bytes:
                continue
            body = memoryview(self._get(key, request.start, request.n_bytes))
            for part in request.parts:
                start, n_bytes = ranges[part]
                found[part] = body[start - request.start : start - request.start + n_bytes]
        return found

    def _get(self, key: str, start: int, n_bytes: int) -> bytes | memoryview:
        def get() -> bytes | memoryview:
            return self.client.get(key, start, n_bytes)

        body = self._try("read", key, get)
        if len(body) < n_bytes:  # cut off on the way without the client seeing it, or really too short
            body = self._try("read", key, get)
        return body

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        return self._try("ask the size of", key, lambda: self.client.size(key))

    def names(self, key: str) -> list[str]:
        """Names directly inside the folder `key`, sorted; empty when there is no such folder."""
        try:
            return sorted(self._try("list", key, lambda: self.client.names(key)))
        except FileNotFoundError:
            return []

    def _try(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Call until it succeeds, the object turns out to be missing, or patience ends."""
        if os.getpid() != self._pid:
            raise UsageError(
                f"{self.url} was opened in another process: its connections did not survive the fork. Open the store "
                f"in the process that reads it."
            )
        patience, started = self._patience, time.perf_counter()
        attempt = 0
        while True:
            attempt += 1
            try:
                return call()
            except (FileNotFoundError, ActcacheError, MemoryError):
                raise
            except RefusedError as error:
                raise UnreachableError(
                    f"could not {verb} {self._name(key)}: refused ({error}). Check the credentials, what they allow, "
                    f"and the endpoint (AWS_* environment variables or storage_options=)."
                ) from error
            except Exception as error:
                spent, wait = time.perf_counter() - started, patience.wait_s(f"{verb} {key}", attempt)
                if attempt >= patience.attempts or spent + wait + patience.attempt_s > patience.total_s:
                    raise UnreachableError(
                        f"could not {verb} {self._name(key)}: {attempt} attempts in {spent:.1f} s failed, the last "
                        f"with {short_cause(error)}. Nothing is wrong with the store as far as can be seen from here: "
                        f"check network and endpoint, then go on from the last cursor."
                    ) from error
            time.sleep(wait)

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url
