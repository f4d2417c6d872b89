"""Vectors on their way from where they were computed to their rows: at once on a CPU, through pinned buffers from a GPU.

    compute stream:  block i | event ---------- block i+1 | event ----------
    copy stream:              `-> wait | copy to slot 0 | event   `-> wait | copy to slot 1 | event
    scatter threads:                                     `-> wait | rows[slot 0] | slot 0 is free again

The slots are allocated once and used in turn. With none free the forward pass waits: nothing is dropped, and host memory
stays what it was.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from actcache.errors import ActcacheError
from actcache.producer.clock import Clock

Place = Callable[[Tensor], None]
"""Puts vectors [n, d] that lie in host memory to their rows."""

_LIVENESS_S = 5.0


class Filling:
    """The rows of one shard being put in place. `wait` returns when every vector handed over is where it belongs."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_under_way = 0
        self._error: BaseException | None = None

    def begin(self) -> None:
        """One more vector batch is under way."""
        with self._changed:
            self._n_under_way += 1

    def end(self, error: BaseException | None) -> None:
        """It is in place, or it never will be."""
        with self._changed:
            self._n_under_way -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait for all of them; raises what went wrong with one."""
        with self._changed:
            while self._n_under_way:
                self._changed.wait(_LIVENESS_S)
        if self._error is not None:
            raise self._error


class Transfer(Protocol):
    """Takes vectors off the device. `put` may return before they are in place, and waits where there is no room.

    takes_any_dtype  not only the one they are stored in.
    """

    takes_any_dtype: bool

    def put(self, acts_nd: Tensor, place: Place, filling: Filling) -> None:
        """Put vectors [n, d] to their rows."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Direct:
    """On a CPU: the vectors are in host memory already."""

    takes_any_dtype = True

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def put(self, acts_nd: Tensor, place: Place, filling: Filling) -> None:  # noqa: ARG002 - nothing is left under way
        """Put vectors to their rows, now."""
        with self._clock.timed("scatter"):
            place(acts_nd)

    def close(self) -> None:
        """Nothing is held."""


class Copier(Protocol):
    """What copies: CUDA, or in tests something slow that is not."""

    def allocate(self, n_bytes: int) -> Tensor:
        """A buffer of uint8 in host memory that `start` can copy to."""
        ...

    def start(self, source: Tensor, target: Tensor) -> Callable[[], None]:
        """Begin to copy, after what computes `source`; returns what waits for the end of it."""
        ...


class CudaCopier:
    """Copies on a stream of its own for each GPU, so that it goes on computing meanwhile."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def allocate(self, n_bytes: int) -> Tensor:
        """Page-locked memory: only from there are copies asynchronous."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, source: Tensor, target: Tensor) -> Callable[[], None]:
        """Begin to copy. The allocator may not use the memory of `source` again before that has ended."""
        if source.device.type == "cpu":  # a block of a model that is spread over GPUs and memory
            target.copy_(source)
            return lambda: None
        stream = self._streams.get(source.device)
        if stream is None:
            stream = self._streams[source.device] = torch.cuda.Stream(source.device)
        stream.wait_event(torch.cuda.current_stream(source.device).record_event())
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(stream)
        return stream.record_event(torch.cuda.Event(blocking=True)).synchronize


class Staged:
    """Through slots of host memory, used in turn.

    Args:
        copier: what copies.
        slot_bytes: the largest vector batch.
        n_slots: how many may be on their way.
        n_threads: that put vectors from a slot to their rows.
        clock: counts the seconds of "copy" (waiting for one) and "scatter".
    """

    takes_any_dtype = False

    def __init__(self, copier: Copier, slot_bytes: int, n_slots: int, n_threads: int, clock: Clock) -> None:
        self._copier, self._clock = copier, clock
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(n_slots):
            self._free.put(copier.allocate(slot_bytes))
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="actcache-scatter")
        self._is_closed = False

    def put(self, acts_nd: Tensor, place: Place, filling: Filling) -> None:
        """Begin to copy vectors into a free slot, waiting for one where there is none."""
        slot = self._take()
        target = slot[: acts_nd.nbytes].view(acts_nd.dtype).view(acts_nd.shape)
        filling.begin()
        try:
            wait = self._copier.start(acts_nd, target)
            job = self._pool.submit(self._scatter, wait, target, place)
        except BaseException as error:
            self._free.put(slot)
            filling.end(error)
            raise
        job.add_done_callback(lambda done: self._done(done, slot, filling))

    def _take(self) -> Tensor:
        while True:
            try:
                return self._free.get(timeout=_LIVENESS_S)
            except queue.Empty:
                if self._is_closed:
                    raise ActcacheError(
                        "vectors were handed over after the transfer had been closed"
                    ) from None

    def _scatter(self, wait: Callable[[], None], target: Tensor, place: Place) -> None:
        with self._clock.timed("copy"):
            wait()
        with self._clock.timed("scatter"):
            place(target)

    def _done(self, job: "Future[None]", slot: Tensor, filling: Filling) -> None:
        self._free.put(slot)
        filling.end(job.exception())

    def close(self) -> None:
        """Wait for what is under way, then release the slots."""
        self._is_closed = True
        self._pool.shutdown(wait=True)
