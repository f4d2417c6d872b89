"""Documents to sequences: split into training and holdout, pack; all before the first forward pass.

A document becomes its separator, if there is one, followed by its tokens. Packed, the documents of one part are laid end
to end and cut every `seq_len` tokens, across documents; else each has a sequence of its own. Axes: q sequences, t
positions.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actcache.errors import CorpusError, UsageError
from actcache.producer.mixture import Mixture, TokenSource
from actcache.producer.spool import PackedStream, Spool
from actcache.producer.tokens import bos_id, check_fast, check_ids, holdout_mask

_STREAMS = ("train", "holdout")
_PROGRESS_TOKENS = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPlan:
    """What decides the sequences, besides the documents and the tokenizer.

    seq_len       t, tokens in a sequence, the BOS included.
    seed          decides which documents are held out.
    holdout_frac  expected fraction of documents in the holdout, from 0 up to but not including 1.
    n_train       training sequences wanted; None, like n_holdout: as many as there are.
    n_holdout     holdout sequences wanted.
    n_tokens      or tokens wanted over both; the document that reaches them is the last. None: the whole corpus.
    bos           every sequence begins with the BOS id.
    is_packed     documents lie end to end; else each has a sequence of its own.
    allow_short   a corpus with less than is wanted is packed as far as it goes.
    """

    seq_len: int
    seed: int
    holdout_frac: float
    n_train: int | None
    n_holdout: int | None
    n_tokens: int | None = None
    bos: bool = False
    is_packed: bool = True
    allow_short: bool = False

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
class PackedTokens:
    """All sequences of a plan.

    train, holdout     the two parts; no document is in both.
    n_documents_read   [source] documents taken from each source.
    text_digest        sha256 over those documents in the order in which they were read: length (8 bytes, little endian)
                       and bytes of the UTF-8 text, or of the ids as little-endian uint32.
    is_short           less than was wanted.
    """

    train: PackedStream
    holdout: PackedStream
    n_documents_read: tuple[int, ...]
    text_digest: str
    is_short: bool

    @property
    def by_source(self) -> NDArray[np.int64]:
        """[source] tokens in both parts."""
        return self.train.by_source + self.holdout.by_source


def pack(
    sources: Sequence[TokenSource],
    tokenizer: PreTrainedTokenizerBase,
    plan: TokenPlan,
    *,
    spool_dir: Path | None,
    vocab_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> PackedTokens:
    """Tokenise and pack documents until both parts are full, or to the end of the corpus.

    Writes four files into `spool_dir`, replacing what an interrupted call left, and nothing else anywhere. Memory: for
    every source a batch of about 256k characters of text, or one document where that is larger, and its tokens.

    Args:
        sources: documents.
        tokenizer: a fast tokenizer.
        plan: how many sequences, of what length.
        spool_dir: an existing folder of the caller's; the result is mapped from it. None: sequences are only counted.
        vocab_size: of the model: every id must be below it.
        on_progress: called with the number of tokens packed so far, every now and then and at the end.

    Raises:
        CorpusError: fewer tokens than wanted, or no training document at all.
        ModelError: a slow tokenizer, or ids that the model does not know.
        UsageError: the tokenizer has no BOS where one is wanted.
        DiskFullError: the spool does not fit.
    """
    check_fast(tokenizer)
    bos = bos_id(tokenizer) if plan.bos else None
    extra = [i for i in (bos, *(source.separator for source in sources)) if i is not None]
    check_ids(np.array(extra, dtype=np.int64), vocab_size)
    mixture = Mixture(
        sources,
        tokenizer,
        vocab_size,
        held_out=lambda numbers: holdout_mask(numbers, plan.seed, plan.holdout_frac),
        allow_short=plan.allow_short,
    )
    with ExitStack() as stack:
        spools = {
            name: Spool(
                stack=stack,
                folder=spool_dir,
                name=name,
                seq_len=plan.seq_len,
                bos=bos,
                n_wanted=n_wanted,
                is_packed=plan.is_packed,
                n_sources=len(sources),
            )
            for name, n_wanted in zip(_STREAMS, (plan.n_train, plan.n_holdout), strict=True)
        }
        digest = _fill(spools, mixture, plan, on_progress or (lambda _n: None))
        is_short = not _is_done(spools, plan) and (plan.n_train is not None or plan.n_tokens is not None)
        _check_enough(spools, plan, sum(mixture.n_read), is_short=is_short)
        for spool in spools.values():
            spool.write_padded()
    train, holdout = (spools[name].load() for name in _STREAMS)
    return PackedTokens(
        train=train,
        holdout=holdout,
        n_documents_read=tuple(mixture.n_read),
        text_digest=digest,
        is_short=is_short,
    )


def _is_done(spools: dict[str, Spool], plan: TokenPlan) -> bool:
    if plan.n_tokens is not None:
        return sum(spool.n_tokens for spool in spools.values()) >= plan.n_tokens
    return all(spool.is_full for spool in spools.values())


def _fill(
    spools: dict[str, Spool], mixture: Mixture, plan: TokenPlan, on_progress: Callable[[int], None]
) -> str:
    """Give each document to its part. Returns the digest of what was read."""
    digest = hashlib.sha256()
    n_told = 0
    while not _is_done(spools, plan):
        drawn = mixture.next()
        if drawn is None:
            break
        raw = drawn.document.raw
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
        spool = spools[_STREAMS[int(drawn.document.is_held_out)]]
        if spool.is_full:
            spool.n_skipped += 1
            drawn.done(0)
            continue
        ids = drawn.ids(alone=any(other.is_full for other in spools.values()))
        drawn.done(spool.add(ids, drawn.document.number))
        n_tokens = sum(other.n_tokens for other in spools.values())
        if n_tokens - n_told >= _PROGRESS_TOKENS:
            on_progress(n_tokens)
            n_told = n_tokens
    on_progress(sum(spool.n_tokens for spool in spools.values()))
    return digest.hexdigest()


def _check_enough(spools: dict[str, Spool], plan: TokenPlan, n_read: int, *, is_short: bool) -> None:
    if is_short and not plan.allow_short:
        raise CorpusError(_shortage(spools, plan, n_read))
    if plan.n_train != 0 and spools["train"].n_documents == 0:
        raise CorpusError(
            f"of {n_read} documents {spools['holdout'].n_documents} are held out and none is left to train on; "
            f"add documents, or lower holdout_frac from {plan.holdout_frac:g}"
        )


def _shortage(spools: dict[str, Spool], plan: TokenPlan, n_read: int) -> str:
    if plan.n_tokens is not None:
        n_tokens = sum(spool.n_tokens for spool in spools.values())
        return (
            f"the corpus is too short. Its {n_read} documents, each in a sequence of {plan.seq_len}, give {n_tokens} tokens, "
            f"{plan.n_tokens} wanted. Add text, ask for fewer tokens or the whole corpus, or give --allow-short"
        )
    states = [
        f"{name}: {spool.n_tokens} tokens, {(spool.n_wanted or 0) * plan.seq_len} wanted "
        f"({spool.n_wanted} sequences of {plan.seq_len})"
        for name, spool in spools.items()
    ]
    return (
        f"the corpus is too short. Its {n_read} documents, {plan.holdout_frac:g} of them held out, give {'; '.join(states)}. "
        "Add text, ask for fewer tokens or the whole corpus, change holdout_frac, or give --allow-short"
    )
