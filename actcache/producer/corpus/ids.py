"""Token ids in files of numbers: `.bin` (nothing but them) and `.npy`."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorpusError
from actcache.producer.corpus.documents import MAX_DOCUMENT_TOKENS, Fields, Values

IDS_SUFFIXES = (".npy", ".bin")
TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")

_BLOCK_IDS = 1 << 18


def read_bin(file: BinaryIO, name: str, n_bytes: int, fields: Fields) -> Values:
    """Ids back to back."""
    dtype = np.dtype(fields.token_dtype).newbyteorder("<")
    if n_bytes % dtype.itemsize:
        raise CorpusError(
            f"{name}: {n_bytes} bytes, no multiple of the {dtype.itemsize} of {fields.token_dtype}; cut short, or of another "
            f"--token-dtype"
        )
    yield from _documents(file, name, dtype, n_bytes // dtype.itemsize, fields)


def read_npy(file: BinaryIO, name: str, n_bytes: int, fields: Fields) -> Values:
    """An array of ids [tokens], or [documents, tokens]."""
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read(file)
    except ValueError as error:
        raise CorpusError(
            f"{name}: no array of numpy's ({error}). Ids without a header (a memmap) are read from a .bin"
        ) from error
    if dtype.kind not in "iu" or dtype != dtype.newbyteorder("<") or len(shape) not in (1, 2):
        raise CorpusError(
            f"{name}: {dtype.str} {list(shape)}; expected little-endian integers [tokens] or [documents, tokens]"
        )
    if fortran_order and len(shape) > 1:
        raise CorpusError(f"{name}: in Fortran order; save it again with numpy.ascontiguousarray")
    n_ids = int(np.prod(shape))
    if n_bytes - file.tell() != n_ids * dtype.itemsize:
        raise CorpusError(
            f"{name}: {n_bytes} bytes where its one array ends at {file.tell() + n_ids * dtype.itemsize}; cut short, or more "
            f"than an array"
        )
    yield from _documents(file, name, dtype, n_ids, fields, shape[1] if len(shape) == 2 else None)


def _documents(
    file: BinaryIO, name: str, dtype: np.dtype[Any], n_ids: int, fields: Fields, row: int | None = None
) -> Values:
    """Documents of `row` ids, of `document_tokens`, or up to the id that ends one."""
    blocks = _blocks(file, name, dtype, n_ids)
    length = row or fields.document_tokens
    if length is not None:
        if n_ids % length:
            raise CorpusError(
                f"{name}: {n_ids} ids are no whole number of documents of {length} (--document-tokens)"
            )
        documents = _by_length(blocks, length)
    elif fields.end_id is not None:
        documents = _by_end(blocks, fields.end_id, name)
    else:
        raise CorpusError(
            f"{name}: nothing says where a document ends: the tokenizer has no EOS. Give --document-tokens, or an array "
            f"[documents, tokens]"
        )
    for i, ids in enumerate(documents):
        yield f"{name}, document {i}", ids


def _blocks(file: BinaryIO, name: str, dtype: np.dtype[Any], n_ids: int) -> Iterator[NDArray[Any]]:
    while n_ids:
        data = file.read(min(n_ids, _BLOCK_IDS) * dtype.itemsize)
        if not data or len(data) % dtype.itemsize:
            raise CorpusError(f"{name}: it ends {n_ids} ids early; it was cut short while it was read")
        n_ids -= len(data) // dtype.itemsize
        yield np.frombuffer(data, dtype)


def _by_length(blocks: Iterator[NDArray[Any]], length: int) -> Iterator[NDArray[Any]]:
    rest: list[NDArray[Any]] = []
    for block in blocks:
        ids = np.concatenate([*rest, block])
        n_whole = ids.size // length
        yield from ids[: n_whole * length].reshape(n_whole, length)
        rest = [ids[n_whole * length :]]


def _by_end(blocks: Iterator[NDArray[Any]], end_id: int, name: str) -> Iterator[NDArray[Any]]:
    """Documents with the id that ends them; the last one may lack it."""
    rest: list[NDArray[Any]] = []
    for block in blocks:
        *whole, tail = np.split(block, np.flatnonzero(block == end_id) + 1)
        for ids in whole:
            yield np.concatenate([*rest, ids])
            rest = []
        rest.append(tail)
        if sum(part.size for part in rest) > MAX_DOCUMENT_TOKENS:
            raise CorpusError(
                f"{name}: more than {MAX_DOCUMENT_TOKENS} ids without the one that ends a document, {end_id}. Ids of "
                f"documents of one length are read with --document-tokens; check --token-dtype too"
            )
    last = np.concatenate(rest) if rest else np.zeros(0, np.uint32)
    if last.size:
        yield last
