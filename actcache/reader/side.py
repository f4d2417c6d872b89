"""A queue of work on a GPU beside the consumer's own: all that is asked of CUDA.

A `Mark` in the queue says when what was put before it is done. Host memory is used again only behind its mark; the
consumer's work waits for the mark of a batch on the device itself, so no thread of the host waits to hand a batch out.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from actcache.errors import UnreachableError, UsageError

_PATIENCE_S = 120.0
_POLL_S = 0.0001


class Mark(Protocol):
    """A place in a queue of work."""

    def is_past(self) -> bool:
        """Whether everything before it is done. Does not wait."""
        ...


class Side(Protocol):
    """A queue of work on a device, beside the one the consumer uses. `submit` may be called by any thread."""

    device: torch.device
    n_bytes: int
    """Memory of the device."""

    def pinned(self, n_bytes: int) -> Tensor:
        """Host memory [n_bytes] uint8 that the device copies from without help."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the device, for use in `submit`."""
        ...

    def submit(self, work: Callable[[], None]) -> Mark:
        """Queue what `work` does to tensors; the mark is behind it."""
        ...

    def hand_over(self, mark: Mark, tensors: Sequence[Tensor]) -> None:
        """What the consumer queues from now on is done after `mark`; its use of `tensors` is known to their owner."""
        ...

    def consumer_mark(self) -> Mark:
        """A mark behind what the consumer has queued so far."""
        ...


class CudaSide:
    """A CUDA stream of its own. See `Side`.

    Its work is short, so it goes before the kernels of the consumer that have not begun.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.n_bytes = int(torch.cuda.get_device_properties(self.device).total_memory)
        self._stream = torch.cuda.Stream(self.device, priority=-1)

    def pinned(self, n_bytes: int) -> Tensor:
        """Page-locked memory."""
        with torch.cuda.device(self.device):
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory that belongs to the stream: freed, it is used again in the order of the stream's work."""
        with torch.cuda.stream(self._stream):
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def submit(self, work: Callable[[], None]) -> "CudaMark":
        """Run `work` with the stream as the current one."""
        with torch.cuda.stream(self._stream):
            work()
            return CudaMark(self._stream)

    def hand_over(self, mark: Mark, tensors: Sequence[Tensor]) -> None:
        """The consumer's current stream waits for the mark; freed, the tensors' memory waits for that stream."""
        assert isinstance(mark, CudaMark)
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_event(mark.event)
        for tensor in tensors:
            tensor.record_stream(consumer)

    def consumer_mark(self) -> "CudaMark":
        """On the consumer's current stream."""
        return CudaMark(torch.cuda.current_stream(self.device))


class CudaMark:
    """An event, recorded now."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def is_past(self) -> bool:
        """Whether the event was reached."""
        return self.event.query()


def open_side(device: str) -> Side | None:
    """The side queue of a CUDA device; None where there is none to have (a CPU, another kind of device)."""
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return None
    if not torch.cuda.is_available():
        raise UsageError(f"device={device!r}: this PyTorch sees no CUDA device; use device='cpu'")
    return CudaSide(chosen)


def wait_for(mark: Mark, what: str) -> None:
    """Wait on the host until a mark is past.

    Raises:
        UnreachableError: the device has not come so far within two minutes.
    """
    deadline = time.perf_counter() + _PATIENCE_S
    while not mark.is_past():
        if time.perf_counter() > deadline:
            raise UnreachableError(
                f"the device has not finished {what} within {_PATIENCE_S:.0f} s. Is another process keeping it busy, or "
                f"has it failed (nvidia-smi)?"
            )
        time.sleep(_POLL_S)
