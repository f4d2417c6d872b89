"""Windows filled from object storage: few requests, bounded bytes between fetching and decoding, bad luck told from damage."""

import threading

import numpy as np
import pytest

from actcache.errors import DamageError
from actcache.reader.access import Store
from actcache.reader.fetching import Room
from tests.conftest import as_bits, write_store
from tests.remote.proxy import always, first


@pytest.fixture
def truth(tmp_path):
    return write_store(tmp_path / "local", n_sequences=32, per_shard=8, width=16, drop=0.0)


def all_rows(store, **changes):
    with store.stream(batch_size=16, **changes) as stream:
        return [as_bits(batch.rows.clone()) for batch in stream]


def test_a_window_of_everything_is_one_request_per_shard(truth, upload, proxy):
    found = all_rows(Store(upload(truth.root)), window_rows=1 << 20)
    expected = all_rows(Store(truth.root), window_rows=1 << 20)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert proxy.count("/rows/") == 3


@pytest.mark.parametrize("options", [{}, {"layers": [3]}, {"stack": "layers"}, {"order": "commit"}], ids=str)
def test_runs_of_chunks_are_fewer_requests_for_the_same_rows(tmp_path, upload, proxy, options):
    """A run of four is one request; and the order is that of the local copy, for the same run length."""
    truth = write_store(tmp_path / "wide", n_sequences=64, seq_len=16, per_shard=16, width=16, drop=0.0)
    remote, local = Store(upload(truth.root)), Store(truth.root)
    counts = {}
    for run_chunks in (1, 4):
        chosen = {"window_rows": 256, "run_chunks": run_chunks} | options
        proxy.seen.clear()
        found = all_rows(remote, **chosen)
        counts[run_chunks] = proxy.count("/rows/")
        expected = all_rows(local, **chosen)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counts[4] <= counts[1] / 2.5  # some neighbours meet by chance


@pytest.mark.parametrize("io_threads", [1, 5])
@pytest.mark.parametrize("fetched_bytes", [1, 1000])
def test_neither_threads_nor_room_change_a_row(truth, upload, monkeypatch, io_threads, fetched_bytes):
    monkeypatch.setattr("actcache.reader.fetching.FETCHED_BYTES", fetched_bytes)
    found = all_rows(Store(upload(truth.root)), window_rows=64, io_threads=io_threads, epochs=2)
    expected = all_rows(Store(truth.root), window_rows=64, epochs=2)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("is_cached", [False, True])
def test_bytes_that_went_wrong_on_the_way_are_read_again(truth, upload, proxy, tmp_path, is_cached):
    place = {"cache_dir": tmp_path / "cache"} if is_cached else {}
    store = Store(upload(truth.root), **place)
    proxy.fault = first(1, "flip", "/rows/")
    found = all_rows(store, window_rows=64)
    expected = all_rows(Store(truth.root), window_rows=64)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    for part in ("/tokens/", "/moments/"):
        proxy.fault = first(1, "flip", part)
        store = Store(store.url)
        assert len(store.tokens) == 32
        assert store.stats()[3].n_rows > 0


def test_bytes_that_are_always_wrong_are_damage(truth, upload, proxy):
    store = Store(upload(truth.root))
    proxy.fault = always("flip", "/rows/")
    with pytest.raises(DamageError, match="crc32c"):
        all_rows(store, window_rows=64)


def test_leaving_early_waits_for_no_request(truth, upload, proxy):
    store = Store(upload(truth.root))
    with store.stream(batch_size=16, window_rows=32) as stream:
        next(iter(stream))
        proxy.fault = always("silent", "/rows/")
    assert stream.state_dict()["slot"] == 16


def test_room():
    room = Room(10)
    assert room.take(8, lambda: False)
    assert not room.take(3, lambda: True)
    taken = threading.Event()
    waiting = threading.Thread(target=lambda: room.take(25, lambda: False) and taken.set())
    waiting.start()
    assert not taken.is_set()
    room.give(8)  # more than the limit fits when nothing else is there
    waiting.join(30)
    assert taken.is_set()
