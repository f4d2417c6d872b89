"""Chunks that are read around the page cache: the same rows, the same errors, and when it is done."""

import errno
import os
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest

import actcache
from actcache.errors import DamageError, MemoryBoundError
from actcache.reader import fetching, filling
from actcache.reader.fetching import AroundCache, is_on_a_disk, machine_bytes, slabs_for
from actcache.store.local import LocalFiles
from actcache.store.shard import ShardReader
from tests.conftest import as_bits, check_rows, write_store
from tests.reader.test_failures import InjectedError, consume, failing_read
from tests.reader.test_stream import SMALL, stream_threads, wait_until

AROUND = SMALL | {"page_cache": False}


@pytest.fixture
def truth(tmp_path):
    return write_store(tmp_path / "s.zarr", n_sequences=24, seq_len=9, width=64, codec="none")


@pytest.fixture
def never_cached(monkeypatch):
    monkeypatch.setattr(LocalFiles, "is_cached", lambda *_args: False)


@pytest.fixture
def fetched(monkeypatch):
    """Per job that was read around the cache: how many chunks came, and how many did not."""
    found, fetch = [], AroundCache.fetch

    def counting(self, job):
        result = fetch(self, job)
        missing = sum(body is None for body in result.bodies)
        found.append((len(job) - missing, missing))
        return result

    monkeypatch.setattr(AroundCache, "fetch", counting)
    return found


def rows_of(store, **options):
    with store.stream(**options) as stream:
        return [as_bits(batch.rows.clone()) for batch in stream]


def forget(root):
    for path in root.rglob("c.*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@pytest.mark.parametrize("codec", ["none", "zstd", "lz4", "uint8"])
@pytest.mark.parametrize(
    "options", [{}, {"stack": "layers"}, {"positions": [1, 2, 5], "threads": 4}], ids=str
)
def test_all_rows_come_by_it(tmp_path, never_cached, fetched, monkeypatch, codec, options):
    store = actcache.open(write_store(tmp_path / "s.zarr", n_sequences=24, width=64, codec=codec).root)
    expected = rows_of(store, **SMALL | options)
    assert not fetched
    monkeypatch.setattr(LocalFiles, "read", None)  # nor is anything read otherwise
    found = rows_of(store, **AROUND | options)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(found) == len(expected)
    assert fetched
    assert not any(missing for _came, missing in fetched)


def test_few_slabs_serve_many_jobs(truth, never_cached, fetched, monkeypatch):
    """Of one chunk each, two in all, four threads waiting for one: each is used again."""
    monkeypatch.setattr(fetching, "_LARGE_PAGE", 4096)
    monkeypatch.setattr(fetching, "AROUND_BYTES", 1)
    monkeypatch.setattr(fetching, "_make_slabs", one_by_one := Counted(fetching._make_slabs))
    with actcache.open(truth.root).stream(**AROUND | {"epochs": 2}, io_threads=4) as stream:
        for batch in stream:
            check_rows(truth, batch)
    assert one_by_one.n_calls == 1
    assert slabs_for(1024, 4)[1] == 2
    assert len(fetched) > 20


class Counted:
    def __init__(self, function):
        self.function, self.n_calls = function, 0

    def __call__(self, *args):
        self.n_calls += 1
        return self.function(*args)


def test_damage_is_found(truth, never_cached):
    path = truth.root / "acts/resid_post/rows/c.0.1.0"
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    with actcache.open(truth.root).stream(**AROUND) as stream:
        _, error = consume(truth, stream)
    assert isinstance(error, DamageError)
    assert "c.0.1.0: chunk 0 of layer index 0 does not match" in str(error)
    assert not stream_threads()


@pytest.mark.parametrize("what", ["cut short", "gone"])
def test_what_is_not_there_is_named(truth, never_cached, what):
    path = truth.root / "acts/resid_post/rows/c.0.2.0"
    if what == "gone":
        path.unlink()
    else:
        os.truncate(path, 700)
    with actcache.open(truth.root).stream(**AROUND) as stream:
        _, error = consume(truth, stream)
    assert isinstance(error, DamageError)
    assert "c.0.2.0" in str(error)
    assert ("missing" if what == "gone" else "ends after") in str(error)


def test_a_read_that_fails_is_tried_the_ordinary_way(truth, never_cached, fetched, monkeypatch):
    """A disk that answers the second time costs no row; one that does not is heard of as itself."""
    preadv = os.preadv

    def failing(fd, buffers, at, *flags):
        if len(buffers[0]) >= 4096 and at % 4096 == 0 and at > 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, at, *flags)

    monkeypatch.setattr(os, "preadv", failing)
    store = actcache.open(truth.root)
    assert rows_of(store, **AROUND)
    assert any(missing for _came, missing in fetched)
    error = OSError(errno.EIO, os.strerror(errno.EIO), "the disk")
    with failing_read(0, error), store.stream(**AROUND) as stream:
        _, raised = consume(truth, stream)
    assert raised is error
    assert not stream_threads()


