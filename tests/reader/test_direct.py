"""Chunks that are stored as they are come by the compiled way; what is not as it should be, by the ordinary one."""

import pytest

import actcache
from actcache.errors import DamageError
from actcache.loops.compiled import compiled
from actcache.reader import window
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


@pytest.fixture
def brought(monkeypatch):
    """How many chunks came by each call."""
    found = []

    def counting(*given):
        result = bring(*given)
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


def test_other_codecs_and_narrow_rows_go_the_ordinary_way(tmp_path, brought):
    for width, codec in ((64, "zstd"), (4, "none")):
        store = write_store(tmp_path / f"{width}.zarr", width=width, codec=codec)
        with actcache.open(store.root).stream(batch_size=7) as stream:
            for batch in stream:
                check_rows(store, batch)
    assert sum(brought) == 0
