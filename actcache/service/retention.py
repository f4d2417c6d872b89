"""A bounded disk between a producer and its consumers: shards make room once no saved checkpoint needs them.

A shard may be started while everything up to it fits: what is committed at its size, what is not at the most it can
take. So no two producers need to agree on anything beyond what is on disk, and what is on disk never exceeds the budget,
temporary files and side arrays included. To make room, the lowest shards that no registered consumer needs are retired:
first that is written down, then their rows are deleted. Nothing is retired before room is needed.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from actcache.errors import ExpiredError, UsageError
from actcache.producer.presence import Presence
from actcache.service.footprint import Footprint
from actcache.store.disk import Disk
from actcache.store.live import (
    BUDGET,
    Budget,
    ConsumerState,
    Expiry,
    LocalLive,
    Watch,
    check_name,
    encode,
    expired_file,
    now,
    read_consumers,
    read_expiry,
    shards_needed,
)
from actcache.store.open import Catalog
from actcache.store.retire import remove_retired, retire
from actcache.version import __version__

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Shards that one producer may be working on: one the model runs on, one that is being written."""
_STUCK_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBudget:
    """What `--max-disk` and what goes with it say.

    max_bytes   the most the store's folder may take, ever.
    consumers   who is waited for, by name.
    expire_s    a consumer that is in the way and not heard of for this long is given up.
    n_workers   producers that fill the store together.
    """

    max_bytes: int
    consumers: tuple[str, ...]
    expire_s: float = 3600.0
    n_workers: int = 1

    def __post_init__(self) -> None:
        if not self.consumers or len(set(self.consumers)) != len(self.consumers):
            raise UsageError(
                f"a disk budget needs to know who reads the shards before they go: --consumers a,b; got "
                f"{','.join(self.consumers) or 'none'}"
            )
        for name in self.consumers:
            check_name(name)


class Blocked(NamedTuple):
    """Why a producer waits: for people, and by the names of consumers."""

    reason: str
    waiting_for: tuple[str, ...]


def bounded_by(
    budget: DiskBudget, on_blocked: Callable[[Blocked | None], None] = lambda _why: None
) -> Callable[[Catalog, Disk, Presence], "Retention"]:
    """What `build` takes as `admission`: a disk budget, and who is told that the producer waits."""

    def make(catalog: Catalog, disk: Disk, presence: Presence) -> Retention:
        said: list[Blocked | None] = [None]

        def tell(why: Blocked | None) -> None:
            if why != said[0]:
                said[0] = why
                presence.blocked(*(why or (None, ())))
                on_blocked(why)

        made = Retention(catalog, disk, budget, on_blocked=tell)
        presence.also_tells(lambda: {"used_bytes": made.used_bytes})
        return made

    return make


def lift_budget(root: Path) -> None:
    """Forget the disk budget of a store: what is built from now on stays."""
    LocalLive(root).drop(BUDGET.rpartition("/")[2])


