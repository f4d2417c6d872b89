"""Streams towards a GPU: the rows are those of a CPU's stream, whatever is late; nothing is used again too early.

The GPU here is one that is late (see late.py); those marked `gpu` use a real one.
"""

import gc
import itertools
import tempfile
import threading
import weakref
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import MemoryBoundError, UnreachableError, UsageError
from actcache.reader import placement, side
from actcache.reader.buffers import HostWindows
from actcache.reader.device import DeviceWindows
from actcache.reader.filling import Filling
from actcache.reader.side import open_side, wait_for
from actcache.store.shard import ShardReader
from tests.conftest import as_bits, check_rows, write_store
from tests.reader.late import BusySide, LateSide, LyingSide
from tests.store.strategies import store_settings

SMALL = {"batch_size": 7, "window_rows": 32}
PLACES = [{"device_memory": None}, {"device_memory": 0}]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    root = tmp_path_factory.mktemp("device") / "s.zarr"
    return write_store(
        root, n_sequences=15, seq_len=9, n_padding=4, width=8, hooks=("resid_post", "mlp_out"), codec="none"
    )


@pytest.fixture
def late(monkeypatch):
    """`late(side)`: any CUDA device is that one from now on."""

    def use(side: LateSide) -> LateSide:
        monkeypatch.setattr(placement, "open_side", lambda _name: side)
        return side

    return use


def stream_on(truth, **options):
    return actcache.open(truth.root).stream(**SMALL | {"device": "cuda"} | options)


