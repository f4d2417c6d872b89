"""What goes wrong in a thread reaches the consumer as itself, soon, and leaves the cursor where it was."""

import errno
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import actcache
from actcache.errors import ActcacheError, DamageError, UnreachableError
from actcache.reader import fetching, filling, window
from actcache.reader.window import Fill
from actcache.store.local import LocalFiles
from actcache.store.shard import ShardReader
from tests.conftest import check_rows, write_store
from tests.reader.test_stream import SMALL, stream_threads, wait_until

ROOT = Path(__file__).parents[2]


class InjectedError(Exception):
    pass


@pytest.fixture
def truth(tmp_path):
    return write_store(tmp_path / "s.zarr", n_sequences=15, seq_len=9)


def consume(truth, stream) -> tuple[list[np.ndarray], BaseException]:
    """Every batch, compared with the truth, up to the error that ends it."""
    found = []
    with pytest.raises(BaseException) as raised:  # noqa: PT011 - the caller looks at it
        found.extend(check_rows(truth, batch) for batch in stream)
    return found, raised.value


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_damaged_chunk_ends_the_stream_at_once(truth, threads, shard):
    path = truth.root / f"acts/resid_post/rows/c.0.{shard}.0"
    data = bytearray(path.read_bytes())
    data[30] ^= 1  # in the first chunk, which holds kept rows
    path.write_bytes(data)
    started = time.perf_counter()
    with actcache.open(truth.root).stream(**SMALL, threads=threads) as stream:
        _, error = consume(truth, stream)
    assert isinstance(error, DamageError)
    assert str(path.name) in str(error)
    assert time.perf_counter() - started < 1
    assert not stream_threads()


def test_after_an_error_the_cursor_is_at_the_first_batch_not_handed_out(truth):
    """Whatever read fails, at whatever time: what was handed out and what follows a second try is the whole order."""
    with actcache.open(truth.root).stream(**SMALL) as stream:
        expected = [check_rows(truth, batch) for batch in stream]
    for fails_at in range(0, 22, 2):
        with failing_read(fails_at, InjectedError("a bad sector")) as seen:
            with actcache.open(truth.root).stream(**SMALL) as stream:
                found = []
                for _try in range(2):
                    with suppress(InjectedError):
                        found.extend(check_rows(truth, batch) for batch in stream)
            assert seen.n_reads > fails_at, "no read failed"
            assert len(found) == len(expected), fails_at
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), fails_at


def test_an_error_seen_while_reading_ahead_is_raised_once(truth):
    """It comes before its window is reached, and is not raised again where the second try succeeds."""
    with actcache.open(truth.root).stream(**SMALL) as stream:
        expected = [check_rows(truth, batch) for batch in stream]
    for failing_window in range(1, 4):
        error = InjectedError("a bad sector")
        with actcache.open(truth.root).stream(**SMALL) as stream:
            lay_out = stream._filling._lay_out

            def failing(epoch, number, bad=failing_window, error=error, lay_out=lay_out):
                if number == bad:
                    raise error
                return lay_out(epoch, number)

            stream._filling._lay_out = failing
            found, raised = [], None
            try:
                for batch in stream:
                    found.append(check_rows(truth, batch))
                    wait_until(lambda stream=stream: all(f.is_done for f in stream._filling._fills.values()))
            except InjectedError as caught:
                raised = caught
            assert raised is error
            assert stream.state_dict()["window"] == failing_window - 1
            stream._filling._lay_out = lay_out
            found.extend(check_rows(truth, batch) for batch in stream)
        assert len(found) == len(expected)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


class failing_read:
    """Only the n-th chunk read fails, with `error`."""

    def __init__(self, n, error):
        self.n, self.error, self.n_reads = n, error, 0

    def __enter__(self):
        self.patch, read, lock = pytest.MonkeyPatch(), ShardReader.load, threading.Lock()

        def failing(reader, *args, **kwargs):
            with lock:
                mine, self.n_reads = self.n_reads, self.n_reads + 1
            if mine == self.n:
                raise self.error
            return read(reader, *args, **kwargs)

        self.patch.setattr(ShardReader, "load", failing)
        return self

    def __exit__(self, *exc):
        self.patch.undo()


@pytest.mark.parametrize(
    "error", [InjectedError("x"), MemoryError("y"), KeyboardInterrupt("z"), OSError(24, "files")]
)
def test_an_error_in_a_thread_surfaces_as_itself(truth, error):
    with failing_read(5, error), actcache.open(truth.root).stream(**SMALL) as stream:
        _, raised = consume(truth, stream)
    assert raised is error
    assert not stream_threads()


