"""Tokenizers: the ids that matter, documents to ids, and which positions are kept.

Axes: q sequences, t positions.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actcache.errors import ModelError, UsageError
from actcache.model.positions import document_positions
from actcache.store import keyed

PAD_TOKEN = 0
PAD_DOCUMENT = 0xFFFFFFFF

SEPARATORS = ("auto", "eos", "bos", "none")
Separator = Literal["auto", "eos", "bos", "none"]


def keep_mask(
    tokens: NDArray[np.uint32],
    document: NDArray[np.uint32],
    special_ids: Sequence[int],
    exclude_first: int,
    *,
    is_isolated: bool = False,
) -> NDArray[np.bool_]:
    """Which positions are trained on and counted: [q, t] bool.

    False for special ids (put separators and the BOS among them), for the first `exclude_first` positions of every
    sequence, or of every document where documents do not see each other, and for padding.

    Args:
        tokens: [q, t] token ids.
        document: [q, t] document numbers, 0xFFFFFFFF for padding.
        special_ids: token ids that are never kept.
        exclude_first: positions never kept at the start, e.g. 1 for attention sinks.
        is_isolated: documents of one sequence are isolated from each other.
    """
    keep = document != PAD_DOCUMENT
    keep &= ~np.isin(tokens, np.array(sorted(special_ids), dtype=np.uint32))
    if is_isolated:
        keep &= document_positions(document) >= exclude_first
    else:
        keep[:, :exclude_first] = False
    return keep


def sequence_order(n: int, seed: int, stream: str) -> NDArray[np.int64]:
    """The order in which a stream's packed sequences are stored: a keyed permutation of 0 .. n - 1, [n]."""
    return keyed.permutation(keyed.derive(seed, "sequence_order", stream), n)


def holdout_mask(document: NDArray[np.integer], seed: int, holdout_frac: float) -> NDArray[np.bool_]:
    """Which documents, by number, are held out: the keyed hash of each is below `holdout_frac` of its range."""
    hashes = keyed.hash_u64(keyed.derive(seed, "holdout"), document)
    return hashes < np.uint64(int(holdout_frac * 2.0**64))


def separator_id(tokenizer: PreTrainedTokenizerBase, chosen: Separator = "auto") -> int | None:
    """The id that begins every document: with "auto" the EOS, else the BOS; None with "none".

    Raises:
        UsageError: the tokenizer has no such token.
    """
    ids = {"eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    wanted = {"auto": ("eos", "bos"), "eos": ("eos",), "bos": ("bos",), "none": ()}[chosen]
    for name in wanted:
        token_id = ids[name]
        if isinstance(token_id, int):
            return token_id
    if not wanted:
        return None
    lacking = {"auto": "neither an EOS nor a BOS token", "eos": "no EOS token", "bos": "no BOS token"}[chosen]
    raise UsageError(
        f"tokenizer {tokenizer.name_or_path!r} has {lacking} to separate documents; choose another --separator, or set one "
        f"in its tokenizer_config.json"
    )


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the BOS token. Raises UsageError where the tokenizer has none."""
    token_id = tokenizer.bos_token_id
    if not isinstance(token_id, int):
        raise UsageError(f"tokenizer {tokenizer.name_or_path!r} has no BOS token; leave out --bos")
    return token_id


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's special ids, ascending: those with a role, and every added token that is marked special."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted({*tokenizer.all_special_ids, *added}))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sha256 of a fast tokenizer's own JSON, keys sorted, without the truncation and padding its last call left in it.

    Raises:
        ModelError: a slow tokenizer, which has no such JSON.
    """
    check_fast(tokenizer)
    backend: Any = tokenizer
    content = json.loads(backend.backend_tokenizer.to_str())
    content.pop("truncation", None)
    content.pop("padding", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """ModelError for a slow tokenizer."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) has no fast backend; "
            "expected one with a tokenizer.json, which AutoTokenizer loads as a fast tokenizer"
        )


def tokenise(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> list[NDArray[np.uint32]]:
    """The ids of each text, without any that the tokenizer would add. ModelError for ids the model does not know."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    arrays = [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]  # type: ignore[arg-type]
    check_ids(np.concatenate(arrays), vocab_size)
    return [array.astype(np.uint32) for array in arrays]


def check_ids(ids: NDArray[np.int64], vocab_size: int) -> None:
    """ModelError for ids the model does not know."""
    if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        raise ModelError(
            f"the tokenizer gives id {int(ids.max())}; the model knows 0 to {vocab_size - 1}. "
            "Use the tokenizer that belongs to the model"
        )
