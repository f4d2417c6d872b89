"""Storage that is waited for, by threads of their own, many at once: what they bring goes to those that decode.

`Requests` waits for object storage; `AroundCache` for local disks that are read without the system's page cache.
"""

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import addressof, c_char
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Protocol

from actcache.reader.layout import Source, by_request
from actcache.store.local import LocalFiles

FETCHED_BYTES = 64 << 20
"""What may have come from object storage and not be decoded yet."""
AROUND_THREADS, AROUND_BYTES = 8, 3 << 20
"""That read around the page cache, and what may be read and not be decoded yet for each of them."""
_PATIENCE_S = 5.0
_LARGE_PAGE, _SECTOR = 2 << 20, 4096
_FEWEST_SLABS = 2
_SAMPLE = 64

Body = bytes | memoryview
_NO_SLAB = memoryview(b"")


class Room:
    """A bound on bytes that are fetched, or being fetched, and not yet decoded."""

    def __init__(self, limit: int) -> None:
        self.limit, self._taken = limit, 0
        self._changed = threading.Condition()

    def take(self, n_bytes: int, is_over: Callable[[], bool]) -> bool:
        """Wait for room (more than the limit fits when nothing else is there); False once `is_over`."""
        with self._changed:
            while not is_over():
                if not self._taken or self._taken + n_bytes <= self.limit:
                    self._taken += n_bytes
                    return True
                self._changed.wait(_PATIENCE_S)
        return False

    def give(self, n_bytes: int) -> None:
        """Give back what was taken; 0 makes those that wait look whether they still should."""
        with self._changed:
            self._taken -= n_bytes
            self._changed.notify_all()


class Fetched(NamedTuple):
    """Bytes of the chunks of a job, not yet compared with anything; None: the ordinary way, which knows what is wrong.

    slab  the memory they are in, where it is used again.
    """

    bodies: list[Body | None]
    slab: memoryview = _NO_SLAB


class Fetching(Protocol):
    """Threads that wait for storage, and the room for what they bring.

    is_remote  whether what they do is a request to object storage.
    """

    is_remote: bool
    pool: ThreadPoolExecutor
    room: Room

    def takes(self, sources: Sequence[Source]) -> bool:
        """Whether these chunks should come this way."""
        ...

    def jobs(self, sources: Sequence[Source]) -> list[list[Source]]:
        """Which of them to fetch together."""
        ...

    def room_for(self, job: Sequence[Source]) -> int:
        """Bytes of room that it takes."""
        ...

    def fetch(self, job: Sequence[Source]) -> Fetched:
        """Wait for the bytes of a job."""
        ...

    def let_go(self, fetched: Fetched) -> None:
        """They were decoded."""
        ...

    def close(self, patience_s: float) -> None:
        """Let go of threads and files; wait no longer than that for threads that are in the middle of something."""
        ...


class Requests:
    """One request to object storage for chunks that lie side by side."""

    is_remote = True

    def __init__(self, n_threads: int) -> None:
        self.pool, self.room = _pool(n_threads), Room(FETCHED_BYTES)

    def takes(self, sources: Sequence[Source]) -> bool:  # noqa: ARG002 - see Fetching
        """There is no other way."""
        return True

    def jobs(self, sources: Sequence[Source]) -> list[list[Source]]:
        """Those that lie side by side."""
        return by_request(sources)

    def room_for(self, job: Sequence[Source]) -> int:
        """What will come."""
        return sum(source.reader.n_bytes(*source.at) for source in job)

    def fetch(self, job: Sequence[Source]) -> Fetched:
        """Send the request."""
        return Fetched([*job[0].reader.fetch([source.at for source in job])])

    def let_go(self, fetched: Fetched) -> None:
        """Nobody refers to them any more."""

    def close(self, patience_s: float) -> None:  # noqa: ARG002 - see Fetching
        """A request may take until its deadline, and nobody waits for that."""
        shut(self.pool, 0.0)