def test_a_dead_disk_is_heard_of_within_a_second(truth):
    """The system's own error, from a thread, while the consumer waits for a window; nothing is left running."""
    for errno_ in (errno.EIO, errno.ESTALE, errno.ENODEV):
        error = OSError(errno_, os.strerror(errno_), "the disk")
        with failing_read(9, error), actcache.open(truth.root).stream(**SMALL, threads=2) as stream:
            started = time.perf_counter()
            _, raised = consume(truth, stream)
            assert time.perf_counter() - started < 1
        assert raised is error
        assert not stream_threads()


def test_a_read_that_never_ends_is_named(truth, monkeypatch):
    """A network file system that hangs: after a while the wait says for what, and closing does not wait for it."""
    monkeypatch.setattr(window, "_LIVENESS_S", 0.02)
    monkeypatch.setattr(window, "_STALLED_S", 0.1)
    monkeypatch.setattr(filling, "_CLOSE_S", 0.1)
    gate, load = threading.Event(), ShardReader.load

    def stuck(self, *args, **kwargs):
        gate.wait(30)
        return load(self, *args, **kwargs)

    monkeypatch.setattr(ShardReader, "load", stuck)
    try:
        with actcache.open(truth.root).stream(**SMALL, threads=1) as stream:
            _, raised = consume(truth, stream)
            assert isinstance(raised, UnreachableError)
            assert "window 0 of epoch 0" in str(raised)
            assert re.search(r"reading acts/resid_post/rows/c\.0\.\d\.0", str(raised))
            assert stream.state_dict()["slot"] == 0
        assert stream_threads()
    finally:
        gate.set()
    wait_until(lambda: not stream_threads())


def test_a_slow_disk_is_not_a_dead_one(truth, monkeypatch):
    """As long as anything comes, the wait goes on."""
    monkeypatch.setattr(window, "_LIVENESS_S", 0.001)
    monkeypatch.setattr(window, "_STALLED_S", 0.2)
    monkeypatch.setattr(window, "JOB_BYTES", 1)
    load = ShardReader.load

    def slow(self, *args, **kwargs):
        threading.Event().wait(0.03)
        return load(self, *args, **kwargs)

    monkeypatch.setattr(ShardReader, "load", slow)
    with actcache.open(truth.root).stream(**SMALL | {"window_rows": 1 << 20}, threads=1) as stream:
        assert len(np.concatenate([check_rows(truth, batch) for batch in stream])) == stream.n_rows


def test_an_error_while_laying_out_surfaces_as_itself(truth, monkeypatch):
    error = InjectedError("layout")

    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr("actcache.reader.filling.arrange", broken)
    with actcache.open(truth.root).stream(**SMALL) as stream:
        _, raised = consume(truth, stream)
    assert raised is error


@pytest.mark.parametrize("page_cache", [True, False])
@pytest.mark.parametrize("leave", ["close", "break", "forget"])
def test_leaving_early_leaves_no_thread_handle_or_memory(tmp_path, monkeypatch, leave, page_cache):
    """However one leaves: closing, breaking out of the loop, or just dropping the stream."""
    monkeypatch.setattr(LocalFiles, "is_cached", lambda *_args: False)
    monkeypatch.setattr(fetching, "_make_slabs", made := recorded(fetching._make_slabs))
    truth = write_store(
        tmp_path / "s.zarr", n_sequences=64, seq_len=32, width=64, rows_per_chunk=64, codec="none"
    )

    kept = []

    def use(n):
        kept.clear()
        stream = actcache.open(truth.root).stream(
            batch_size=32, window_rows=512, epochs=None, threads=4, page_cache=page_cache
        )
        for i, batch in enumerate(stream):
            assert len(batch) == 32
            if i == n:
                kept.append(batch)  # keeps its window, not the stream
                break
        if leave == "close":
            stream.close()
        elif leave == "break":
            with stream:
                pass

    use(1)  # what is imported and compiled once
    wait_until(lambda: not stream_threads())  # without a garbage collection
    handles = sorted(Path("/proc/self/fd").iterdir())
    tracemalloc.start()
    try:
        use(1)
        wait_until(lambda: not stream_threads())
        kept.clear()
        before = tracemalloc.get_traced_memory()[0]
        for n in (0, 3, 40):
            use(n)
        wait_until(lambda: not stream_threads())
        kept.clear()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert sorted(Path("/proc/self/fd").iterdir()) == handles
    assert len(made.memory) == (0 if page_cache else 5)
    assert not any(memory() for memory in made.memory)
    assert after - before < 64 * 512 * 2  # not one window of three streams