def test_an_error_while_fetching_surfaces_as_itself_and_costs_no_slab(truth, never_cached, monkeypatch):
    error, range_of, n_left = InjectedError("no memory"), ShardReader.range_of, [40]

    def failing(self, *at):
        n_left[0] -= 1
        if n_left[0] == 0:
            raise error
        return range_of(self, *at)

    monkeypatch.setattr(fetching, "_LARGE_PAGE", 4096)
    monkeypatch.setattr(fetching, "AROUND_BYTES", 1)
    with actcache.open(truth.root).stream(**AROUND) as stream:
        expected = [check_rows(truth, batch) for batch in stream]
    n_failed = 0
    for after in range(10, 130, 8):
        with actcache.open(truth.root).stream(**AROUND) as stream:
            monkeypatch.setattr(ShardReader, "range_of", failing)
            n_left[0], found = after, []
            for _try in range(2):
                with suppress(InjectedError):
                    found.extend(check_rows(truth, batch) for batch in stream)
        n_failed += n_left[0] <= 0
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(found) == len(expected)
    assert n_failed > 8


def test_a_file_system_that_cannot_is_read_the_ordinary_way(truth, never_cached, fetched, monkeypatch):
    """Some refuse to open a file for it, some to read one."""
    monkeypatch.setattr(os, "O_DIRECT", 1 << 30)
    opened = os.open

    def refusing(path, flags, *rest, **named):
        if flags & (1 << 30):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    with actcache.open(truth.root).stream(**AROUND) as stream:
        for batch in stream:
            check_rows(truth, batch)
    assert not fetched


def test_what_is_in_the_page_cache_is_read_there(truth, fetched):
    store = actcache.open(truth.root)
    for path in truth.root.rglob("c.*"):
        path.read_bytes()
    rows_of(store, **AROUND)
    assert not fetched
    files = LocalFiles(truth.root)
    keys = [str(path.relative_to(truth.root)) for path in truth.root.rglob("rows/c.*")]

    def is_forgotten():
        forget(truth.root)  # what was written a moment ago may stay at the first try
        return not any(files.is_cached(key, 0) for key in keys)

    try:
        wait_until(is_forgotten)
    except AssertionError:
        pytest.skip("this file system keeps what it was asked to forget (one in memory)")
    rows_of(store, **AROUND)
    assert fetched
    assert not any(files.is_cached(key, 0) for key in keys), "it went through the cache all the same"


def test_where_there_is_no_telling_it_counts_as_cached(truth, monkeypatch):
    files = LocalFiles(truth.root)
    assert files.is_cached("acts/resid_post/rows/none-such", 0)
    assert files.is_cached("acts/resid_post/rows/c.0.1.0", 1 << 40)
    forget(truth.root)
    monkeypatch.setattr("actcache.store.local.CAN_ASK", False)
    assert files.is_cached("acts/resid_post/rows/c.0.1.0", 0)


@pytest.mark.parametrize(("page_cache", "is_large", "is_around"), [
    (None, False, False), (None, True, True), (True, True, False), (False, False, True),
])  # fmt: skip
def test_when_it_is_done(truth, never_cached, fetched, monkeypatch, page_cache, is_large, is_around):
    store = actcache.open(truth.root)
    with store.stream(**SMALL) as stream:
        n_bytes = stream.n_rows * 64 * 2
    monkeypatch.setattr(filling, "machine_bytes", lambda: 2 * n_bytes - (1 if is_large else 0))
    for is_disk in (True, False):
        monkeypatch.setattr(filling, "is_on_a_disk", lambda _root, found=is_disk: found)
        fetched.clear()
        rows_of(store, **SMALL | {"page_cache": page_cache})
        assert bool(fetched) == (is_around and (is_disk or page_cache is False))


def test_its_memory_is_in_the_bound(truth):
    least = {}
    for page_cache in (True, False):
        with pytest.raises(MemoryBoundError) as raised:
            actcache.open(truth.root).stream(**SMALL, memory=1, page_cache=page_cache)
        least[page_cache] = int(
            str(raised.value).split("two windows take ")[1].split(" ")[0].replace(",", "")
        )
    assert least[False] - least[True] == np.prod(slabs_for(1024, 8)) == 24 << 20


@pytest.mark.parametrize("chunk_bytes", [1, 256 << 10, (2 << 20) - 1, 2 << 20, 5 << 20, 100 << 20])
def test_a_slab_has_room_for_a_chunk_that_did_not_compress(chunk_bytes):
    n_bytes, n = slabs_for(chunk_bytes, 8)
    assert n_bytes >= chunk_bytes + chunk_bytes // 20 + 2 * 4096 - 2
    assert n_bytes % (2 << 20) == 0
    assert n >= 2
    assert n_bytes * n <= max(24 << 20, 2 * n_bytes)
    if chunk_bytes <= 1 << 20:
        assert slabs_for(chunk_bytes, 64)[1] == 96  # who asks for many threads wants them all to read


def test_a_disk_is_a_block_device():
    for st_dev, expected in ((os.makedev(254, 0), True), (os.makedev(0, 61), False)):
        root = SimpleNamespace(stat=lambda found=st_dev: SimpleNamespace(st_dev=found))
        assert is_on_a_disk(root) == expected


def test_memory_of_a_container_is_what_it_may_use(monkeypatch):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for text, expected in (("123456789\n", 123456789), ("max\n", machine), (str(1 << 60), machine)):
        monkeypatch.setattr("actcache.reader.fetching.Path.read_text", lambda _self, text=text: text)
        assert machine_bytes() == expected
