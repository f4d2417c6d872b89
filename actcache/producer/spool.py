"""One part of the sequences while it is packed: documents come in, whole sequences go to disk, or are only counted."""

import errno
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DiskFullError
from actcache.producer.tokens import PAD_DOCUMENT, PAD_TOKEN

PENDING_IDS = 1 << 18
"""Ids held before whole sequences are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStream:
    """One part's sequences.

    n_sequences   q.
    n_tokens      tokens in them: BOS and separators included, padding not.
    n_cut         tokens of documents that were cut off, where a document is a sequence.
    n_documents   documents with at least one token in them.
    n_skipped     documents read after the part was full.
    by_source     [source] tokens in them, by the source of their document.
    tokens        [q, t] uint32, read-only, in the caller's spool folder. Padding is token 0.
    document      [q, t] uint32, the document of each token; 0xFFFFFFFF for padding.

    The last two are empty where sequences were only counted.
    """

    n_sequences: int
    n_tokens: int
    n_cut: int
    n_documents: int
    n_skipped: int
    by_source: NDArray[np.int64]
    tokens: NDArray[np.uint32]
    document: NDArray[np.uint32]


@dataclass(slots=True, kw_only=True)
class Spool:
    """One part while it is packed.

    stack      closes its files.
    folder     where they are; None: sequences are counted and not written.
    name       "train" or "holdout".
    seq_len    t.
    bos        the id that begins every sequence, if any.
    n_wanted   sequences; None: as many as there are.
    is_packed  documents lie end to end; else each has a sequence of its own, and what does not fit is cut off.
    n_sources  document d is of source d % n_sources.
    """

    stack: ExitStack
    folder: Path | None
    name: str
    seq_len: int
    bos: int | None
    n_wanted: int | None
    is_packed: bool
    n_sources: int
    n_content: int = 0
    n_documents: int = 0
    n_skipped: int = 0
    n_sequences: int = 0
    n_padding: int = 0
    n_cut: int = 0
    n_pending: int = 0
    by_source: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    pending: list[NDArray[np.uint32]] = field(default_factory=list)
    pending_document: list[NDArray[np.uint32]] = field(default_factory=list)
    files: list[FileIO] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_source = np.zeros(self.n_sources, np.int64)
        self.files = [self.stack.enter_context(path.open("wb", buffering=0)) for path in self.paths]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The two files: tokens and documents."""
        if self.folder is None:
            return ()
        return self.folder / f"{self.name}.tokens.u32", self.folder / f"{self.name}.document.u32"

    @property
    def capacity(self) -> int:
        """Tokens of documents that fit in one sequence."""
        return self.seq_len - (self.bos is not None)

    @property
    def is_full(self) -> bool:
        """Whether no more is wanted."""
        return self.n_wanted is not None and self.n_content >= self.n_wanted * self.capacity

    @property
    def n_tokens(self) -> int:
        """Tokens packed: those wanted and taken in so far, with a BOS for every sequence begun."""
        n_content = self.n_content
        if self.n_wanted is not None:
            n_content = min(n_content, self.n_wanted * self.capacity)
        n_begun = -(-n_content // self.capacity) if self.is_packed else self.n_documents
        return n_content + (n_begun if self.bos is not None else 0)

    def add(self, ids: NDArray[np.uint32], document: int) -> int:
        """Take in a document; returns how many of its tokens were taken."""
        self.n_documents += 1
        if not self.is_packed:
            self.n_cut += max(0, ids.size - self.capacity)
            ids = ids[: self.capacity]
        self.n_content += ids.size
        self._append(ids, document)
        if not self.is_packed and ids.size < self.capacity:
            self._append(np.full(self.capacity - ids.size, PAD_TOKEN, np.uint32), PAD_DOCUMENT)
        if self.n_pending >= PENDING_IDS:
            self.write_full()
        return ids.size

    def _append(self, ids: NDArray[np.uint32], document: int) -> None:
        self.pending.append(ids)
        self.pending_document.append(np.full(ids.size, document, np.uint32))
        self.n_pending += ids.size

    def write_full(self) -> None:
        """Write every whole sequence that is pending; keep the rest."""
        if not self.pending:
            return
        content, document = np.concatenate(self.pending), np.concatenate(self.pending_document)
        n_full = content.size // self.capacity
        if self.n_wanted is not None:
            n_full = min(n_full, self.n_wanted - self.n_sequences)
        n_taken = n_full * self.capacity
        self._write(content[:n_taken], document[:n_taken])
        self.pending, self.pending_document = [content[n_taken:].copy()], [document[n_taken:].copy()]
        self.n_pending = content.size - n_taken

    def write_padded(self) -> None:
        """Write all that is left, filled up to one sequence; nothing where the part is full."""
        self.write_full()
        if self.is_full or not self.n_pending:
            return
        n_padding = self.capacity - self.n_pending
        self._write(
            np.pad(self.pending[0], (0, n_padding), constant_values=PAD_TOKEN),
            np.pad(self.pending_document[0], (0, n_padding), constant_values=PAD_DOCUMENT),
        )
        self.pending, self.pending_document, self.n_pending = [], [], 0

    def _write(self, content: NDArray[np.uint32], document: NDArray[np.uint32]) -> None:
        tokens_qt = content.reshape(-1, self.capacity)
        document_qt = document.reshape(-1, self.capacity)
        if self.bos is not None:
            tokens_qt = np.insert(tokens_qt, 0, self.bos, axis=1)
            document_qt = np.concatenate([document_qt[:, :1], document_qt], axis=1)
        try:
            for file, array in zip(self.files, (tokens_qt, document_qt), strict=False):
                _write_all(file, np.ascontiguousarray(array, dtype="<u4"))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                error.errno,
                f"{self.folder} cannot hold the packed tokens: full after {self.n_sequences} {self.name} sequences; "
                "they take 8 bytes a token. Free space or ask for fewer tokens",
            ) from error
        is_token = document_qt != PAD_DOCUMENT
        self.by_source += np.bincount(document_qt[is_token] % self.n_sources, minlength=self.n_sources)
        self.n_padding += int((~is_token).sum())
        self.n_sequences += tokens_qt.shape[0]

    def load(self) -> PackedStream:
        """What was packed."""
        shape = (self.n_sequences, self.seq_len)
        arrays = [
            np.memmap(path, dtype="<u4", mode="r", shape=shape)
            if self.n_sequences
            else np.zeros(shape, np.uint32)
            for path in self.paths
        ] or [np.zeros((0, self.seq_len), np.uint32)] * 2
        return PackedStream(
            n_sequences=self.n_sequences,
            n_tokens=self.n_sequences * self.seq_len - self.n_padding,
            n_cut=self.n_cut,
            n_documents=self.n_documents,
            n_skipped=self.n_skipped,
            by_source=self.by_source,
            tokens=arrays[0],
            document=arrays[1],
        )


def _write_all(file: FileIO, array: NDArray[np.uint32]) -> None:
    """Unbuffered, so that a full disk is reported here and not once more when the file is closed."""
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
        rest = rest[file.write(rest) :]
