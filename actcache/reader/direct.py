"""Chunks that are stored as they are: from a file to their slots in one compiled call for many.

Python is asked once for a job, not several times for each chunk, and other threads run meanwhile. Whatever is not as it
should be ends the call: the chunk it ended at goes the ordinary way, which knows what to make of it.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from actcache.loops.compiled import Direct
from actcache.reader.fetching import Body
from actcache.reader.layout import Source
from actcache.reader.scatter import Target, address
from actcache.store.local import NOT_MAPPED, LocalFiles


class Brought(NamedTuple):
    """What a call did: chunks, bytes read, rows; which shares of its time went into reading, comparing and scattering."""

    n_chunks: int
    n_bytes: int
    n_rows: int
    read: float
    decode: float
    scatter: float


_NOTHING = Brought(0, 0, 0, 0.0, 0.0, 0.0)
_IN_MEMORY, _COLUMNS = -1, 9
"""For a file, and numbers of a chunk, as loops_x86.ll has them."""


def bring(
    job: Sequence[Source], target: Target, files: LocalFiles, direct: Direct, *, is_warm: bool
) -> Brought:
    """The first chunks of a job to their slots, as far as they come.

    is_warm  they are likely to be in the page cache, where they can be read without being copied from it.
    """
    work, held, n_most = array("q"), [], 0
    for reader, lane, chunk, slots, chosen in job:
        found = reader.as_is(lane.layer_index, chunk)
        if found is None:
            break
        try:
            file = files.file(reader.key)
        except FileNotFoundError:
            break
        held.append(file)
        n_most = max(n_most, found[1])
        of_chosen = 0 if chosen is None else address(chosen)
        mapped = file.mapped() if is_warm else NOT_MAPPED
        work.extend((file.fd, *found, address(slots), of_chosen, len(slots), *mapped))
    return _brought(work, target, direct, files.memory(n_most).address) if held else _NOTHING


def bring_fetched(
    job: Sequence[Source], bodies: Sequence[Body | None], target: Target, direct: Direct
) -> Brought:
    """As `bring`, of chunks that are in memory: `bodies`."""
    work = array("q")
    for (reader, lane, chunk, slots, chosen), body in zip(job, bodies, strict=True):
        found = reader.as_is(lane.layer_index, chunk)
        if found is None or body is None or len(body) != found[1]:
            break
        of_chosen = 0 if chosen is None else address(chosen)
        begin = address(np.frombuffer(body, np.uint8))
        work.extend((_IN_MEMORY, begin, *found[1:], address(slots), of_chosen, len(slots), *NOT_MAPPED))
    return _brought(work, target, direct, 0) if work else _NOTHING


def _brought(work: "array[int]", target: Target, direct: Direct, memory: int) -> Brought:
    cycles = np.zeros(3, np.int64)
    n = direct.bring(
        work.buffer_info()[0],
        len(work) // _COLUMNS,
        memory,
        *target.place,
        direct.shift.ctypes.data,
        cycles.ctypes.data,
    )
    n_bytes, n_rows = (sum(work[column : n * _COLUMNS : _COLUMNS]) for column in (2, 6))
    return Brought(n, n_bytes, n_rows, *(cycles / max(1, cycles.sum())).tolist())
