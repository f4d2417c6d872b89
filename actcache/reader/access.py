"""The store as a reader sees it: `actcache.open(path)`."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import UncommittedError, UsageError
from actcache.reader.filters import RowFilter, RowRules, limits_from_ratio, resolve_positions
from actcache.reader.follow import Follower, Waiting, check_can_follow
from actcache.reader.provenance import Provenance
from actcache.reader.selection import Delivery, OrderName, Selection, Stack, parse_shards, shards_text
from actcache.reader.shard_rows import ShardRows, iter_shard_rows
from actcache.reader.stream import Connect, Stream
from actcache.store.dtypes import disk_dtype
from actcache.store.merged import LayerStatistics, layer_statistics, quantisation_errors
from actcache.store.objects import Objects, open_objects
from actcache.store.open import CaptureCatalog, Catalog
from actcache.store.schema import Plan
from actcache.store.statistics import QuantisationError

if TYPE_CHECKING:
    from types import TracebackType

    from actcache.reader.consumer import Consumer

WINDOW_ROWS = 131_072
PARTITIONS = 8
_MOST_PARTITIONS = 4096

Split = Literal["train", "holdout"]


class Store:
    """A store opened for reading. Every byte is compared with the plan or the ledger before it is handed out."""

    def __init__(
        self,
        location: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self._open(open_objects(location, storage_options, cache_dir=cache_dir, cache_bytes=cache_bytes))

    @classmethod
    def of(cls, objects: Objects, connect: Connect | None = None) -> Self:
        """A store wherever its objects are. connect: makes what fills windows of streams, where a service does."""
        made = cls.__new__(cls)
        made._open(objects, connect)
        return made

    def _open(self, objects: Objects, connect: Connect | None = None) -> None:
        self._catalog = Catalog(objects)
        self._provenance = Provenance(self._catalog)
        self._connect = connect

    def __repr__(self) -> str:
        grid = self.plan.grid
        return (
            f"Store({self.url!r}: {grid.n_sequences:,} sequences of {grid.seq_len}, hooks {list(self.hooks)}, "
            f"{self.plan.request.model.name})"
        )

    @property
    def url(self) -> str:
        """Where the store is."""
        return self._catalog.objects.url

    @property
    def objects(self) -> Objects:
        """What the store is made of, read by name."""
        return self._catalog.objects

    @property
    def plan(self) -> Plan:
        """Everything that was decided before the first forward pass."""
        return self._catalog.plan

    @cached_property
    def hooks(self) -> tuple[str, ...]:
        """Names of the captures."""
        return tuple(sorted(self._catalog.captures))

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layer numbers in the only (or first) capture; `layers_of` for others."""
        return self.layers_of(None)

    def layers_of(self, hook: str | None) -> tuple[int, ...]:
        """The model's layer numbers in one capture."""
        return self._capture(hook).capture.layers

    @property
    def width(self) -> int:
        """D of the only (or first) capture."""
        return self._capture(None).capture.width

    @property
    def n_tokens(self) -> int:
        """Tokens in the store, excluded ones counted, padding not."""
        return int(self._catalog.shards.stored.sum())

    @property
    def n_kept(self) -> int:
        """Tokens that are trained on and counted: rows per layer."""
        return self.plan.n_kept

    def committed(self, hook: str | None = None) -> list[int]:
        """Committed shards of a capture, retired ones too, ascending."""
        return self._capture(hook).committed()

    def retired(self) -> list[int]:
        """Shards whose rows were deleted to stay within a disk budget, ascending."""
        return self._capture(None).retired()

    @property
    def is_complete(self) -> bool:
        """Whether every shard of every capture is committed."""
        return all(len(self.committed(hook)) == self.plan.grid.n_shards for hook in self.hooks)

    def _capture(self, hook: str | None) -> CaptureCatalog:
        if hook is None:
            hook = "resid_post" if "resid_post" in self._catalog.captures else self.hooks[0]
        return self._catalog.capture(hook)

    @cached_property
    def tokens(self) -> NDArray[np.uint32]:
        """[sequence, position] uint32: every token, read and checked once."""
        return np.concatenate(
            [self._catalog.plan_object("tokens", s) for s in range(self.plan.grid.n_shards)]
        )

    @cached_property
    def document(self) -> NDArray[np.uint32]:
        """[sequence, position] uint32: the corpus document of each token; 0xFFFFFFFF for padding."""
        return np.concatenate(
            [self._catalog.plan_object("document", s) for s in range(self.plan.grid.n_shards)]
        )

    @cached_property
    def keep(self) -> NDArray[np.bool_]:
        """[sequence, position] bool: whether a token is trained on and counted."""
        return np.concatenate([self._catalog.plan_object("keep", s) for s in range(self.plan.grid.n_shards)])

    def _shards(self, split: Split | None) -> range:
        grid = self.plan.grid
        if split is None:
            return range(grid.n_shards)
        if split not in ("train", "holdout"):
            raise UsageError(f"split={split!r}: expected 'train' or 'holdout'")
        return (
            range(grid.n_holdout_shards)
            if split == "holdout"
            else range(grid.n_holdout_shards, grid.n_shards)
        )

    def stats(self, hook: str | None = None, split: Split | None = "train") -> dict[int, LayerStatistics]:
        """Statistics of kept rows per layer, merged from the shards of a split that can be read (None: of both)."""
        capture = self._capture(hook)
        return layer_statistics(capture, sorted(set(capture.live()) & set(self._shards(split))))

    def quantisation_error(
        self, hook: str | None = None, split: Split | None = "train"
    ) -> dict[int, QuantisationError]:
        """What quantising cost each layer, measured when it was written; UsageError where rows are stored as they are."""
        capture = self._capture(hook)
        return quantisation_errors(capture, sorted(set(capture.live()) & set(self._shards(split))))

    def read(
        self,
        *,
        layer: int,
        hook: str | None = None,
        sequences: Sequence[int] | slice | int | None = None,
        positions: Sequence[int] | slice | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Activations [q, t, d] of one layer, in sequence order, as stored unless `dtype` is given.

        sequences, positions: an index, a slice, a list, or None for all. Only the chunks that hold them are read.

        Raises:
            UncommittedError: a sequence lies in a shard that is not committed.
            DamageError: a chunk is not what was committed.
            UsageError: an index is out of range, or names padding, which was never stored.
        """
        capture, grid = self._capture(hook), self.plan.grid
        q, t = (
            _indices(sequences, grid.n_sequences, "sequences"),
            _indices(positions, grid.seq_len, "positions"),
        )
        out = np.empty((len(q), len(t), capture.capture.width), disk_dtype(capture.capture.dtype))
        layer_i = capture.layer_index(layer)
        for shard in np.unique(q // grid.sequences_per_shard):
            at = np.flatnonzero(q // grid.sequences_per_shard == shard)
            rows = self._provenance.rows_of(int(shard))[q[at] - grid.sequences_of(int(shard)).start][:, t]
            if (rows < 0).any():
                raise UsageError(
                    f"sequences {q[at][(rows < 0).any(1)].tolist()} hold padding at those positions; see .document"
                )
            out[at] = self._rows(capture, int(shard), layer_i, rows.reshape(-1)).reshape(
                len(at), len(t), out.shape[2]
            )
        tensor = torch.from_numpy(out)
        tensor = tensor.view(torch.bfloat16) if capture.capture.dtype == "bfloat16" else tensor
        return tensor if dtype is None else tensor.to(dtype)

    def _rows(
        self, capture: CaptureCatalog, shard: int, layer_i: int, rows: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Rows of one shard by their number within it."""
        reader, r = capture.reader(shard), self.plan.grid.rows_per_chunk
        out = np.empty((len(rows), capture.capture.width), reader.dtype)
        chunk_of = rows // r
        for chunk in np.unique(chunk_of):
            at = chunk_of == chunk
            out[at] = reader.read(layer_i, int(chunk))[rows[at] - chunk * r]
        return out

    def stream(
        self,
        *,
        batch_size: int = 8192,
        hook: str | Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        stack: Stack = "data",
        split: Split = "train",
        order: OrderName | None = None,
        commit_shards: int = 4,
        run_chunks: int = 1,
        partial: bool | str = False,
        follow: bool = False,
        consumer: str | None = None,
        patience_s: float = 600.0,
        on_wait: Callable[[Waiting | None], None] | None = None,
        seed: int = 0,
        epochs: int | None = 1,
        window_rows: int = WINDOW_ROWS,
        partitions: int = PARTITIONS,
        outlier_norm_ratio: float | None = None,
        norm_limits: Mapping[int, float] | None = None,
        positions: Sequence[int] | slice | None = None,
        exclude_tokens: Sequence[int] | None = None,
        drop_last: bool = False,
        memory: int | None = None,
        threads: int | None = None,
        io_threads: int | None = None,
        page_cache: bool | None = None,
        device: str = "cpu",
        device_memory: int | None = None,
        dtype: torch.dtype | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Stream:
        """Shuffled batches of token x layer rows, in an order that nothing but these arguments can change.

        Args:
            batch_size: rows per batch, over all ranks.
            hook: a capture, or several of the same dtype, aligned row for row (transcoders: input and output).
            layers: the model's layer numbers; None: all that are stored.
            stack: "data": a row is one layer of one token, [b, d] (a multi-layer SAE). "feature": all layers of a token
                side by side, [b, l * d]. "layers": [b, l, d] (crosscoders).
            split: "train" or "holdout".
            order: "global" (without `follow` the default) mixes the whole split. "commit" (with it) goes through shards as
                they were planned, mixing the last `commit_shards`: what somebody following a running build can have.
            commit_shards: see `order`.
            run_chunks: adjacent chunks of a shard that come into the same window, and can be read in one request. Part of
                the order: 1 mixes best; on object storage 4 to 16 make a quarter to a sixteenth of the requests.
            partial: True: of an unfinished store, the shards that are committed now. They are part of the order, and
                `stream.shards` says which; to go on with exactly them, give that text.
            follow: wait for shards that are not committed yet. The rows and their order are those of a finished store in the
                `commit` order; the stream's `follower` says what it waits for.
            consumer: the name by which a build with a disk budget knows this reader, see `Store.register`.
            patience_s: of a follower: StalledError when no shard was committed and no producer heard of for so long.
            on_wait: of a follower: told every second what is waited for, and once with None when it is there. It may raise
                `actcache.flow.StopWaiting`: the consumer gets that, and no row is lost.
            seed: of the order.
            epochs: None goes on for ever. Each epoch has another order.
            window_rows: rows shuffled together; more is better mixed and takes more memory.
            partitions: what ranks share out: world_size must divide it.
            outlier_norm_ratio: drop rows whose norm exceeds this many times their layer's median. In the `commit` order the
                median is that of the store's first shard, which is there before any other.
            norm_limits: or drop rows whose norm exceeds a number, given per layer.
            positions: stream these positions of a sequence only.
            exclude_tokens: leave these token ids out.
            drop_last: leave out a short last batch of an epoch.
            memory: bound in bytes; it suffices, or is refused with the least that would.
            threads: that decode, and read local disks; None: 2, or 1 on a single core.
            io_threads: that wait for object storage, one request each; None: 16. Of local disks, those that wait for what is
                read around the page cache; None: 8.
            page_cache: whether files of a local store are read through the system's page cache, which makes later epochs as
                fast as memory where they fit. None: unless they are on a disk and take more than half of this machine's memory; those are
                read around it, faster and with less of a processor, where not most of them happen to be in it.
            device: where batches go.
            device_memory: bound in bytes on windows in the memory of a GPU, where rows are then shuffled. None: a tenth of
                the GPU, if two windows fit into that. 0: windows stay in this machine's memory.
            dtype: of the batches; None: as stored.
            rank: this reader's number.
            world_size: how many readers share the batches.

        Raises:
            UncommittedError: the store is not finished, and neither `partial` nor `follow` was asked for.
            RetiredError: shards were deleted to stay within a disk budget.
            UsageError: an argument cannot be used.
            MemoryBoundError: `memory` or `device_memory` is too little; the message says how much would do.
        """
        names = (hook,) if hook is None or isinstance(hook, str) else tuple(hook)
        captures = [self._capture(name) for name in names]
        selected = tuple(sorted(layers)) if layers is not None else captures[0].capture.layers
        _check_positive(
            batch_size=batch_size,
            window_rows=window_rows,
            partitions=partitions,
            world_size=world_size,
            commit_shards=commit_shards,
            run_chunks=run_chunks,
        )
        order = order or ("commit" if follow else "global")
        _check_choice("stack", stack, ("data", "feature", "layers"))
        _check_choice("order", order, ("global", "commit"))
        self._check_captures(captures, selected)
        if partitions > _MOST_PARTITIONS:
            raise UsageError(f"partitions={partitions}: expected at most {_MOST_PARTITIONS}")
        if partitions % world_size or not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}: world_size must divide partitions={partitions}")
        follower = None
        if follow:
            check_can_follow(
                captures,
                order=order,
                epochs=epochs,
                partial=partial,
                consumer=consumer,
                is_held_out=split == "holdout",
            )
            follower = Follower(
                captures,
                consumer=consumer,
                patience_s=patience_s,
                on_wait=on_wait or (lambda _waiting: None),
            )
            shards = list(self._shards(split))
        else:
            shards = self._shards_to_stream(captures, split, partial=partial, world_size=world_size)
        if order == "commit" and outlier_norm_ratio is not None:
            if follower is not None:
                follower.wait_for([0])
            of = [0]
        else:
            of = list(self._shards("train")) if split != "train" else shards
        selection = Selection(
            hooks=tuple(found.capture.name for found in captures),
            layers=selected,
            stack=stack,
            split=split,
            shards=None if len(shards) == len(self._shards(split)) else shards_text(shards),
            order=order,
            commit_shards=commit_shards if order == "commit" else 0,
            run_chunks=run_chunks,
            seed=seed,
            batch_size=batch_size,
            window_rows=window_rows,
            partitions=partitions,
            rules=RowRules(
                norm_limits=self._norm_limits(captures[0], of, selected, outlier_norm_ratio, norm_limits),
                positions=resolve_positions(positions, self.plan.grid.seq_len),
                exclude_tokens=None if exclude_tokens is None else tuple(sorted(set(exclude_tokens))),
            ),
            drop_last=drop_last,
        )
        delivery = Delivery(
            epochs=epochs,
            threads=threads or min(2, os.cpu_count() or 1),
            memory_bytes=memory,
            io_threads=io_threads,
            page_cache=page_cache,
            dtype=dtype,
            device=device,
            device_memory_bytes=device_memory,
            rank=rank,
            world_size=world_size,
        )
        return Stream(
            captures,
            self._provenance,
            selection,
            delivery,
            kept=self._catalog.shards.kept,
            shards=np.array(shards, np.int64),
            follower=follower,
            connect=self._connect,
        )

    def register(
        self, name: str, stream: Stream, *, checkpoint_rows: int | None = None, first_rows: int = 0
    ) -> "Consumer":
        """Tell producers that this process reads the store as consumer `name`; see `actcache.reader.consumer`.

        checkpoint_rows: how many rows it reads between checkpoints.
        first_rows: how many it reads before it can save its first checkpoint.

        Raises:
            UsageError: the store is built within a disk budget that does not wait for this name, or is too small for it.
            ExpiredError: the consumer was given up, and shards that it needs are gone.
        """
        from actcache.reader.consumer import Consumer

        return Consumer(name, stream, self._catalog.objects, checkpoint_rows, first_rows)

    def iter_shards(
        self,
        split: Split = "holdout",
        *,
        hook: str | Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        outlier_norm_ratio: float | None = None,
        norm_limits: Mapping[int, float] | None = None,
        positions: Sequence[int] | slice | None = None,
        exclude_tokens: Sequence[int] | None = None,
        n_tokens: int | None = None,
    ) -> Iterator[ShardRows]:
        """Kept tokens in the order of the text, one shard at a time, all layers aligned: for evaluations.

        Filters are those of `stream`, and say which rows pass; none is left out. The first hook decides norm limits.
        Memory: one layer of one shard for each call of `ShardRows.rows`.

        Args:
            split: "train" or "holdout".
            hook: a capture, or several, aligned row for row.
            layers: the model's layer numbers; None: all that are stored.
            outlier_norm_ratio: rows whose norm exceeds this many times their layer's median do not pass.
            norm_limits: or rows whose norm exceeds a number, given per layer.
            positions: only these positions of a sequence pass.
            exclude_tokens: these token ids do not pass.
            n_tokens: stop after the sequence that completes so many kept tokens; None: the whole split.

        Raises:
            UncommittedError: the split is not finished.
            UsageError: an argument cannot be used.
        """
        names = (hook,) if hook is None or isinstance(hook, str) else tuple(hook)
        captures = [self._capture(name) for name in names]
        selected = tuple(sorted(layers)) if layers is not None else captures[0].capture.layers
        self._check_captures(captures, selected)
        shards = self._shards_to_stream(captures, split, partial=False, world_size=1)
        if not shards:
            raise UsageError(
                f"the {split} split of {self.url} holds no shards; build it with a larger --holdout"
            )
        rules = RowRules(
            norm_limits=self._norm_limits(
                captures[0], self._shards("train"), selected, outlier_norm_ratio, norm_limits
            ),
            positions=resolve_positions(positions, self.plan.grid.seq_len),
            exclude_tokens=None if exclude_tokens is None else tuple(sorted(set(exclude_tokens))),
        )
        lanes = [np.array([captures[0].layer_index(layer)]) for layer in selected]
        row_filter = RowFilter(
            captures[0], self._provenance.plan_object, self._catalog.shards.kept, rules, lanes
        )
        return iter_shard_rows(
            self._catalog, self._provenance, captures, selected, shards, row_filter, n_tokens
        )

    def _check_captures(self, captures: list[CaptureCatalog], layers: tuple[int, ...]) -> None:
        """UsageError where captures or layers cannot be streamed together."""
        if not layers or len(set(layers)) != len(layers):
            raise UsageError(
                f"layers={list(layers)}: expected distinct layers among {list(captures[0].capture.layers)}"
            )
        for found in captures:
            for layer in layers:
                found.layer_index(layer)
        if len({found.capture.name for found in captures}) != len(captures) or not captures:
            raise UsageError(f"hook={[found.capture.name for found in captures]}: name each once")

    def _shards_to_stream(
        self, captures: list[CaptureCatalog], split: Split, *, partial: bool | str, world_size: int
    ) -> list[int]:
        """The shards of a split that every capture has committed; UncommittedError where that must be all and is not."""
        wanted = self._shards(split) if isinstance(partial, bool) else parse_shards(partial)
        if not set(wanted) <= set(self._shards(split)):
            raise UsageError(
                f"partial={partial!r}: the {split} split has shards {shards_text(self._shards(split)) or 'none'}"
            )
        if partial is not True:
            for shard in sorted(set(wanted) & set(captures[0].retired())):
                captures[0].check_not_retired(shard)
        committed = set(wanted).intersection(*(found.live() for found in captures))
        missing = sorted(set(wanted) - committed)
        if not missing:
            return list(wanted)
        if partial is not True:
            raise UncommittedError(
                f"{len(missing)} of {len(wanted)} {split} shards of {', '.join(c.capture.name for c in captures)} in "
                f"{self.url} are not committed yet (the first is {missing[0]}). Finish the build first: run the same "
                f"command again. Or stream what there is: partial=True (--partial); or follow the build: follow=True "
                f"(--follow)."
            )
        if not committed:
            raise UncommittedError(
                f"no {split} shard in {self.url} is committed yet: there is nothing to stream."
            )
        if world_size > 1:
            raise UsageError(
                "partial=True with several ranks: each might find other shards committed. Ask once, and give all ranks "
                "that stream's text: partial=stream.shards"
            )
        return sorted(committed)

    def _norm_limits(
        self,
        capture: CaptureCatalog,
        shards: Sequence[int],
        layers: tuple[int, ...],
        ratio: float | None,
        limits: Mapping[int, float] | None,
    ) -> tuple[float, ...] | None:
        if limits is not None:
            if ratio is not None or set(limits) != set(layers):
                raise UsageError(
                    f"norm_limits={dict(limits)}: expected one limit for each of layers {list(layers)}, and no "
                    f"outlier_norm_ratio beside them"
                )
            return tuple(float(limits[layer]) for layer in layers)
        if ratio is None:
            return None
        return limits_from_ratio(capture, self._catalog.shards.kept, shards, layers, ratio)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", value: BaseException | None, tb: "TracebackType | None"
    ) -> None:
        """Nothing is held open; `with` is allowed because people expect it."""


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name}={value}: expected at least 1")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


def _indices(chosen: Sequence[int] | slice | int | None, n: int, name: str) -> NDArray[np.int64]:
    """Indices below `n`, negative ones counted from the end."""
    everything = np.arange(n)
    if chosen is None:
        return everything
    try:
        return np.atleast_1d(
            everything[chosen if isinstance(chosen, slice | int) else np.asarray(chosen, np.int64)]
        )
    except IndexError as error:
        raise UsageError(f"{name}={chosen!r} is out of range: there are {n}") from error


def open_store(
    location: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Store:
    """Open a store for reading.

    Args:
        location: a local folder or any fsspec URL (s3://, gs://, https://, memory://).
        storage_options: credentials and endpoint of object storage, where the environment does not give them.
        cache_dir: a local folder where chunks read from a URL are kept.
        cache_bytes: the most that folder may hold; None: 16 GiB.
    """
    return Store(location, storage_options, cache_dir=cache_dir, cache_bytes=cache_bytes)
