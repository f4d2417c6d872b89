"""One window being filled: chunks are read, checked, decoded and brought to their shuffled place by threads.

From a local disk, through the page cache, the threads that decode also read. Otherwise other threads (`Fetching`) wait,
many at once, and hand what came to those that decode; the bytes between them are bounded, however many wait.

Where rows land, in this machine's memory or on a device, is the `Window`'s business.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, thread_time
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ActcacheError, UnreachableError
from actcache.reader.buffers import Window
from actcache.reader.counters import Counters
from actcache.reader.direct import bring, bring_fetched
from actcache.reader.fetching import Body, Fetched, Fetching
from actcache.reader.layout import Layout, Source, handfuls
from actcache.reader.scatter import Target
from actcache.store.local import LocalFiles
from actcache.store.quantise import Quantised

JOB_BYTES = 8 << 20
"""Decoded bytes that a thread takes on at a time; half of it where a window has no two jobs for each thread otherwise."""
_LIVENESS_S = 5.0
_STALLED_S = 300.0
"""Longer than any request to object storage is tried."""
_READ_AHEAD_BYTES = 24 << 20
_WARM_BYTES_PER_S, _WARM_S = 20e9, 20e-6
"""Having bytes read takes more of a processor than this when they are not in memory, by far, and less when they are. What comes
on top is for a first call, of which nothing is in the processor's caches."""

_NO_ROWS = np.empty((0, 0), np.uint8)
T = TypeVar("T")


