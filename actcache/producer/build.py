"""Building a store: plan it unless it is planned, then fill what is missing.

What is asked is compared with what is there, so that the same command continues a build and another one is refused.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actcache.errors import UsageError
from actcache.model import Decoder
from actcache.producer.clock import Clock, TimedPool
from actcache.producer.corpus import Corpus
from actcache.producer.forward import N_SCATTER_THREADS, Forward, make_transfer, mixed_rows
from actcache.producer.pipeline import Pipeline
from actcache.producer.plan import write_plan
from actcache.producer.presence import MakeAdmission, Presence, Rate, forget_ended
from actcache.producer.settings import Settings, capture_requests, check_same, make_request
from actcache.producer.summary import BuildReporter, BuildSummary
from actcache.producer.workers import Rank, Shards, Work, wait_for_plan
from actcache.store.arrays import disk_dtype
from actcache.store.claims import Claims
from actcache.store.create import CaptureRequest, sweep_staged
from actcache.store.disk import Disk
from actcache.store.ledger import ShardCommitter
from actcache.store.live import read_budget
from actcache.store.objects import LocalObjects
from actcache.store.open import CaptureCatalog, Catalog
from actcache.store.schema import Request, ShardRecord
from actcache.version import __version__

_MOST_ENCODE_THREADS = 8


def default_encode_threads(device: str, n_local: int = 1) -> int:
    """A worker's share of the cores on a CPU, where the model waits meanwhile; beside a GPU all but two, at most 8.

    n_local  workers on this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // n_local)
    return share if device == "cpu" else max(1, min(_MOST_ENCODE_THREADS, share - 2))


def takes_turns(device: str) -> bool:
    """Whether the model waits while its rows are encoded: where both want the same cores."""
    return device == "cpu"


def build(
    settings: Settings,
    decoder: Decoder,
    tokenizer: Any,
    corpus: Corpus,
    *,
    corpus_name: str,
    encode_threads: int | None = None,
    allow_non_finite: bool = False,
    rank: Rank | None = None,
    takeover_s: float | None = None,
    admission: MakeAdmission | None = None,
    max_disk_bytes: int | None = None,
    reporter: BuildReporter | None = None,
    on_operation: Callable[[str, str], None] | None = None,
) -> BuildSummary:
    """Build a store, or continue one; a finished one is left as it is.

    Several processes may do so at once, with the same arguments: they share the shards out among themselves.

    Args:
        settings: what to build, and where.
        decoder: the model; cut after the last captured layer.
        tokenizer: the fast tokenizer that belongs to it.
        corpus: the text.
        corpus_name: what the corpus is called in the plan.
        encode_threads: threads that compress; None: see `default_encode_threads`.
        allow_non_finite: store rows with NaN or infinity instead of stopping.
        rank: which of several workers this is: the first plans, the others wait for it, and each begins with its share.
        takeover_s: how long a shard that another worker has claimed is left to it; see `Work`.
        admission: makes what decides when a shard may be started; None: at once.
        max_disk_bytes: what `admission` sees to: the store never takes more, however large it would be whole.
        reporter: told about progress.
        on_operation: called before every step that changes the disk.

    Raises:
        PlanMismatchError: there is a store of other arguments. CorpusError: the text cannot be read or is too short.
        DiskFullError: it does not fit. NonFiniteError: the model gave NaN or infinity.
    """
    started, reporter, rank = time.perf_counter(), reporter or BuildReporter(), rank or Rank()
    catalog, names = ensure_planned(
        settings,
        decoder,
        tokenizer,
        corpus,
        corpus_name=corpus_name,
        rank=rank,
        max_disk_bytes=max_disk_bytes,
        reporter=reporter,
        on_operation=on_operation,
    )
    summary = fill_captures(
        catalog,
        names,
        decoder,
        encode_threads=encode_threads,
        allow_non_finite=allow_non_finite,
        rank=rank,
        takeover_s=takeover_s,
        admission=admission,
        reporter=reporter,
        on_operation=on_operation,
    )
    summary.elapsed_s = time.perf_counter() - started
    return summary


