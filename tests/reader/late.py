"""A device that is late: everything queued for it happens some time after, in order, as on a GPU that is busy.

It lives in this machine's memory. Work is done only when somebody looks at a mark (and then not always), or when the
consumer is handed something that stands behind it. So memory used again too early, or handed out too early, shows.
"""

import threading
from collections import deque

import numpy as np
import torch

POISON = 0x5A


class LateMark:
    def __init__(self, side: "LateSide", number: int) -> None:
        self.side, self.number = side, number

    def is_past(self) -> bool:
        return self.side.look(self.number)


class LateSide:
    """See `actcache.reader.device.Side`. rate: how often looking finds that something more was done.

    is_apart: the consumer's work on what it is handed happens on the device too, so that handing over waits for nothing;
    `finish` before looking at numbers.
    """

    def __init__(
        self, seed: int = 0, rate: float = 0.3, n_bytes: int = 1 << 30, is_apart: bool = False
    ) -> None:
        self.is_apart = is_apart
        self.device, self.n_bytes, self.rate = torch.device("cpu"), n_bytes, rate
        self.n_submitted = self.n_done = self.n_pinned_bytes = 0
        self._queue: deque = deque()
        self._rng, self._lock = np.random.default_rng(seed), threading.RLock()

    def pinned(self, n_bytes: int) -> torch.Tensor:
        self.n_pinned_bytes += n_bytes
        return torch.full((n_bytes,), POISON, dtype=torch.uint8)

    def empty(self, shape, dtype) -> torch.Tensor:
        made = torch.empty(tuple(shape), dtype=dtype)
        made.view(torch.uint8).fill_(POISON)
        return made

    def submit(self, work) -> LateMark:
        with self._lock:
            self._queue.append(work)
            self.n_submitted += 1
            return LateMark(self, self.n_submitted)

    def hand_over(self, mark: LateMark, tensors) -> None:
        """What the consumer does next stands behind the mark."""
        while not self.is_apart and self.n_done < mark.number:
            self._do_one()

    def finish(self) -> None:
        while self._queue:
            self._do_one()

    def consumer_mark(self) -> LateMark:
        """The consumer's own work takes a while too."""
        return self.submit(lambda: None)

    def look(self, number: int) -> bool:
        with self._lock:
            if self._rng.random() < self.rate:
                self._do_one()
            return self._is_past(number)

    def _is_past(self, number: int) -> bool:
        return self.n_done >= number

    def _do_one(self) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft()()
                self.n_done += 1


class LyingSide(LateSide):
    """Says that everything is done, and does it later."""

    def _is_past(self, number: int) -> bool:
        return True


class BusySide(LateSide):
    """Does everything at once, and says that it has not, while it is busy."""

    is_busy = True

    def submit(self, work) -> LateMark:
        mark = super().submit(work)
        self.finish()
        return mark

    def _is_past(self, number: int) -> bool:
        return not self.is_busy
