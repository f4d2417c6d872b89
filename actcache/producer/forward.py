"""The model over the sequences of one shard: every vector goes to its row of the shard's buffer, nothing is kept twice."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.errors import DamageError
from actcache.model import Decoder
from actcache.producer.clock import Clock
from actcache.producer.inputs import ModelInputs
from actcache.producer.placing import Places
from actcache.producer.staging import CudaCopier, Direct, Filling, Staged, Transfer
from actcache.store.mixing import Mixed, mix
from actcache.store.open import CaptureCatalog, Catalog

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
N_SLOTS = 4
N_SCATTER_THREADS = 2


def mixed_rows(catalog: Catalog, shard: int) -> Mixed:
    """Which token goes to which row of a shard; DamageError where the plan says otherwise."""
    keep, document = (catalog.plan_object(name, shard) for name in ("keep", "document"))
    mixed = mix(catalog.grid, catalog.plan.request.seed, shard, keep, document)
    if mixed.stored != catalog.shards.stored[shard]:
        raise DamageError(
            f"the plan says that shard {shard} stores {catalog.shards.stored[shard]} rows; its tokens say {mixed.stored}"
        )
    return mixed


def slot_bytes(catalog: Catalog, captures: Sequence[CaptureCatalog]) -> int:
    """Bytes of the largest batch of vectors of one hook and layer, as they are stored."""
    request = catalog.plan.request
    row_bytes = max(c.capture.width * TORCH_DTYPES[c.capture.dtype].itemsize for c in captures)
    return request.batch_size * catalog.grid.seq_len * row_bytes


def make_transfer(
    decoder: Decoder, catalog: Catalog, captures: Sequence[CaptureCatalog], clock: Clock
) -> Transfer:
    """How vectors come off the model's device."""
    if decoder.device.type == "cpu":
        return Direct(clock)
    return Staged(CudaCopier(), slot_bytes(catalog, captures), N_SLOTS, N_SCATTER_THREADS, clock)


class ShardBuffers:
    """Rows [l, stored, d] of every capture of one shard, in memory that is used again for the next one."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}

    def take(self, captures: Sequence[CaptureCatalog], stored: int) -> None:
        """Shape the memory for the next shard."""
        self.rows = {}
        for c in captures:
            n_layers, width = len(c.capture.layers), c.capture.width
            dtype, n = TORCH_DTYPES[c.capture.dtype], n_layers * stored * width
            memory = self._memory.get(c.capture.name)
            if memory is None or memory.numel() < n:
                self._memory.pop(c.capture.name, None)
                memory = self._memory[c.capture.name] = torch.empty(n, dtype=dtype)
            self.rows[c.capture.name] = memory[:n].view(n_layers, stored, width)

    def on_disk_dtype(self, name: str) -> np.ndarray[Any, Any]:
        """Rows [l, stored, d] of one capture as they are stored: a bfloat16 is its bits."""
        rows = self.rows[name]
        return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


class CpuTimer:
    """Seconds of the model on a CPU: those of a batch, but for what of it was putting vectors to their rows."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around one batch."""
        before = self._clock.spent_s["scatter"]
        with self._clock.timed("forward"):
            yield
        self._clock.add("forward", before - self._clock.spent_s["scatter"])

    def finish(self) -> None:
        """Nothing is under way."""


class CudaTimer:
    """Seconds of the model on a GPU, which runs behind the thread that tells it what to do: by events on its stream."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self._stream, self._clock = torch.cuda.current_stream(device), clock
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around one batch."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        yield
        end.record(self._stream)
        self._under_way.append((start, end))
        while self._under_way and self._under_way[0][1].query():
            self._count()

    def _count(self) -> None:
        start, end = self._under_way.popleft()
        self._clock.add("forward", start.elapsed_time(end) / 1000)

    def finish(self) -> None:
        """Wait for all batches."""
        self._stream.synchronize()
        while self._under_way:
            self._count()


class Forward:
    """Runs the model for shard after shard.

    on_tokens  called with the tokens of every batch that was run.
    """

    def __init__(
        self,
        catalog: Catalog,
        decoder: Decoder,
        transfer: Transfer,
        clock: Clock,
        on_tokens: Callable[[int], None],
    ) -> None:
        self._catalog, self._decoder, self._transfer = catalog, decoder, transfer
        self._on_tokens = on_tokens
        is_cuda = decoder.device.type == "cuda"
        self._timer = CudaTimer(decoder.device, clock) if is_cuda else CpuTimer(clock)

    def finish(self) -> None:
        """Wait for the device, so that its time is counted whole."""
        self._timer.finish()

    def run(
        self, shard: int, captures: Sequence[CaptureCatalog], buffers: ShardBuffers, filling: Filling
    ) -> None:
        """Run a shard's sequences, in batches of the plan's size; vectors may still be on their way to `buffers`."""
        mixed, inputs = mixed_rows(self._catalog, shard), ModelInputs(self._catalog, shard)
        buffers.take(captures, mixed.stored)
        hooks: dict[str, list[int]] = {}
        for c in captures:  # a hook may be in several captures, of other layers each
            hooks.setdefault(c.capture.hook, []).extend(c.capture.layers)
        has_text = np.any(mixed.row_of_token >= 0, axis=1)
        batch_size = self._catalog.plan.request.batch_size
        for start in range(0, len(inputs), batch_size):
            chosen = np.flatnonzero(has_text[start : start + batch_size]) + start
            if not len(chosen):
                continue
            rows = torch.from_numpy(mixed.row_of_token[chosen].reshape(-1))
            hand_over = self._hand_over(captures, buffers, rows, filling)
            input_ids, positions = inputs.of(chosen)
            with self._timer.batch():
                self._decoder.capture_each(input_ids.to(self._decoder.device), hooks, hand_over, positions)
            self._on_tokens(input_ids.numel())

    def _hand_over(
        self, captures: Sequence[CaptureCatalog], buffers: ShardBuffers, rows: Tensor, filling: Filling
    ) -> Callable[[str, int, Tensor], None]:
        """What the model calls with every vector: rows [n] is where each token's goes, -1 for padding."""
        targets = {
            (c.capture.hook, layer): buffers.rows[c.capture.name][i]
            for c in captures
            for i, layer in enumerate(c.capture.layers)
        }
        places, rounds_first = Places(rows), not self._transfer.takes_any_dtype

        def hand_over(hook: str, layer: int, acts_qtd: Tensor) -> None:
            target, acts_nd = targets[hook, layer], acts_qtd.reshape(-1, acts_qtd.shape[-1])
            if rounds_first:
                stored = places.stored(acts_nd).to(target.dtype).contiguous()
                self._transfer.put(stored, lambda vectors: places.put_stored(target, vectors), filling)
            else:
                self._transfer.put(acts_nd, lambda vectors: places.put(target, vectors), filling)

        return hand_over