def ensure_planned(
    settings: Settings,
    decoder: Decoder,
    tokenizer: Any,
    corpus: Corpus,
    *,
    corpus_name: str,
    device: str | None = None,
    rank: Rank | None = None,
    max_disk_bytes: int | None = None,
    reporter: BuildReporter | None = None,
    on_operation: Callable[[str, str], None] | None = None,
) -> tuple[Catalog, list[str]]:
    """The store, planned by this call or before, and the names of the captures asked for. Arguments as those of `build`.

    device  the class of the workers' devices; None: that of the decoder.
    """
    reporter = reporter or BuildReporter()
    request = make_request(settings, decoder, tokenizer, corpus, corpus_name)
    if device is not None:
        request = request.model_copy(update={"device": device})
    captures = capture_requests(settings, decoder)
    sweep_staged(settings.out)
    if not (settings.out / "zarr.json").exists():
        _check_free(settings.out)
    if rank is None or rank.rank == 0 or not wait_for_plan(settings.out):
        _plan(settings, request, captures, tokenizer, corpus, reporter, on_operation, max_disk_bytes)
    catalog = Catalog(LocalObjects(settings.out))
    check_same(catalog, request, captures)
    return catalog, [capture.group for capture in captures]


def _plan(
    settings: Settings,
    request: Request,
    captures: list[CaptureRequest],
    tokenizer: Any,
    corpus: Corpus,
    reporter: BuildReporter,
    on_operation: Callable[[str, str], None] | None,
    max_disk_bytes: int | None,
) -> None:
    """Plan the store unless it is planned; of several that do so at once one is first, and the others take its plan."""
    if (settings.out / "zarr.json").exists():
        return
    try:
        write_plan(
            settings,
            request,
            captures,
            tokenizer,
            corpus,
            version=__version__,
            on_tokens=reporter.on_tokens,
            on_forecast=reporter.on_forecast,
            on_operation=on_operation,
            max_disk_bytes=max_disk_bytes,
        )
    except FileExistsError as error:
        if not (settings.out / "zarr.json").exists():
            raise UsageError(
                f"{settings.out} appeared while the plan was written, and is not a store"
            ) from error


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not a store (it has no zarr.json). Nothing was touched; give another --out."
        )


def fill_captures(
    catalog: Catalog,
    names: Sequence[str],
    decoder: Decoder,
    *,
    encode_threads: int | None = None,
    allow_non_finite: bool = False,
    rank: Rank | None = None,
    takeover_s: float | None = None,
    admission: MakeAdmission | None = None,
    reporter: BuildReporter,
    on_operation: Callable[[str, str], None] | None = None,
) -> BuildSummary:
    """Commit every shard that some of these captures lack. The decoder is cut after their last layer."""
    grid, root = catalog.grid, Path(catalog.objects.url)
    summary = BuildSummary(root, n_shards=grid.n_shards)
    wanted = [catalog.captures[name] for name in names]
    decoder.cut(max(max(found.capture.layers) for found in wanted))
    with Disk(root, on_operation) as disk:
        disk.sweep()
        work = Work(
            catalog,
            wanted,
            Claims(disk),
            rank or Rank(),
            takeover_s=takeover_s,
            on_committed=lambda shard: reporter.on_forward(len(grid.sequences_of(shard)) * grid.seq_len),
        )
        if work.left:
            if admission is None:
                _check_unbounded(catalog)
            n_left = sum(len(grid.sequences_of(shard)) for shard in work.left) * grid.seq_len
            n_tokens = grid.n_sequences * grid.seq_len
            reporter.on_start(n_tokens - n_left, n_tokens)
            threads = encode_threads or default_encode_threads(decoder.device.type)
            clock, rate, at = Clock(), Rate(lambda: summary.n_tokens), rank or Rank()

            def facts() -> dict[str, Any]:
                n_committed = min(len(found.committed()) for found in wanted)
                stages = {name: round(seconds, 2) for name, seconds in (clock.spent_s | disk.spent_s).items()}
                return {"tokens_per_s": rate(), "stage_s": stages, "n_committed": n_committed}

            with Presence(
                disk,
                grid.n_shards,
                facts,
                rank=at.rank,
                world_size=at.world_size,
                is_bounded=admission is not None,
            ) as presence:
                if admission is not None:
                    work.admission = admission(catalog, disk, presence)
                work.on_start = presence.starts
                fill_shards(
                    catalog,
                    wanted,
                    work,
                    disk,
                    decoder,
                    threads,
                    summary,
                    reporter,
                    clock,
                    allow_non_finite=allow_non_finite,
                )
            summary.blocked_s = work.blocked_s
            summary.was_enough = work.admission is not None and work.admission.is_enough
        if not work.left or all(len(found.committed()) == grid.n_shards for found in wanted):
            forget_ended(root)
    return summary


