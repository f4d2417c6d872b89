"""A corpus: one source of documents, or several in given shares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from actcache.errors import CorpusError, UsageError
from actcache.producer.corpus.documents import Document, Fields, Values
from actcache.producer.corpus.files import CorpusFile, Files, find_files, names_with
from actcache.producer.corpus.ids import IDS_SUFFIXES, read_bin, read_npy
from actcache.producer.corpus.lines import JSON_SUFFIXES, TEXT_SUFFIX, read_json_lines, read_text
from actcache.producer.corpus.parquet import PARQUET_SUFFIX, read_parquet

SUFFIXES = {
    "text": (TEXT_SUFFIX, *JSON_SUFFIXES, PARQUET_SUFFIX),
    "chat": (*JSON_SUFFIXES, PARQUET_SUFFIX),
    "ids": (*JSON_SUFFIXES, PARQUET_SUFFIX, *IDS_SUFFIXES),
}


@dataclass(slots=True, kw_only=True)
class Source:
    """Documents of a file, a folder or a glob. Nothing is open between calls.

    name      the last part of what was given.
    files     in reading order: sorted by name. With the sizes this is what a fingerprint is made of.
    ignored   names of files that are there but of no known suffix.
    fields    what they are read as.
    n_empty   documents with nothing in them, skipped, in the latest pass of `documents` so far.
    """

    name: str
    files: tuple[CorpusFile, ...]
    ignored: tuple[str, ...]
    fields: Fields
    opener: Files
    n_empty: int = 0

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty, in order.

        Memory: some documents and a read buffer. A document may hold 8 MiB of text (tokenising takes some 150 bytes a
        byte) or two million ids.

        Raises:
            CorpusError: what is not as it should be, with file and line or row; or no document at all.
            NotFoundError: a file that has gone since the corpus was opened. UnreachableError: a URL that does not answer.
        """
        self.n_empty = 0
        n_documents = 0
        for file in self.files:
            with self.opener.open(file.name) as opened:
                for where, value in self._values(opened, file):
                    document = self.fields.to_document(value, where)
                    if document is None:
                        self.n_empty += 1
                        continue
                    n_documents += 1
                    yield document
        if n_documents == 0:
            raise CorpusError(
                f"corpus {self.opener.root}: {len(self.files)} files, {self.n_empty} documents, none of them with text; "
                "expected at least one document that is not empty"
            )

    def _values(self, opened: BinaryIO, file: CorpusFile) -> Values:
        lower = file.name.lower()
        if lower.endswith(TEXT_SUFFIX):
            return read_text(opened, file.name, file.n_bytes)
        if lower.endswith(PARQUET_SUFFIX):
            return read_parquet(opened, file.name, self.fields)
        if lower.endswith(".npy"):
            return read_npy(opened, file.name, file.n_bytes, self.fields)
        if lower.endswith(".bin"):
            return read_bin(opened, file.name, file.n_bytes, self.fields)
        return read_json_lines(opened, file.name, self.fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """One source, or several.

    weights  the share of the tokens that each is to have, summing to 1; None: one after the other, all of each.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None = None

    @property
    def n_empty(self) -> int:
        """Documents with nothing in them, skipped so far."""
        return sum(source.n_empty for source in self.sources)


def open_source(location: str | Path, fields: Fields | None = None) -> Source:
    """Find the files of a source; reads none of them.

    Args:
        location: a file, a folder (searched recursively) or a glob such as `texts/**/*.jsonl.zst`; here, or at any URL
            that fsspec reads, such as `hf://datasets/org/name/*.parquet`.
        fields: what they are read as; text in the column "text" where left out. Where there is no text but .npy or .bin
            files, these are read as token ids.

    Raises:
        NotFoundError: no such file or folder. CorpusError: nothing there of a known suffix.
        UsageError: a URL nobody here can read. UnreachableError: one that does not answer.
    """
    fields = fields or Fields()
    opener = find_files(location)
    every = opener.list_files()
    known = names_with(every, SUFFIXES[fields.kind])
    if not known and fields.kind == "text" and (known := names_with(every, IDS_SUFFIXES)):
        fields = replace(fields, kind="ids")
    ignored = tuple(file.name for file in every if file not in known)
    if not known:
        others = f"; {len(ignored)} other files, such as {ignored[0]}" if ignored else ""
        raise CorpusError(f"corpus {location}: no file ends in {', '.join(SUFFIXES[fields.kind])}{others}")
    return Source(
        name=str(location).rstrip("/").rpartition("/")[2],
        files=tuple(known),
        ignored=ignored,
        fields=fields,
        opener=opener,
    )


def open_corpus(locations: str | Path | Sequence[str | Path], fields: Fields | None = None) -> Corpus:
    """Open one source, or several with weights, such as `["web.jsonl:0.7", "code.parquet:0.3"]`.

    Raises:
        UsageError: weights that are no positive numbers, or only some of several.
        What `open_source` raises.
    """
    given = [locations] if isinstance(locations, str | Path) else list(locations)
    parted = [_part(location) for location in given]
    weights = [weight for _location, weight in parted if weight is not None]
    if weights and len(weights) < len(parted):
        raise UsageError(
            f"{len(weights)} of {len(parted)} corpora have a weight; give each one, such as a.jsonl:0.7"
        )
    sources = tuple(open_source(location, fields) for location, _weight in parted)
    if not weights or len(weights) == 1:
        return Corpus(sources=sources)
    return Corpus(sources=sources, weights=tuple(weight / sum(weights) for weight in weights))


def _part(location: str | Path) -> tuple[str | Path, float | None]:
    """A location and the weight after its last colon, if there is one."""
    text = str(location)
    head, colon, tail = text.rpartition(":")
    if isinstance(location, Path) or not colon or not head or "/" in tail or Path(text).exists():
        return location, None
    try:
        weight = float(tail)
    except ValueError as error:
        raise UsageError(
            f"corpus {text}: {tail!r} is no weight; expected a number above 0, as in a.jsonl:0.7"
        ) from error
    if not 0 < weight < float("inf"):
        raise UsageError(f"corpus {text}: weight {tail}: expected a number above 0")
    return head, weight