class recorded:
    """What makes slabs; `memory` they are in, as long as somebody refers to it."""

    def __init__(self, make):
        self.make, self.memory = make, []

    def __call__(self, *args):
        slabs = self.make(*args)
        self.memory.append(weakref.ref(slabs[0].obj))
        return slabs


def test_closing_wakes_a_consumer_that_waits(truth):
    gate, reading = threading.Event(), threading.Event()
    outcome = []

    def stuck(self, *args, **kwargs):
        reading.set()
        gate.wait(20)
        raise InjectedError("too late to matter")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "load", stuck)
        stream = actcache.open(truth.root).stream(**SMALL)

        def work():
            try:
                next(iter(stream))
            except (InjectedError, ActcacheError) as error:
                outcome.append(error)

        consumer = threading.Thread(target=work)
        consumer.start()
        assert reading.wait(5)
        closing = threading.Thread(target=stream.close)
        closing.start()
        consumer.join(4)  # it does not wait for the read, nor for the next look at whether threads live
        assert not consumer.is_alive()
        gate.set()
        closing.join(10)
    assert len(outcome) == 1
    assert "was closed, or moved" in str(outcome[0])


def test_closing_while_the_next_window_is_about_to_begin(truth):
    """Whichever comes first: the consumer hears that the stream was closed, and no thread is left."""
    begun, closed, until_begun = threading.Event(), threading.Event(), Fill.wait_until_begun
    outcome: list[BaseException] = []

    def late(self):
        until_begun(self)
        begun.set()
        assert closed.wait(20)

    def gated(self, *args, **kwargs):
        closed.wait(20)
        return load(self, *args, **kwargs)

    load = ShardReader.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fill, "wait_until_begun", late)
        patch.setattr(ShardReader, "load", gated)
        stream = actcache.open(truth.root).stream(**SMALL)

        def work():
            try:
                next(iter(stream))
            except ActcacheError as error:
                outcome.append(error)

        consumer = threading.Thread(target=work)
        consumer.start()
        assert begun.wait(20)
        closing = threading.Thread(target=stream.close)
        closing.start()
        wait_until(lambda: stream._filling._awaited.error is not None)
        closed.set()
        consumer.join(20)
        closing.join(20)
    assert "was closed, or moved" in str(outcome[0])
    wait_until(lambda: not stream_threads())


FORK = """
import os, sys, threading
import actcache
from actcache.errors import UsageError
from actcache.reader.filling import Filling
from actcache.reader.window import Fill
from actcache.store.local import LocalFiles
from actcache.store.shard import ShardReader

gate, reading, read, start = threading.Event(), threading.Event(), ShardReader.load, Filling._begin
started = []

def counted(self, *args):
    started.append(1)
    return start(self, *args)

def gated(self, *args, **kwargs):
    if len(started) > 1:
        reading.set()
        gate.wait(30)
    return read(self, *args, **kwargs)

ShardReader.load, Filling._begin = gated, counted
stream = actcache.open(sys.argv[1]).stream(batch_size=7, window_rows=32, threads=1, epochs=None)
batches = iter(stream)
next(batches)
assert reading.wait(30)
pid = os.fork()
if pid == 0:
    try:
        for batch in batches:
            pass
    except UsageError as error:
        os._exit(42 if "another process" in str(error) else 1)
    os._exit(2)
_, status = os.waitpid(pid, 0)
gate.set()
next(batches)
stream.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_is_refused_and_never_hangs(truth):
    """The child goes on while a window is being read by threads it does not have."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(truth.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 42, done.stderr


def test_who_goes_on_after_an_error_never_meets_an_old_one(truth):
    """Windows that were begun ahead failed of the same thing, which is mended now."""
    with actcache.open(truth.root).stream(**SMALL) as stream:
        expected = [batch.rows.clone() for batch in stream]
    paths = sorted((truth.root / "acts/resid_post/rows").glob("c.0.[123].0"))
    good = [path.read_bytes() for path in paths]
    with actcache.open(truth.root).stream(**SMALL) as stream:
        for path in paths:
            os.truncate(path, 3)
        fills = [stream._filling.get(0, window) for window in (0, 1)]
        for fill in fills:
            wait_until(lambda fill=fill: fill.is_done)
        with pytest.raises(DamageError):
            next(iter(stream))
        for path, data in zip(paths, good, strict=True):
            path.write_bytes(data)
        found = [batch.rows for batch in stream]
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
