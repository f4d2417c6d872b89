"""Several processes fill one store: who makes which shard, and what becomes of the shards of one that dies or sleeps.

Nobody hands out work. Every worker goes through the shards in an order of its own - its share first, in plan order, then
what others have left - and skips what is committed or claimed by a living one. Commits are exclusive, so the worst that
can happen is a shard made twice and committed once. Whoever finds nothing free waits until the store is complete, and
takes over a claimed shard when it has seen no end of it for long: a worker that sleeps, or a machine whose locks do not
reach this one.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from actcache.errors import UsageError
from actcache.producer.presence import Admission
from actcache.store.claims import Claims
from actcache.store.create import is_being_planned
from actcache.store.open import CaptureCatalog, Catalog

POLL_S = 0.25
_NAMES = (
    *("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"),
    *(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP")),
)
PLAN_PATIENCE_S = 60.0
TAKEOVER_S = 120.0
_TAKEOVER_SHARDS = 4.0


@dataclass(frozen=True, slots=True)
class Rank:
    """One worker of several: it begins with shards rank, rank + world_size, and so on."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"rank {self.rank} of {self.world_size} workers: expected 0 to {self.world_size - 1}"
            )


def rank_in(environment: Mapping[str, str]) -> Rank | None:
    """What torchrun or Slurm say of this process; None where neither started it.

    torchrun: RANK of WORLD_SIZE. Slurm: the task of an array, and within it SLURM_PROCID of SLURM_NTASKS.
    """
    number = {
        name: int(text) for name, text in environment.items() if name in _NAMES and text.strip("-").isdigit()
    }
    if {"RANK", "WORLD_SIZE"} <= set(number):
        return Rank(number["RANK"], number["WORLD_SIZE"])
    rank, world_size = number.get("SLURM_PROCID", 0), number.get("SLURM_NTASKS", 1)
    if {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= set(number):
        first, step = number.get("SLURM_ARRAY_TASK_MIN", 0), number.get("SLURM_ARRAY_TASK_STEP", 1)
        rank += (number["SLURM_ARRAY_TASK_ID"] - first) // step * world_size
        world_size *= number["SLURM_ARRAY_TASK_COUNT"]
    return Rank(rank, world_size) if world_size > 1 else None


def local_rank_in(environment: Mapping[str, str]) -> tuple[int, int]:
    """Number of this process among those on its machine, and how many they are; (0, 1) where nobody says."""
    for rank, n in (("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")):
        if environment.get(rank, "").isdigit():
            of = environment.get(n, "")
            return int(environment[rank]), int(of) if of.isdigit() else 1
    return 0, 1


def wait_for_plan(out: Path) -> bool:
    """Wait until another worker has planned the store; False when for `PLAN_PATIENCE_S` nobody has been at it."""
    seen = time.monotonic()
    while not (out / "zarr.json").exists():
        if is_being_planned(out):
            seen = time.monotonic()
        elif time.monotonic() - seen > PLAN_PATIENCE_S:
            return False
        time.sleep(POLL_S)
    return True


class Shards(Protocol):
    """What is to be made: iterates over (shard, the captures that lack it)."""

    check: Callable[[], None]
    """Called while waiting; may raise."""

    def __iter__(self) -> Iterator[tuple[int, list[CaptureCatalog]]]: ...

    def done(self, shard: int) -> None:
        """A shard is committed."""
        ...


class Work:
    """The shards one worker makes, one at a time; ends when all others are committed.

    Every shard that is handed out is claimed; give the claim up with `done` when it is committed.

    takeover_s    how long another's claim is respected; None: two minutes, or four times what a shard takes here.
    on_committed  called with each shard that others have committed meanwhile.
    check         called while waiting; may raise.
    admission     what decides which shards may be started; None: all may.
    on_start      called with each shard that is started, or waited for.
    blocked_s     seconds in which no shard was admitted.
    """

    admission: Admission | None = None
    on_start: Callable[[int], None] = staticmethod(lambda _shard: None)

    def __init__(
        self,
        catalog: Catalog,
        captures: Sequence[CaptureCatalog],
        claims: Claims,
        rank: Rank,
        *,
        takeover_s: float | None = None,
        on_committed: Callable[[int], None] = lambda _shard: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._catalog, self._captures, self._claims, self._rank = catalog, captures, claims, rank
        self._takeover_s, self._on_committed, self.check = takeover_s, on_committed, check
        self._longest_s = self.blocked_s = 0.0
        self._claimed_since: dict[int, float] = {}
        committed = [set(c.committed()) for c in captures]
        self.left = [s for s in range(catalog.grid.n_shards) if any(s not in done for done in committed)]

    def __iter__(self) -> Iterator[tuple[int, list[CaptureCatalog]]]:
        """(shard, the captures that lack it): the own share in plan order, then what is free, then what is overdue.

        Where one is not admitted, none above it is: those below are looked at again, in case whoever was at one has died.
        """
        mine, n = self._rank.rank, self._rank.world_size
        left = sorted(self.left, key=lambda shard: (shard % n != mine, shard))
        while left:
            claimed, has_taken, limit = [], False, self._catalog.grid.n_shards
            for shard in left:
                if shard >= limit or not self._is_admitted(shard):
                    claimed.append(shard)
                    limit = min(limit, shard)
                    continue
                missing = self._take(shard)
                if missing is None:
                    claimed.append(shard)
                elif missing:
                    has_taken = True
                    started = time.monotonic()
                    self.on_start(shard)
                    yield shard, missing
                    self._longest_s = max(self._longest_s, time.monotonic() - started)
            left = claimed
            if left and not has_taken:
                self.check()
                if self.admission is not None and self.admission.is_enough:
                    return
                if limit < self._catalog.grid.n_shards:
                    self.on_start(limit)
                    self.blocked_s += POLL_S
                time.sleep(POLL_S)

    def _is_admitted(self, shard: int) -> bool:
        """Whether a shard may be started; one that is committed or another's is not asked about."""
        if self.admission is None or not self._missing(shard):
            return True
        return bool(self._claims.holders(shard)) or self.admission.admits(shard)

    def _take(self, shard: int) -> list[CaptureCatalog] | None:
        """The captures that lack a shard, claimed if there are any; None where another worker is at it."""
        if self._missing(shard) and not self._claims.take(shard):
            if not self._is_overdue(shard):
                return None
            self._claims.force(shard)
        missing = self._missing(shard)  # again: whoever had the claim before may have been through in between
        if not missing:
            self._claims.release(shard)
            self._on_committed(shard)
        return missing

    def _missing(self, shard: int) -> list[CaptureCatalog]:
        return [capture for capture in self._captures if not capture.is_committed(shard)]

    def _is_overdue(self, shard: int) -> bool:
        now = time.monotonic()
        since = self._claimed_since.setdefault(shard, now)
        limit = self._takeover_s
        if limit is None:
            limit = max(TAKEOVER_S, _TAKEOVER_SHARDS * self._longest_s)
        return now - since >= limit

    def done(self, shard: int) -> None:
        """A shard is committed."""
        self._claims.release(shard)
