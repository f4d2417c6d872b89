"""An in-memory BatchSource: tensors in, shuffled batches out, with a cursor."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from actcache.errors import CursorError
from actcache.flow import Batch


class ListSource:
    """Rows in memory, permuted anew in each epoch; the last batch of an epoch may be smaller. Its length is in batches."""

    def __init__(
        self, rows: Tensor, layer: Tensor, *, batch_rows: int, epochs: int = 1, seed: int = 0
    ) -> None:
        self._rows, self._layer = rows, layer
        self._batch_rows, self._epochs, self._seed = batch_rows, epochs, seed
        self._per_epoch = -(-len(rows) // batch_rows)
        self._next = 0

    @property
    def width(self) -> int:
        return self._rows.shape[1]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(set(self._layer.tolist())))

    @property
    def fingerprint(self) -> str:
        content = self._rows.float().numpy().tobytes() + self._layer.numpy().tobytes()
        return hashlib.sha256(content + repr((self._batch_rows, self._seed)).encode()).hexdigest()

    def __len__(self) -> int:
        return self._per_epoch * self._epochs

    def __iter__(self) -> Iterator[Batch]:
        while self._next < len(self):
            epoch, i = divmod(self._next, self._per_epoch)
            self._next += 1
            yield self._batch(self._order(epoch)[i * self._batch_rows : (i + 1) * self._batch_rows])

    def peek(self, n_rows: int) -> Batch:
        return self._batch(self._order(0)[:n_rows])

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise CursorError(f"fingerprint {state['fingerprint']} is not {self.fingerprint}")
        self._next = state["next"]

    def waited_s(self) -> float:
        return 0.0

    def close(self) -> None:
        pass

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1000 + epoch)
        return torch.randperm(len(self._rows), generator=generator)

    def _batch(self, ids: Tensor) -> Batch:
        return Batch(self._rows[ids].clone(), self._layer[ids], sequence=ids // 16, position=ids % 16)


class EndlessSource(ListSource):
    """A ListSource that does not say how long it is."""

    __len__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Batch]:
        while self._next < self._per_epoch * self._epochs:
            epoch, i = divmod(self._next, self._per_epoch)
            self._next += 1
            yield self._batch(self._order(epoch)[i * self._batch_rows : (i + 1) * self._batch_rows])


def random_source(
    n_rows: int = 210,
    width: int = 12,
    layers: tuple[int, ...] = (2, 5),
    *,
    batch_rows: int = 32,
    epochs: int = 1,
    seed: int = 0,
    kind: type[ListSource] = ListSource,
) -> ListSource:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.tensor(layers)[torch.arange(n_rows) % len(layers)]
    rows = torch.randn(n_rows, width, generator=generator) * (1 + layer[:, None]) + torch.arange(width)
    return kind(rows, layer, batch_rows=batch_rows, epochs=epochs, seed=seed)
