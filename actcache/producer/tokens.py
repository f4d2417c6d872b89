"""Documents to sequences: tokenise, split into training and holdout, pack; all before the first forward pass.

A document becomes its separator id followed by its tokens. Documents of one stream are laid end to end and cut every
`seq_len` tokens, across documents; attention is not isolated between them. Axes: q sequences, t positions.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actcache.errors import CorpusError, DiskFullError, ModelError, UsageError
from actcache.store import keyed

PAD_TOKEN = 0
PAD_DOCUMENT = 0xFFFFFFFF

_BATCH_CHARACTERS = 1 << 18
_STREAMS = ("train", "holdout")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPlan:
    """What decides the sequences, besides the documents and the tokenizer.

    seq_len       t, tokens in a sequence, the BOS included.
    seed          decides which documents are held out.
    holdout_frac  expected fraction of documents in the holdout, from 0 up to but not including 1.
    n_train       training sequences wanted; None, like n_holdout: the whole corpus.
    n_holdout     holdout sequences wanted.
    bos           every sequence begins with the BOS id.
    """

    seq_len: int
    seed: int
    holdout_frac: float
    n_train: int | None
    n_holdout: int | None
    bos: bool = False

    def __post_init__(self) -> None:
        if self.seq_len < 1 + self.bos:
            raise UsageError(f"seq_len {self.seq_len}: expected at least {1 + self.bos}")
        if not 0 <= self.holdout_frac < 1:
            raise UsageError(f"holdout_frac {self.holdout_frac}: expected 0 <= holdout_frac < 1")
        if (self.n_train is None) != (self.n_holdout is None):
            raise UsageError(
                f"n_train {self.n_train} and n_holdout {self.n_holdout}: give both, or neither for the whole corpus"
            )
        if self.n_train is not None and self.n_holdout is not None:
            if min(self.n_train, self.n_holdout) < 0 or self.n_train + self.n_holdout == 0:
                raise UsageError(
                    f"{self.n_train} training and {self.n_holdout} holdout sequences: nothing to pack"
                )
            if self.n_holdout > 0 and self.holdout_frac == 0:
                raise UsageError(
                    f"{self.n_holdout} holdout sequences of holdout_frac 0: give a fraction above 0"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStream:
    """One stream's sequences, in the caller's spool folder.

    tokens        [q, t] uint32, read-only. Padding is token 0.
    document      [q, t] uint32, the corpus document of each token; 0xFFFFFFFF for padding.
    n_tokens      tokens in them: BOS and separators included, padding not.
    n_documents   documents with at least one token in them.
    n_skipped     documents read after the stream was full.
    """

    tokens: NDArray[np.uint32]
    document: NDArray[np.uint32]
    n_tokens: int
    n_documents: int
    n_skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTokens:
    """All sequences of a plan.

    train, holdout     the two streams; no document is in both.
    n_documents_read   documents taken from the corpus; their numbers are 0 .. n_documents_read - 1.
    text_digest        sha256 over those documents in order: length of the UTF-8 text (8 bytes, little endian), text.
    separator_id       the id that begins every document.
    bos_id             the id that begins every sequence; None without BOS.
    """

    train: PackedStream
    holdout: PackedStream
    n_documents_read: int
    text_digest: str
    separator_id: int
    bos_id: int | None


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    plan: TokenPlan,
    *,
    spool_dir: Path,
    vocab_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> PackedTokens:
    """Tokenise and pack documents until both streams are full, or to the end of the corpus.

    Writes four files into `spool_dir`, replacing what an interrupted call left, and nothing else anywhere. Memory: a
    batch of about 256k characters of text, or one document where that is larger, and its tokens.

    Args:
        documents: texts in corpus order.
        tokenizer: a fast tokenizer.
        plan: how many sequences, of what length.
        spool_dir: an existing folder of the caller's; the result is mapped from it.
        vocab_size: of the model: every id must be below it.
        on_progress: called with the number of tokens packed so far, after every batch.

    Raises:
        CorpusError: fewer tokens than wanted, or no training document at all.
        ModelError: a slow tokenizer, or ids that the model does not know.
        UsageError: the tokenizer has no separator, or no BOS where one is wanted.
        DiskFullError: the spool does not fit.
    """
    _check_fast(tokenizer)
    separator = separator_id(tokenizer)
    bos = _bos_id(tokenizer) if plan.bos else None
    _check_ids(np.array([separator] if bos is None else [separator, bos]), vocab_size)
    with ExitStack() as stack:
        spools = {
            name: _Spool(stack, spool_dir, name, plan.seq_len, bos, n_wanted)
            for name, n_wanted in zip(_STREAMS, (plan.n_train, plan.n_holdout), strict=True)
        }
        digest = hashlib.sha256()
        n_read = 0
        for batch in _batch_texts(documents):
            n_read += _pack_batch(batch, n_read, tokenizer, plan, spools, digest, separator, vocab_size)
            for spool in spools.values():
                spool.write_full()
            if on_progress is not None:
                on_progress(sum(spool.n_tokens for spool in spools.values()))
            if all(spool.is_full for spool in spools.values()):
                break
        _check_enough(spools, plan, n_read)
        for spool in spools.values():
            spool.write_padded()
    train, holdout = (spools[name].load() for name in _STREAMS)
    return PackedTokens(
        train=train,
        holdout=holdout,
        n_documents_read=n_read,
        text_digest=digest.hexdigest(),
        separator_id=separator,
        bos_id=bos,
    )


def keep_mask(
    tokens: NDArray[np.uint32], document: NDArray[np.uint32], special_ids: Sequence[int], exclude_first: int
) -> NDArray[np.bool_]:
    """Which positions are trained on and counted: [q, t] bool.

    False for special ids (put the separator and the BOS among them), for the first `exclude_first` positions of every
    sequence, and for padding.

    Args:
        tokens: [q, t] token ids.
        document: [q, t] document numbers, 0xFFFFFFFF for padding.
        special_ids: token ids that are never kept.
        exclude_first: positions never kept at the start of every sequence, e.g. 1 for attention sinks.
    """
    keep = document != PAD_DOCUMENT
    keep &= ~np.isin(tokens, np.array(sorted(special_ids), dtype=np.uint32))
    keep[:, :exclude_first] = False
    return keep


def sequence_order(n: int, seed: int, stream: str) -> NDArray[np.int64]:
    """The order in which a stream's packed sequences are stored: a keyed permutation of 0 .. n - 1, [n]."""
    return keyed.permutation(keyed.derive(seed, "sequence_order", stream), n)


