"""What a field of a corpus holds, and how it becomes a document: a text, or token ids."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorpusError

MAX_DOCUMENT_BYTES = 8 << 20
MAX_DOCUMENT_TOKENS = 2 << 20

Document = str | NDArray[np.uint32]
Kind = Literal["text", "chat", "ids"]
Values = Iterator[tuple[str, Any]]
"""Where each value is, for messages, and the value of the field there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What a corpus is read as.

    kind             "text"; "chat": lists of messages that a template renders; "ids": tokenised already.
    column           the field of JSON lines and parquet that holds it.
    mask_column      with "ids": a field beside it, obeyed where it is there: ids where it is 0 are left out.
    template         with "chat": the template's text.
    render           with "chat": messages to text, by that template.
    n_ids            with "ids": ids the model knows.
    token_dtype      with "ids": of .bin files.
    document_tokens  with "ids": ids of a document in .bin and one-dimensional .npy files; None: documents end at `end_id`.
    end_id           with "ids": the id that ends a document there.
    """

    kind: Kind = "text"
    column: str = "text"
    mask_column: str = "attention_mask"
    template: str | None = None
    render: Callable[[Any], str] | None = None
    n_ids: int | None = None
    token_dtype: str = "uint16"
    document_tokens: int | None = None
    end_id: int | None = None

    def to_document(self, value: Any, where: str) -> Document | None:
        """A field's value as a document; None where it has nothing in it.

        Raises:
            CorpusError: it is not what the kind says; the message says where.
        """
        if value is None:
            return None
        if self.kind == "ids":
            return self._ids(value, where)
        text = self._render(value, where) if self.kind == "chat" else value
        if not isinstance(text, str):
            raise CorpusError(
                f"{where}: column {self.column!r} holds {type(text).__name__}; expected a string. (A column of token ids is "
                f"read with --ids-column, one of messages with --chat-template)"
            )
        self._check_text(text, where)
        return text if text.strip() else None

    def _check_text(self, text: str, where: str) -> None:
        try:
            n_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{where}: column {self.column!r} holds half a surrogate pair, \\u{ord(text[error.start]):04x}, at "
                f"character {error.start}, which is no text; expected whole characters"
            ) from error
        if n_bytes > MAX_DOCUMENT_BYTES:
            raise CorpusError(
                f"{where}: a document of {n_bytes} bytes; expected at most {MAX_DOCUMENT_BYTES}. Split large documents"
            )

    def _render(self, value: Any, where: str) -> str:
        assert self.render is not None
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise CorpusError(
                f"{where}: column {self.column!r} holds {type(value).__name__}; expected a list of messages, each an object "
                f'such as {{"role": "user", "content": "..."}}'
            )
        if not value:
            return ""
        try:
            return self.render(value)
        except ValueError as error:
            raise CorpusError(
                f"{where}: the chat template refuses these messages ({error}); their fields are "
                f"{', '.join(sorted({str(key) for message in value for key in message}))}"
            ) from error

    def _ids(self, value: Any, where: str) -> NDArray[np.uint32] | None:
        ids = value if isinstance(value, np.ndarray) else _as_array(value)
        if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise CorpusError(
                f"{where}: column {self.column!r} holds no list of integers; expected token ids"
            )
        if ids.size == 0:
            return None
        if ids.size > MAX_DOCUMENT_TOKENS:
            raise CorpusError(
                f"{where}: a document of {ids.size} ids; expected at most {MAX_DOCUMENT_TOKENS}. Split large documents"
            )
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or (self.n_ids is not None and highest >= self.n_ids):
            raise CorpusError(
                f"{where}: ids from {lowest} to {highest}; the model knows 0 to {(self.n_ids or 0) - 1}. Expected ids of the "
                f"model's own tokenizer, and of .bin files the right --token-dtype"
            )
        return ids.astype(np.uint32)


def _as_array(value: Any) -> NDArray[Any] | None:
    """A JSON list of whole numbers as an array; None where it is anything else."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        return None
    return np.array(value, dtype=np.int64)


def masked(ids: Any, mask: Any, where: str) -> Any:
    """Ids where the mask beside them is not 0."""
    if ids is None or mask is None:
        return ids
    if len(ids) != len(mask):
        raise CorpusError(f"{where}: {len(ids)} ids and {len(mask)} numbers in the mask beside them")
    if isinstance(ids, np.ndarray):
        return ids[np.asarray(mask) != 0]
    return [i for i, m in zip(ids, mask, strict=True) if m]
