"""A producer says that it lives and what it is doing, in its workspace, for followers and for `actcache top`."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from actcache.store.disk import Disk
from actcache.store.live import (
    LIVE_DIR,
    STATE,
    LocalLive,
    ProducerState,
    encode,
    ended_file,
    now,
    replace_file,
    whereabouts,
)

if TYPE_CHECKING:
    from actcache.store.open import Catalog

logger = logging.getLogger(__name__)

BEAT_S = 2.0
_RATE_S = 30.0

Facts = Callable[[], dict[str, Any]]
MakeAdmission = Callable[["Catalog", Disk, "Presence"], "Admission"]
"""Makes what decides, once the store's plan is there and its producer is."""


class Admission(Protocol):
    """Decides which shards may be started: what a disk budget does.

    is_enough  nobody needs what has not been made yet.
    """

    is_enough: bool

    def admits(self, shard: int) -> bool:
        """Whether `shard` may be started now; makes room for it where that is possible, and says why where not."""
        ...


class Presence:
    """The state of one producer, written every few seconds while it lives. One that does not end well leaves its last.

    What it says is written at once, on a thread of its own: putting a file in another's place may take a disk 10 ms, in
    which the model could run.

    facts  asked with every beat: `tokens_per_s`, `stage_s`, `n_committed`, `used_bytes`.
    """

    def __init__(
        self,
        disk: Disk,
        n_shards: int,
        facts: Facts,
        *,
        rank: int = 0,
        world_size: int = 1,
        is_bounded: bool = False,
    ) -> None:
        self._path, self._facts = disk.workspace / STATE, facts
        self._live = LocalLive(disk.root)
        self._lock, self._is_closing = threading.Lock(), False
        self._news = threading.Event()
        self._state = ProducerState(
            nonce=disk.nonce,
            n_shards=n_shards,
            rank=rank,
            world_size=world_size,
            is_bounded=is_bounded,
            **whereabouts(),
        )
        self._thread = threading.Thread(target=self._beat, name="actcache-presence", daemon=True)

    def also_tells(self, facts: Facts) -> None:
        """More to be asked with every beat."""
        before = self._facts
        self._facts = lambda: {**before(), **facts()}

    def starts(self, shard: int) -> None:
        """It works on a shard, or waits to."""
        self._say(shard=shard)

    def blocked(self, reason: str | None, waiting_for: tuple[str, ...] = ()) -> None:
        """It waits for room, and for whom; None: it goes on."""
        phase: Literal["blocked", "working"] = "working" if reason is None else "blocked"
        self._say(phase=phase, reason=reason, waiting_for=waiting_for)

    def _say(self, **changes: Any) -> None:
        with self._lock:
            self._state = self._state.model_copy(update=changes)
        self._news.set()

    def _write(self) -> None:
        facts = self._facts()
        with self._lock:
            changes = {"beat": self._state.beat + 1, "seen_at": now(), **facts}
            self._state = state = self._state.model_copy(update=changes)
        try:
            replace_file(self._path, encode(state))
        except OSError as error:  # to be seen is not worth stopping for
            logger.warning("the state of this producer could not be written: %s", error)

    def _beat(self) -> None:
        while not self._is_closing:
            self._news.wait(BEAT_S)
            self._news.clear()
            self._write()

    def __enter__(self) -> Self:
        self._live.drop(ended_file(self._state.rank))
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_closing = True
        self._news.set()
        self._thread.join()
        if error is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self._say(phase="stopped", reason="asked to stop")
        else:
            self._say(phase="failed", reason=f"{type(error).__name__}: {error}")
        self._write()
        try:
            self._live.put(ended_file(self._state.rank), encode(self._state))  # the workspace goes
        except OSError as failed:
            logger.warning("how this producer ended could not be written: %s", failed)


def forget_ended(root: Path) -> None:
    """Nothing is left to make: how producers ended that did not come so far is of no interest any more."""
    live = LocalLive(root)
    for path in (root / LIVE_DIR).glob("ended-*.json"):
        live.drop(path.name)


class Rate:
    """Units per second over the last while, from a count that only rises."""

    def __init__(self, count: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._clock = count, clock
        self._seen: list[tuple[float, int]] = []

    def __call__(self) -> float:
        """Over the last half minute."""
        moment, count = self._clock(), self._count()
        recent = [one for one in self._seen if moment - one[0] < _RATE_S]
        self._seen = [*recent, (moment, count)]
        (first, before), elapsed = self._seen[0], moment - self._seen[0][0]
        return (count - before) / elapsed if elapsed > 0 and first < moment else 0.0
