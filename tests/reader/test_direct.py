"""Chunks that are stored as they are come by the compiled way; what is not as it should be, by the ordinary one."""

import os
from pathlib import Path

import pytest

import actcache
from actcache.errors import DamageError
from actcache.loops.compiled import compiled
from actcache.reader import window
from actcache.store import local
from actcache.store.shard import ShardReader
from tests.conftest import check_rows, write_store

LOOPS = compiled()
pytestmark = pytest.mark.skipif(
    LOOPS is None or LOOPS.direct is None, reason="no instruction for crc32c here"
)
CHUNK_BYTES = 8 * 64 * 2 + 4  # stored: 8 rows of 64 numbers, and the trailer


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "s.zarr", n_sequences=24, width=64, codec="none", n_holdout_shards=0)


@pytest.fixture(params=["copied", "mapped"])
def brought(monkeypatch, request):
    """How many chunks came by each call, all copied from the page cache, or all read in it."""
    found = []

    def counting(*given, is_warm):
        result = bring(*given, is_warm=request.param == "mapped")
        found.append(result.n_chunks)
        return result

    bring = window.bring
    monkeypatch.setattr(window, "bring", counting)
    return found


def fail(*_given, **_named):
    raise AssertionError("decoded")


@pytest.mark.parametrize("stack", ["data", "feature"])
@pytest.mark.parametrize("positions", [None, [1, 2, 5]])
def test_all_chunks_come_by_it(store, brought, monkeypatch, stack, positions):
    monkeypatch.setattr(ShardReader, "decode", fail)
    n_rows = 0
    with actcache.open(store.root).stream(batch_size=7, stack=stack, positions=positions) as stream:
        for batch in stream:
            if stack == "data":
                check_rows(store, batch)
            n_rows += len(batch)
        assert n_rows == stream.n_rows
        assert stream.counters.read_bytes == sum(brought) * (CHUNK_BYTES - 4)
    assert sum(brought) > 0


def test_the_ordinary_way_says_what_is_wrong(store, brought):
    path = store.root / "acts/resid_post/rows/c.0.2.0"
    data = bytearray(path.read_bytes())
    data[2 * CHUNK_BYTES + 5] ^= 1
    path.write_bytes(data)
    stream = actcache.open(store.root).stream(batch_size=7, threads=1)
    with stream, pytest.raises(DamageError, match=r"c\.0\.2\.0: chunk 2 of layer index 0 does not match"):
        list(stream)
    assert sum(brought) > 0


def test_a_file_that_ends_early(store, brought):
    path = store.root / "acts/resid_post/rows/c.0.1.0"
    path.write_bytes(path.read_bytes()[:-2000])
    stream = actcache.open(store.root).stream(batch_size=7, threads=1)
    with stream, pytest.raises(DamageError, match="ends after"):
        list(stream)


def test_a_file_that_was_cut_short_while_it_was_open(store, brought):
    """It is mapped as long as it was, and touching what is gone would kill."""
    path = store.root / "acts/resid_post/rows/c.0.1.0"
    with actcache.open(store.root).stream(batch_size=7, threads=1, epochs=None) as stream:
        batches, n_rows = iter(stream), 0
        while n_rows < 2 * stream.n_rows:  # then every file is open
            n_rows += len(next(batches))
        os.truncate(path, CHUNK_BYTES + 3)
        with pytest.raises(DamageError, match="ends after"):
            list(batches)
    assert sum(brought) > 0


def test_without_maps_chunks_are_copied(store, brought, monkeypatch):
    monkeypatch.setattr(ShardReader, "decode", fail)
    monkeypatch.setattr(local, "_map", lambda _fd: local.NOT_MAPPED)
    with actcache.open(store.root).stream(batch_size=7) as stream:
        for batch in stream:
            check_rows(store, batch)
    assert sum(brought) > 0


@pytest.mark.parametrize(("width", "rows_per_chunk"), [(32, 8), (480, 4), (1024, 8), (2080, 3)])
def test_rows_of_any_size(tmp_path, brought, monkeypatch, width, rows_per_chunk):
    """Narrower and wider than what is compared at once."""
    store = write_store(
        tmp_path / "s.zarr", n_sequences=8, width=width, codec="none", rows_per_chunk=rows_per_chunk
    )
    monkeypatch.setattr(ShardReader, "decode", fail)
    with actcache.open(store.root).stream(batch_size=5) as stream:
        for batch in stream:
            check_rows(store, batch)
    assert sum(brought) > 0


def file_pages() -> int:
    """Bytes of files that count as this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_pages_of_maps_are_given_back(tmp_path, brought):
    store = write_store(
        tmp_path / "s.zarr",
        n_sequences=1024,
        seq_len=16,
        per_shard=256,
        rows_per_chunk=64,
        width=512,
        codec="none",
    )
    before = file_pages()
    with actcache.open(store.root).stream(batch_size=512) as stream:
        n_bytes = sum(batch.rows.nbytes for batch in stream)
        assert file_pages() - before < n_bytes // 4
    assert n_bytes > 16 << 20
    assert sum(brought) > 0


def test_other_codecs_and_narrow_rows_go_the_ordinary_way(tmp_path, brought):
    for width, codec in ((64, "zstd"), (4, "none")):
        store = write_store(tmp_path / f"{width}.zarr", width=width, codec=codec)
        with actcache.open(store.root).stream(batch_size=7) as stream:
            for batch in stream:
                check_rows(store, batch)
    assert sum(brought) == 0
