"""What a stream hands out, and how: what its order depends on, and what changes nothing about it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from actcache.errors import UsageError
from actcache.reader.filters import RowRules
from actcache.store.schema import digest_of

Stack = Literal["data", "feature", "layers"]
OrderName = Literal["global", "commit"]

_MOST_LISTED = 24
_LONGEST_TEXT = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the rows and their order depend on besides the data: another value, another order.

    hooks          captures, aligned row for row; the first decides the norm limits.
    layers         the model's layer numbers.    stack  how a token's layers become rows, see `Store.stream`.
    split          "train" or "holdout".         seed   of the order.
    shards         those streamed of an unfinished store, as text ("3-57,60"); None: all of the split.
    order          "global" or "commit", which mixes the `commit_shards` shards committed last.
    run_chunks     adjacent chunks that are taken together.
    batch_size     b, over all ranks.            drop_last  whether a short last batch of an epoch is left out.
    window_rows    rows mixed together.          partitions  what ranks share out.
    rules          which kept rows are streamed.
    """

    hooks: tuple[str, ...]
    layers: tuple[int, ...]
    stack: Stack
    split: str
    shards: str | None
    order: OrderName
    commit_shards: int
    run_chunks: int
    seed: int
    batch_size: int
    window_rows: int
    partitions: int
    rules: RowRules
    drop_last: bool

    def as_json(self) -> dict[str, Any]:
        """By name, for a cursor: a long list is represented by its digest."""
        flat = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rules"}
        flat |= {f.name: getattr(self.rules, f.name) for f in fields(self.rules)}
        brief = {
            name: _brief(list(value)) if isinstance(value, tuple) else value for name, value in flat.items()
        }
        if self.shards is not None and len(self.shards) > _LONGEST_TEXT:
            brief["shards"] = _brief(parse_shards(self.shards))
        return brief


def _brief(values: list[Any]) -> Any:
    return values if len(values) <= _MOST_LISTED else f"{len(values)} values, sha256 {digest_of(values)[:16]}"


def shards_text(shards: Iterable[int]) -> str:
    """Ascending numbers as ranges: "3-57,60"."""
    ranges: list[list[int]] = []
    for shard in shards:
        if ranges and shard == ranges[-1][1] + 1:
            ranges[-1][1] = shard
        else:
            ranges.append([shard, shard])
    return ",".join(str(a) if a == z else f"{a}-{z}" for a, z in ranges)


def parse_shards(text: str) -> list[int]:
    """What `shards_text` made; UsageError where it cannot have."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or part == first)):
            raise UsageError(
                f"partial={text!r}: expected shards such as '3-57,60', as `stream.shards` says them"
            )
        found += range(int(first), int(last or first) + 1)
    if found != sorted(set(found)) or not found:
        raise UsageError(f"partial={text!r}: expected distinct shards, ascending")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How rows reach the consumer: nothing here changes which rows come, or when.

    epochs        how many; None goes on for ever.
    threads       that decode, and read local disks.  memory_bytes  bound on window buffers; None for three windows.
    io_threads    that wait for object storage, or for disks read around the page cache; None: as many as suit it.
    page_cache    whether local files are read through it; None: unless they are on a disk and larger than it can be.
    dtype         of the batches; None: as stored.  device     of the batches.
    device_memory_bytes  bound on windows on a GPU; None: a tenth of it, if two fit; 0: windows live in host memory.
    rank, world_size  this reader's share: partitions p with p % world_size == rank.
    """

    epochs: int | None = 1
    threads: int = 2
    memory_bytes: int | None = None
    io_threads: int | None = None
    page_cache: bool | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    device_memory_bytes: int | None = None
    rank: int = 0
    world_size: int = 1