class Filled(Protocol):
    """A window on its way, from this machine's disks or from a service."""

    window: Window
    error: BaseException | None

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not have to wait."""
        ...

    def wait(self) -> Layout:
        """Wait until the window is whole; raises what went wrong."""
        ...

    def wait_until_begun(self) -> None:
        """Wait, for some seconds at most, until all it reads was asked for: what is asked for next then comes after it."""
        ...

    def cancel(self, reason: str) -> None:
        """Stop; whoever waits gets an error."""
        ...


class WindowSource(Protocol):
    """Fills windows, in place of threads that read shards."""

    def begin(self, into: Window, epoch: int, window: int, counters: Counters) -> Filled:
        """Begin to fill a window."""
        ...

    def close(self) -> None:
        """Let go of threads and connections."""
        ...


class Fill:
    """A window on its way. `wait` returns when every row has landed, or raises what went wrong.

    chunk_bytes  of a decoded chunk.    files  of a local store.    name  what to call the window when something is wrong.
    """

    def __init__(
        self,
        window: Window,
        lay_out: Callable[[], Layout],
        pool: ThreadPoolExecutor,
        counters: Counters,
        *,
        chunk_bytes: int,
        files: LocalFiles | None = None,
        fetching: Fetching | None = None,
        name: str = "a window",
    ) -> None:
        self.window, self._name = window, name
        self.error: BaseException | None = None
        self._layout: Layout | None = None
        self._pool, self._counters = pool, counters
        self.files, self._fetching = files, fetching
        self._begun, self._done = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._n_jobs = 0
        self.reading: dict[int, str] = {}  # thread -> what it reads
        self._chunks_per_job = max(1, JOB_BYTES // chunk_bytes)
        self._n_ahead = max(self._chunks_per_job, _READ_AHEAD_BYTES // chunk_bytes)
        # `lay_out` is not kept: a stream that is dropped is freed without a garbage collection.
        pool.submit(self._open, lay_out)

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not have to wait."""
        return self._done.is_set()

    def is_done_within(self, seconds: float) -> bool:
        """Wait so long for it, at most."""
        return self._done.wait(seconds)

    def _open(self, lay_out: Callable[[], Layout]) -> None:
        started = perf_counter()
        try:
            layout = lay_out()
            self._layout = layout
            self._counters.add(layout_s=perf_counter() - started)
            if self._fetching is not None and self._fetching.takes(layout.sources):
                self._begin_fetching(layout.sources, self._fetching)
            else:
                self._begin_reading(layout.sources)
            self._begun.set()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self._fail(error)

    def _begin_reading(self, sources: list[Source]) -> None:
        fair, most = len(sources) // (2 * self._pool._max_workers), self._chunks_per_job
        jobs = handfuls(sources, min(most, max(fair, most // 2, 1)))
        self._expect(len(jobs))
        self._will_need(sources[: self._n_ahead])
        for start, job in jobs:
            self._pool.submit(self._work, job, sources[start + self._n_ahead :][: len(job)])

    def _begin_fetching(self, sources: list[Source], fetching: Fetching) -> None:
        jobs = fetching.jobs(sources)
        self._expect(len(jobs))
        for job in jobs:
            fetching.pool.submit(self._fetch, job, fetching)

    def _expect(self, n_jobs: int) -> None:
        self._n_jobs = n_jobs
        if not n_jobs:
            self._finish()

    def _will_need(self, sources: list[Source]) -> None:
        """Have chunks read before they are asked for. While the last ones were in memory already, one of them is tried first."""
        if self.files is None or not sources:
            return
        if not self.files.seem_warm or not self._are_in_memory(sources[:1], self.files):
            self.files.seem_warm = self._are_in_memory(sources, self.files)

    @staticmethod
    def _are_in_memory(sources: list[Source], files: LocalFiles) -> bool:
        """Have chunks read; whether they seem to have been in memory already."""
        begun = thread_time()
        for source in sources:
            source.reader.will_need(*source.at, files)
        n_bytes = sum(source.reader.n_bytes(*source.at) for source in sources)
        return thread_time() - begun < _WARM_S + n_bytes / _WARM_BYTES_PER_S

    def _fetch(self, job: list[Source], fetching: Fetching) -> None:
        """The bytes of a job, on a thread that may wait."""
        n_bytes = fetching.room_for(job)
        if not fetching.room.take(n_bytes, lambda: self.error is not None):
            return
        fetched = None
        try:
            started = perf_counter()
            self.reading[threading.get_ident()] = job[0].reader.key
            fetched = fetching.fetch(job)
            del self.reading[threading.get_ident()]
            self._counters.add(fetch_s=perf_counter() - started, n_requests=int(fetching.is_remote))
            self._pool.submit(self._work_on_fetched, job, fetched, fetching, n_bytes)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            if fetched is not None:
                fetching.let_go(fetched)
            fetching.room.give(n_bytes)
            self._fail(error)

    def _work_on_fetched(self, job: list[Source], fetched: Fetched, fetching: Fetching, n_bytes: int) -> None:
        try:
            self._work(job, [], fetched.bodies)
        finally:
            fetched.bodies.clear()
            fetching.let_go(fetched)
            fetching.room.give(n_bytes)

    def _work(
        self, job: list[Source], ahead: list[Source], bodies: Sequence[Body | None] | None = None
    ) -> None:
        """Bring a few chunks to their place, and have those `_READ_AHEAD_BYTES` further on read meanwhile."""
        try:
            if self.error is not None:
                return
            self._will_need(ahead)
            begun, decoding = perf_counter(), _Decoding(self, job, bodies)
            self.window.land(job, decoding)
            scatter_s = perf_counter() - begun - decoding.read_s - decoding.decode_s
            self._counters.add(**decoding.sums(), scatter_s=scatter_s)
            self.reading.pop(threading.get_ident(), None)
            with self._lock:
                self._n_jobs -= 1
                is_last = self._n_jobs == 0
            if is_last:
                self._finish()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self._finish()

    def _finish(self) -> None:
        self.window.seal()
        self._wake()

    def _wake(self) -> None:
        self._begun.set()
        self._done.set()
        if self._fetching is not None:
            self._fetching.room.give(0)

    def cancel(self, reason: str) -> None:
        """Make running jobs stop at their next chunk."""
        self.error = self.error or ActcacheError(reason)
        self._wake()

    def wait_until_begun(self) -> None:
        """Wait until all chunks were asked for; not for ever."""
        self._begun.wait(_LIVENESS_S)

    def wait(self) -> Layout:
        """Wait until the window is whole.

        Raises:
            UnreachableError: no chunk of it came for five minutes; names those that are being read.
        """
        left, since = self._n_jobs, perf_counter()
        while not self._done.wait(_LIVENESS_S):
            if self._pool._shutdown:
                raise ActcacheError("the stream was closed while its consumer was waiting for a window")
            if self._n_jobs != left:
                left, since = self._n_jobs, perf_counter()
            elif perf_counter() - since > _STALLED_S:
                reading = ", ".join(sorted(set(self.reading.values()))) or "nothing"
                self.cancel(f"{self._name} was given up")
                raise UnreachableError(
                    f"no chunk of {self._name} came for {_STALLED_S:.0f} s; threads are reading {reading}. Is the disk "
                    f"or the network file system that holds the store still there? Go on from the last cursor."
                )
        if self.error is not None:
            raise self.error
        assert self._layout is not None
        return self._layout


class _Stopped(Exception):
    """Not an error: something else went wrong, or nobody wants the window any more."""


class _Decoding:
    """The chunks of one job, one after the other, and what that took. See `Decoded`."""

    def __init__(self, fill: Fill, job: list[Source], bodies: Sequence[Body | None] | None) -> None:
        self._fill, self._job, self._bodies = fill, job, bodies
        self.read_s = self.decode_s = 0.0
        self._read_bytes = self._row_bytes = 0

    def bring(self, target: Target) -> int:
        """Chunks that need no decoding, or none but for putting bytes together, by compiled loops where there are any."""
        return self._bring_as_they_are(target) or self._bring_planes(target)

    def _bring_planes(self, target: Target) -> int:
        if not target.takes_planes or not self._job[0].reader.comes_in_planes:
            return 0
        for number, source in enumerate(self._job):
            planes, rows = self._timed(number, _planes_or_rows)
            if planes is not None:
                target.put_planes(source.slots, planes, source.chosen)
            else:
                target.put(source.slots, rows, source.chosen)
        return len(self._job)

    def _bring_as_they_are(self, target: Target) -> int:
        direct, files = None if target.loops is None else target.loops.direct, self._fill.files
        if direct is None or (self._bodies is None and files is None):
            return 0
        if self._fill.error is not None:
            raise _Stopped
        begun = perf_counter()
        self._fill.reading[threading.get_ident()] = self._job[0].reader.key
        if self._bodies is not None:
            found = bring_fetched(self._job, self._bodies, target, direct)
        else:
            assert files is not None
            found = bring(self._job, target, files, direct, is_warm=files.seem_warm)
        took = perf_counter() - begun
        self.read_s += took * found.read
        self.decode_s += took * found.decode
        self._read_bytes += found.n_bytes
        self._row_bytes += found.n_rows * self._job[0].reader.row_bytes
        return found.n_chunks

    def rows_of(self, number: int, out: NDArray[Any] | None) -> NDArray[Any]:
        """Rows [r, d] of a chunk: in `out` where they had to be decoded."""
        return self._timed(number, lambda source, body: source.reader.decode(*source.at, body, out))

    def codes_of(self, number: int) -> Quantised:
        """A quantised chunk in codes."""
        return self._timed(number, lambda source, body: source.reader.decode_codes(*source.at, body))

    def _timed(self, number: int, decode: Callable[[Source, Body], T]) -> T:
        if self._fill.error is not None:
            raise _Stopped
        source, begun = self._job[number], perf_counter()
        self._fill.reading[threading.get_ident()] = source.reader.key
        body = None if self._bodies is None else self._bodies[number]
        if body is None:
            body = source.reader.load(*source.at, files=self._fill.files)
            begun, started = perf_counter(), begun
            self.read_s += begun - started
        found = decode(source, body)
        self.decode_s += perf_counter() - begun
        self._read_bytes += source.reader.n_bytes(*source.at)
        self._row_bytes += len(source.slots) * source.reader.row_bytes
        return found

    def sums(self) -> dict[str, float]:
        """For the counters."""
        return {
            "read_s": self.read_s,
            "decode_s": self.decode_s,
            "read_bytes": self._read_bytes,
            "row_bytes": self._row_bytes,
        }


def _planes_or_rows(source: Source, body: Body) -> tuple[NDArray[np.uint8] | None, NDArray[Any]]:
    planes = source.reader.planes(*source.at, body)
    return planes, source.reader.decode(*source.at, body) if planes is None else _NO_ROWS
