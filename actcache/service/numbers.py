"""What a service counts of itself."""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from actcache.errors import UnreachableError

MOST_CALLS = 64
"""Under way at once. One that comes when there are so many is told to come again."""


@dataclass(slots=True)
class Numbers:
    """What a service counts since it began.

    calls, failed, refused  by method; those that failed, and those without the right to call.
    active      calls under way.    rows, row_bytes  handed out in windows.    object_bytes  read from stores.
    """

    began: float = field(default_factory=time.monotonic)
    calls: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    active: int = 0
    rows: int = 0
    row_bytes: int = 0
    object_bytes: int = 0
    peers: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **amounts: int) -> None:
        """Add to some sums."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    @contextmanager
    def call(self, method: str, peer: str) -> Iterator[None]:
        """A call from its beginning to its end."""
        with self._lock:
            if self.active >= MOST_CALLS:
                raise UnreachableError(f"{MOST_CALLS} calls are under way: ask again in a moment")
            self.active += 1
            self.calls[method] = self.calls.get(method, 0) + 1
            key = secrets.token_hex(4)
            self.peers[key] = f"{peer} {method}"
        try:
            yield
        except (GeneratorExit, FileNotFoundError):  # left early; or asked whether something is there
            raise
        except BaseException:
            with self._lock:
                self.failed[method] = self.failed.get(method, 0) + 1
            raise
        finally:
            with self._lock:
                self.active -= 1
                del self.peers[key]
