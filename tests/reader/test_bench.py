"""`bench` measures every ceiling, says where the time went, and names a bottleneck that is there."""

import threading

import fsspec
import pytest

import actcache
from actcache.errors import UsageError
from actcache.reader import bench as module
from actcache.reader.bench import bench
from actcache.reader.fetching import AroundCache
from actcache.store.local import LocalFiles
from actcache.store.objects import open_objects
from actcache.store.open import Catalog
from actcache.store.shard import ShardReader
from tests.conftest import write_store


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(module, "_MEMCPY_BYTES", 1 << 20)


@pytest.fixture(scope="module", params=["none", "zstd", "uint8"])
def truth(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("bench") / "s.zarr"
    return write_store(
        root, n_sequences=64, seq_len=32, per_shard=16, rows_per_chunk=64, width=64, codec=request.param
    )


def measure(location: str, **options):
    capture = Catalog(open_objects(location)).capture("resid_post")
    store = actcache.open(location)
    chosen = {"batch_size": 64, "window_rows": 512, "epochs": None, "threads": 1} | options
    return bench(lambda: store.stream(**chosen), capture, rounds=2, seconds=0.05)


def test_what_is_read_around_the_page_cache(truth, monkeypatch):
    """Whoever waits for the disk is not one of the stream's threads."""
    monkeypatch.setattr(LocalFiles, "is_cached", lambda *_args: False)
    delay, fetch = threading.Event(), AroundCache.fetch

    def slow(self, job):
        delay.wait(0.02)
        return fetch(self, job)

    monkeypatch.setattr(AroundCache, "fetch", slow)
    found = measure(str(truth.root), page_cache=False, io_threads=1)
    assert found.share["read"] == 0
    assert found.busy < 0.5
    assert found.request_bytes is None
    assert found.bottleneck.startswith("disk: it is read around the page cache")


def test_everything_is_measured(truth, request):
    found = measure(str(truth.root))
    assert min(found.memcpy, found.disk, found.decode, found.stream, found.stream_cpu) > 0
    assert sum(found.share.values()) == pytest.approx(1)
    is_plain = (
        request.node.callspec.params["truth"] == "none"
    )  # then what is in memory is compared while it is scattered
    assert all(value > 0 for name, value in found.share.items() if name != "decode" or not is_plain)
    assert 0 < found.busy <= 1
    assert found.from_disk is not None
    assert found.from_disk >= 0
    assert found.request_bytes is None
    assert found.scatter == "compiled"
    assert 0.5 < found.ratio < 2.1


def test_slow_object_storage_is_named_with_what_would_help(truth, monkeypatch):
    fsspec.filesystem("memory").put(str(truth.root), "/bench-store", recursive=True)
    fetch = ShardReader.fetch

    def slow(self, *given, **named):
        threading.Event().wait(0.005)
        return fetch(self, *given, **named)

    monkeypatch.setattr(ShardReader, "fetch", slow)
    found = measure("memory://bench-store", io_threads=1)
    assert found.bottleneck.startswith("object storage: ")
    assert "run_chunks=" in found.bottleneck
    assert found.disk is None
    assert found.share["read"] == 0
    longer = measure("memory://bench-store", io_threads=1, run_chunks=8)
    assert longer.request_bytes > 2 * found.request_bytes


def test_slow_decoding_is_named(truth, monkeypatch):
    checked = ShardReader._checked

    def slow(self, *given):
        threading.Event().wait(0.002)
        return checked(self, *given)

    monkeypatch.setattr(ShardReader, "_checked", slow)
    monkeypatch.setattr(ShardReader, "as_is", lambda *_given: None)
    monkeypatch.setattr(module, "_disk", lambda *_given: None)
    assert measure(str(truth.root)).bottleneck.startswith("decode: ")


def test_nothing_to_measure(tmp_path):
    truth = write_store(tmp_path / "s.zarr", commit=[])
    with pytest.raises(UsageError, match="no committed shard"):
        measure(str(truth.root))
