"""An in-memory BatchSource: tensors in, shuffled batches out, with a cursor; a share of them for a rank."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from actcache.errors import CursorError
from actcache.flow import Batch


class ListSource:
    """Rows in memory, permuted anew in each epoch; the last batch of an epoch may be smaller. Its length is in batches.

    rows   [n, d] with a layer number each; or [n, l, d] or [n, l * d] with `layer` [l], where a row holds all layers.
    more   other hooks' rows, aligned.
    rank, world_size  a share of every batch: rows whose number modulo world_size is rank; shares differ in size.
    """

    def __init__(
        self,
        rows: Tensor,
        layer: Tensor,
        *,
        batch_rows: int,
        epochs: int = 1,
        seed: int = 0,
        more: dict[str, Tensor] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._rows, self._layer = rows, layer
        self._batch_rows, self._epochs, self._seed = batch_rows, epochs, seed
        self._more = more or {}
        self._rank, self._world_size = rank, world_size
        self._per_epoch = -(-len(rows) // batch_rows)
        self._next = 0

    @property
    def width(self) -> int:
        return self._rows.shape[-1]

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
        while self._next < self._per_epoch * self._epochs:
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
        slot = (ids % self._world_size == self._rank).nonzero().squeeze(1)
        ids = ids[slot]
        rows = self._rows[ids].clone()
        one_each = self._rows.ndim == 2 and len(self._layer) == len(self._rows)
        return Batch(
            rows,
            self._layer[ids] if one_each else self._layer,
            sequence=ids // 16,
            position=ids % 16,
            slot=slot,
            hooks={"first": rows, **{name: x[ids].clone() for name, x in self._more.items()}}
            if self._more
            else None,
        )


class EndlessSource(ListSource):
    """A ListSource that does not say how long it is."""

    __len__ = None  # type: ignore[assignment]


def random_rows(n_rows: int, width: int, layers: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [n, d] of other scales on other layers, and their layer numbers."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.tensor(layers)[torch.arange(n_rows) % len(layers)]
    rows = torch.randn(n_rows, width, generator=generator) * (1 + layer[:, None]) + torch.arange(width)
    return rows, layer


def random_source(
    n_rows: int = 210,
    width: int = 12,
    layers: tuple[int, ...] = (2, 5),
    *,
    seed: int = 0,
    kind: type[ListSource] = ListSource,
    **more: Any,
) -> ListSource:
    rows, layer = random_rows(n_rows, width, layers, seed)
    return kind(rows, layer, **{"batch_rows": 32, "seed": seed, **more})


def form_source(form: str, n_rows: int = 210, width: int = 12, **more: Any) -> ListSource:
    """A source as a form needs it, of layers 2 and 5: rows that a dictionary can say something about."""
    layers = (2, 5)
    options = {"batch_rows": 32, **more}
    rows, layer = random_rows(n_rows * (1 if form in ("stacked", "transcoder") else 2), width, layers)
    if form == "stacked":
        return ListSource(rows, layer, **options)
    if form == "transcoder":
        mixing = torch.randn(width, width + 2, generator=torch.Generator().manual_seed(9))
        return ListSource(rows, layer, more={"second": rows @ mixing / 4 + layer[:, None] * 3}, **options)
    joint = rows.view(n_rows, 2, width)  # layers alternate
    return ListSource(joint.flatten(1) if form == "feature" else joint, torch.tensor(layers), **options)
