"""The local cache of chunks: right bytes or none, whatever happened to its folder, and never too large."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import UsageError
from actcache.reader import access
from actcache.store import chunk_cache
from actcache.store.chunk_cache import CachedObjects, ChunkCache
from actcache.store.objects import LocalObjects, open_objects
from tests.conftest import as_bits, write_store

BLOCK = 4096
DATA = bytes(range(256)) * 12  # one block with its header


def n_on_disk(folder: Path) -> int:
    """Bytes of the files, in blocks, as a reader from outside sees them."""
    sizes = [path.stat().st_size for path in folder.iterdir() if path.name != "total"]
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"total"}


def test_put_and_get(tmp_path):
    cache = ChunkCache(tmp_path / "c", 10 * BLOCK)
    assert cache.get("a") is None
    assert cache.put("a", DATA)
    assert cache.put("b", memoryview(b""))
    assert cache.get("a") == DATA
    assert cache.get("b") == b""
    assert ChunkCache(tmp_path / "c", 10 * BLOCK).get("a") == DATA
    assert cache.put("a", DATA[::-1])
    assert cache.get("a") == DATA[::-1]


def test_the_least_recently_used_go_first(tmp_path):
    cache = ChunkCache(tmp_path, 10 * BLOCK)
    for name in "abcdefghij":
        assert cache.put(name, DATA)
    assert cache.get("a") == DATA
    assert cache.put("k", DATA)
    assert entries(tmp_path) == set("acdefghijk") - {"c"}  # down to nine tenths with the new one


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path):
    cache = ChunkCache(tmp_path, 2 * BLOCK)
    assert cache.put("a", DATA)
    assert not cache.put("b", bytes(3 * BLOCK))
    assert entries(tmp_path) == {"a"}


@settings(max_examples=20, deadline=None)
@given(
    limit=st.integers(1, 8),
    puts=st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3 * BLOCK), st.booleans()), max_size=25
    ),
)
def test_never_larger_than_its_bound_and_never_wrong(tmp_path_factory, limit, puts):
    folder = tmp_path_factory.mktemp("cache")
    cache, last = ChunkCache(folder, limit * BLOCK), {}
    for i, (name, n_bytes, reopens) in enumerate(puts):
        cache = ChunkCache(folder, limit * BLOCK) if reopens else cache
        data = bytes([i]) * n_bytes
        if cache.put(name, data):
            last[name] = data
        assert n_on_disk(folder) <= limit * BLOCK
        for known, expected in last.items():
            assert cache.get(known) in (None, expected)


def test_a_smaller_bound_holds_from_the_start(tmp_path):
    cache = ChunkCache(tmp_path, 10 * BLOCK)
    for name in "abcdefgh":
        cache.put(name, DATA)
    ChunkCache(tmp_path, 3 * BLOCK)
    assert n_on_disk(tmp_path) <= 3 * BLOCK


@pytest.mark.parametrize(
    "tear",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: bytes(len(data)),
        lambda data: b"xxxx" + data[4:],
    ],
)
def test_a_torn_entry_is_a_miss_and_goes(tmp_path, tear):
    cache = ChunkCache(tmp_path, 10 * BLOCK)
    cache.put("a", DATA)
    (tmp_path / "a").write_bytes(tear((tmp_path / "a").read_bytes()))
    assert cache.get("a") is None
    assert entries(tmp_path) == set()
    assert cache.put("a", DATA)
    assert cache.get("a") == DATA


def test_an_entry_under_another_name_is_a_miss(tmp_path):
    cache = ChunkCache(tmp_path, 10 * BLOCK)
    cache.put("a", DATA)
    (tmp_path / "a").rename(tmp_path / "b")
    assert cache.get("b") is None


@pytest.mark.parametrize("total", [b"", b"xyz", bytes(8), b"\xff" * 8])
def test_a_lost_or_wrong_total_costs_no_more_than_a_count(tmp_path, total):
    cache = ChunkCache(tmp_path, 4 * BLOCK)
    for name in "abc":
        cache.put(name, DATA)
    (tmp_path / "total").write_bytes(total)
    cache = ChunkCache(tmp_path, 4 * BLOCK)
    assert cache.get("b") == DATA
    for name in "defgh":
        assert cache.put(name, DATA)
        assert n_on_disk(tmp_path) <= 4 * BLOCK


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cache_dir"):
        ChunkCache(tmp_path / "file" / "cache", 100)
    with pytest.raises(UsageError, match="cache_bytes"):
        ChunkCache(tmp_path, 0)


def test_a_full_disk_keeps_nothing_and_breaks_nothing(tmp_path, monkeypatch, caplog):
    def full(*_args):
        raise OSError(28, "No space left on device")

    cache = ChunkCache(tmp_path, 10 * BLOCK)
    monkeypatch.setattr(chunk_cache, "_write_all", full)
    assert not cache.put("a", DATA)
    assert not cache.put("a", DATA)
    assert entries(tmp_path) == set()
    assert caplog.text.count("No space left") == 1


def test_a_lock_that_another_process_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_cache, "_LOCK_S", 0.02)
    cache = ChunkCache(tmp_path, 10 * BLOCK)
    with cache._locked():
        assert not cache.put("a", DATA)
    assert cache.put("a", DATA)


# Other processes.

_WRITER = """
import sys
from pathlib import Path
from actcache.reader import access
from actcache.store import chunk_cache
cache = chunk_cache.ChunkCache(Path(sys.argv[1]), int(sys.argv[2]))
seed = int(sys.argv[3])
for i in range(int(sys.argv[4])):
    number = (i * 7 + seed) % 23
    data = bytes([number]) * (number * 700)
    found = cache.get(str(number))
    assert found is None or found == data
    cache.put(str(number), data)