class Retention:
    """Says which shards a producer may start. Made when the store's plan is there and its workspace is locked.

    on_blocked  told why the producer waits, and None when it goes on.
    used_bytes  what the store takes, what is set aside for its records included.
    is_enough   no consumer needs what has not been made yet.
    """

    def __init__(
        self,
        catalog: Catalog,
        disk: Disk,
        budget: DiskBudget,
        *,
        on_blocked: Callable[[Blocked | None], None] = lambda _why: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalog, self.disk, self.budget = catalog, disk, budget
        self._on_blocked, self._clock = on_blocked, clock
        self.is_enough, self._is_blocked = False, False
        self._stuck_since: float | None = None
        self._footprint = Footprint(catalog, disk.root, len(budget.consumers))
        self._live, self._watch = LocalLive(disk.root), Watch(clock)
        self._cost = self._footprint.most.copy()
        self._settled = np.zeros(catalog.grid.n_shards, np.bool_)
        self._retired: set[int] = set()
        self.used_bytes = 0
        self._look()
        for shard in sorted(self._retired):
            self._remove(shard)
        self._check()
        self._announce()

    # Whether it can work.

    @property
    def _n_for_good(self) -> int:
        """Shards that are never retired: the holdout, and always the first (see `Store.stream`, outlier_norm_ratio)."""
        return max(1, self.catalog.grid.n_holdout_shards)

    @property
    def room_bytes(self) -> int:
        """Bytes for shards."""
        return self.budget.max_bytes - self._footprint.fixed_bytes

    @property
    def slots(self) -> int:
        """Training shards that fit beside the holdout, if none of them can be compressed."""
        held = self._n_for_good
        return int((self.room_bytes - self._cost[:held].sum()) // max(1, self._footprint.most[held:].max()))

    def least_bytes(self, n_training_shards: int) -> int:
        """The least budget that holds this many training shards."""
        held = self._n_for_good
        n = min(n_training_shards, self.catalog.grid.n_shards - held)
        return int(
            self._footprint.fixed_bytes + self._cost[:held].sum() + n * self._footprint.most[held:].max()
        )

    def _check(self) -> None:
        """Everything fits, or what the consumers that are known keep, what is in flight and a checkpoint interval do."""
        if self._cost.sum() <= self.room_bytes:
            return
        in_flight = IN_FLIGHT * self.budget.n_workers
        known = [state for state in self._consumers().values() if state is not None]
        n_shards = max(
            (
                shards_needed(s.keeps_shards, s.interval_shards, s.begins_shards, in_flight=in_flight)
                for s in known
            ),
            default=shards_needed(in_flight=in_flight),
        )
        least = self.least_bytes(n_shards)
        if least > self.budget.max_bytes:
            raise UsageError(
                f"--max-disk {self.budget.max_bytes:,} bytes is too little. The least is {least:,}: "
                f"{self._footprint.fixed_bytes:,} for the plan and its records, the holdout, and room for {n_shards} shards, "
                f"of up to {int(self._footprint.most.max()):,} bytes each: those that a consumer mixes, {in_flight} in work, "
                f"and those between checkpoints. Give that much, or build with smaller shards (--sequences-per-shard or "
                f"--shard-memory)."
            )

    def _announce(self) -> None:
        said = Budget(
            max_disk_bytes=self.budget.max_bytes,
            slots=min(self.slots, self.catalog.grid.n_shards),
            in_flight=IN_FLIGHT * self.budget.n_workers,
            consumers=self.budget.consumers,
            expire_s=self.budget.expire_s,
            set_at=now(),
        )
        self._live.put(BUDGET.rpartition("/")[2], encode(said))

    # What is on disk.

    def _look(self) -> None:
        """Costs as they are now. A shard counts at what it takes once it is committed in every capture."""
        captures = list(self.catalog.captures.values())
        committed = set.intersection(*(set(found.committed()) for found in captures))
        self._retired = set(captures[0].retired())
        for shard in np.flatnonzero(~self._settled).tolist():
            if shard in self._retired or shard in committed:
                self._cost[shard] = self._footprint.actual(shard)
                self._settled[shard] = shard not in self._retired or self._cost[shard] == 0
        self.used_bytes = int(self._footprint.fixed_bytes + self._cost[self._settled].sum())

    def _consumers(self) -> dict[str, ConsumerState | None]:
        """The registered consumers that are not given up; None for one that has not come yet."""
        found = read_consumers(self.catalog.objects)
        return {
            name: found.get(name)
            for name in self.budget.consumers
            if read_expiry(self.catalog.objects, name) is None
        }

    # Admission.

    def admits(self, shard: int) -> bool:
        """Whether `shard` may be started now. Makes room where that is possible; otherwise says why not.

        Raises:
            ExpiredError: no consumer is left.
            UsageError: it would wait for ever: the budget is too small for what the consumers keep.
        """
        self.disk.sweep()  # what dead producers left behind takes room
        self._look()
        if self._excess(shard) > 0:
            consumers = self._consumers()
            needed = self._needed(consumers)
            self._make_room(shard, needed, consumers)
            if self._excess(shard) > 0:
                self._wait(shard, needed, consumers)
                return False
        self._stuck_since = None
        if self._is_blocked:
            self._is_blocked = False
            self._on_blocked(None)
        return True

    def _wait(self, shard: int, needed: int, consumers: dict[str, ConsumerState | None]) -> None:
        """Say what is waited for, unless it is nothing any more; give up who is lost."""
        if consumers and needed >= self.catalog.grid.n_shards:
            self.is_enough = True
            return
        why = self._why(shard, consumers, needed)
        self._is_blocked = True
        self._on_blocked(why)
        self._expire(consumers, why)
        self._stuck_since = self._check_stuck(shard, consumers, self._stuck_since)

    def _excess(self, shard: int) -> int:
        """Bytes that are lacking for everything up to `shard` and what is committed beyond it."""
        beyond = self._cost[shard + 1 :][self._settled[shard + 1 :]].sum()
        return int(self._cost[: shard + 1].sum() + beyond - self.room_bytes)

    def _needed(self, consumers: dict[str, ConsumerState | None]) -> int:
        """The first training shard that somebody still needs."""
        held, n_shards = self.catalog.grid.n_holdout_shards, self.catalog.grid.n_shards
        return min(
            (held if state is None else _needs(state, n_shards) for state in consumers.values()),
            default=held,
        )

    def _make_room(self, shard: int, needed: int, consumers: dict[str, ConsumerState | None]) -> None:
        """Retire the lowest shards that nobody needs until `shard` fits."""
        n_shards = self.catalog.grid.n_shards
        at = {name: _needs(state, n_shards) for name, state in consumers.items() if state is not None}
        for candidate in range(self._n_for_good, min(needed, shard)):
            if self._excess(shard) <= 0:
                return
            if self._settled[candidate] and candidate not in self._retired:
                spec = self.catalog.arrays["retired"]
                retire(self.disk, spec, self.catalog.plan, candidate, at, __version__)
                self._retired.add(candidate)
                self._remove(candidate)

    def _remove(self, shard: int) -> None:
        remove_retired(self.disk, (found.arrays for found in self.catalog.captures.values()), shard)
        self._cost[shard], self._settled[shard] = self._footprint.actual(shard), True

    # Waiting.

    def _why(self, shard: int, consumers: dict[str, ConsumerState | None], needed: int) -> Blocked:
        held = self._n_for_good
        said, waiting_for = [], []
        for name, state in consumers.items():
            if state is None:
                said.append(f"{name} to begin")
            elif _needs(state, self.catalog.grid.n_shards) == needed:
                silent = self._watch.silent_s(name, state.beat)
                unseen = f", not heard of for {silent:.0f} s" if silent > _STUCK_S else ""
                said.append(
                    f"{name} to save a checkpoint past shard {state.needs_shard} (it is at shard {state.at_shard}"
                    f"{unseen})"
                )
            else:
                continue
            waiting_for.append(name)
        return Blocked(
            f"no room for shard {shard}: {self.used_bytes / 1e6:,.0f} of {self.budget.max_bytes / 1e6:,.0f} MB are taken "
            f"by shards {max(needed, held)} and on; waiting for {', '.join(said) or 'nobody'}",
            tuple(waiting_for),
        )

    def _expire(self, consumers: dict[str, ConsumerState | None], why: Blocked) -> None:
        for name, state in consumers.items():
            silent = self._watch.silent_s(name, None if state is None else state.beat)
            if name in why.waiting_for and silent > self.budget.expire_s:
                logger.warning(
                    "consumer %s has not been heard of for %.0f s while the disk budget was full, and is given up: shards are "
                    "no longer kept for it",
                    name,
                    silent,
                )
                gone = Expiry(
                    name=name,
                    expired_at=now(),
                    silent_s=round(silent, 1),
                    needs_shard=self.catalog.grid.n_holdout_shards if state is None else state.needs_shard,
                )
                self._live.put(expired_file(name), encode(gone))
        if not self._consumers():
            raise ExpiredError(
                f"no consumer is left: {', '.join(self.budget.consumers)} were not heard of for "
                f"{self.budget.expire_s:g} s each while the disk budget was full. Start one again, then run the same "
                f"command again: every committed shard is safe."
            )

    def _check_stuck(
        self, shard: int, consumers: dict[str, ConsumerState | None], since: float | None
    ) -> float | None:
        """UsageError where everybody waits for everybody: consumers for this shard, and it for room only they could make."""
        states = list(consumers.values())
        is_lowest = bool(self._settled[:shard].all())
        starved = [s is not None and s.phase == "waiting" and s.needs_shard >= s.at_shard for s in states]
        if not (states and is_lowest and all(starved)):
            return None
        since = self._clock() if since is None else since
        if self._clock() - since > _STUCK_S:
            keeps = max(state.keeps_shards for state in states if state is not None)
            raise UsageError(
                f"the disk budget of {self.budget.max_bytes:,} bytes is too small: all consumers have saved and wait for shard "
                f"{shard}, which does not fit beside the {keeps} they mix. The least is "
                f"{self.least_bytes(shards_needed(keeps, in_flight=IN_FLIGHT * self.budget.n_workers)):,} bytes."
            )
        return since


def _needs(state: ConsumerState, n_shards: int) -> int:
    return n_shards if state.phase == "finished" else state.needs_shard
