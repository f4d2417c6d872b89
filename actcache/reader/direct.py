"""Chunks that are stored as they are: from a file to their slots in one compiled call for many.

Python is asked once for a job, not several times for each chunk, and other threads run meanwhile. Whatever is not as it
should be ends the call: the chunk it ended at goes the ordinary way, which knows what to make of it.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from actcache.loops.compiled import Direct
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
    if not held:
        return Brought(0, 0, 0, 0.0, 0.0, 0.0)
    cycles = np.zeros(3, np.int64)
    n = direct.bring(
        work.buffer_info()[0],
        len(held),
        files.memory(n_most).address,
        *target.place,
        direct.shift.ctypes.data,
        cycles.ctypes.data,
    )
    columns = len(work) // len(held)
    n_bytes, n_rows = (sum(work[i : n * columns : columns]) for i in (2, 6))
    return Brought(n, n_bytes, n_rows, *(cycles / max(1, cycles.sum())).tolist())