"""

_CRASHERS = """
import json, os, signal, sys
from pathlib import Path
from actcache.store import chunk_cache

def die_in(module, name, left):
    real = getattr(module, name)
    def call(*args, **kwargs):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(*args, **kwargs)
    setattr(module, name, call)

class Os:
    def __getattr__(self, name):
        return getattr(os, name)

def crash(folder, limit, step, after):
    cache = chunk_cache.ChunkCache(folder, limit)
    chunk_cache.os = Os()
    die_in(chunk_cache.Path if step == "rename" else chunk_cache.os, step, [after])
    for i in range(30):
        cache.put(str(i % 9), bytes([i % 9]) * 5000)

for folder, limit, step, after in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        crash(Path(folder), limit, step, after)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, (step, after)
"""


def _start(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


def test_several_processes_share_it(tmp_path):
    limit = 12 * BLOCK
    writers = [_start(_WRITER, tmp_path, limit, seed, 40) for seed in range(2)]
    most = 0
    for writer in writers:
        while writer.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                writer.wait(0.01)
            with suppress(FileNotFoundError):  # an entry went while it was being listed
                most = max(most, n_on_disk(tmp_path))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert 0 < most <= limit
    assert n_on_disk(tmp_path) <= limit


def test_a_crash_at_any_step(tmp_path):
    limit = 6 * BLOCK
    steps = ("pwrite", "open", "ftruncate", "write", "rename", "close")
    cases = [(str(tmp_path / f"{step}-{after}"), limit, step, after) for step in steps for after in (1, 4)]
    assert _start(_CRASHERS, json.dumps(cases)).wait() == 0
    for folder, *_ in cases:
        assert n_on_disk(Path(folder)) <= limit
        cache = ChunkCache(Path(folder), limit)
        assert not any(name.startswith(".writing") for name in entries(Path(folder)))
        for i in range(9):
            assert cache.get(str(i)) in (None, bytes([i]) * 5000)
            assert cache.put(str(i), bytes([i]) * 5000)
            assert n_on_disk(Path(folder)) <= limit


def test_threads_share_it(tmp_path):
    cache = ChunkCache(tmp_path, 8 * BLOCK)

    def work(i: int) -> bool:
        name, data = str(i % 11), bytes([i % 11]) * 3000
        cache.put(name, data)
        return cache.get(name) in (None, data)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert n_on_disk(tmp_path) <= 8 * BLOCK


# In front of objects.


class Counting(LocalObjects):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ranges: list[tuple[str, int, int]] = []

    def read_ranges(self, key, ranges, *, fresh=False):
        self.ranges += [(key, *one) for one in ranges]
        return super().read_ranges(key, ranges, fresh=fresh)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(DATA)
    return Counting(tmp_path / "source")


def test_only_what_is_missing_is_read(tmp_path, source):
    cached = CachedObjects(source, ChunkCache(tmp_path / "c", 100 * BLOCK), "digest")
    assert bytes(cached.read_range("a", 10, 20)) == DATA[10:30]
    found = cached.read_ranges("a", [(0, 5), (10, 20), (40, 5)])
    assert [bytes(data) for data in found] == [DATA[:5], DATA[10:30], DATA[40:45]]
    assert source.ranges == [("a", 10, 20), ("a", 0, 5), ("a", 40, 5)]
    cached.read_ranges("a", [(10, 20)], fresh=True)
    assert source.ranges[3:] == [("a", 10, 20)]


def test_another_store_key_or_range_is_another_entry(tmp_path, source):
    cache = ChunkCache(tmp_path / "c", 100 * BLOCK)
    (source.root / "b").write_bytes(DATA[::-1])
    for digest in ("one", "two"):
        cached = CachedObjects(source, cache, digest)
        assert bytes(cached.read_range("a", 0, 5)) == DATA[:5]
        assert bytes(cached.read_range("b", 0, 5)) == DATA[::-1][:5]
        assert bytes(cached.read_range("a", 0, 6)) == DATA[:6]
    assert len(source.ranges) == 6


def test_what_ends_early_is_not_kept(tmp_path, source):
    cached = CachedObjects(source, ChunkCache(tmp_path / "c", 100 * BLOCK), "digest")
    for _ in range(2):
        assert bytes(cached.read_range("a", len(DATA) - 5, 10)) == DATA[-5:]
    assert len(source.ranges) == 2


def test_a_second_epoch_needs_no_network(tmp_path, upload, proxy, monkeypatch):
    truth = write_store(tmp_path / "local", n_sequences=16)
    objects = open_objects(upload(truth.root), cache_dir=tmp_path / "cache", cache_bytes=1 << 22)
    monkeypatch.setattr(access, "open_objects", lambda *_args, **_options: objects)
    with access.Store("any").stream(batch_size=16, window_rows=48) as stream:
        before = [as_bits(batch.rows.clone()) for batch in stream]
    proxy.seen.clear()
    with access.Store("any").stream(batch_size=16, window_rows=48) as stream:
        after = [as_bits(batch.rows.clone()) for batch in stream]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert proxy.count("/rows/") == 0
    assert n_on_disk(tmp_path / "cache")