class AroundCache:
    """Chunks of local shards, from the disk into memory that is used again, with no copy in the system's page cache.

    A store that does not fit in memory gains nothing from that cache: its pages take most of the processor time of a read
    (one by one, where chunks are read in no order), push out what others keep there, and are gone when they are wanted
    again. Pages of 2 MiB make it one piece of memory for a disk to write to, instead of 64.

    files  of the store, as they are read otherwise.    chunk_bytes  of a chunk at most, decoded.
    """

    is_remote = False

    def __init__(self, files: LocalFiles, chunk_bytes: int, n_threads: int) -> None:
        self._cached, self._is_able = files, None
        self._files = LocalFiles(files.root, 2 * n_threads, is_direct=True)
        self._slab_bytes, self._n_slabs = slabs_for(chunk_bytes, n_threads)
        self._slabs: deque[memoryview] | None = None
        self._lock = threading.Lock()
        self.pool, self.room = _pool(n_threads), Room(self._slab_bytes * self._n_slabs)

    def takes(self, sources: Sequence[Source]) -> bool:
        """Whether files can be read this way here, and most of the chunks are not in the page cache already."""
        if not sources:
            return False
        if self._is_able is None:
            self._is_able = self._try(sources[0])
        return self._is_able and not self._are_cached(sources[:: max(1, len(sources) // _SAMPLE)])

    def _try(self, source: Source) -> bool:
        try:
            file = self._files.file(source.reader.key)
            return os.preadv(file.fd, [mmap.mmap(-1, _SECTOR)], 0) > 0
        except OSError:  # not every file system can
            return False

    def _are_cached(self, sample: Sequence[Source]) -> bool:
        found = sum(self._cached.is_cached(s.reader.key, s.reader.range_of(*s.at)[0]) for s in sample)
        return 2 * found >= len(sample)

    def jobs(self, sources: Sequence[Source]) -> list[list[Source]]:
        """As many as fit in a slab, of one lane's buffer and columns."""
        return [
            job
            for _lane, group in groupby(sources, lambda source: source.lane[::2])
            for job in self._fitting(group)
        ]

    def _fitting(self, sources: Iterable[Source]) -> Iterator[list[Source]]:
        job: list[Source] = []
        left = self._slab_bytes
        for source in sources:
            first, stop = _sectors(*source.reader.range_of(*source.at))
            if job and stop - first > left:
                yield job
                job, left = [], self._slab_bytes
            job.append(source)
            left -= stop - first
        if job:
            yield job

    def room_for(self, job: Sequence[Source]) -> int:  # noqa: ARG002 - see Fetching
        """A slab."""
        return self._slab_bytes

    def fetch(self, job: Sequence[Source]) -> Fetched:
        """Read them one after the other; other threads do too."""
        fetched, at = Fetched([], self._take()), 0
        try:
            for source in job:
                body, at = self._read(source, fetched.slab, at)
                fetched.bodies.append(body)
        except BaseException:
            self.let_go(fetched)
            raise
        return fetched

    def _read(self, source: Source, slab: memoryview, at: int) -> tuple[Body | None, int]:
        """A chunk to a place in a slab; says where the next one goes."""
        start, n_bytes = source.reader.range_of(*source.at)
        first, stop = _sectors(start, n_bytes)
        behind, begin = at + stop - first, at + start - first
        try:
            file = self._files.file(source.reader.key)
            got = os.preadv(file.fd, [slab[at:behind]], first)
        except OSError:  # the ordinary way will meet it too, and says what it is
            got = 0
        return (slab[begin : begin + n_bytes] if got >= start + n_bytes - first else None), behind

    def _take(self) -> memoryview:
        with self._lock:
            if self._slabs is None:
                self._slabs = deque(_make_slabs(self._slab_bytes, self._n_slabs))
            return self._slabs.pop()

    def let_go(self, fetched: Fetched) -> None:
        """The slab may be used again."""
        if self._slabs is not None:
            self._slabs.append(fetched.slab)

    def close(self, patience_s: float) -> None:
        """A thread that is stuck in a read ends when the read does."""
        shut(self.pool, patience_s)
        self._files.close()


def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="actcache-fetch")


def shut(pool: ThreadPoolExecutor, patience_s: float) -> None:
    """Begin nothing more, and wait so long for what was begun."""
    pool.shutdown(wait=False, cancel_futures=True)
    deadline = perf_counter() + patience_s
    for thread in list(pool._threads):
        thread.join(max(0.0, deadline - perf_counter()))


def _sectors(start: int, n_bytes: int) -> tuple[int, int]:
    """The whole sectors around some bytes: disks are read in these."""
    return start - start % _SECTOR, -(-(start + n_bytes) // _SECTOR) * _SECTOR


def slabs_for(chunk_bytes: int, n_threads: int) -> tuple[int, int]:
    """Bytes of a slab, for one chunk at least, and how many there are."""
    n_bytes = -(-(chunk_bytes + chunk_bytes // 16 + 2 * _SECTOR) // _LARGE_PAGE) * _LARGE_PAGE
    return n_bytes, max(_FEWEST_SLABS, n_threads * AROUND_BYTES // n_bytes)


def _make_slabs(n_bytes: int, n: int) -> list[memoryview]:
    """In one piece of memory, of large pages where the system has them."""
    memory = mmap.mmap(-1, n_bytes * n + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    skip = -addressof(c_char.from_buffer(memory)) % _LARGE_PAGE
    whole = memoryview(memory)
    return [whole[at : at + n_bytes] for at in range(skip, skip + n * n_bytes, n_bytes)]


def is_on_a_disk(root: Path) -> bool:
    """Whether files are on a block device. A network file system is on none, and answers better when asked far ahead."""
    return os.major(root.stat().st_dev) != 0


def machine_bytes() -> int:
    """Of memory, that this machine has, or this process may use of it: pages of the page cache count."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(Path(path).read_text()))
    return min(limits)
