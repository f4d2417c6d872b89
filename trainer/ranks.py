"""The processes of one run, and the few things they tell each other.

Every process calls the same methods in the same order. One that fails tells the others (`agree`), so that all stop; one
that is gone is noticed by the next call, which raises PeerError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actcache.errors import ActcacheError, PeerError

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, who may be writing a checkpoint."""


class Ranks:
    """This process among those of its run; alone unless `join` made it. All methods change nothing when alone.

    rank  its number, from 0.    size  how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes."""
        if self.size > 1:
            self._all([(tensor, dist.ReduceOp.SUM) for tensor in tensors])

    def largest_(self, tensor: Tensor) -> None:
        """Replace a tensor by its element-wise largest values over all processes."""
        if self.size > 1:
            self._all([(tensor, dist.ReduceOp.MAX)])

    def table(self, numbers: Sequence[int]) -> Tensor:
        """Everybody's numbers, [size, n] int64 on the CPU."""
        table = torch.zeros(self.size, len(numbers), dtype=torch.int64)
        table[self.rank] = torch.tensor(numbers, dtype=torch.int64)
        self.sum_([table])
        return table

    def any(self, flag: bool) -> bool:  # noqa: FBT001 (it is what is asked)
        """Whether the flag is set in some process."""
        return bool(self.table([int(flag)]).any())

    def agree(self, error: ActcacheError | None) -> None:
        """Raises this process's error, or PeerError where another has one; all stop, or none."""
        failed = self.table([int(error is not None)])[:, 0].nonzero().squeeze(1).tolist()
        if error is not None:
            raise error
        if failed:
            raise PeerError(
                f"process {', '.join(map(str, failed))} of {self.size} stopped with an error, which it prints; "
                "the other processes stopped too"
            )

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns (JSON) in the first process, in all of them; its error stops all."""
        result, error = None, None
        if self.is_first:
            try:
                result = work()
            except ActcacheError as caught:
                error = caught
        self.agree(error)
        return self._broadcast(result) if self.size > 1 else result

    def _broadcast(self, value: Any) -> Any:
        data = json.dumps(value).encode() if self.is_first else b""
        n_bytes = int(self.table([len(data)]).sum())
        buffer = torch.zeros(n_bytes, dtype=torch.uint8)
        if self.is_first:
            buffer += torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.sum_([buffer])
        return json.loads(bytes(buffer.tolist()))

    def _all(self, tasks: list[tuple[Tensor, dist.ReduceOp.RedOpType]]) -> None:
        try:
            works = [dist.all_reduce(tensor, op, async_op=True) for tensor, op in tasks]
            for work in works:
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            raise PeerError(
                f"process {self.rank} of {self.size} lost the others ({str(error).splitlines()[0]}); "
                "look at what they printed, then start all of them again with --resume"
            ) from error


ALONE = Ranks()


def join(device: torch.device, init_method: str, rank: int, size: int) -> Ranks:
    """Meet the other processes of the run.

    Args:
        device: CPU tensors go by gloo; CUDA ones by NCCL, where `device` is a GPU.
        init_method: `env://` under torchrun, or a URL that PyTorch knows.
        rank: this process.
        size: how many there are.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size, timeout=TIMEOUT)
    return Ranks(rank, size)


def leave() -> None:
    """Part from the other processes, after a run that ended well."""
    dist.destroy_process_group()