def _check_unbounded(catalog: Catalog) -> None:
    budget = read_budget(catalog.objects)
    if budget is not None:
        raise UsageError(
            f"{catalog.objects.url} is built within a disk budget: give it again (--max-disk {budget.max_disk_bytes} "
            f"--consumers {','.join(budget.consumers)}, or other values), or lift it with --max-disk none"
        )


def fill_shards(
    catalog: Catalog,
    captures: Sequence[CaptureCatalog],
    work: Shards,
    disk: Disk,
    decoder: Decoder,
    encode_threads: int,
    summary: BuildSummary,
    reporter: BuildReporter,
    clock: Clock,
    *,
    allow_non_finite: bool,
    generations: Mapping[str, Mapping[int, int]] | None = None,
) -> None:
    """Run the model for the shards that `work` names and commit them; what was done is added to `summary`.

    generations  by capture and shard: of those that are rebuilt, which generation they become.
    """
    started = time.perf_counter()
    transfer = make_transfer(decoder, catalog, captures, clock)

    def on_tokens(n_tokens: int) -> None:
        summary.n_tokens += n_tokens
        reporter.on_forward(n_tokens)

    def count(capture: CaptureCatalog, record: ShardRecord) -> None:
        stored, c = int(catalog.shards.stored[record.shard]), capture.capture
        summary.raw_bytes += stored * len(c.layers) * c.width * disk_dtype(c.dtype).itemsize
        summary.disk_bytes += record.rows_bytes

    def on_commit(capture: CaptureCatalog, record: ShardRecord) -> None:
        if record.producer.nonce == disk.nonce:  # else another worker committed it first
            summary.n_built += 1
            count(capture, record)

    def on_adopt(capture: CaptureCatalog, record: ShardRecord) -> None:
        if record.producer.nonce == disk.nonce:
            summary.n_adopted += 1
            count(capture, record)

    def on_shard(shard: int) -> None:
        work.done(shard)
        reporter.on_shard(shard)

    def where(shard: int, row: int) -> str:
        mixed = mixed_rows(catalog, shard)
        return f"sequence {mixed.row_sequence[row]}, position {mixed.row_position[row]}"

    with TimedPool(encode_threads, clock, "encode") as pool:
        committers = {
            c.capture.name: ShardCommitter(
                disk,
                catalog.objects,
                c.capture,
                c.arrays,
                pool,
                __version__,
                where,
                n_ahead=encode_threads + 2,
                allow_non_finite=allow_non_finite,
                generations=(generations or {}).get(c.capture.name),
            )
            for c in captures
        }
        forward = Forward(catalog, decoder, transfer, clock, on_tokens)
        try:
            with Pipeline(
                catalog,
                forward,
                committers,
                clock,
                takes_turns=takes_turns(decoder.device.type),
                on_commit=on_commit,
                on_adopt=on_adopt,
                on_shard=on_shard,
            ) as pipeline:
                work.check = pipeline.check
                for shard, missing in work:
                    pipeline.add(shard, missing)
                forward.finish()
                pipeline.finish()
        finally:
            transfer.close()
    summary.filling_s = time.perf_counter() - started
    summary.stage_s = clock.spent_s | disk.spent_s
    summary.stage_threads |= {"encode": encode_threads}
    if decoder.device.type != "cpu":
        summary.stage_threads |= {"copy": N_SCATTER_THREADS, "scatter": N_SCATTER_THREADS}
