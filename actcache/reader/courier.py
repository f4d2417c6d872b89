"""Batches on their way to a GPU, each started before it is asked for."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.reader.buffers import Shape
from actcache.reader.side import Mark, Side, wait_for

BATCHES_AHEAD = 1
"""Batches whose copies are started before they are asked for."""


class Parcel(NamedTuple):
    """Tensors of one batch on their way: good for work queued after `mark`."""

    tensors: list[Tensor]
    mark: Mark


class Courier:
    """Takes batches to a device. One thread's, the consumer's.

    What is copied from is kept until its copy is done, and so is not used again before.

    rows_are_there  windows live on the device: their rows need no copy, unless another dtype is asked for.
    """

    def __init__(self, side: Side, *, rows_are_there: bool) -> None:
        self.side, self.rows_are_there = side, rows_are_there
        self._moving: deque[tuple[Mark, list[Tensor]]] = deque()

    def send(
        self, rows: Sequence[Tensor], dtypes: Sequence[torch.dtype], *numbers: NDArray[np.int64]
    ) -> Parcel:
        """Start taking rows, in the given dtypes, and integers that go with them, which come last in the parcel."""
        steps: list[tuple[Tensor, Tensor]] = []
        arriving: list[Tensor] = []
        for tensor, dtype in zip(rows, dtypes, strict=True):
            there = tensor if self.rows_are_there else self._sent(tensor, steps)
            if dtype != there.dtype:  # on the device: the host would be slower
                converted = self.side.empty(there.shape, dtype)
                steps.append((converted, there))
                there = converted
            arriving.append(there)
        staged = [self._staged(one) for one in numbers]
        arriving.extend(self._sent(one, steps) for one in staged)

        def work() -> None:
            for to, source in steps:
                to.copy_(source, non_blocking=True)

        mark = self.side.submit(work)
        self._moving.append((mark, [*rows, *staged]))
        self.settle()
        return Parcel(arriving, mark)

    def _staged(self, numbers: NDArray[np.int64]) -> Tensor:
        staged = self.side.pinned(numbers.nbytes).view(torch.int64).view(numbers.shape)
        staged.numpy()[...] = numbers
        return staged

    def _sent(self, tensor: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
        there = self.side.empty(tensor.shape, tensor.dtype)
        steps.append((there, tensor))
        return there

    def hand_over(self, parcel: Parcel) -> list[Tensor]:
        """The tensors, for what the consumer does from now on."""
        self.side.hand_over(parcel.mark, parcel.tensors)
        return parcel.tensors

    def settle(self, *, wait: bool = False) -> None:
        """Let go of what has arrived; with `wait`, of everything."""
        while self._moving and (wait or self._moving[0][0].is_past()):
            if wait:
                wait_for(self._moving[0][0], "copying a batch")
            self._moving.popleft()


def pinned_allocator(side: Side) -> Callable[[Shape], NDArray[Any]]:
    """Makes buffers of pinned memory for `HostWindows`."""

    def allocate(shape: Shape) -> NDArray[Any]:
        return side.pinned(shape.n_bytes).numpy().view(shape.dtype).reshape(shape[:2])

    return allocate
