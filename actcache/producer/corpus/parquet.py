"""Parquet, a few rows at a time: a row group of any size passes through a small buffer."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from actcache.errors import ActcacheError, CorpusError
from actcache.producer.corpus.documents import Fields, Values, masked

PARQUET_SUFFIX = ".parquet"

_ROWS = 16
_BUFFER_BYTES = 1 << 20


def read_parquet(file: BinaryIO, name: str, fields: Fields) -> Values:
    """A document a row."""
    try:
        parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        columns = _columns(parquet.schema_arrow, name, fields)
        n_rows = 0
        for batch in parquet.iter_batches(_ROWS, columns=columns, use_threads=False):
            for i, value in enumerate(_values(batch, fields, f"{name}, rows from {n_rows}")):
                yield f"{name}, row {n_rows + i}", value
            n_rows += len(batch)
    except ActcacheError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{name}: not a whole parquet file ({' '.join(str(error).split())[:200]}). Copy it again"
        ) from error


def _columns(schema: pa.Schema, name: str, fields: Fields) -> list[str]:
    """The columns to read; CorpusError where the one wanted is not there or holds something else."""
    if fields.column not in schema.names:
        raise CorpusError(
            f"{name}: no column {fields.column!r}; columns are {', '.join(map(repr, schema.names)) or '(none)'}. "
            "Name the one that holds the text"
        )
    kind = schema.field(fields.column).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    expected, is_right = {
        "text": ("strings", _is_string(plain)),
        "chat": ("lists of messages", is_list and types.is_struct(kind.value_type)),
        "ids": ("lists of integers", is_list and types.is_integer(kind.value_type)),
    }[fields.kind]
    if not is_right:
        raise CorpusError(
            f"{name}: column {fields.column!r} holds {kind}; expected {expected}. (A column of token ids is read with "
            f"--ids-column, one of messages with --chat-template)"
        )
    has_mask = fields.kind == "ids" and fields.mask_column in schema.names
    return [fields.column, fields.mask_column] if has_mask else [fields.column]


def _is_string(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _values(batch: pa.RecordBatch, fields: Fields, where: str) -> Iterator[Any]:
    column = batch.column(0)
    if fields.kind != "ids":
        yield from column.to_pylist()
        return
    masks = batch.column(1) if batch.num_columns > 1 else None
    for i in range(len(batch)):
        ids = _as_numpy(column[i], where)
        yield ids if masks is None else masked(ids, _as_numpy(masks[i], where), where)


def _as_numpy(scalar: Any, where: str) -> Any:
    if not scalar.is_valid:
        return None
    if scalar.values.null_count:
        raise CorpusError(f"{where}: a list with a null in it; expected integers")
    return np.asarray(scalar.values.to_numpy(zero_copy_only=False))
