"""The nouns that travel between reader and trainer: a batch of rows, and where batches come from.

Axes: b rows, d width. Torch is needed to hold a batch but not to import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    Lookup = Callable[[str], Tensor]


class Batch:
    """`b` activation rows with their provenance.

    rows    [b, d] in the stream's dtype. The consumer owns it: it may write to it and keep it.
    layer   [b] int64, the model's layer number of each row.

    Where rows come from is looked up when asked for, so a consumer that never asks pays nothing:

    sequence  [b] int64, index into the store's `tokens`.
    position  [b] int64, position within the sequence.
    token     [b] int64, the token id there.
    document  [b] int64, the corpus document it came from.

    slot      [b] int64, place of each row in the whole batch, of which this may be one reader's share.

    Where a row holds several layers (stack "feature" or "layers"), `rows` is [b, l * d] or [b, l, d] and `layer` is [l].
    Where several hooks are streamed, `hooks` holds the rows of each by name, aligned; `rows` are those of the first.
    """

    __slots__ = ("_lookup", "_position", "_sequence", "_slot", "hooks", "layer", "rows")

    def __init__(
        self,
        rows: Tensor,
        layer: Tensor,
        sequence: Tensor | None = None,
        position: Tensor | None = None,
        lookup: Lookup | None = None,
        hooks: dict[str, Tensor] | None = None,
        slot: Tensor | None = None,
    ) -> None:
        self.rows, self.layer = rows, layer
        self.hooks: dict[str, Tensor] = hooks or {}
        self._slot = slot
        self._sequence, self._position, self._lookup = sequence, position, lookup

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def __repr__(self) -> str:
        return f"Batch(rows={tuple(self.rows.shape)} {self.rows.dtype} on {self.rows.device})"

    @property
    def slot(self) -> Tensor:
        """[b] int64, place of each row in the whole batch: 0, 1, ... where one reader gets all of it."""
        if self._slot is None:
            import torch

            self._slot = torch.arange(len(self), device=self.rows.device)
        return self._slot

    @property
    def sequence(self) -> Tensor:
        """[b] int64, index into the store's `tokens`."""
        if self._sequence is None:
            self._sequence = self._look_up("sequence")
        return self._sequence

    @property
    def position(self) -> Tensor:
        """[b] int64, position within the sequence."""
        if self._position is None:
            self._position = self._look_up("position")
        return self._position

    @property
    def token(self) -> Tensor:
        """[b] int64, the token id at each row's position."""
        return self._look_up("token")

    @property
    def document(self) -> Tensor:
        """[b] int64, the corpus document of each row."""
        return self._look_up("document")

    def _look_up(self, name: str) -> Tensor:
        if self._lookup is None:
            raise LookupError(f"this batch comes from a source that has no {name}; a store's stream has")
        return self._lookup(name)


class StopWaiting(Exception):
    """Raised while a source waits for rows, by whoever does not want to wait any longer; no batch is lost by it."""


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