def everything(batches) -> list[tuple]:
    """All that batches hold, in plain numbers."""
    found = []
    for batch in batches:
        rows = [as_bits(rows.clone()) for rows in batch.hooks.values()]
        found.append(
            (*rows, *(getattr(batch, n).numpy() for n in ("layer", "sequence", "position", "token")))
        )
    return found


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=25)
@given(chosen=store_settings(), data=st.data())
def test_the_rows_are_those_of_a_cpu(chosen, data):
    options = {
        "batch_size": data.draw(st.integers(1, 60)),
        "window_rows": data.draw(st.integers(1, 300)),
        "stack": data.draw(st.sampled_from(["data", "feature", "layers"])),
        "order": data.draw(st.sampled_from(["global", "commit"])),
        "threads": data.draw(st.sampled_from([1, 2, 8])),
        "positions": data.draw(st.sampled_from([None, [0], slice(0, None, 2)])),
        "dtype": data.draw(st.sampled_from([None, torch.float32])),
        "epochs": 2,
    }
    side = LateSide(data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.02, 0.5, 1.0])))
    place = data.draw(st.sampled_from(PLACES))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        truth = write_store(Path(folder) / "s.zarr", **chosen)
        store = actcache.open(truth.root)
        with store.stream(**options) as stream:
            expected = everything(stream)
        patch.setattr(placement, "open_side", lambda _name: side)
        patch.setattr(placement, "STAGED_BYTES", data.draw(st.sampled_from([1, 1000, 2 << 20])))
        patch.setattr("actcache.reader.stream.BATCHES_AHEAD", data.draw(st.sampled_from([1, 4])))
        with store.stream(**options, **place, device="cuda") as stream:
            kept_to_the_end = everything(stream)
    assert_same(kept_to_the_end, expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stack", ["data", "layers"])
def test_pairs_of_hooks_and_ranks(truth, late, place, stack):
    options = {"hook": ("mlp_out", "resid_post"), "stack": stack, "rank": 1, "world_size": 2}
    with stream_on(truth, **options, device="cpu") as stream:
        expected = everything(stream)
    late(LateSide())
    with stream_on(truth, **options, **place) as stream:
        assert_same(everything(stream), expected)


@pytest.mark.parametrize("place", PLACES)
def test_layers_fetched_together_land_in_their_own_columns(tmp_path, late, place):
    """The last chunk of a layer lies beside the first one of the next: here each layer of a shard is one chunk."""
    truth = write_store(tmp_path / "s.zarr", rows_per_chunk=32, width=8, n_holdout_shards=0)
    fsspec.filesystem("memory").put(str(truth.root), "memory://stacked", recursive=True)
    with stream_on(truth, stack="feature", device="cpu") as stream:
        expected = everything(stream)
    late(LateSide())
    with actcache.open("memory://stacked").stream(**SMALL, stack="feature", device="cuda", **place) as stream:
        assert_same(everything(stream), expected)


@pytest.mark.parametrize("kind", [LateSide, LyingSide])
@pytest.mark.parametrize("place", PLACES)
def test_no_memory_is_used_again_before_it_was_copied(truth, late, place, kind, monkeypatch):
    """And a device that says so too early would be found out: other rows, or slots that are none."""
    with stream_on(truth, device="cpu", epochs=6) as stream:
        expected = everything(stream)
    side = late(kind(rate=0.1 if kind is LateSide else 0.0, is_apart=True))
    monkeypatch.setattr(placement, "STAGED_BYTES", 1)
    with stream_on(truth, **place, epochs=6, threads=1) as stream:
        kept = [
            (*b.hooks.values(), *(getattr(b, n) for n in ("layer", "sequence", "position", "token")))
            for b in stream
        ]

    def finish_and_compare():
        side.finish()
        assert_same([tuple(map(plain, tensors)) for tensors in kept], expected)

    if kind is LateSide or place["device_memory"] == 0:  # work queued here holds its pinned window; see below
        finish_and_compare()
    else:
        with pytest.raises((AssertionError, IndexError)):
            finish_and_compare()


def test_a_pinned_window_is_not_free_before_its_copies_are_done(truth, late):
    """On a real device work is queued at once and holds no reference: the stream has to."""
    with stream_on(truth, device="cpu") as stream:
        n_batches = sum(1 for _ in itertools.takewhile(lambda _: stream.state_dict()["window"] == 0, stream))
    side = late(BusySide())
    with stream_on(truth, device_memory=0) as stream:
        batches, (pool,) = iter(stream), stream._filling.windows.pools
        for _ in range(n_batches + 3):
            next(batches)
        assert stream.state_dict()["window"] == 1
        stream._filling.courier.settle()
        assert pool.n_free == 0
        side.is_busy = False
        stream._filling.courier.settle()
        assert pool.n_free == 1


def plain(tensor):
    return tensor.numpy() if tensor.dtype == torch.int64 else as_bits(tensor)


@pytest.mark.parametrize("place", PLACES)
def test_the_next_batch_is_on_its_way_before_it_is_asked_for(truth, late, place):
    side = late(LateSide(rate=0.0))
    with stream_on(truth, **place, window_rows=1 << 20) as stream:
        batches, sent = iter(stream), []
        send = stream._filling.courier.send
        stream._filling.courier.send = lambda *given: sent.append(1) or send(*given)
        for handed_out in range(1, 5):
            next(batches)
            assert len(sent) == handed_out + 1
            assert side.n_done < side.n_submitted  # and nobody has waited for it


@pytest.mark.parametrize("place", PLACES)
def test_a_window_that_is_not_there_yet_holds_nothing_up(truth, late, place, monkeypatch):
    """All batches of a window are handed out while nothing of the next one can be read."""
    with stream_on(truth, device="cpu", batch_size=3) as stream:
        n_batches = sum(1 for _ in itertools.takewhile(lambda _: stream.state_dict()["window"] == 0, stream))
    assert n_batches > 1
    late(LateSide())
    gate, windows, load = threading.Event(), [], ShardReader.load
    begin = Filling._begin
    monkeypatch.setattr(Filling, "_begin", lambda *given: windows.append(given[2]) or begin(*given))

    def gated(self, *given, **named):
        if windows[-1] > 0:
            gate.wait(20)
        return load(self, *given, **named)

    monkeypatch.setattr(ShardReader, "load", gated)
    with stream_on(truth, **place, batch_size=3) as stream:
        stream._filling.get(0, 0)._done.wait(20)  # whole, before the next one is begun
        found = everything(itertools.islice(stream, n_batches))
        assert windows == [0, 1]
        assert not gate.is_set()
        gate.set()
        found += everything(stream)
    with stream_on(truth, device="cpu", batch_size=3) as stream:
        assert_same(found, everything(stream))


def test_batches_are_the_consumers_to_keep_and_to_write_into(truth, late):
    with stream_on(truth, device="cpu", epochs=3) as stream:
        expected = everything(stream)
    late(LateSide())
    kept = []
    with stream_on(truth, epochs=3) as stream:
        for i, batch in enumerate(stream):
            kept.append((everything([batch])[0], batch))
            batch.rows.fill_(i)
    assert_same([numbers for numbers, _ in kept], expected)
    for i, (_, batch) in enumerate(kept):
        assert (batch.rows == i).all()


def test_windows_on_the_device_are_bounded_and_used_again(truth, late):
    late(LateSide())
    with stream_on(truth, epochs=6) as stream:
        windows = stream._filling.windows
        assert isinstance(windows, DeviceWindows)
        most = 0
        for batch in stream:
            most = max(most, len(windows._lent))
            del batch
        assert most <= windows.most
        assert 6 * stream._filling.order(0).n_windows > 10


def test_a_bound_on_device_memory_suffices_or_is_refused(truth, late):
    late(LateSide())
    with pytest.raises(MemoryBoundError, match="device_memory=1 bytes is too little") as refused:
        stream_on(truth, device_memory=1)
    least = int(str(refused.value).split("take ")[1].split(" bytes")[0].replace(",", ""))
    with pytest.raises(MemoryBoundError):
        stream_on(truth, device_memory=least - 1)
    with stream_on(truth, device_memory=least) as stream:
        assert stream._filling.windows.most == 2
        assert sum(len(batch) for batch in stream) == stream.n_rows


def test_where_windows_live(truth, late):
    late(LateSide(n_bytes=10**9))
    assert isinstance(stream_on(truth)._filling.windows, DeviceWindows)
    assert isinstance(stream_on(truth, device_memory=0)._filling.windows, HostWindows)
    late(LateSide(n_bytes=10**5))  # a tenth of it is not enough
    assert isinstance(stream_on(truth)._filling.windows, HostWindows)


def test_the_bound_on_host_memory_holds_for_what_is_pinned(truth, late):
    late(LateSide())
    for place in PLACES:
        with pytest.raises(MemoryBoundError, match=r"^memory=1 bytes") as refused:
            stream_on(truth, **place, memory=1, threads=1)
        least = int(str(refused.value).split("take ")[1].split(" bytes")[0].replace(",", ""))
        side = late(LateSide())
        with stream_on(truth, **place, memory=least, threads=1) as stream:
            assert sum(len(batch) for batch in stream) == stream.n_rows
            assert 0 < side.n_pinned_bytes <= least + len(stream) * 8 * 8  # layer numbers of each batch


@pytest.mark.parametrize("place", PLACES)
def test_leaving_early_leaves_nothing(truth, late, place):
    side = late(LateSide())
    for n in range(4):
        stream = stream_on(truth, **place, epochs=None)
        batches = list(itertools.islice(stream, n))
        gone = weakref.ref(stream._filling.windows)
        stream.close()
        side.hand_over(side.consumer_mark(), [])  # the device finishes what was queued
        del batches, stream
        gc.collect()
        assert gone() is None


def test_a_device_that_stops_is_an_error(monkeypatch):
    monkeypatch.setattr(side, "_PATIENCE_S", 0.02)
    stuck = LateSide(rate=0.0)
    with pytest.raises(UnreachableError, match=r"has not finished copying chunks"):
        wait_for(stuck.submit(lambda: None), "copying chunks")


def test_a_device_that_stops_ends_the_stream(truth, late, monkeypatch):
    monkeypatch.setattr(side, "_PATIENCE_S", 0.02)
    late(LateSide(rate=0.0))
    monkeypatch.setattr(placement, "STAGED_BYTES", 1)
    with stream_on(truth) as stream, pytest.raises(UnreachableError, match="has not finished copying"):
        list(stream)


def test_no_such_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="sees no CUDA device"):
        open_side("cuda")
    assert open_side("cpu") is None
    assert open_side("meta") is None


