"""The nouns that travel between producer, reader and trainer: a batch of rows, and where batches come from.

Axes: b rows, d width. Torch is needed to hold a batch but not to import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class Batch:
    """`b` activation rows with their provenance.

    rows      [b, d] in the stream's dtype. The consumer owns it: it may write to it and keep it.
    layer     [b] int64, the model's layer number of each row.
    sequence  [b] int64, index into the store's `tokens`.
    position  [b] int64, position within the sequence.
    """

    rows: Tensor
    layer: Tensor
    sequence: Tensor
    position: Tensor
    lookup: Callable[[str, Tensor, Tensor], Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def __repr__(self) -> str:
        return f"Batch(rows={tuple(self.rows.shape)} {self.rows.dtype} on {self.rows.device})"

    @property
    def token(self) -> Tensor:
        """[b] int64, the token id at each row's position. Looked up when asked for."""
        return self._look_up("tokens")

    @property
    def document(self) -> Tensor:
        """[b] int64, the corpus document of each row. Looked up when asked for."""
        return self._look_up("document")

    def _look_up(self, name: str) -> Tensor:
        if self.lookup is None:
            raise LookupError(f"this batch comes from a source that has no {name}; a store's stream has")
        return self.lookup(name, self.sequence, self.position)


@runtime_checkable
class BatchSource(Protocol):
    """Where a trainer gets batches: a store's stream, a socket, or tensors in memory.

    width        d.
    layers       the layer numbers that occur, ascending.
    fingerprint  digest of everything the order of rows depends on, the data included.
    """

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def fingerprint(self) -> str: ...

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the cursor on; ends only when the order is exhausted."""
        ...

    def peek(self, n_rows: int) -> Batch:
        """The first `n_rows` rows of the order (fewer if there are fewer). Moves no cursor."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the last batch handed out: JSON, under 4 KiB."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken; CursorError names what differs."""
        ...

    def waited_s(self) -> float:
        """Seconds the consumer has waited for data so far."""
        ...

    def close(self) -> None:
        """Stop reading ahead and release everything held."""
        ...
