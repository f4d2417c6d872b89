"""What travels between a service and its clients: requests as JSON, rows as Arrow record batches, errors by kind.

    DoGet(ticket)          rows of one window, of one rank, or a part of them: messages of about 2 MB
    DoAction(name, JSON)   objects of a store, its live files, health, status, metrics
    GetFlightInfo(path)    what a store holds; GetFlightInfo(command): the tickets of an epoch

Every request names all it needs: a server that keeps nothing between two of them answers the same.
"""

import json
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import flight
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from actcache import errors
from actcache.errors import ActcacheError, UsageError
from actcache.reader.selection import Selection
from actcache.store.codec import extend_crc32c

VERSION = 1
MESSAGE_BYTES = 2 << 20
"""Of rows in one message. Larger ones are no faster (measured: 1 to 4 MB are alike), smaller ones cost more each."""
MESSAGES_PER_CALL = 32
"""A call hands out at most so many; the next one goes on."""
WAITING = "waiting"
"""In the metadata of a message without rows: the window is being decoded, the service lives."""
MEMORY = "memory"
"""In the metadata of a message that has no rows but says where they are: `Where` per hook, or null if nobody can read there."""
NEAR_ROW_BYTES = 16
"""Of what such a message says of each row."""
_MOST_REQUEST_BYTES = 1 << 20

_SELECTION = TypeAdapter(Selection)


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class WindowTicket(_Request):
    """Rows of one window, for one rank: those of part `part` of `parts`, from the `first`-th on.

    plan, captures  digests of the data the client knows: another store under the same name is refused.
    selection       everything the order depends on besides.
    client          whose stream this is: a window that it has not had yet is kept for it.
    near            it is on the same machine, and wants to be told where in memory rows are: all of the part, in one call,
                    which it ends when it has read them.
    """

    version: Literal[1] = VERSION
    store: str
    plan: str
    captures: str
    selection: dict[str, Any]
    epoch: int = Field(ge=0)
    window: int = Field(ge=0)
    rank: int = Field(ge=0)
    world_size: int = Field(ge=1)
    part: int = Field(default=0, ge=0)
    parts: int = Field(default=1, ge=1, le=64)
    first: int = Field(default=0, ge=0)
    client: str | None = Field(default=None, min_length=1, max_length=64)
    near: bool = False

    def encode(self) -> bytes:
        """The bytes of a Flight ticket."""
        return self.model_dump_json().encode()

    def selected(self) -> Selection:
        """The selection; UsageError where it is none."""
        try:
            found = _SELECTION.validate_json(json.dumps(self.selection), strict=True)
        except ValidationError as error:
            raise UsageError(f"the ticket's selection cannot be used: {_problems(error)}") from error
        unknown = set(self.selection) - set(selection_json(found))
        if unknown:
            raise UsageError(
                f"the ticket's selection has {sorted(unknown)[:5]}, which this version does not know"
            )
        return found


class ReadRequest(_Request):
    """Bytes of an object: all, or some ranges of it (first byte, number of bytes)."""

    store: str
    key: str
    ranges: tuple[tuple[int, int], ...] | None = None


class NamesRequest(_Request):
    """Names in a folder of a store."""

    store: str
    key: str


class SizeRequest(_Request):
    """Length of an object."""

    store: str
    key: str


class PutRequest(_Request):
    """A live file of a consumer, to be replaced; None: to be removed."""

    store: str
    name: str
    text: str | None


class StreamRequest(_Request):
    """The tickets of one epoch of a stream: what a client that is not this one needs to begin."""

    store: str
    selection: dict[str, Any]
    epoch: int = Field(default=0, ge=0)
    rank: int = Field(default=0, ge=0)
    world_size: int = Field(default=1, ge=1)


def selection_json(selection: Selection) -> dict[str, Any]:
    """A selection in full, as a ticket carries it (a cursor abbreviates long lists)."""
    return json.loads(_SELECTION.dump_json(selection))


