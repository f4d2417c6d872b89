"""Following a store that is still being written: waiting for shards, and knowing why they do not come.

A shard is there once its ledger record is, in every capture; nothing else is looked at, so no byte is read that is not
committed. Whether anybody works on it is told by what producers write into their workspaces: their `beat` is compared
with this process's clock, so the clocks of two machines need not agree.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.errors import ActcacheError, NotFoundError, StalledError, UncommittedError, UsageError
from actcache.store.create import is_being_planned
from actcache.store.live import ProducerState, Watch, read_budget, read_producers
from actcache.store.objects import Objects
from actcache.store.open import CaptureCatalog

if TYPE_CHECKING:
    from actcache.reader.access import Store

_FIRST_POLL_S = 0.05
_LAST_POLL_S = 1.0
_LAST_REMOTE_POLL_S = 5.0
_SILENT_S = 20.0
"""A producer that has not been seen for so long is said to be silent: it writes its state every few seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What a follower waits for, and what is known of who should bring it.

    shard        the one that is not committed yet; None: the store itself, or the beginning of its build.
    waited_s     since when.
    stalled_s    since nothing was heard of any producer.
    producers    those whose workspaces are there, with the seconds since each was heard of.
    is_starved   a producer waits for room on disk that a checkpoint of this consumer would make.
    is_planned   somebody is planning the store.
    """

    shard: int | None
    waited_s: float
    stalled_s: float
    producers: tuple[tuple[ProducerState, float], ...]
    is_starved: bool = False
    is_planned: bool = False

    def __str__(self) -> str:
        what = "the build to begin" if self.shard is None else f"shard {self.shard}"
        return f"waiting for {what} ({self.waited_s:.0f} s): {self.why}"

    @property
    def why(self) -> str:
        """What producers do, in words."""
        if self.is_planned:
            return "the text is being tokenised"
        if not self.producers:
            return f"no producer is running (for {self.stalled_s:.0f} s)"
        return "; ".join(_said(state, silent_s) for state, silent_s in self.producers)


def _said(state: ProducerState, silent_s: float) -> str:
    on = "" if state.shard is None else f" on shard {state.shard}"
    if state.phase == "failed":
        return f"{state.who} failed{on} at {state.seen_at}: {state.reason}"
    if state.phase in ("finished", "stopped"):
        return f"{state.who} {state.phase} at {state.seen_at}"
    if silent_s > _SILENT_S:
        return f"{state.who} has been silent for {silent_s:.0f} s, since {state.seen_at}; it was working{on}"
    if state.phase == "blocked":
        return f"{state.who} is blocked: {state.reason}"
    speed = f", {state.tokens_per_s:,.0f} tok/s" if state.tokens_per_s else ""
    return f"{state.who} is working{on}{speed}"


def check_can_follow(
    captures: Sequence[CaptureCatalog],
    *,
    order: str,
    epochs: int | None,
    partial: bool | str,
    consumer: str | None,
    is_held_out: bool,
) -> None:
    """UsageError where a store cannot be followed so: above all where its disk budget would delete rows before they come."""
    if order != "commit":
        raise UsageError(
            f"order={order!r} mixes the whole store, so it cannot follow a build: only order='commit' can"
        )
    if partial:
        raise UsageError(
            "follow=True waits for all shards, partial= streams those that are there: give one of the two"
        )
    objects = captures[0].objects
    budget = read_budget(objects)
    n_shards = captures[0].plan.grid.n_shards
    if budget is None or is_held_out or all(len(found.live()) == n_shards for found in captures):
        return
    if epochs != 1:
        raise UsageError(
            f"epochs={epochs}: {objects.url} is built within a disk budget, so shards go once they were read: epochs=1"
        )
    if consumer is None or consumer not in budget.consumers:
        raise UsageError(
            f"{objects.url} is built within a disk budget, which keeps shards for {', '.join(budget.consumers)} only; "
            f"this consumer is {consumer or 'not named'}. Name one of them (consumer=, --consumer), or build with "
            f"--consumers that names this one too."
        )


def wait_for_store(
    find: Callable[[], "Store"],
    planned_at: Path | None,
    *,
    patience_s: float = 600.0,
    on_wait: Callable[[Waiting | None], None] = lambda _waiting: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> "Store":
    """A store that may not be there yet, once it is and its build has begun, so that a disk budget would be known.

    Args:
        find: opens it; NotFoundError: there is none yet.
        planned_at: where it is going to be on this machine; None: elsewhere.
        patience_s: give up when nobody was at it for so long.
        on_wait: told every second what is waited for, and once with None when it is there. It may raise StopWaiting.
        clock: seconds.
        sleep: waits.

    Raises:
        StalledError: nobody makes it.
    """
    begun = busy_at = clock()
    said_at, has_said = begun, False
    while True:
        store, missing = None, None
        try:
            store = find()
        except NotFoundError as error:
            missing = error
        if store is not None and (store.is_complete or _has_begun(store.objects)):
            if has_said:
                on_wait(None)
            return store
        moment = clock()
        is_planned = missing is not None and planned_at is not None and is_being_planned(planned_at)
        busy_at = moment if is_planned else busy_at
        waiting = Waiting(
            shard=None,
            waited_s=moment - begun,
            stalled_s=moment - busy_at,
            producers=(),
            is_planned=is_planned,
        )
        if waiting.stalled_s > patience_s:
            what = missing or "the store is planned, and nobody was seen building it"
            raise StalledError(
                f"{what} Waited for {waiting.waited_s:.0f} s. Run 'actcache build', then this again."
            ) from missing
        if moment - said_at >= _LAST_POLL_S or not has_said:
            on_wait(waiting)
            said_at, has_said = moment, True
        sleep(_LAST_POLL_S / 4)


def _has_begun(objects: Objects) -> bool:
    """Whether it is known if a build has a disk budget: it was announced, or producers say that they have none."""
    producers = read_producers(objects)
    return read_budget(objects) is not None or (
        bool(producers) and not any(state.is_bounded for state in producers)
    )


class Follower:
    """Waits for shards of a store that is being written.

    consumer    the name by which producers with a disk budget know this reader; None: it keeps nothing from going.
    patience_s  give up when no shard was committed and no producer was heard of for so long.
    on_wait     told every second or so while something is waited for, and once with None when it is there.
    on_starved  called, while waiting, when a checkpoint would make the room that the producer waits for.
    waiting     what it waits for now.
    """

    def __init__(
        self,
        captures: Sequence[CaptureCatalog],
        *,
        consumer: str | None = None,
        patience_s: float = 600.0,
        on_wait: Callable[[Waiting | None], None] = lambda _waiting: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._captures, self._consumer, self._patience_s = captures, consumer, patience_s
        self.on_wait = on_wait
        self.waiting: Waiting | None = None
        self.on_starved: Callable[[], None] | None = None
        self._clock, self._watch = clock, Watch(clock)
        self._committed = -1
        self._closed = threading.Event()
        self._objects = captures[0].objects
        self._last_poll_s = _LAST_REMOTE_POLL_S if self._objects.n_in_flight else _LAST_POLL_S

    def is_there(self, shard: int) -> bool:
        """Whether a shard is committed in every capture. Shards below one that was found there are not asked for again.

        Raises:
            RetiredError: its rows are gone already.
        """
        if shard <= self._committed:
            return True
        try:
            for capture in self._captures:
                capture.record(shard)
        except UncommittedError:
            return False
        self._captures[0].check_not_retired(shard)
        return True

    def are_there(self, shards: Sequence[int]) -> bool:
        """Whether all of some ascending shards are committed."""
        for shard in shards:
            if not self.is_there(shard):
                return False
            self._committed = max(self._committed, shard)
        return True

    def wait_for(self, shards: Sequence[int]) -> None:
        """Wait until all of some ascending shards are committed.

        Raises:
            StalledError: nobody brings them; says since when, and who was last seen.
            RetiredError: one is gone already.
        """
        if self.are_there(shards):
            return
        try:
            self._wait(shards)
        finally:
            was_waiting, self.waiting = self.waiting, None
        if was_waiting is not None:
            self.on_wait(None)

    def _wait(self, shards: Sequence[int]) -> None:
        begun = heard_at = said_at = self._clock()
        poll_s, has_starved = _FIRST_POLL_S, False
        while not self.are_there(shards):
            moment = self._clock()
            missing = next((s for s in shards if not self.is_there(s)), None)
            if missing is None:
                return
            producers = tuple(
                (s, self._watch.silent_s(s.nonce, s.beat)) for s in read_producers(self._objects)
            )
            living = [silent for s, silent in producers if s.phase in ("working", "blocked")]
            heard_at = max([heard_at, *(moment - silent for silent in living)])
            is_starved = any(
                self._consumer in s.waiting_for for s, _silent in producers if s.phase == "blocked"
            )
            self.waiting = waiting = Waiting(
                shard=missing,
                waited_s=moment - begun,
                stalled_s=moment - heard_at,
                producers=producers,
                is_starved=is_starved,
            )
            if moment - said_at >= _LAST_POLL_S or is_starved != has_starved:
                self.on_wait(waiting)
                said_at = moment
            if is_starved and not has_starved and self.on_starved is not None:
                self.on_starved()
            has_starved = is_starved
            if waiting.stalled_s > self._patience_s:
                raise StalledError(self._stalled(waiting))
            if self._closed.wait(poll_s):
                raise ActcacheError(f"the stream was closed while it was {waiting}")
            poll_s = min(self._last_poll_s, poll_s * 1.3)

    def _stalled(self, waiting: Waiting) -> str:
        return (
            f"shard {waiting.shard} of {self._objects.url} has not come, and for {waiting.stalled_s:.0f} s no producer was "
            f"heard of ({waiting.why}). Run the same 'actcache build' again to continue it, then go on from the last "
            f"checkpoint (--resume)."
        )

    def again(self) -> "Follower":
        """Another that waits alike, but never asks for a checkpoint."""
        return Follower(
            self._captures,
            consumer=self._consumer,
            patience_s=self._patience_s,
            on_wait=lambda waiting: self.on_wait(waiting),
            clock=self._clock,
        )

    def close(self) -> None:
        """Wake whoever waits."""
        self._closed.set()
