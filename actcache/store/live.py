"""What the processes around a store say about themselves: producers, consumers, and the disk budget they share.

    .partial/NONCE/state.json     a producer, in its workspace: what it is doing
    .live/budget.json             the disk budget, and the consumers it waits for
    .live/consumer-NAME.json      a consumer: which shards its last saved checkpoint still needs
    .live/expired-NAME.json       a consumer that was given up for lost
    .live/ended-RANK.json         the last state of a producer that was stopped or failed

Small files, replaced whole, so nobody sees half of one. They steer waiting and making room; no row is read by them.
`beat` rises while a process lives: who watches it compares it with its own clock, so clocks need not agree.
"""

import contextlib
import json
import os
import re
import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from actcache.errors import UsageError
from actcache.store.disk import WORK_DIR
from actcache.store.objects import LocalObjects, Objects

LIVE_DIR = ".live"
STATE = "state.json"
BUDGET = f"{LIVE_DIR}/budget.json"
MOST_BYTES = 1 << 14
"""Of one of these files: what a budget leaves for each."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _State(BaseModel):
    """A state from another version may say more: what is not known here is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ProducerState(_State):
    """A producer.

    phase         working; blocked: waits for room on disk; finished, stopped: it ended well, failed: it did not.
    shard         the last it started, or waits to start.
    reason        why it is blocked, or how it failed.
    waiting_for   the consumers whose checkpoints it waits for.
    n_committed   shards committed in the store; n_shards of them in all.
    stage_s       seconds per stage of the pipeline.
    used_bytes    on disk, where it has a budget; is_bounded: whether it has one.
    """

    nonce: str
    host: str
    pid: int
    rank: int = 0
    world_size: int = 1
    started_at: str
    seen_at: str
    beat: int = 0
    phase: Literal["working", "blocked", "finished", "stopped", "failed"] = "working"
    shard: int | None = None
    reason: str | None = None
    waiting_for: tuple[str, ...] = ()
    n_committed: int = 0
    n_shards: int = 0
    tokens_per_s: float = 0.0
    stage_s: dict[str, float] = {}
    used_bytes: int | None = None
    is_bounded: bool = False

    @property
    def who(self) -> str:
        """For people."""
        rank = f"rank {self.rank} of {self.world_size}, " if self.world_size > 1 else ""
        return f"the producer on {self.host} ({rank}process {self.pid})"


class ConsumerState(_State):
    """A consumer.

    phase         working; waiting: for a shard that is not committed; finished: it needs nothing more; stopped.
    needs_shard   the first shard that its last SAVED checkpoint still needs.
    at_shard      the first that it needs now: where it would be after saving.
    keeps_shards  how many shards a window mixes; interval_shards  how many it goes through between checkpoints.
    begins_shards  how many it goes through before it can save its first checkpoint.
    rows, rows_per_s, waited_frac  so far; now; share of its time spent waiting for data.
    facts         whatever else it wants seen: loss, shuffle quality.
    """

    name: str
    host: str
    pid: int
    started_at: str
    seen_at: str
    beat: int = 0
    phase: Literal["working", "waiting", "finished", "stopped"] = "working"
    needs_shard: int
    at_shard: int
    keeps_shards: int
    interval_shards: int = 0
    begins_shards: int = 0
    rows: int = 0
    rows_per_s: float = 0.0
    waited_frac: float = 0.0
    facts: dict[str, float | str] = {}


class Budget(_State):
    """A disk budget.

    slots        training shards that fit at once if none of them could be compressed.
    in_flight    shards that producers may be working on.
    expire_s     a consumer not heard of for this long is given up.
    """

    max_disk_bytes: int
    slots: int
    in_flight: int
    consumers: tuple[str, ...]
    expire_s: float
    set_at: str


class Expiry(_State):
    """A consumer that was given up: when, and what it needed then."""

    name: str
    expired_at: str
    silent_s: float
    needs_shard: int


def shards_needed(
    keeps_shards: int = 1, interval_shards: int = 1, begins_shards: int = 0, *, in_flight: int
) -> int:
    """Training shards that have to fit for producers and a consumer to go on side by side."""
    return in_flight + max(keeps_shards + max(1, interval_shards), begins_shards)


S = TypeVar("S", bound=_State)


