"""Corpus to documents: text files and JSON lines, read in order and in bounded memory.

Every error names the file, and the line where there are lines; nothing that cannot be read is passed over.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from actcache.errors import CorpusError, NotFoundError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_DOCUMENT_BYTES = 8 << 20

_PLAIN_READ_BYTES = 1 << 20
_ZSTD_READ_BYTES = 1 << 16
_MAGIC = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file: its name relative to the corpus (POSIX, no absolute path) and its size on disk."""

    name: str
    n_bytes: int


@dataclass(slots=True, kw_only=True)
class Corpus:
    """Documents of a file, a folder or a glob. Nothing is open between calls.

    root         the folder that file names are relative to.
    files        in reading order: sorted by name. With the sizes this is what a fingerprint is made of.
    ignored      names of files that are there but of no known suffix.
    text_column  the field of a JSON line that holds the text.
    n_empty      documents without any text, skipped, in the latest pass of `documents` so far.
    """

    root: Path
    files: tuple[CorpusFile, ...]
    ignored: tuple[str, ...]
    text_column: str
    n_empty: int = 0

    def documents(self) -> Iterator[str]:
        """Every document that is not empty, in order: of one .txt file the whole, of .jsonl one a line.

        Memory: about one document and a read buffer. A document may hold `MAX_DOCUMENT_BYTES` (8 MiB; tokenising takes some 150 bytes a byte).

        Raises:
            CorpusError: bytes that are not UTF-8, not JSON, a line without the text column, a compressed file that is
                damaged or ends early, a document too large, or no document with text at all.
            NotFoundError: a file that has gone since the corpus was opened.
        """
        self.n_empty = 0
        n_documents = 0
        for file in self.files:
            for text in _read_documents(self.root / file.name, file.name, self.text_column):
                if not text.strip():
                    self.n_empty += 1
                    continue
                n_documents += 1
                yield text
        if n_documents == 0:
            raise CorpusError(
                f"corpus {self.root}: {len(self.files)} files, {self.n_empty} documents, none of them with text; "
                "expected at least one document that is not empty"
            )


def open_corpus(path_or_glob: str | Path, text_column: str = "text") -> Corpus:
    """Find the files of a corpus; reads none of them.

    Args:
        path_or_glob: a file, a folder (searched recursively) or a glob such as `texts/**/*.jsonl.zst`.
        text_column: the field of a JSON line that holds the text.

    Raises:
        NotFoundError: no such file or folder.
        CorpusError: nothing there of a known suffix: .txt, .jsonl, .jsonl.gz, .jsonl.zst.
    """
    path = Path(path_or_glob).expanduser()
    if path.is_dir():
        root, found = path, path.rglob("*")
    elif path.exists():
        root, found = path.parent, iter([path])
    elif _MAGIC & set(str(path)):
        root, found = _glob(path)
    else:
        raise NotFoundError(f"corpus {path}: no such file or folder; expected a file, a folder or a glob")
    names = sorted(file.relative_to(root).as_posix() for file in found if file.is_file())
    known = [name for name in names if name.lower().endswith(SUFFIXES)]
    ignored = tuple(name for name in names if not name.lower().endswith(SUFFIXES))
    if not known:
        others = f"; {len(ignored)} other files, such as {ignored[0]}" if ignored else ""
        raise CorpusError(f"corpus {path}: no file ends in {', '.join(SUFFIXES)}{others}")
    files = tuple(CorpusFile(name, (root / name).stat().st_size) for name in known)
    return Corpus(root=root, files=files, ignored=ignored, text_column=text_column)


def _glob(pattern: Path) -> tuple[Path, Iterator[Path]]:
    """The folder before the first wildcard, and the files that match."""
    parts = pattern.parts
    n_fixed = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
    root = Path(*parts[:n_fixed])
    return root, root.glob(str(Path(*parts[n_fixed:])))


def _read_documents(path: Path, name: str, text_column: str) -> Iterator[str]:
    if name.lower().endswith(".txt"):
        yield _read_text(path, name)
        return
    for line_number, line in enumerate(_split_lines(_read_bytes(path, name), name), start=1):
        where = f"{name}, line {line_number}"
        text = _decode(line, where)
        if text.strip():
            yield _parse_line(text, where, text_column)


def _read_text(path: Path, name: str) -> str:
    size = path.stat().st_size if path.exists() else 0
    if size > MAX_DOCUMENT_BYTES:
        raise CorpusError(
            f"{name}: {size} bytes; a .txt file is one document, of at most {MAX_DOCUMENT_BYTES}. "
            "Split it into documents, one JSON object a line in a .jsonl"
        )
    return _decode(b"".join(_read_bytes(path, name)), name)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8 ({error.reason}); "
            "expected UTF-8. Convert the file, e.g. with iconv"
        ) from error


def _parse_line(line: str, where: str, text_column: str) -> str:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorpusError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(value, dict):
        raise CorpusError(
            f"{where}: a JSON {type(value).__name__}; expected an object with a column {text_column!r}"
        )
    if text_column not in value:
        raise CorpusError(
            f"{where}: no column {text_column!r}; columns are {', '.join(map(repr, value)) or '(none)'}. "
            "Name the one that holds the text"
        )
    text = value[text_column]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: column {text_column!r} holds {type(text).__name__}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: column {text_column!r} holds half a surrogate pair, \\u{ord(text[error.start]):04x}, at "
            f"character {error.start}, which is no text; expected whole characters"
        ) from error
    return text


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


def _read_bytes(path: Path, name: str) -> Iterator[bytes]:
    """A file's bytes, decompressed, in pieces."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".gz", ".zst") and path.stat().st_size == 0:
            raise EOFError  # gzip reads nothing as an empty file; no compressor writes that
        if suffix == ".gz":
            with gzip.open(path) as source:
                while piece := source.read(_PLAIN_READ_BYTES):
                    yield piece
        elif suffix == ".zst":
            yield from _read_zstd(path)
        else:
            with path.open("rb") as source:
                while piece := source.read(_PLAIN_READ_BYTES):
                    yield piece
    except FileNotFoundError as error:
        raise NotFoundError(f"{name}: gone from {path.parent} since the corpus was opened") from error
    except EOFError as error:
        raise CorpusError(
            f"{name}: the compressed data end early: a truncated file. Copy it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise CorpusError(
            f"{name}: not the {suffix} its name says, or damaged ({error}). Check it with gzip -t or zstd -t"
        ) from error


def _read_zstd(path: Path) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader ends without an error where a frame is cut short."""
    frame = None
    with path.open("rb") as source:
        while piece := source.read(_ZSTD_READ_BYTES):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(piece)
                piece = frame.unused_data
                if frame.eof:
                    frame = None
    if frame is not None:
        raise EOFError
