"""`.txt`, and JSON lines, plain or compressed."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

from actcache.errors import CorpusError
from actcache.producer.corpus.documents import MAX_DOCUMENT_BYTES, Fields, Values, masked

JSON_SUFFIXES = tuple(f"{stem}{packed}" for stem in (".jsonl", ".json") for packed in ("", ".gz", ".zst"))
TEXT_SUFFIX = ".txt"

_PLAIN_READ_BYTES = 1 << 20
_ZSTD_READ_BYTES = 1 << 16


def read_text(file: BinaryIO, name: str, n_bytes: int) -> Values:
    """A file that is one document."""
    if n_bytes > MAX_DOCUMENT_BYTES:
        raise CorpusError(
            f"{name}: {n_bytes} bytes; a .txt file is one document, of at most {MAX_DOCUMENT_BYTES}. "
            "Split it into documents, one JSON object a line in a .jsonl"
        )
    yield name, _decode(file.read(), name)


def read_json_lines(file: BinaryIO, name: str, fields: Fields) -> Values:
    """A document a line."""
    for line_number, line in enumerate(_split_lines(_decompress(file, name), name), start=1):
        where = f"{name}, line {line_number}"
        text = _decode(line, where)
        if text.strip():
            yield where, _parse(text, where, fields)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8 ({error.reason}); "
            "expected UTF-8. Convert the file, e.g. with iconv"
        ) from error


def _parse(line: str, where: str, fields: Fields) -> Any:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorpusError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(value, dict):
        raise CorpusError(
            f"{where}: a JSON {type(value).__name__}; expected an object with a column {fields.column!r}"
        )
    if fields.column not in value:
        raise CorpusError(
            f"{where}: no column {fields.column!r}; columns are {', '.join(map(repr, value)) or '(none)'}. "
            "Name the one that holds the text"
        )
    if fields.kind == "ids":
        return masked(value[fields.column], value.get(fields.mask_column), where)
    return value[fields.column]


def _split_lines(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Lines without their ends, of at most MAX_DOCUMENT_BYTES."""
    rest: list[bytes] = []
    n_rest = 0
    n_lines = 0
    for chunk in chunks:
        *lines, tail = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*rest, line])
            n_lines += 1
            rest, n_rest = [], 0
        rest.append(tail)
        n_rest += len(tail)
        if n_rest > MAX_DOCUMENT_BYTES:
            raise CorpusError(
                f"{name}, line {n_lines + 1}: more than {MAX_DOCUMENT_BYTES} bytes without an end of line; "
                "expected one JSON object a line. Split large documents"
            )
    if n_rest:
        yield b"".join(rest)


def _decompress(file: BinaryIO, name: str) -> Iterator[bytes]:
    """A file's bytes, decompressed, in pieces."""
    suffix = name.lower().rpartition(".")[2]
    try:
        if suffix == "gz":
            yield from _read_gzip(file)
        elif suffix == "zst":
            yield from _read_zstd(file)
        else:
            while piece := file.read(_PLAIN_READ_BYTES):
                yield piece
    except EOFError as error:
        raise CorpusError(
            f"{name}: the compressed data end early: a truncated file. Copy it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise CorpusError(
            f"{name}: not the .{suffix} its name says, or damaged ({error}). Check it with gzip -t or zstd -t"
        ) from error


def _read_gzip(file: BinaryIO) -> Iterator[bytes]:
    n_pieces = 0
    with gzip.GzipFile(fileobj=file) as source:
        while piece := source.read(_PLAIN_READ_BYTES):
            n_pieces += 1
            yield piece
    if not n_pieces and file.seek(0, 2) == 0:
        raise EOFError  # gzip reads nothing as an empty file; no compressor writes that


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader ends without an error where a frame is cut short."""
    frame = None
    n_bytes = 0
    while piece := file.read(_ZSTD_READ_BYTES):
        n_bytes += len(piece)
        while piece:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(piece)
            piece = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None or n_bytes == 0:
        raise EOFError
