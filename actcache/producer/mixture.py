"""Which source the next document comes from, and its token ids: several corpora in given shares of the tokens."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actcache.errors import CorpusError
from actcache.producer.corpus import Document
from actcache.producer.tokens import PAD_DOCUMENT, tokenise

_BATCH_CHARACTERS = 1 << 18
_MOST_BATCH_DOCUMENTS = 1 << 12


HeldOut = Callable[[NDArray[np.int64]], NDArray[np.bool_]]
"""Which documents, by number, are held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSource:
    """One source of documents.

    name       for messages.
    documents  in order; texts, or ids that are taken as they are.
    weight     its share of the tokens, the shares summing to 1; None: the sources are read one after the other.
    separator  the id put before every document; None: nothing is.
    """

    name: str
    documents: Iterable[Document]
    weight: float | None = None
    separator: int | None = None


class Numbered(NamedTuple):
    """A document with its number in the corpus, and whether it is held out."""

    number: int
    document: Document
    is_held_out: bool

    @property
    def raw(self) -> bytes:
        """What the digest of the text is made of."""
        if isinstance(self.document, str):
            return self.document.encode()
        return np.ascontiguousarray(self.document, "<u4").tobytes()


class _Reader:
    """Documents of one source, read ahead a batch at a time, because tokenisers are fast on batches."""

    def __init__(
        self,
        source: TokenSource,
        numbers: range,
        held_out: HeldOut,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
    ) -> None:
        self.source = source
        self._documents: Iterator[Document] = iter(source.documents)
        self._numbers, self._held_out = numbers, held_out
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._ahead: deque[Numbered] = deque()
        self._ids: dict[int, NDArray[np.uint32]] = {}
        self.n_read = 0
        self.n_tokens = 0

    def peek(self) -> Numbered | None:
        """The next document; None where there is no more."""
        if not self._ahead:
            self._read_ahead()
        return self._ahead[0] if self._ahead else None

    def _read_ahead(self) -> None:
        documents, n_characters = [], 0
        while n_characters < _BATCH_CHARACTERS and len(documents) < _MOST_BATCH_DOCUMENTS:
            document = next(self._documents, None)
            if document is None:
                break
            documents.append(document)
            n_characters += len(document)
        numbers = self._numbers[self.n_read : self.n_read + len(documents)]
        if len(numbers) < len(documents):
            raise CorpusError(
                f"more than {PAD_DOCUMENT} documents; their numbers are 32 bits. Join short documents"
            )
        held_out = self._held_out(np.array(numbers, np.int64)).tolist()
        self._ahead.extend(map(Numbered, numbers, documents, held_out))

    def pop(self) -> None:
        """Go past the next document."""
        self._ids.pop(self._ahead.popleft().number, None)
        self.n_read += 1

    def ids(self, *, alone: bool) -> NDArray[np.uint32]:
        """Ids of the next document, with its separator; of all that were read ahead too, unless `alone`."""
        first = self._ahead[0]
        if first.number not in self._ids:
            wanted = [first] if alone else list(self._ahead)
            texts = [(n.number, n.document) for n in wanted if isinstance(n.document, str)]
            self._ids |= {n.number: n.document for n in wanted if not isinstance(n.document, str)}
            found = tokenise([text for _i, text in texts], self._tokenizer, self._vocab_size)
            self._ids |= {i: ids for (i, _text), ids in zip(texts, found, strict=True)}
        ids, separator = self._ids[first.number], self.source.separator
        return ids if separator is None else np.concatenate([np.array([separator], np.uint32), ids])


class Mixture:
    """Documents of all sources in the order in which they are packed.

    With shares, the next document is one of the source that is furthest behind its share of the tokens packed so far
    (the first of them, where several are), so shares are kept to within a document of each source. Document number `i`
    of source `c` of `s` is document `i * s + c` of the corpus.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        *,
        held_out: HeldOut,
        allow_short: bool,
    ) -> None:
        numbers = [range(at, PAD_DOCUMENT, len(sources)) for at in range(len(sources))]
        self._readers = [
            _Reader(source, own, held_out, tokenizer, vocab_size)
            for source, own in zip(sources, numbers, strict=True)
        ]
        self._allow_short = allow_short
        self._ended: set[int] = set()

    @property
    def n_read(self) -> list[int]:
        """Documents taken, by source."""
        return [reader.n_read for reader in self._readers]

    def next(self) -> "Drawn | None":
        """The next document; None when all are exhausted.

        Raises:
            CorpusError: a source whose turn it is has run out, and that is not allowed; or too many documents.
        """
        while len(self._ended) < len(self._readers):
            at = self._choose()
            found = self._readers[at].peek()
            if found is not None:
                return Drawn(self._readers[at], found)
            self._ended.add(at)
            self._check_ended(at)
        return None

    def _choose(self) -> int:
        left = [i for i in range(len(self._readers)) if i not in self._ended]
        if self._readers[left[0]].source.weight is None:
            return left[0]
        total = sum(reader.n_tokens for reader in self._readers)
        behind = [(self._readers[i].source.weight or 0.0) * total - self._readers[i].n_tokens for i in left]
        return left[int(np.argmax(behind))]

    def _check_ended(self, at: int) -> None:
        reader = self._readers[at]
        if reader.source.weight is None or self._allow_short or len(self._readers) == 1:
            return
        shares = "; ".join(f"{r.source.name}: {r.n_tokens} tokens" for r in self._readers)
        raise CorpusError(
            f"corpus {reader.source.name} has run out after {reader.n_read} documents, before its share of "
            f"{reader.source.weight:.3g} of the tokens asked for ({shares} packed). Add text to it, lower its weight or "
            f"--tokens, or give --allow-short to go on without it"
        )


class Drawn(NamedTuple):
    """The next document of a mixture; `done` goes past it."""

    reader: _Reader
    document: Numbered

    def ids(self, *, alone: bool) -> NDArray[np.uint32]:
        """Its ids; `alone` where few of the documents that follow will be wanted."""
        return self.reader.ids(alone=alone)

    def done(self, n_tokens: int) -> None:
        """Go on, `n_tokens` of it having been packed."""
        self.reader.n_tokens += n_tokens
        self.reader.pop()
