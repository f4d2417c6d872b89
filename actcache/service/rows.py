"""Rows of a window as messages, each with what is said of it and its checksum."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.service.memory import PAGE, Memory
from actcache.service.numbers import Numbers
from actcache.service.windows import Entry, Order, WindowCache
from actcache.service.wire import (
    MESSAGE_BYTES,
    MESSAGES_PER_CALL,
    WAITING,
    WindowTicket,
    message,
    part_of,
)
from actcache.store.codec import extend_crc32c

_MEMORY = Memory()
_BLOCK_BYTES = 256 << 10

_SIGN_S = 5.0
"""While a window is being decoded, a client hears of it so often."""


def messages(
    cache: WindowCache, order: Order, asked: WindowTicket, is_over: Callable[[], bool], numbers: Numbers
) -> Iterator[tuple[pa.RecordBatch, pa.Buffer]]:
    """The next rows that a ticket asks for, as many as a call may bring; and, while there are none yet, signs of life."""
    per_message = max(1, MESSAGE_BYTES // sum(s.width * s.dtype.itemsize for s in order.filling.shapes))
    n_sent, first, is_last = 0, asked.first, False
    with cache.call(asked.client) as client:
        while n_sent < MESSAGES_PER_CALL and not is_last and not is_over():
            with cache.use(order, asked.epoch, asked.window, client, is_over, _SIGN_S) as entry:
                cut = None if entry is None else _cut(cache, order, entry, asked, first, per_message)
                is_last = cut is not None and cut[2]
                if entry is not None and is_last:
                    cache.had(client, entry, asked.part, asked.parts)
            if cut is None:
                yield pa.RecordBatch.from_pylist([], schema=order.schema), as_json({WAITING: True})
                continue
            found, said, _ = cut
            cache.prepare(order, asked.epoch, asked.window + 1)
            numbers.add(rows=found.num_rows, row_bytes=found.nbytes)
            n_sent, first = n_sent + 1, first + found.num_rows
            yield found, as_json(said)


def _cut(
    cache: WindowCache, order: Order, entry: Entry, asked: WindowTicket, first: int, per_message: int
) -> tuple[pa.RecordBatch, dict[str, Any], bool]:
    """The next rows of the part that is asked for; what is said of them; whether they are its last."""
    slots, layout = entry.own_slots(asked.rank, asked.world_size), entry.layout
    assert layout is not None
    part = part_of(len(slots), asked.part, asked.parts)
    if first > len(part):
        raise UsageError(
            f"part {asked.part} of window {asked.window} holds {len(part)} rows, none from {first} on"
        )
    chosen = part[first : first + per_message]
    mine = slots[chosen.start : chosen.stop]
    is_run = asked.world_size == 1 and len(mine) > 0
    at: Any = slice(int(mine[0]), int(mine[-1]) + 1) if is_run else mine
    slot, layer, row = mine.astype(np.uint32), layout.layer[at].astype(np.int32), layout.row[at]
    which = (asked.rank, asked.world_size, chosen.start, len(mine))
    crc = entry.checksums.get(which)  # others ask for the same
    about = None if crc is not None else [slot, layer, row]
    lent = cache.lend(entry, at) if is_run else None
    rows, found = _copied(entry.rows, at, len(mine), about) if lent is None else _as_they_are(lent, about)
    entry.checksums[which] = found if crc is None else crc
    said = {"first": chosen.start, "n_own": len(slots), "n_slots": len(layout.partition)}
    said["crc32c"] = entry.checksums[which]
    return message(order.schema, slot, layer, row, rows), said, first + len(mine) >= len(part)


def _copied(
    rows: list[NDArray[Any]], at: Any, n: int, about: list[NDArray[Any]] | None
) -> tuple[list[pa.Buffer], int]:
    """Some rows per hook, in memory that is used again when the message was sent; and the crc32c of `about` and them.

    Taken a block at a time, while it is in the processor's cache. about  None: the crc32c is known, and not taken.
    """
    crc = 0
    for array in about or ():
        crc = extend_crc32c(array, crc)
    sizes = [n * numbers.shape[1] * numbers.itemsize for numbers in rows]
    starts = [sum(-(-size // PAGE) * PAGE for size in sizes[:i]) for i in range(len(sizes))]
    memory = _MEMORY.take(starts[-1] + sizes[-1])
    for numbers, start, size in zip(rows, starts, sizes, strict=True):
        to = memory[start : start + size].view(numbers.dtype).reshape(n, numbers.shape[1])
        per_block = max(1, _BLOCK_BYTES // max(1, to[:1].nbytes))
        for first in range(0, n, per_block):
            block = to[first : first + per_block]
            if isinstance(at, slice):
                block[...] = numbers[at.start + first :][: len(block)]
            else:
                np.take(numbers, at[first : first + per_block], axis=0, out=block, mode="clip")
            if about is not None:
                crc = extend_crc32c(block, crc)
    whole = pa.py_buffer(memory)
    return [whole.slice(start, size) for start, size in zip(starts, sizes, strict=True)], crc


def _as_they_are(rows: list[NDArray[Any]], about: list[NDArray[Any]] | None) -> tuple[list[pa.Buffer], int]:
    """Rows per hook where they are, and the crc32c of `about` and them; about None: it is known."""
    crc = 0
    if about is not None:
        for array in (*about, *rows):
            crc = extend_crc32c(array, crc)
    return [pa.py_buffer(numbers) for numbers in rows], crc


def as_json(value: Any) -> pa.Buffer:
    """A value as its JSON's bytes."""
    return pa.py_buffer(json.dumps(value).encode())
