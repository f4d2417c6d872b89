"""A consumer that producers with a disk budget wait for: what its saved checkpoints still need, and that it lives.

    with store.stream(follow=True, consumer="a") as stream, store.register("a", stream) as consumer:
        for batch in stream:
            ...
            consumer.saved(stream.state_dict())  # AFTER a checkpoint that goes on from there is safely on disk

Shards go once every registered consumer's last saved checkpoint is past them, so `saved` must never come before the
checkpoint itself.
"""

import logging
import threading
import time
from types import TracebackType
from typing import Any, Self

from actcache.errors import ActcacheError, ExpiredError, UsageError
from actcache.reader.stream import Stream
from actcache.store.live import (
    ConsumerState,
    consumer_file,
    encode,
    expired_file,
    live_writer,
    now,
    read_budget,
    read_expiry,
    shards_needed,
    whereabouts,
)
from actcache.store.objects import Objects

logger = logging.getLogger(__name__)

BEAT_S = 2.0


class Consumer:
    """One consumer while it reads. Close it when it stops; `finished` when it needs nothing more.

    checkpoint_rows  how many rows it reads between checkpoints; None: not known.
    first_rows       how many it reads before it can save its first.

    Raises:
        UsageError: the disk budget is too small for it; says the least number of shards.
        ExpiredError: it was given up, and shards that it needs are gone.
    """

    def __init__(
        self,
        name: str,
        stream: Stream,
        objects: Objects,
        checkpoint_rows: int | None = None,
        first_rows: int = 0,
    ) -> None:
        self.name = name
        self._file, self._stream, self._objects = consumer_file(name), stream, objects
        self._writer = live_writer(objects)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._interval = _interval_shards(stream, checkpoint_rows)
        self._begins = stream.shards_for(first_rows) if first_rows else 0
        self._check_budget()
        self._check_expiry()
        self._state = ConsumerState(
            name=name,
            needs_shard=stream.first_shard(),
            at_shard=stream.first_shard(),
            keeps_shards=stream.shards_per_window,
            interval_shards=self._interval,
            begins_shards=self._begins,
            **whereabouts(),
        )
        self._rows_seen = (0, time.monotonic(), stream.waited_s())
        self._write()
        self._thread = threading.Thread(target=self._beat, name="actcache-consumer", daemon=True)
        self._thread.start()

    def _check_budget(self) -> None:
        budget = read_budget(self._objects)
        if budget is None:
            return
        if self.name not in budget.consumers:
            raise UsageError(
                f"consumer {self.name!r} is not among those the build waits for: {', '.join(budget.consumers)}. Use one of "
                f"these names, or build with --consumers that names this one too."
            )
        keeps, interval = self._stream.shards_per_window, max(1, self._interval)
        least = shards_needed(keeps, interval, self._begins, in_flight=budget.in_flight)
        n_shards = len(self._stream.shard_numbers)
        if budget.slots < min(least, n_shards):
            raise UsageError(
                f"the disk budget of {self._objects.url} ({budget.max_disk_bytes:,} bytes) holds {budget.slots} training "
                f"shards; this consumer needs {least}: {budget.in_flight} in work, {keeps} that a window mixes and {interval} "
                f"between checkpoints"
                + (f", or {self._begins} that it reads before its first checkpoint" if self._begins else "")
                + ". Give a larger --max-disk, smaller shards, a shorter --checkpoint-every, or fewer rows to begin with "
                "(--set first_window_rows=...)."
            )

    def _check_expiry(self) -> None:
        gone = read_expiry(self._objects, self.name)
        if gone is None:
            return
        if self._stream.is_within_reach():
            self._writer.drop(expired_file(self.name))
            return
        raise ExpiredError(
            f"consumer {self.name} was given up at {gone.expired_at}, after {gone.silent_s:.0f} s of silence, and shards it "
            f"needs from shard {self._stream.first_shard()} on are gone. Its run cannot go on; begin another on a new store."
        )

    # What it says.

    def saved(self, cursor: dict[str, Any]) -> None:
        """A checkpoint that goes on from `cursor` is safely on disk: what lies before it may go.

        Raises:
            ExpiredError: this consumer was given up meanwhile.
        """
        gone = read_expiry(self._objects, self.name)
        if gone is not None:
            raise ExpiredError(
                f"consumer {self.name} was given up at {gone.expired_at}, after {gone.silent_s:.0f} s of silence: shards are "
                f"no longer kept for it. The checkpoint is saved; resume from it while the shards are still there."
            )
        self._change(needs_shard=self._stream.first_shard(cursor))
        self._write()

    def update(self, *, rows: int | None = None, **facts: float | str) -> None:
        """What else it wants seen. It is written with the next beat."""
        more: dict[str, Any] = {} if rows is None else {"rows": rows}
        self._change(facts={**self._state.facts, **facts}, **more)

    def finished(self) -> None:
        """It needs nothing more: its result is safely on disk."""
        past = self._stream.shard_numbers[-1] + 1
        self._change(phase="finished", needs_shard=past, at_shard=past)
        self._write()

    def _change(self, **changes: Any) -> None:
        with self._lock:
            self._state = self._state.model_copy(update=changes)

    def _write(self) -> None:
        with self._lock:
            state = self._state
            changes: dict[str, Any] = {"beat": state.beat + 1, "seen_at": now()}
            if state.phase in ("working", "waiting"):
                follower = self._stream.follower
                is_waiting = follower is not None and follower.waiting is not None
                changes |= {
                    "phase": "waiting" if is_waiting else "working",
                    "at_shard": self._stream.first_shard(),
                    "facts": {**state.facts, **self._stream.glance()},
                    **self._speed(state.rows),
                }
            self._state = state = state.model_copy(update=changes)
            self._writer.put(self._file, encode(state))

    def _speed(self, rows: int) -> dict[str, float]:
        before, moment, waited_s = self._rows_seen
        elapsed_s = time.monotonic() - moment
        if elapsed_s < BEAT_S / 2:
            return {}
        now_waited_s = self._stream.waited_s()
        self._rows_seen = (rows, time.monotonic(), now_waited_s)
        return {
            "rows_per_s": (rows - before) / elapsed_s,
            "waited_frac": min(1.0, (now_waited_s - waited_s) / elapsed_s),
        }

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_S):
            try:
                self._write()
            except (OSError, ActcacheError) as error:  # a missed beat is no reason to stop training
                logger.warning("consumer %s could not write its state: %s", self.name, error)

    # The end.

    def close(self) -> None:
        """Stop saying that it lives. Unless it has finished, shards are kept for it until it expires."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        if self._state.phase != "finished":
            self._change(phase="stopped")
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def rows_that_fit(stream: Stream, objects: Objects) -> int | None:
    """Most rows between checkpoints for which a disk budget has room; None where there is none."""
    budget = read_budget(objects)
    if budget is None:
        return None
    n_shards = budget.slots - budget.in_flight - stream.shards_per_window
    return int(max(1, n_shards) * stream.n_rows // len(stream.shard_numbers))


def _interval_shards(stream: Stream, checkpoint_rows: int | None) -> int:
    """How many shards are gone through between checkpoints."""
    if checkpoint_rows is None:
        return 0
    rows_per_shard = stream.n_rows / len(stream.shard_numbers)
    return int(-(-checkpoint_rows // max(1, rows_per_shard)))