def holdout_mask(document: NDArray[np.integer], seed: int, holdout_frac: float) -> NDArray[np.bool_]:
    """Which documents, by number, are held out: the keyed hash of each is below `holdout_frac` of its range."""
    hashes = keyed.hash_u64(keyed.derive(seed, "holdout"), document)
    return hashes < np.uint64(int(holdout_frac * 2.0**64))


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every document: EOS, else BOS. Raises UsageError where the tokenizer has neither."""
    for token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise UsageError(
        f"tokenizer {tokenizer.name_or_path!r} has neither an EOS nor a BOS token to separate documents; "
        "set eos_token in its tokenizer_config.json"
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's special ids, separator and BOS among them, ascending."""
    return tuple(sorted({*tokenizer.all_special_ids, separator_id(tokenizer)}))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sha256 of a fast tokenizer's own JSON, keys sorted, without the truncation and padding its last call left in it.

    Raises:
        ModelError: a slow tokenizer, which has no such JSON.
    """
    _check_fast(tokenizer)
    backend: Any = tokenizer
    content = json.loads(backend.backend_tokenizer.to_str())
    content.pop("truncation", None)
    content.pop("padding", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(slots=True)
class _Spool:
    """One stream while it is packed: tokens come in a document at a time, whole sequences go to disk."""

    stack: ExitStack
    folder: Path
    name: str
    seq_len: int
    bos: int | None
    n_wanted: int | None
    n_content: int = 0
    n_documents: int = 0
    n_skipped: int = 0
    n_sequences: int = 0
    n_padding: int = 0
    pending: list[NDArray[np.uint32]] = field(default_factory=list)
    pending_document: list[NDArray[np.uint32]] = field(default_factory=list)
    files: list[FileIO] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.files = [self.stack.enter_context(path.open("wb", buffering=0)) for path in self.paths]

    @property
    def paths(self) -> tuple[Path, Path]:
        return self.folder / f"{self.name}.tokens.u32", self.folder / f"{self.name}.document.u32"

    @property
    def capacity(self) -> int:
        """Tokens of documents that fit in one sequence."""
        return self.seq_len - (self.bos is not None)

    @property
    def is_full(self) -> bool:
        return self.n_wanted is not None and self.n_content >= self.n_wanted * self.capacity

    @property
    def n_tokens(self) -> int:
        """Tokens packed: those wanted and taken in so far, with a BOS for every sequence begun."""
        n_content = self.n_content
        if self.n_wanted is not None:
            n_content = min(n_content, self.n_wanted * self.capacity)
        return n_content + (-(-n_content // self.capacity) if self.bos is not None else 0)

    def add(self, ids: NDArray[np.uint32], document: int) -> None:
        self.n_documents += 1
        self.n_content += ids.size
        self.pending.append(ids)
        self.pending_document.append(np.full(ids.size, document, dtype=np.uint32))

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

    def write_padded(self) -> None:
        """Write what is left of a whole corpus, filled up to one sequence."""
        if self.n_wanted is not None or not self.pending or self.pending[0].size == 0:
            return
        self.n_padding = self.capacity - self.pending[0].size
        self._write(
            np.pad(self.pending[0], (0, self.n_padding), constant_values=PAD_TOKEN),
            np.pad(self.pending_document[0], (0, self.n_padding), constant_values=PAD_DOCUMENT),
        )

    def _write(self, content: NDArray[np.uint32], document: NDArray[np.uint32]) -> None:
        tokens_qt = content.reshape(-1, self.capacity)
        document_qt = document.reshape(-1, self.capacity)
        if self.bos is not None:
            tokens_qt = np.insert(tokens_qt, 0, self.bos, axis=1)
            document_qt = np.concatenate([document_qt[:, :1], document_qt], axis=1)
        try:
            for file, array in zip(self.files, (tokens_qt, document_qt), strict=True):
                _write_all(file, np.ascontiguousarray(array, dtype="<u4"))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                error.errno,
                f"{self.folder} cannot hold the packed tokens: full after {self.n_sequences} {self.name} sequences; "
                "they take 8 bytes a token. Free space or ask for fewer tokens",
            ) from error
        self.n_sequences += tokens_qt.shape[0]

    def load(self) -> PackedStream:
        shape = (self.n_sequences, self.seq_len)
        tokens, document = (
            np.memmap(path, dtype="<u4", mode="r", shape=shape)
            if self.n_sequences
            else np.zeros(shape, np.uint32)
            for path in self.paths
        )
        return PackedStream(
            tokens=tokens,
            document=document,
            n_tokens=self.n_sequences * self.seq_len - self.n_padding,
            n_documents=self.n_documents,
            n_skipped=self.n_skipped,
        )


def _write_all(file: FileIO, array: NDArray[np.uint32]) -> None:
    """Unbuffered, so that a full disk is reported here and not once more when the file is closed."""
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
        rest = rest[file.write(rest) :]


def _batch_texts(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    n_characters = 0
    for text in documents:
        batch.append(text)
        n_characters += len(text)
        if n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _pack_batch(
    batch: list[str],
    first: int,
    tokenizer: PreTrainedTokenizerBase,
    plan: TokenPlan,
    spools: dict[str, _Spool],
    digest: Any,
    separator: int,
    vocab_size: int,
) -> int:
    """Give each document to its stream. Returns how many were read: fewer than given if both streams are full."""
    if first + len(batch) > PAD_DOCUMENT:
        raise CorpusError(
            f"more than {PAD_DOCUMENT} documents; their numbers are 32 bits. Join short documents"
        )
    held_out = holdout_mask(np.arange(first, first + len(batch)), plan.seed, plan.holdout_frac)
    homes = [spools[_STREAMS[int(is_held_out)]] for is_held_out in held_out]
    wanted = [i for i, spool in enumerate(homes) if not spool.is_full]
    ids = dict(
        zip(wanted, _tokenise([batch[i] for i in wanted], tokenizer, separator, vocab_size), strict=True)
    )
    for i, (text, spool) in enumerate(zip(batch, homes, strict=True)):
        if all(spool.is_full for spool in spools.values()):
            return i
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
        if spool.is_full:
            spool.n_skipped += 1
        else:
            spool.add(ids[i], first + i)
    return len(batch)


def _tokenise(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, separator: int, vocab_size: int
) -> list[NDArray[np.uint32]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    arrays = [np.array([separator, *ids], dtype=np.int64) for ids in encoded["input_ids"]]  # type: ignore[misc]
    for array in arrays:
        _check_ids(array, vocab_size)
    return [array.astype(np.uint32) for array in arrays]


def _check_ids(ids: NDArray[np.int64], vocab_size: int) -> None:
    if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
        raise ModelError(
            f"the tokenizer gives id {int(ids.max())}; the model knows 0 to {vocab_size - 1}. "
            "Use the tokenizer that belongs to the model"
        )


def _check_enough(spools: dict[str, _Spool], plan: TokenPlan, n_read: int) -> None:
    if plan.n_train is None:
        if spools["train"].n_documents == 0:
            raise CorpusError(
                f"of {n_read} documents {spools['holdout'].n_documents} are held out and none is left to train on; "
                f"add documents, or lower holdout_frac from {plan.holdout_frac:g}"
            )
        return
    if all(spool.is_full for spool in spools.values()):
        return
    states = [
        f"{name}: {spool.n_tokens} tokens, {(spool.n_wanted or 0) * plan.seq_len} wanted "
        f"({spool.n_wanted} sequences of {plan.seq_len})"
        for name, spool in spools.items()
    ]
    raise CorpusError(
        f"the corpus is too short. Its {n_read} documents, {plan.holdout_frac:g} of them held out, give {'; '.join(states)}. "
        "Add text, ask for fewer tokens or the whole corpus, or change holdout_frac"
    )


def _check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) has no fast backend; "
            "expected one with a tokenizer.json, which AutoTokenizer loads as a fast tokenizer"
        )


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    token_id = tokenizer.bos_token_id
    if not isinstance(token_id, int):
        raise UsageError(
            f"bos=True, but tokenizer {tokenizer.name_or_path!r} has no BOS token; use bos=False"
        )
    return token_id
