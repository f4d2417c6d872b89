"""Filling shards, stage after stage, with everything bounded.

    forward -> rows of shard k --(2 buffers)--> encode, write --(2 files)--> sync, commit
               main thread                      encoding threads             one thread

While the model runs on shard k, shard k - 1 is encoded and shard k - 2 is on its way to the disk. Whoever is faster
waits: there are two shard buffers, and two shards may be written and not committed. On a CPU the model and the
encoding threads would only take the cores from each other (a model's threads wait for their slowest), so there they
take turns: one buffer, all cores to the one, then all to the other.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from actcache.errors import ActcacheError
from actcache.producer.clock import Clock
from actcache.producer.forward import Forward, ShardBuffers
from actcache.producer.staging import Filling
from actcache.store.ledger import ShardCommitter, Written
from actcache.store.open import CaptureCatalog, Catalog
from actcache.store.schema import ShardRecord

N_BUFFERS = 2
N_UNCOMMITTED = 2
_LIVENESS_S = 5.0

OnCommit = Callable[[CaptureCatalog, ShardRecord], None]
"""Told of a capture's shard that is committed now, with the record that holds."""


class Pipeline:
    """Commits shards, given in plan order, of any captures that lack them. Use as a context manager.

    takes_turns  the model waits while rows are encoded.
    on_commit    called, on another thread, for rows that were made; on_adopt for those that were found on disk.
    on_shard     called with the number of a shard when all its captures are committed.
    """

    def __init__(
        self,
        catalog: Catalog,
        forward: Forward,
        committers: Mapping[str, ShardCommitter],
        clock: Clock,
        *,
        takes_turns: bool,
        on_commit: OnCommit,
        on_adopt: OnCommit,
        on_shard: Callable[[int], None],
    ) -> None:
        self._catalog, self._forward, self._committers, self._clock = catalog, forward, committers, clock
        self._takes_turns, self._on_shard = takes_turns, on_shard
        self._on_commit, self._on_adopt = on_commit, on_adopt
        self._free: queue.SimpleQueue[ShardBuffers] = queue.SimpleQueue()
        for _ in range(1 if takes_turns else N_BUFFERS):
            self._free.put(ShardBuffers())
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="actcache-shard")
        self._finishing = ThreadPoolExecutor(1, thread_name_prefix="actcache-commit")
        self._may_write = threading.Semaphore(N_UNCOMMITTED)
        self._error: BaseException | None = None
        self._is_stopped = False

    def add(self, shard: int, captures: Sequence[CaptureCatalog]) -> None:
        """Run the model for what is missing of one shard; encoding and committing may go on after this returns."""
        missing = [c for c in captures if not self._adopt(shard, c)]
        if not missing:
            self._on_shard(shard)
            return
        buffers, filling = self._take_buffers(), Filling()
        self._forward.run(shard, missing, buffers, filling)
        job = self._encoding.submit(self._encode, shard, missing, buffers, filling)
        if self._takes_turns:
            with self._clock.timed("wait"):
                job.result()

    def _adopt(self, shard: int, capture: CaptureCatalog) -> bool:
        """Commit rows that an interrupted build left on disk whole; whether there were any."""
        record = self._committers[capture.capture.name].adopt(shard, self._catalog.shards.records[shard])
        if record is not None:
            self._on_adopt(capture, record)
        return record is not None

    def _take_buffers(self) -> ShardBuffers:
        with self._clock.timed("wait"):
            while True:
                self.check()
                try:
                    return self._free.get(timeout=_LIVENESS_S)
                except queue.Empty:
                    continue

    def check(self) -> None:
        """Raise what went wrong in some stage."""
        if self._error is not None:
            raise self._error
        if self._is_stopped:
            raise ActcacheError("the build was stopped")

    def _encode(
        self, shard: int, captures: Sequence[CaptureCatalog], buffers: ShardBuffers, filling: Filling
    ) -> None:
        """Encode and write every capture of a shard, then give its buffers back."""
        try:
            self.check()
            filling.wait()
            for i, capture in enumerate(captures):
                name = capture.capture.name
                self._wait_for_commits()
                written = self._committers[name].write(
                    shard, self._catalog.shards.records[shard], buffers.on_disk_dtype(name)
                )
                self._finishing.submit(self._finish, capture, written, i == len(captures) - 1)
            self._free.put(buffers)
        except BaseException as error:
            self._error = self._error or error
            raise

    def _wait_for_commits(self) -> None:
        while not self._may_write.acquire(timeout=_LIVENESS_S):
            self.check()

    def _finish(self, capture: CaptureCatalog, written: Written, is_last: bool) -> None:  # noqa: FBT001 - a job
        try:
            if self._error is not None:
                written.writer.close()
                return
            record = self._committers[capture.capture.name].finish(written)
            self._on_commit(capture, record)
            if is_last:
                self._on_shard(written.shard)
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            self._may_write.release()

    def finish(self) -> None:
        """Wait until everything added is committed; raises what went wrong."""
        self._encoding.shutdown(wait=True)
        self._finishing.shutdown(wait=True)
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop: shards that are written are still committed, others are given up."""
        self._is_stopped = True
        self._encoding.shutdown(wait=True)
        self._finishing.shutdown(wait=True)
