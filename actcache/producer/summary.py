"""What a build tells while it runs and when it is done: counts, seconds per stage, and which stage was the bottleneck."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from actcache.producer.clock import STAGES
from actcache.store.schema import Grid

if TYPE_CHECKING:
    from actcache.producer.plan import SizeForecast


@dataclass(slots=True)
class BuildReporter:
    """What a build tells its caller while it runs. Every callback may be left out.

    on_blocked  why it waits for room on disk; None: it goes on.
    """

    on_tokens: Callable[[int], None] = lambda _n: None
    on_forecast: "Callable[[Grid, SizeForecast], None]" = lambda _grid, _forecast: None
    on_start: Callable[[int, int], None] = lambda _n_done, _n_tokens: None
    on_forward: Callable[[int], None] = lambda _n_tokens: None
    on_shard: Callable[[int], None] = lambda _shard: None
    on_blocked: Callable[[str | None], None] = lambda _why: None


@dataclass(slots=True)
class BuildSummary:
    """What a build did.

    n_shards        shards of the store; n_built by this run, n_adopted found whole on disk, the rest were committed.
    n_tokens        tokens run through the model by this run.
    elapsed_s       of the whole run, planning included; filling_s without planning.
    stage_s         seconds spent per stage, of all its threads together; `wait`: in which the forward pass waited.
    stage_threads   threads of each stage.
    raw_bytes, disk_bytes  of the rows committed by this run.
    blocked_s       seconds in which it waited for room on disk.
    was_enough      it ended before the last shard because no consumer needs more.
    """

    store: Path
    n_shards: int = 0
    n_built: int = 0
    n_adopted: int = 0
    n_tokens: int = 0
    elapsed_s: float = 0.0
    filling_s: float = 0.0
    raw_bytes: int = 0
    disk_bytes: int = 0
    blocked_s: float = 0.0
    was_enough: bool = False
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*STAGES, "wait"), 0.0))
    stage_threads: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 1))

    @classmethod
    def merged(cls, store: Path, workers: "Sequence[BuildSummary]") -> Self:
        """What several workers did that filled one store side by side."""
        found = cls(store, n_shards=max(w.n_shards for w in workers))
        for name in ("n_built", "n_adopted", "n_tokens", "raw_bytes", "disk_bytes"):
            setattr(found, name, sum(getattr(w, name) for w in workers))
        found.filling_s, found.blocked_s = (
            max(getattr(w, n) for w in workers) for n in ("filling_s", "blocked_s")
        )
        found.was_enough = any(w.was_enough for w in workers)
        for stage in found.stage_s:
            found.stage_s[stage] = sum(w.stage_s[stage] for w in workers)
        for stage in found.stage_threads:
            found.stage_threads[stage] = sum(w.stage_threads[stage] for w in workers)
        return found

    @property
    def was_complete(self) -> bool:
        """Whether there was nothing to do."""
        return self.n_built + self.n_adopted == 0

    def busy(self, stage: str) -> float:
        """The share of the time of filling in which the threads of a stage were busy."""
        return self.stage_s[stage] / (self.stage_threads[stage] * max(1e-9, self.filling_s))

    @property
    def bottleneck(self) -> str:
        """The stage that was busy for the largest share of the time: making the others faster gains nothing."""
        return max(STAGES, key=self.busy)

    @property
    def tokens_per_s(self) -> float:
        """Tokens run through the model per second of filling."""
        return self.n_tokens / max(1e-9, self.filling_s)

    @property
    def bytes_per_s(self) -> float:
        """Bytes of rows, before encoding, committed per second of filling."""
        return self.raw_bytes / max(1e-9, self.filling_s)

    @property
    def ratio(self) -> float:
        """Bytes of rows before over after encoding; 1 where none were."""
        return self.raw_bytes / self.disk_bytes if self.disk_bytes else 1.0

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, what follows from the fields included."""
        derived = ("bottleneck", "tokens_per_s", "bytes_per_s", "ratio")
        busy = {stage: round(self.busy(stage), 4) for stage in STAGES}
        return {
            **asdict(self),
            "store": str(self.store),
            "busy": busy,
            **{name: getattr(self, name) for name in derived},
        }
