"""Rows of a window as messages, each with what is said of it and its checksum; or where they are, for a client nearby."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.reader.layout import Layout
from actcache.service.memory import PAGE, Memory
from actcache.service.numbers import Numbers
from actcache.service.windows import Entry, Order, WindowCache
from actcache.service.wire import (
    MEMORY,
    MESSAGE_BYTES,
    MESSAGES_PER_CALL,
    NEAR,
    NEAR_ROW_BYTES,
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
    per_message = max(1, MESSAGE_BYTES // order.row_bytes)
    n_sent, first, is_last = 0, asked.first, False
    with cache.call(asked.client) as client:
        while n_sent < MESSAGES_PER_CALL and not is_last and not is_over():
            with cache.use(order, asked.epoch, asked.window, client, is_over, _SIGN_S) as entry:
                cut = None if entry is None else _cut(order, entry, asked, first, per_message)
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
    order: Order, entry: Entry, asked: WindowTicket, first: int, per_message: int
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
    at, about = _about(layout, mine, is_run=asked.world_size == 1)
    which = (asked.rank, asked.world_size, chosen.start, len(mine))
    crc = entry.checksums.get(which)  # others ask for the same
    rows, found = _copied(entry.rows, at, len(mine), about if crc is None else None)
    entry.checksums[which] = found if crc is None else crc
    said = {"first": chosen.start, "n_own": len(slots), "n_slots": len(layout.partition)}
    said["crc32c"] = entry.checksums[which]
    return message(order.schema, about, rows), said, first + len(mine) >= len(part)


def _about(layout: Layout, slots: NDArray[np.int64], *, is_run: bool) -> tuple[Any, list[NDArray[Any]]]:
    """What chooses the rows of some slots, which follow each other where `is_run`; and their slot, layer and number."""
    at: Any = slice(int(slots[0]), int(slots[-1]) + 1) if is_run and len(slots) else slots
    return at, [slots.astype(np.uint32), layout.layer[at].astype(np.int32), layout.row[at]]


def places(
    cache: WindowCache, order: Order, asked: WindowTicket, is_over: Callable[[], bool], numbers: Numbers
) -> Iterator[tuple[pa.RecordBatch, pa.Buffer]]:
    """Where the rows that a ticket asks for are in this machine's memory; ends when the client has read them, and ends the call."""
    with cache.call(asked.client) as client:
        entry: Entry | None = None
        until = 0.0
        while entry is None and not is_over():
            with cache.use(order, asked.epoch, asked.window, client, is_over, _SIGN_S) as entry:
                if entry is not None:
                    until = cache.keep(client, entry)
            if entry is None:
                yield pa.RecordBatch.from_pylist([], schema=NEAR), as_json({WAITING: True})
        if entry is None:
            return
        try:
            cache.prepare(order, asked.epoch, asked.window + 1)
            for found, said in _told(entry, asked):
                numbers.add(rows=found.num_rows, row_bytes=found.num_rows * order.row_bytes)
                yield found, as_json(said)
            cache.wait(until, is_over)
            cache.had(client, entry, asked.part, asked.parts)
        finally:
            cache.done_with(client, entry)


def _told(entry: Entry, asked: WindowTicket) -> Iterator[tuple[pa.RecordBatch, dict[str, Any]]]:
    slots, layout = entry.own_slots(asked.rank, asked.world_size), entry.layout
    assert layout is not None
    part = part_of(len(slots), asked.part, asked.parts)
    memory = [found.where() for found in entry.memory]
    said = {"n_own": len(slots), "n_slots": len(layout.partition), MEMORY: None if None in memory else memory}
    per_message = MESSAGE_BYTES // NEAR_ROW_BYTES
    for first in range(part.start, max(part.stop, part.start + 1), per_message):
        mine = slots[first : min(first + per_message, part.stop)]
        _at, about = _about(layout, mine, is_run=asked.world_size == 1)
        crc = 0
        for array in about:
            crc = extend_crc32c(array, crc)
        yield message(NEAR, about, []), said | {"first": first, "crc32c": crc}


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


def as_json(value: Any) -> pa.Buffer:
    """A value as its JSON's bytes."""
    return pa.py_buffer(json.dumps(value).encode())