class LiveWriter(Protocol):
    """Writes the files of `.live`: in a folder, or through a service."""

    def put(self, name: str, data: bytes) -> None:
        """Replace the file `name`."""
        ...

    def drop(self, name: str) -> None:
        """Remove the file `name`, if it is there."""
        ...


class LocalLive:
    """`LiveWriter` of a folder of this machine, or of a shared file system."""

    def __init__(self, root: Path) -> None:
        self._folder = root / LIVE_DIR

    def put(self, name: str, data: bytes) -> None:
        """Replace the file `name`."""
        self._folder.mkdir(exist_ok=True)
        replace_file(self._folder / name, data)

    def drop(self, name: str) -> None:
        """Remove the file `name`, if it is there."""
        (self._folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others' files are in it, or it is not there
            self._folder.rmdir()


def live_writer(objects: Objects) -> LiveWriter:
    """Who writes the live files of a store; UsageError where nobody can."""
    if isinstance(objects, LocalObjects):
        return LocalLive(objects.root)
    behind = getattr(objects, "objects", objects)  # a local cache writes nothing
    make: Callable[[], LiveWriter] | None = getattr(behind, "live_writer", None)
    if make is None:
        raise UsageError(
            f"a consumer cannot be registered with {objects.url}: that takes a folder, or a service ('actcache serve')"
        )
    return make()


def replace_file(path: Path, data: bytes) -> None:
    """Put a small file in place whole."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def encode(state: BaseModel) -> bytes:
    """A state as it stands in its file."""
    return state.model_dump_json().encode()


def check_name(name: str) -> str:
    """The name of a consumer, which is also that of a file; UsageError where it cannot be."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"consumer {name!r}: expected up to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    return name


def now() -> str:
    """UTC, ISO 8601, seconds: for people."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def whereabouts() -> dict[str, Any]:
    """Host, process and times of this process."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started_at": now(), "seen_at": now()}


def _read(objects: Objects, key: str, kind: type[S]) -> S | None:
    """A state; None where there is none, or one that this version cannot make sense of."""
    try:
        return kind.model_validate(json.loads(objects.read(key)))
    except (FileNotFoundError, NotADirectoryError, ValidationError, ValueError):
        return None


def read_producers(objects: Objects) -> list[ProducerState]:
    """The producers whose workspaces are there, dead ones among them; in place of one that said how it ended, that."""
    keys = [f"{WORK_DIR}/{name}/{STATE}" for name in objects.names(WORK_DIR)]
    there = [state for state in (_read(objects, key, ProducerState) for key in keys) if state is not None]
    names = [name for name in objects.names(LIVE_DIR) if name.startswith("ended-") and name.endswith(".json")]
    ended = [_read(objects, f"{LIVE_DIR}/{name}", ProducerState) for name in names]
    ranks = {state.rank for state in there}
    there += [state for state in ended if state is not None and state.rank not in ranks]
    return sorted(there, key=lambda state: (state.rank, state.started_at))


def read_consumers(objects: Objects) -> dict[str, ConsumerState]:
    """The consumers that have registered, by name."""
    names = [n for n in objects.names(LIVE_DIR) if n.startswith("consumer-") and n.endswith(".json")]
    found = (_read(objects, f"{LIVE_DIR}/{name}", ConsumerState) for name in names)
    return {state.name: state for state in found if state is not None}


def read_budget(objects: Objects) -> Budget | None:
    """The disk budget, where there is one."""
    return _read(objects, BUDGET, Budget)


def read_expiry(objects: Objects, name: str) -> Expiry | None:
    """Whether a consumer was given up."""
    return _read(objects, f"{LIVE_DIR}/{expired_file(name)}", Expiry)


def consumer_file(name: str) -> str:
    """Name of a consumer's file."""
    return f"consumer-{check_name(name)}.json"


def expired_file(name: str) -> str:
    """Name of the file that says that a consumer was given up."""
    return f"expired-{check_name(name)}.json"


def ended_file(rank: int) -> str:
    """Name of the file that says how a producer ended."""
    return f"ended-{rank}.json"


class Watch:
    """How long each of some processes has been silent, by this process's clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def silent_s(self, who: str, beat: Any) -> float:
        """Seconds since `beat` was another; 0 where `who` was not known before."""
        moment = self._clock()
        known = self._seen.get(who)
        if known is None or known[0] != beat:
            self._seen[who] = known = (beat, moment)
        return moment - known[1]
