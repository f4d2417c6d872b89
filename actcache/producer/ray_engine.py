"""Workers on a Ray cluster: a pool of actors that fill one store, each as a worker of its own (see `workers`).

Ray places the actors, gives each its GPU, starts one that died again and has it go on. The store decides what is left
to do, so nothing is lost with an actor, nor with the driver: the same command goes on.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.errors import ActcacheError, PlanMismatchError, UsageError
from actcache.producer.presence import MakeAdmission
from actcache.producer.summary import BuildReporter, BuildSummary
from actcache.producer.workers import Rank
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog

RESTARTS = 4
_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RayPool:
    """What to run where.

    out           the store, on storage that every node reaches under this path.
    captures      names of the captures to fill.
    model, revision, dtype, device, device_map  as `load_model` takes them, on every node.
    n_workers     actors.
    n_gpus        GPUs of each.          n_cpus  cores of each.
    encode_threads, allow_non_finite, takeover_s, admission  as `fill_captures` takes them.
    address       of a running cluster; None: one on this machine, for as long as the build lasts.
    """

    out: Path
    captures: tuple[str, ...]
    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | None = None
    n_workers: int = 1
    n_gpus: float = 0
    n_cpus: float = 1
    encode_threads: int | None = None
    allow_non_finite: bool = False
    takeover_s: float | None = None
    admission: MakeAdmission | None = None
    address: str | None = None


class Extractor:
    """One actor: loads the model, then fills what is left. Ray makes it anew when its process dies."""

    def __init__(self, pool: RayPool) -> None:
        from actcache.model import load_model

        self._pool = pool
        self._decoder = load_model(
            pool.model,
            revision=pool.revision,
            dtype=pool.dtype,
            device=pool.device,
            device_map=pool.device_map,
        )

    def process(self) -> int:
        """Its process id."""
        return os.getpid()

    def fill(self, rank: int, world_size: int) -> BuildSummary:
        """Work until the store is complete; returns what this actor did."""
        from actcache.producer.build import fill_captures

        pool, catalog = self._pool, Catalog(LocalObjects(self._pool.out))
        here, there = self._decoder.weights_digest(), catalog.plan.request.model.digest
        if here != there:
            raise PlanMismatchError(
                f"{pool.model} on this node has other weights ({here[:12]}) than the plan of {pool.out} ({there[:12]})"
            )
        return fill_captures(
            catalog,
            pool.captures,
            self._decoder,
            encode_threads=pool.encode_threads,
            allow_non_finite=pool.allow_non_finite,
            rank=Rank(rank, world_size),
            takeover_s=pool.takeover_s,
            admission=pool.admission,
            reporter=BuildReporter(),
        )


def fill_on_ray(
    pool: RayPool, reporter: BuildReporter, on_workers: Callable[[list[int]], None] = lambda _pids: None
) -> BuildSummary:
    """Fill a planned store on Ray; returns what all actors did that lived to tell.

    Args:
        pool: what to run where.
        reporter: told about progress, by what is committed.
        on_workers: called with the actors' process ids, once all have the model.

    Raises:
        UsageError: Ray is not installed. ActcacheError: an actor's own error, or all actors died for good.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs the package ray: pip install 'actcache[ray]'") from error
    is_mine = not ray.is_initialized()
    if is_mine:
        ray.init(
            address=pool.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    try:
        started = time.perf_counter()
        found = BuildSummary.merged(pool.out, _fill(ray, pool, reporter, on_workers))
        found.elapsed_s = time.perf_counter() - started
        return found
    finally:
        if is_mine:
            ray.shutdown()


def _fill(
    ray: Any, pool: RayPool, reporter: BuildReporter, on_workers: Callable[[list[int]], None]
) -> list[BuildSummary]:
    actor = ray.remote(Extractor).options(
        num_cpus=pool.n_cpus, num_gpus=pool.n_gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS
    )
    workers = [actor.remote(pool) for _ in range(pool.n_workers)]
    catalog = Catalog(LocalObjects(pool.out))
    on_workers(ray.get([worker.process.remote() for worker in workers]))
    running = [worker.fill.remote(i, pool.n_workers) for i, worker in enumerate(workers)]
    done: list[BuildSummary] = []
    lost: list[Exception] = []
    while running:
        ready, running = ray.wait(running, num_returns=1, timeout=_POLL_S)
        _report(catalog, pool, reporter)
        for future in ready:
            try:
                done.append(ray.get(future))
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, ActcacheError) else error) from error
            except ray.exceptions.RayActorError as error:  # died once more than it may; the others go on
                lost.append(error)
    if not done:
        raise ActcacheError(
            f"all {pool.n_workers} Ray actors died, each {RESTARTS + 1} times; what they committed is safe. The last "
            f"said: {lost[-1]}"
        ) from lost[-1]
    return done


def _report(catalog: Catalog, pool: RayPool, reporter: BuildReporter) -> None:
    grid = catalog.grid
    committed = set.intersection(*(set(catalog.captures[name].committed()) for name in pool.captures))
    n_done = sum(len(grid.sequences_of(shard)) for shard in committed)
    reporter.on_start(n_done * grid.seq_len, grid.n_sequences * grid.seq_len)
