"""What goes where in a window: an arrangement turned into chunks to read and slots to put their rows in. No files."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from actcache.reader.order import Arrangement, Members
from actcache.store.shard import ShardReader

I64 = NDArray[np.int64]


class Lane(NamedTuple):
    """Where the rows of one layer of one capture go: columns [column, column + d) of buffer number `buffer`."""

    buffer: int
    layer_index: int
    column: int


class Kind(Protocol):
    """What the rows of a piece are: [R, d] at most, of a dtype on disk, and whether they come in codes."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows at most, and numbers in a row."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers; bfloat16 is its bits."""
        ...

    @property
    def quantised(self) -> str | None:
        """The logical dtype of rows that come in codes."""
        ...


class Piece(Protocol):
    """Rows that land together: those of a chunk, or of a message from a service.

    slots   where rows go, counted in this reader's own slots.
    chosen  which rows of the piece those are; None: its first ones.
    """

    @property
    def reader(self) -> Kind:
        """What the rows are."""
        ...

    @property
    def lane(self) -> Lane:
        """Whose they are."""
        ...

    @property
    def slots(self) -> I64:
        """[n]."""
        ...

    @property
    def chosen(self) -> I64 | None:
        """[n], or None."""
        ...


class Source(NamedTuple):
    """One chunk of a window.

    slots   where rows go, counted in this reader's own slots.
    chosen  which rows of the chunk those are; None: its first ones.
    """

    reader: ShardReader
    lane: Lane
    chunk: int
    slots: I64
    chosen: I64 | None

    @property
    def at(self) -> tuple[int, int]:
        """Layer index and chunk: where it is in its shard."""
        return self.lane.layer_index, self.chunk


class Layout(NamedTuple):
    """What goes where in a window.

    sources     the chunks this reader decodes.
    layer       [n] int16 model layer of the row in each of this reader's slots (the first, where a row has several).
    row         [n] int64 global row number of each.
    own_before  [s + 1] how many of this reader's rows come before each slot of all ranks.
    partition   [s] int16 the partition of the row in each slot of all ranks.
    """

    sources: list[Source]
    layer: NDArray[np.int16]
    row: I64
    own_before: I64
    partition: NDArray[np.int16]


class Places(NamedTuple):
    """Each member of a window, [m]: its shard, chunk, model layer, and the global row number of its first row."""

    shard: I64
    chunk: I64
    layer: NDArray[np.int16]
    first_row: I64


def lay_out(
    members: Members,
    arrangement: Arrangement,
    counts: I64,
    selected: Sequence[I64] | None,
    *,
    places: Places,
    lanes: Sequence[Sequence[Lane]],
    readers: Callable[[int, int], ShardReader],
    is_mine: NDArray[np.bool_],
) -> Layout:
    """Turn an arrangement into work for the threads.

    counts    [m] rows of each member that are streamed.  selected  which of its rows those are; None: its first ones.
    lanes     per lane of the order, what a member of it reads: equally many captures and layers in all.
    readers   (buffer, shard) -> the reader of that shard of the buffer's capture.
    is_mine   [P] which partitions this rank reads.

    What the arrangement told is of the first rows of members, and of all ranks: it is asked for where that is right.
    """
    starts = np.cumsum(counts) - counts
    is_own, of_own = is_mine[members.partition], slice(None)
    if is_own.all():
        own_before, own_slot = _numbers(len(arrangement.slot) + 1), arrangement.slot
    else:
        own_before = np.concatenate([[0], np.cumsum(is_mine[arrangement.partition])])
        own_slot = own_before[arrangement.slot]  # of rows of others it means nothing
        of_own = np.flatnonzero(np.repeat(is_own, counts))
    if arrangement.told is not None:
        out_row, out_layer = arrangement.told
    else:
        n_own = int(own_before[-1])
        out_layer, out_row = np.empty(n_own, np.int16), np.empty(n_own, np.int64)
        out_layer[own_slot[of_own]] = np.repeat(places.layer, counts)[of_own]
        rows = np.repeat(places.first_row - (starts if selected is None else 0), counts)
        rows += np.arange(len(rows)) if selected is None else np.concatenate([counts[:0], *selected])
        out_row[own_slot[of_own]] = rows[of_own]
    mine = np.flatnonzero(is_own & (counts > 0))
    columns = [mine, members.layer_i[mine], places.shard[mine], places.chunk[mine], starts[mine]]
    columns.append(columns[-1] + counts[mine])
    work = list(zip(*(column.tolist() for column in columns), strict=True))
    found: dict[tuple[int, int], ShardReader] = {}
    sources = []
    for j in range(len(lanes[0])):
        for m, layer_i, shard, chunk, start, stop in work:
            lane = lanes[layer_i][j]
            reader = found.get((lane.buffer, shard))
            if reader is None:
                reader = found[lane.buffer, shard] = readers(lane.buffer, shard)
            chosen = None if selected is None else selected[m]
            sources.append(Source(reader, lane, chunk, own_slot[start:stop], chosen))
    return Layout(sources, out_layer, out_row, own_before, arrangement.partition)


@lru_cache(maxsize=4)
def _numbers(n: int) -> I64:
    """0 to n - 1; read-only."""
    found = np.arange(n)
    found.flags.writeable = False
    return found


def handfuls(sources: list[Source], size: int) -> list[tuple[int, list[Source]]]:
    """At most `size` sources at a time of one lane's buffer and columns, with the number of the first of each."""
    jobs: list[tuple[int, list[Source]]] = []
    for number, source in enumerate(sources):
        last = jobs[-1][1] if jobs else []
        if last and len(last) < size and source.lane[::2] == last[0].lane[::2]:
            last.append(source)
        else:
            jobs.append((number, [source]))
    return jobs


def by_request(sources: Iterable[Source]) -> list[list[Source]]:
    """Sources whose chunks lie side by side in one object, to be fetched in one request each; of one lane's buffer and columns."""
    together: dict[tuple[int, ...], list[Source]] = {}
    for source in sources:
        together.setdefault((id(source.reader), *source.lane[::2]), []).append(source)
    return [
        [found[i] for i in parts]
        for found in together.values()
        for parts in found[0].reader.requests([source.at for source in found])
    ]