@pytest.mark.parametrize("place", PLACES)
def test_peek_and_quality(truth, late, place):
    with stream_on(truth, device="cpu") as stream:
        peeked, quality = stream.peek(20), stream.quality(5)
    late(LateSide())
    with stream_on(truth, **place) as stream:
        assert np.array_equal(as_bits(stream.peek(20).rows), as_bits(peeked.rows))
        assert stream.quality(5) == quality
        check_rows(truth, next(iter(stream)))


# On a real GPU: pytest -m gpu


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_cuda_hands_out_the_same_rows(truth, place, dtype):
    options = {"hook": ("mlp_out", "resid_post"), "dtype": dtype, "epochs": 3}
    with stream_on(truth, **options, device="cpu") as stream:
        expected = everything(stream)
    found = []
    with stream_on(truth, **options, **place, device="cuda") as stream:
        for batch in stream:
            assert all(rows.is_cuda for rows in batch.hooks.values())
            assert batch.layer.is_cuda
            rows = [as_bits(rows.cpu()) for rows in batch.hooks.values()]
            names = ("layer", "sequence", "position", "token")
            found.append((*rows, *(getattr(batch, name).cpu().numpy() for name in names)))
            batch.rows.mul_(2)  # ours to write into, also while later copies run
    assert_same(found, expected)


@pytest.mark.gpu
def test_cuda_rows_of_a_large_store_stay_right_under_load(tmp_path):
    """Windows of a few MB, many times over, beside kernels that keep the consumer's stream busy."""
    truth = write_store(
        tmp_path / "s.zarr",
        n_sequences=512,
        seq_len=128,
        per_shard=64,
        rows_per_chunk=256,
        width=256,
        codec="none",
    )
    busy = torch.randn(2048, 2048, device="cuda")
    for place in PLACES:
        with actcache.open(truth.root).stream(
            batch_size=1000, window_rows=8192, device="cuda", epochs=2, threads=4, **place
        ) as stream:
            for batch in stream:
                busy = busy @ busy / 50
                on_host = [getattr(batch, n).cpu().numpy() for n in ("layer", "sequence", "position")]
                assert np.array_equal(as_bits(batch.rows.cpu()), truth.bits(*on_host))


@pytest.mark.parametrize("place", PLACES)
def test_every_chunk_is_read_once(tmp_path, late, place):
    """Batches on their way may be of a window further on than the one that was handed out last."""
    truth = write_store(tmp_path / "s.zarr", n_sequences=32, seq_len=32, per_shard=8, rows_per_chunk=64)
    late(LateSide(rate=1.0))
    with actcache.open(truth.root).stream(batch_size=64, window_rows=512, device="cuda", **place) as stream:
        n_bytes = sum(batch.rows.nbytes for batch in stream)
        assert stream.counters.row_bytes == n_bytes