def part_of(n: int, part: int, parts: int) -> range:
    """Which of `n` rows belong to a part: nearly equal shares, in order."""
    return range(n * part // parts, n * (part + 1) // parts)


def parse(kind: type[Any], data: bytes) -> Any:
    """A request from its bytes; UsageError says what is wrong with it."""
    if len(data) > _MOST_REQUEST_BYTES:
        raise UsageError(f"a request of {len(data):,} bytes: at most {_MOST_REQUEST_BYTES:,} are read")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise UsageError(f"a malformed {kind.__name__}: {_problems(error)}") from error


def _problems(error: ValidationError) -> str:
    found = [f"{'.'.join(str(p) for p in e['loc']) or 'it'}: {e['msg']}" for e in error.errors()[:5]]
    return "; ".join(found)


# Rows.


def schema_of(hooks: list[tuple[str, int, str]]) -> pa.Schema:
    """Of the messages with rows. hooks: name, bytes of a row, logical dtype.

    slot   uint32, of the window over all ranks.    layer  int32, the model's, of the row (the first, where it has several).
    row    int64, global row number.                then one column per hook, a row's numbers as they are on disk.
    """
    fields = [pa.field("slot", pa.uint32()), pa.field("layer", pa.int32()), pa.field("row", pa.int64())]
    fields += [pa.field(name, pa.binary(n), metadata={"dtype": dtype}) for name, n, dtype in hooks]
    return pa.schema(fields, metadata={"actcache": str(VERSION)})


NEAR = schema_of([])
"""Of messages that say where rows are."""


def message(schema: pa.Schema, about: list[NDArray[Any]], rows: list[pa.Buffer]) -> pa.RecordBatch:
    """One message. about: slots, layers and numbers of its rows. rows: per hook; nothing is copied."""
    columns: list[pa.Array] = [pa.array(column) for column in about]
    for numbers, field in zip(rows, list(schema)[3:], strict=True):
        columns.append(pa.FixedSizeBinaryArray.from_buffers(field.type, len(about[0]), [None, numbers]))
    return pa.record_batch(columns, schema=schema)


def rows_of(column: pa.Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The numbers of a hook's column, [n, columns], where they were received; read-only, and aligned to nothing."""
    n_bytes = column.type.byte_width
    data = np.frombuffer(column.buffers()[1], np.uint8, len(column) * n_bytes, column.offset * n_bytes)
    return data.view(dtype).reshape(len(column), n_bytes // dtype.itemsize)


def checksum(columns: Iterable[pa.Array]) -> int:
    """crc32c over columns of a message, one after the other: what its metadata must say of all of them."""
    found = 0
    for column in columns:
        width = column.type.byte_width
        body = memoryview(column.buffers()[1])[column.offset * width : (column.offset + len(column)) * width]
        found = extend_crc32c(body, found)
    return found


# Errors.


def _classes() -> dict[str, type[ActcacheError]]:
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ActcacheError)]
    return {c.kind: c for c in found}


_MISSING = "missing"


def to_flight(error: Exception) -> flight.FlightError:
    """An error as it crosses the wire: its kind beside its text. Unauthenticated and unavailable have their own codes."""
    kind = _MISSING if type(error) is FileNotFoundError else getattr(error, "kind", "actcache")
    text = str(error.args[-1]) if error.args else type(error).__name__
    detail = json.dumps({"kind": kind, "message": text}).encode()
    if isinstance(error, errors.UnreachableError):
        return flight.FlightUnavailableError(text, detail)
    if isinstance(error, errors.RefusedError):
        return flight.FlightUnauthenticatedError(text, detail)
    return flight.FlightServerError(text, detail)


def from_flight(error: flight.FlightError) -> Exception | None:
    """The error that a server sent, as itself; None where the connection or gRPC failed."""
    try:
        found = json.loads(error.extra_info)
        kind, text = found["kind"], found["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if kind == _MISSING:
        return FileNotFoundError(text)
    return _classes().get(kind, ActcacheError)(text)
