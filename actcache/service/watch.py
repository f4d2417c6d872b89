"""What goes on around a store, in one look: what is committed, who produces, who consumes, how full the disk is."""

import time
from dataclasses import dataclass
from typing import Any

from actcache.service.footprint import bytes_under
from actcache.store.live import (
    Budget,
    ConsumerState,
    ProducerState,
    Watch,
    read_budget,
    read_consumers,
    read_expiry,
    read_producers,
)
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog

_WAITS_MUCH = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at a store.

    committed, retired  training and holdout shards.    used_bytes  on disk; None where that cannot be seen.
    producers, consumers  each with the seconds since it was heard of.    expired  consumers given up.
    bottleneck  what the others wait for.    service  the numbers of a service, where one was asked.
    """

    name: str
    n_shards: int
    committed: int
    retired: int
    n_tokens: int
    used_bytes: int | None
    budget: Budget | None
    producers: tuple[tuple[ProducerState, float], ...]
    consumers: tuple[tuple[ConsumerState, float], ...]
    expired: tuple[str, ...]
    bottleneck: str
    service: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        found = {n: getattr(self, n) for n in self.__slots__ if n not in ("budget", "producers", "consumers")}
        found["budget"] = None if self.budget is None else self.budget.model_dump()
        for name in ("producers", "consumers"):
            found[name] = [{**state.model_dump(), "silent_s": s} for state, s in getattr(self, name)]
        return found

    def lag(self, state: ConsumerState) -> int:
        """Committed shards that a consumer has not come to."""
        return max(0, self.committed - state.at_shard)


class Watcher:
    """Looks at one store again and again."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog, self._watch = catalog, Watch(time.monotonic)

    def look(self, service: dict[str, Any] | None = None) -> Look:
        """Now."""
        objects, captures = self._catalog.objects, list(self._catalog.captures.values())
        committed = min(len(found.committed()) for found in captures)
        producers = tuple((s, self._watch.silent_s(s.nonce, s.beat)) for s in read_producers(objects))
        states = read_consumers(objects)
        consumers = tuple(
            (s, self._watch.silent_s(f"consumer {n}", s.beat)) for n, s in sorted(states.items())
        )
        budget = read_budget(objects)
        registered = set(states) | set(() if budget is None else budget.consumers)
        used = bytes_under(objects.root) if isinstance(objects, LocalObjects) else None
        if used is None:
            used = next((s.used_bytes for s, _silent in producers if s.used_bytes is not None), None)
        return Look(
            name=objects.url,
            n_shards=self._catalog.grid.n_shards,
            committed=committed,
            retired=len(captures[0].retired()),
            n_tokens=self._catalog.grid.n_sequences * self._catalog.grid.seq_len,
            used_bytes=used,
            budget=budget,
            producers=producers,
            consumers=consumers,
            expired=tuple(n for n in sorted(registered) if read_expiry(objects, n) is not None),
            bottleneck=bottleneck([s for s, _ in producers], [s for s, _ in consumers]),
            service=service,
        )


def bottleneck(producers: list[ProducerState], consumers: list[ConsumerState]) -> str:
    """What the others wait for, in a few words."""
    working = [state for state in producers if state.phase in ("working", "blocked")]
    blocked = [state for state in working if state.phase == "blocked"]
    if blocked:
        return f"consumers: the producer waits for {', '.join(blocked[0].waiting_for) or 'room on disk'}"
    hungry = [state for state in consumers if state.phase == "waiting" or state.waited_frac > _WAITS_MUCH]
    if working and hungry:
        return f"the producer{_slowest_stage(working[0])}: {', '.join(state.name for state in hungry)} waits for data"
    if working:
        return f"the producer{_slowest_stage(working[0])}"
    active = [state for state in consumers if state.phase in ("working", "waiting")]
    return "consumers: everything else is done" if active else "nothing is running"


def _slowest_stage(state: ProducerState) -> str:
    stages = {name: s for name, s in state.stage_s.items() if name not in ("wait", "blocked") and s > 0}
    return f" ({max(stages, key=lambda name: stages[name])})" if stages else ""
