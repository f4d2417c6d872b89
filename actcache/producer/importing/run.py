"""Filling a store from a source: read -> convert -> rows in their mixed place -> encode -> commit, shard after shard.

While one shard is encoded and committed by a thread, the next is read; two shard buffers are used in turn. A shard's
sequences are read in the order of the source, at most `READ_BYTES` at a time.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.errors import NonFiniteError, UsageError
from actcache.producer.grid import choose_grid
from actcache.producer.importing.layout import (
    ImportSettings,
    Order,
    StoredSequences,
    blocks,
    check_same_import,
    make_capture,
    make_request,
    make_text,
)
from actcache.producer.importing.source import Fingerprint, Source
from actcache.producer.plan import SizeForecast, forecast
from actcache.store.arrays import disk_dtype
from actcache.store.create import CaptureRequest, create_plan, staging, sweep_staged
from actcache.store.disk import Disk
from actcache.store.dtypes import as_float32
from actcache.store.ledger import ShardCommitter
from actcache.store.mixing import Mixed, mix
from actcache.store.objects import LocalObjects
from actcache.store.open import CaptureCatalog, Catalog
from actcache.store.schema import Grid, Request, ShardRecord
from actcache.version import __version__

READ_BYTES = 16 << 20
_TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}

OnOperation = Callable[[str, str], None]


@dataclass(slots=True)
class ImportReporter:
    """What an import tells its caller while it runs. Every callback may be left out."""

    on_fingerprint: Callable[[int, int], None] = lambda _n_bytes, _total: None
    on_forecast: Callable[[Grid, SizeForecast], None] = lambda _grid, _forecast: None
    on_start: Callable[[int, int], None] = lambda _n_done_tokens, _n_tokens: None
    on_tokens: Callable[[int], None] = lambda _n_tokens: None


@dataclass(slots=True)
class ImportSummary:
    """What an import did.

    n_shards   of the store; n_imported by this run, n_adopted found whole on disk, the rest were committed.
    n_tokens   positions read by this run; each is a row of every layer.
    raw_bytes, disk_bytes  of the rows committed by this run.
    """

    store: Path
    n_shards: int = 0
    n_imported: int = 0
    n_adopted: int = 0
    n_tokens: int = 0
    raw_bytes: int = 0
    disk_bytes: int = 0
    elapsed_s: float = 0.0

    @property
    def was_complete(self) -> bool:
        """Whether there was nothing to do."""
        return self.n_imported + self.n_adopted == 0


def import_activations(
    source: Source,
    settings: ImportSettings,
    *,
    encode_threads: int = 1,
    reporter: ImportReporter | None = None,
    on_operation: OnOperation | None = None,
) -> ImportSummary:
    """Write a store from others' activations, or continue one; a finished one is left as it is.

    The source is read whole once for its fingerprint, whenever this is called, and once more for what is not committed.

    Args:
        source: the activations; see `open_source`.
        settings: what to store, and where.
        encode_threads: threads that compress.
        reporter: told about progress.
        on_operation: called before every step that changes the disk.

    Raises:
        PlanMismatchError: there is a store of other arguments, or of another source. UsageError: the settings do not fit.
        CorpusError: a file of the source is damaged, or changed meanwhile. DiskFullError: the store does not fit.
        NonFiniteError: NaN or infinity in the source, or infinity by converting to the stored dtype.
    """
    started, reporter, out = time.perf_counter(), reporter or ImportReporter(), settings.out
    sweep_staged(out)
    is_there = (out / "zarr.json").exists()
    if not is_there:
        _check_free(out)
    capture = make_capture(source.facts, settings)
    fingerprint = Fingerprint(source.facts, reporter.on_fingerprint)
    request = make_request(source, settings, fingerprint)
    order = Order(source.facts, request.seed, request.holdout_frac)
    if not is_there:
        _write_plan(source, order, request, capture, fingerprint, out, reporter, on_operation)
    catalog = Catalog(LocalObjects(out))
    check_same_import(catalog, request, capture, source.facts, fingerprint)
    summary = ImportSummary(out, n_shards=catalog.grid.n_shards)
    found = catalog.capture(capture.hook)
    committed = set(found.committed())
    with Disk(out, on_operation) as disk:
        disk.sweep()
        if len(committed) < catalog.grid.n_shards:
            reporter.on_start(
                int(catalog.shards.stored[sorted(committed)].sum()), int(catalog.shards.stored.sum())
            )
            with ThreadPoolExecutor(max(1, encode_threads), thread_name_prefix="actcache-encode") as pool:
                stored = StoredSequences(source, order, request, catalog.grid)
                _Filler(catalog, found, disk, pool, source, stored, fingerprint, summary, reporter).fill(
                    [s for s in range(catalog.grid.n_shards) if s not in committed]
                )
    summary.elapsed_s = time.perf_counter() - started
    return summary


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not a store (it has no zarr.json). Nothing was touched; give another --out."
        )


def _write_plan(
    source: Source,
    order: Order,
    request: Request,
    capture: CaptureRequest,
    fingerprint: Fingerprint,
    out: Path,
    reporter: ImportReporter,
    on_operation: OnOperation | None,
) -> None:
    """Write the plan: it appears under `out` whole, or not at all. One that another process made meanwhile is kept."""
    grid = choose_grid(request, [capture], order.n_train, order.n_holdout)
    reporter.on_forecast(grid, forecast(grid, [capture], out))
    try:
        with staging(out, on_operation) as disk:
            create_plan(
                disk,
                version=__version__,
                request=request,
                text=make_text(source.facts, fingerprint),
                grid=grid,
                sequences_of=StoredSequences(source, order, request, grid).of_shard,
                captures=[capture],
                on_shard=fingerprint.check,
            )
    except FileExistsError as error:
        if not (out / "zarr.json").exists():
            raise UsageError(f"{out} appeared while the plan was written, and is not a store") from error


def converted(values: NDArray[Any], there: str, here: str) -> NDArray[Any]:
    """Numbers of logical dtype `there` as numbers on disk of logical dtype `here`, rounded to nearest, ties to even.

    The same dtype is the same bits, NaN payloads included.
    """
    if there == here:
        return values
    tensor = torch.from_numpy(values)
    tensor = (tensor.view(torch.bfloat16) if there == "bfloat16" else tensor).to(_TORCH_DTYPES[here])
    return (tensor.view(torch.uint16) if here == "bfloat16" else tensor).numpy()


class _Filler:
    """Fills the shards that are left. The main thread reads; one other thread commits."""

    def __init__(
        self,
        catalog: Catalog,
        found: CaptureCatalog,
        disk: Disk,
        pool: ThreadPoolExecutor,
        source: Source,
        stored: StoredSequences,
        fingerprint: Fingerprint,
        summary: ImportSummary,
        reporter: ImportReporter,
    ) -> None:
        self._catalog, self._capture, self._source, self._stored = catalog, found.capture, source, stored
        self._fingerprint, self._summary, self._reporter = fingerprint, summary, reporter
        self._committer = ShardCommitter(
            disk,
            catalog.objects,
            found.capture,
            found.arrays,
            pool,
            __version__,
            lambda s, r: f"shard {s}, row {r}",
        )
        self._buffers: list[NDArray[Any] | None] = [None, None]

    def fill(self, shards: list[int]) -> None:
        """Commit the shards, overlapping reading with encoding and the disk."""
        with ThreadPoolExecutor(1, thread_name_prefix="actcache-commit") as committing:
            pending: Future[None] | None = None
            turn = 0
            for shard in shards:
                record = self._committer.adopt(shard, self._catalog.shards.records[shard])
                if record is not None:
                    self._summary.n_adopted += 1
                    self._count(record)
                    continue
                rows = self._read(shard, turn)
                self._fingerprint.check()
                if pending is not None:
                    pending.result()
                pending, turn = committing.submit(self._commit, shard, rows), 1 - turn
            if pending is not None:
                pending.result()

    def _mixed(self, shard: int) -> Mixed:
        keep, document = (self._catalog.plan_object(name, shard) for name in ("keep", "document"))
        return mix(self._catalog.grid, self._catalog.plan.request.seed, shard, keep, document)

    def _read(self, shard: int, turn: int) -> NDArray[Any]:
        """Rows [l, stored, d] of a shard, every vector read straight to its place."""
        capture, facts, mixed = self._capture, self._source.facts, self._mixed(shard)
        numbers = self._stored.numbers(shard)
        shape = (len(capture.layers), mixed.stored, capture.width)
        buffer = self._buffers[turn]
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[turn] = np.empty(shape, disk_dtype(capture.dtype))
        for layer_i, layer in enumerate(capture.layers):
            for index in blocks(numbers, facts.n_bytes_per_sequence, READ_BYTES):
                acts_qtd = self._source.read(layer, numbers[index])
                rows = converted(acts_qtd, facts.dtype, capture.dtype).reshape(-1, capture.width)
                buffer[layer_i, mixed.row_of_token[index].reshape(-1)] = rows
                if layer_i == 0:
                    self._summary.n_tokens += len(rows)
                    self._reporter.on_tokens(len(rows))
        return buffer

    def _commit(self, shard: int, rows: NDArray[Any]) -> None:
        try:
            record = self._committer.commit(shard, self._catalog.shards.records[shard], rows)
        except NonFiniteError as error:
            raise self._located(shard, rows) from error
        self._summary.n_imported += 1
        self._count(record)

    def _count(self, record: ShardRecord) -> None:
        stored, c = int(self._catalog.shards.stored[record.shard]), self._capture
        self._summary.raw_bytes += stored * len(c.layers) * c.width * disk_dtype(c.dtype).itemsize
        self._summary.disk_bytes += record.rows_bytes

    def _located(self, shard: int, rows: NDArray[Any]) -> NonFiniteError:
        """The error of a shard that holds NaN or infinity, in the words of the source."""
        mixed, numbers = self._mixed(shard), self._stored.numbers(shard)
        first = self._catalog.grid.sequences_of(shard).start
        for layer_i, layer in enumerate(self._capture.layers):
            bad = np.flatnonzero(~np.isfinite(as_float32(rows[layer_i], self._capture.dtype)).all(1))
            if len(bad):
                number = int(numbers[int(mixed.row_sequence[bad[0]]) - first])
                position = int(mixed.row_position[bad[0]])
                return self._non_finite(layer, number, position)
        raise AssertionError(f"shard {shard} was refused as not finite, and is")

    def _non_finite(self, layer: int, number: int, position: int) -> NonFiniteError:
        facts, stored_as = self._source.facts, self._capture.dtype
        values = self._source.read(layer, np.array([number]))[0, position]
        x = as_float32(values, facts.dtype) if facts.dtype == "bfloat16" else values
        where = (
            f"layer {layer}, sequence {number}, position {position} of {self._source.locate(layer, number)}"
        )
        if np.isfinite(x).all():
            return NonFiniteError(
                f"{where} holds {float(np.abs(x).max()):g}, which is infinite as {stored_as}: the shard was not committed. "
                f"Import into a new store with --dtype float32."
            )
        return NonFiniteError(
            f"{'NaN' if np.isnan(x).any() else 'infinity'} in {where}: the shard was not committed. Correct the source, or "
            f"leave the layer out with --layers, and import into a new store."
        )
