"""Filling a store: sequences -> forward -> rows in their mixed place -> encode -> commit, shard after shard.

While one shard is encoded and committed by a thread, the model already runs on the next; two shard buffers are used
in turn, so memory is bounded and a slow disk makes the model wait rather than lose anything.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import DamageError, UsageError
from actcache.model import Decoder
from actcache.producer.corpus import Corpus
from actcache.producer.plan import (
    Settings,
    SizeForecast,
    capture_requests,
    check_same,
    make_request,
    write_plan,
)
from actcache.producer.presence import Admission, Presence, Rate
from actcache.store.create import sweep_staged
from actcache.store.disk import Disk
from actcache.store.ledger import ShardCommitter
from actcache.store.mixing import Mixed, mix
from actcache.store.objects import LocalObjects
from actcache.store.open import CaptureCatalog, Catalog
from actcache.store.schema import Grid, ShardRecord
from actcache.version import __version__

MakeAdmission = Callable[[Catalog, Disk, Presence], Admission]
_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(slots=True)
class Reporter:
    """What a build tells its caller while it runs. Every callback may be left out."""

    on_tokens: Callable[[int], None] = lambda _n: None
    on_forecast: Callable[[Grid, SizeForecast], None] = lambda _grid, _forecast: None
    on_start: Callable[[int, int], None] = lambda _n_done, _n_tokens: None
    on_forward: Callable[[int], None] = lambda _n_tokens: None
    on_shard: Callable[[int], None] = lambda _shard: None


@dataclass(slots=True)
class BuildSummary:
    """What a build did.

    n_shards    shards of the store; n_built by this run, n_adopted found whole on disk, the rest were committed.
    n_tokens    tokens run through the model by this run.
    stage_s     seconds spent per stage: `forward` and `scatter` on the main thread, `wait` for the commit of the
                shard before, `commit` (statistics, encoding, disk) on the committing thread; `blocked`: for room on
                disk.
    raw_bytes, disk_bytes  of the rows committed by this run.
    was_enough  it ended before the last shard because every consumer has what it needs.
    """

    store: Path
    n_shards: int = 0
    n_built: int = 0
    n_adopted: int = 0
    n_tokens: int = 0
    elapsed_s: float = 0.0
    raw_bytes: int = 0
    disk_bytes: int = 0
    stage_s: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("forward", "scatter", "wait", "commit", "blocked"), 0.0)
    )
    was_enough: bool = False

    @property
    def was_complete(self) -> bool:
        """Whether there was nothing to do."""
        return self.n_built + self.n_adopted == 0


def build(
    settings: Settings,
    decoder: Decoder,
    tokenizer: Any,
    corpus: Corpus,
    *,
    corpus_name: str,
    encode_threads: int = 1,
    reporter: Reporter | None = None,
    admission: MakeAdmission | None = None,
    on_operation: Callable[[str, str], None] | None = None,
) -> BuildSummary:
    """Build a store, or continue one; a finished one is left as it is.

    Args:
        settings: what to build, and where.
        decoder: the model; cut after the last captured layer.
        tokenizer: the fast tokenizer that belongs to it.
        corpus: the text.
        corpus_name: what the corpus is called in the plan.
        encode_threads: threads that compress.
        reporter: told about progress.
        admission: makes what decides when a shard may be started; None: at once.
        on_operation: called before every step that changes the disk.

    Raises:
        PlanMismatchError: there is a store of other arguments. CorpusError: the text cannot be read or is too short.
        DiskFullError: it does not fit. NonFiniteError: the model gave NaN or infinity.
    """
    started, reporter = time.perf_counter(), reporter or Reporter()
    request, captures = (
        make_request(settings, decoder, tokenizer, corpus, corpus_name),
        capture_requests(settings, decoder),
    )
    sweep_staged(settings.out)
    if not (settings.out / "zarr.json").exists():
        _check_free(settings.out)
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
            )
        except FileExistsError as error:
            if not (settings.out / "zarr.json").exists():
                raise UsageError(
                    f"{settings.out} appeared while the plan was written, and is not a store"
                ) from error
    catalog = Catalog(LocalObjects(settings.out))
    check_same(catalog, request, captures)
    summary = BuildSummary(settings.out, n_shards=catalog.grid.n_shards)
    left = _uncommitted(catalog)
    decoder.cut(max(max(c.layers) for c in captures))
    with Disk(settings.out, on_operation) as disk:
        disk.sweep()
        if left:
            reporter.on_start(
                sum(len(catalog.grid.sequences_of(s)) for s in range(catalog.grid.n_shards) if s not in left)
                * settings.seq_len,
                catalog.grid.n_sequences * settings.seq_len,
            )
            rate = Rate(lambda: summary.n_tokens)

            def facts() -> dict[str, Any]:
                done = min(map(len, (found.committed() for found in catalog.captures.values())))
                return {"tokens_per_s": rate(), "stage_s": dict(summary.stage_s), "n_committed": done}

            with (
                ThreadPoolExecutor(max(1, encode_threads), thread_name_prefix="actcache-encode") as pool,
                Presence(disk, catalog.grid.n_shards, facts) as presence,
            ):
                chosen = None if admission is None else admission(catalog, disk, presence)
                filler = _Filler(catalog, disk, decoder, pool, summary, reporter, settings.batch_size)
                filler.fill(left, presence, chosen)
    summary.elapsed_s = time.perf_counter() - started
    return summary


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not a store (it has no zarr.json). Nothing was touched; give another --out."
        )


def _uncommitted(catalog: Catalog) -> dict[int, list[CaptureCatalog]]:
    """Shards that some capture still lacks, in plan order, with those captures."""
    left: dict[int, list[CaptureCatalog]] = {}
    for capture in catalog.captures.values():
        for shard in sorted(set(range(catalog.grid.n_shards)) - set(capture.committed())):
            left.setdefault(shard, []).append(capture)
    return dict(sorted(left.items()))


class _Filler:
    """Fills the shards that are left. The main thread runs the model; one other thread commits."""

    def __init__(
        self,
        catalog: Catalog,
        disk: Disk,
        decoder: Decoder,
        pool: ThreadPoolExecutor,
        summary: BuildSummary,
        reporter: Reporter,
        batch_size: int,
    ) -> None:
        self._catalog, self._decoder, self._summary = catalog, decoder, summary
        self._reporter, self._batch_size = reporter, batch_size
        self._committers = {
            name: ShardCommitter(
                disk, catalog.objects, found.capture, found.arrays, pool, __version__, self._where
            )
            for name, found in catalog.captures.items()
        }
        self._buffers: list[dict[str, Tensor]] = [{}, {}]

    def fill(
        self, left: dict[int, list[CaptureCatalog]], presence: Presence, admission: Admission | None
    ) -> None:
        """Commit every shard of `left` that is admitted, overlapping the model with encoding and the disk."""
        with ThreadPoolExecutor(1, thread_name_prefix="actcache-commit") as committing:
            pending: Future[None] | None = None
            for turn, (shard, captures) in enumerate(left.items()):
                presence.starts(shard)
                if admission is not None and not self._admitted(shard, admission, pending):
                    break
                missing = [c for c in captures if not self._adopt(shard, c)]
                if missing:
                    self._forward(shard, missing, self._buffers[turn % 2])
                self._wait(pending)
                pending = committing.submit(self._commit, shard, missing, self._buffers[turn % 2])
            self._wait(pending)

    def _admitted(self, shard: int, admission: Admission, pending: "Future[None] | None") -> bool:
        """Wait until there is room for a shard; before that, for what is being committed: its real size frees some."""
        if not admission.fits(shard):
            self._wait(pending)
        with self._timed("blocked"):
            is_admitted = admission.admit(shard)
        self._summary.was_enough = not is_admitted
        return is_admitted

    def _wait(self, pending: "Future[None] | None") -> None:
        if pending is not None:
            with self._timed("wait"):
                pending.result()

    def _timed(self, stage: str) -> "_Timer":
        return _Timer(self._summary.stage_s, stage)

    def _adopt(self, shard: int, capture: CaptureCatalog) -> bool:
        """Commit rows that an interrupted build left on disk whole; whether there were any."""
        record = self._committers[capture.capture.name].adopt(shard, self._catalog.shards.records[shard])
        if record is not None:
            self._summary.n_adopted += 1
            self._count(capture, record)
        return record is not None

    def _mixed(self, shard: int) -> Mixed:
        keep, document = (self._catalog.plan_object(name, shard) for name in ("keep", "document"))
        return mix(self._catalog.grid, self._catalog.plan.request.seed, shard, keep, document)

    def _where(self, shard: int, row: int) -> str:
        mixed = self._mixed(shard)
        return f"sequence {mixed.row_sequence[row]}, position {mixed.row_position[row]}"

    def _forward(self, shard: int, captures: list[CaptureCatalog], buffers: dict[str, Tensor]) -> None:
        """Run the model over a shard's sequences; every vector goes straight to its row of the shard buffer."""
        mixed, tokens = self._mixed(shard), self._catalog.plan_object("tokens", shard)
        if mixed.stored != self._catalog.shards.stored[shard]:
            raise DamageError(
                f"the plan says that shard {shard} stores {self._catalog.shards.stored[shard]} rows; its tokens say {mixed.stored}"
            )
        hooks = {c.capture.hook: c.capture.layers for c in captures}
        places = {
            (c.capture.hook, layer): (c.capture.name, i)
            for c in captures
            for i, layer in enumerate(c.capture.layers)
        }
        for c in captures:
            shape = (len(c.capture.layers), mixed.stored, c.capture.width)
            if c.capture.name not in buffers or buffers[c.capture.name].shape != shape:
                buffers[c.capture.name] = torch.empty(shape, dtype=_TORCH_DTYPES[c.capture.dtype])
        has_text = np.any(mixed.row_of_token >= 0, axis=1)
        for start in range(0, len(tokens), self._batch_size):
            chosen = np.arange(start, min(start + self._batch_size, len(tokens)))
            chosen = chosen[np.asarray(has_text)[chosen]]
            if not len(chosen):
                continue
            rows = torch.from_numpy(mixed.row_of_token[chosen].reshape(-1))
            stored = torch.nonzero(rows >= 0).reshape(-1)

            def keep(
                hook: str, layer: int, acts_qtd: Tensor, rows: Tensor = rows[stored], stored: Tensor = stored
            ) -> None:
                with self._timed("scatter"):
                    name, i = places[hook, layer]
                    flat = acts_qtd.reshape(-1, acts_qtd.shape[-1])
                    if len(stored) < len(flat):
                        flat = flat[stored.to(flat.device)]
                    target = buffers[name]
                    target[i].index_copy_(0, rows, flat.to(target.dtype).to(target.device))

            with self._timed("forward"):
                input_ids = torch.from_numpy(tokens[chosen].astype(np.int64)).to(self._decoder.device)
                self._decoder.capture_each(input_ids, hooks, keep)
            self._summary.n_tokens += input_ids.numel()
            self._reporter.on_forward(input_ids.numel())

    def _commit(self, shard: int, captures: list[CaptureCatalog], buffers: dict[str, Tensor]) -> None:
        with self._timed("commit"):
            for capture in captures:
                buffer = buffers[capture.capture.name]
                rows: NDArray[Any] = (
                    buffer.view(torch.uint16) if buffer.dtype == torch.bfloat16 else buffer
                ).numpy()
                record = self._committers[capture.capture.name].commit(
                    shard, self._catalog.shards.records[shard], rows
                )
                self._summary.n_built += 1
                self._count(capture, record)
        self._reporter.on_shard(shard)

    def _count(self, capture: CaptureCatalog, record: ShardRecord) -> None:
        stored, c = int(self._catalog.shards.stored[record.shard]), capture.capture
        itemsize = 4 if c.dtype == "float32" else 2
        self._summary.raw_bytes += stored * len(c.layers) * c.width * itemsize
        self._summary.disk_bytes += record.rows_bytes


class _Timer:
    """Adds the seconds spent inside a `with` block to one stage."""

    def __init__(self, stages: dict[str, float], stage: str) -> None:
        self._stages, self._stage = stages, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_exc: object) -> None:
        self._stages[self._stage] += time.perf_counter() - self._started
