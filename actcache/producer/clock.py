"""Where the time of a build goes: seconds per stage, from any thread."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

STAGES = ("forward", "copy", "scatter", "encode", "write", "sync")
"""In the order in which a vector passes them. `forward` is the device's own time, `copy` from it, `sync` fsync and naming."""


class Clock:
    """Seconds per stage, and `wait`: those in which the model had no buffer to fill. Of several threads each counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.spent_s: dict[str, float] = dict.fromkeys((*STAGES, "wait"), 0.0)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a `with` block to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        with self._lock:
            self.spent_s[stage] += seconds


class TimedPool(ThreadPoolExecutor):
    """Threads whose busy seconds count for one stage."""

    def __init__(self, n_threads: int, clock: Clock, stage: str) -> None:
        super().__init__(n_threads, thread_name_prefix=f"actcache-{stage}")
        self._clock, self._stage = clock, stage

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """As its base class does."""

        def timed() -> Any:
            with self._clock.timed(self._stage):
                return fn(*args, **kwargs)

        return super().submit(timed)
