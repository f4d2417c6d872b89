"""The stream against plain arrays: each kept row once, as it is, in an order that only its arguments change."""

import itertools
import json
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import CursorError, MemoryBoundError, UncommittedError, UsageError
from actcache.reader.filling import Filling
from actcache.store.shard import ShardReader
from tests.conftest import as_bits, check_rows, commit_shards, sorted_rows, write_store
from tests.store.strategies import store_settings


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """3 shards of training, 1 held out; 2 layers; chunks of 8 that the kept rows do not fill."""
    root = tmp_path_factory.mktemp("stream") / "s.zarr"
    return write_store(root, n_sequences=15, seq_len=9, n_padding=4)


SMALL = {"batch_size": 7, "window_rows": 32}


def order_of(truth, **options) -> np.ndarray:
    """[n, 3] layer, sequence, position of a whole stream, every row compared with the truth."""
    with actcache.open(truth.root).stream(**SMALL | options) as stream:
        return ids_of(truth, stream)


def ids_of(truth, batches) -> np.ndarray:
    parts = [check_rows(truth, batch) for batch in batches]
    return np.concatenate([np.empty((0, 3), np.int64), *parts])


@settings(max_examples=50, deadline=None)
@given(chosen=store_settings(), data=st.data())
def test_an_epoch_is_every_kept_row_once(chosen, data):
    with tempfile.TemporaryDirectory() as folder:
        truth = write_store(Path(folder) / "s.zarr", **chosen)
        splits = ["train", "holdout"] if chosen["n_holdout_shards"] else ["train"]
        layers = data.draw(st.one_of(st.none(), st.sets(st.sampled_from(chosen["layers"]), min_size=1)))
        split, drop_last = data.draw(st.sampled_from(splits)), data.draw(st.booleans())
        size = data.draw(st.integers(1, 60))
        epochs = data.draw(st.integers(1, 2))
        expected = truth.kept(sorted(layers) if layers else None, split)
        ratio = data.draw(st.sampled_from([None, 1.05, 2.0]))
        expected = without_outliers(truth, expected, ratio)
        stream = actcache.open(truth.root).stream(
            batch_size=size,
            layers=None if layers is None else list(layers),
            split=split,
            epochs=epochs,
            window_rows=data.draw(st.integers(1, 300)),
            partitions=data.draw(st.sampled_from([1, 2, 5, 8])),
            outlier_norm_ratio=ratio,
            drop_last=drop_last,
            threads=data.draw(st.sampled_from([1, 2, 8])),
            seed=data.draw(st.integers(0, 99)),
        )
        with stream:
            batches = list(stream)
            assert stream.n_rows == len(expected)
            assert len(batches) == len(stream)
        assert {len(b) for b in batches} <= {size, len(expected) % size}
        found = ids_of(truth, batches)
        per_epoch = len(expected) - (len(expected) % size if drop_last else 0)
        assert len(found) == epochs * per_epoch
        for epoch in range(epochs):
            ids = found[epoch * per_epoch : (epoch + 1) * per_epoch]
            if drop_last:
                rows = set(map(tuple, ids.tolist()))
                assert len(rows) == per_epoch
                assert rows <= set(map(tuple, expected.tolist()))
            else:
                assert np.array_equal(sorted_rows(ids), sorted_rows(expected))


def without_outliers(truth, ids, ratio):
    """The definition: rows whose norm exceeds `ratio` times the median norm of their layer's training rows."""
    if ratio is None:
        return ids
    norms = np.linalg.norm(truth.floats(), axis=-1).astype(np.float32)
    train = truth.kept(split="train")
    keep = np.ones(len(ids), bool)
    for i, layer in enumerate(truth.layers):
        of_layer = train[train[:, 0] == layer]
        limit = float(np.median(norms[i][of_layer[:, 1], of_layer[:, 2]])) * ratio
        mine = ids[:, 0] == layer
        value = norms[i][ids[:, 1], ids[:, 2]]
        assume((np.abs(value / limit - 1) > 1e-6).all())  # on the edge the last bit of the limit would decide
        keep &= ~mine | (value <= limit)
    return ids[keep]


def test_same_arguments_same_order_and_other_arguments_another(truth):
    base = order_of(truth)
    assert np.array_equal(base, order_of(truth))
    assert sorted_rows(base).tolist() == truth.kept().tolist()
    for other in ({"seed": 1}, {"window_rows": 64}, {"partitions": 2}):
        assert not np.array_equal(base, order_of(truth, **other)), other
    two = order_of(truth, epochs=2)
    assert np.array_equal(two[: len(base)], base)
    assert np.array_equal(sorted_rows(two[len(base) :]), sorted_rows(base))
    assert not np.array_equal(two[len(base) :], base)


@pytest.mark.parametrize(
    "options",
    [{"threads": 2}, {"threads": 8}, {"memory": 80_000_000, "threads": 1}, {"dtype": torch.float32}],
)
def test_delivery_changes_no_order(truth, options):
    with actcache.open(truth.root).stream(**SMALL, **options) as stream:
        ids = [np.stack([b.layer, b.sequence, b.position], 1) for b in stream]
    assert np.array_equal(np.concatenate(ids), order_of(truth, threads=1))


def test_dtype_converts_exactly(truth):
    with actcache.open(truth.root).stream(**SMALL, dtype=torch.float32) as stream:
        for batch in stream:
            assert batch.rows.dtype == torch.float32
            at = [np.searchsorted(truth.layers, batch.layer.numpy()), batch.sequence, batch.position]
            assert np.array_equal(batch.rows.numpy(), truth.floats()[tuple(at)])


@contextmanager
def delayed(seed: int):
    """Chunks take a random time to read, so threads overtake one another."""
    rng, lock, read = np.random.default_rng(seed), threading.Lock(), ShardReader.load

    def slow(self, *args, **kwargs):
        with lock:
            delay = rng.exponential(0.0005)
        threading.Event().wait(delay)
        return read(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "load", slow)
        yield


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_timing_changes_no_order(truth, threads):
    expected = order_of(truth, epochs=2)
    with delayed(threads):
        assert np.array_equal(order_of(truth, epochs=2, threads=threads), expected)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_global_batches(truth, world_size, drop_last):
    """Batch for batch, all ranks together have the rows of a single reader, and no chunk is read twice."""
    options = SMALL | {"batch_size": 16, "epochs": 2, "drop_last": drop_last}
    store = actcache.open(truth.root)
    with store.stream(**options) as stream:
        expected = [sorted_rows(check_rows(truth, batch)) for batch in stream]
    reads, per_rank = [], []
    for rank in range(world_size):
        with recorded_reads() as read, store.stream(**options, rank=rank, world_size=world_size) as stream:
            per_rank.append([check_rows(truth, batch) for batch in stream])
        reads.append(read)
    assert all(len(batches) == len(expected) for batches in per_rank)
    for together, alone in zip(zip(*per_rank, strict=True), expected, strict=True):
        assert np.array_equal(sorted_rows(np.concatenate(together)), alone)
    sizes = [len(ids) for batches in per_rank for ids in batches]
    assert max(sizes) <= 16 / world_size + 8  # a fair share, but for whole rows of each partition
    counted = [chunk for read in reads for chunk in read]
    assert len(set(counted)) * 2 == len(counted)  # every chunk once per epoch, by one rank


@contextmanager
def recorded_reads():
    read, seen = ShardReader.load, []

    def recorded(self, layer_i, chunk, **named):
        seen.append((self.key, layer_i, chunk))
        return read(self, layer_i, chunk, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "load", recorded)
        yield seen


def test_one_layer_reads_only_its_chunks(truth):
    with recorded_reads() as seen:
        order_of(truth, layers=[truth.layers[1]])
    assert {layer_i for _, layer_i, _ in seen} == {1}
    assert {key.rsplit(".", 2)[1] for key, _, _ in seen} == {"1", "2", "3"}


# The cursor.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 50},
        {"batch_size": 200, "window_rows": 16},
        {"drop_last": True},
        {"rank": 1, "world_size": 2},
    ],
    ids=str,
)
def test_a_cursor_taken_after_any_batch_goes_on_exactly(truth, options):
    options = SMALL | {"epochs": 2} | options
    store = actcache.open(truth.root)
    stream = store.stream(**options)
    expected, states = [], [stream.state_dict()]
    for batch in stream:
        expected.append(check_rows(truth, batch))
        states.append(stream.state_dict())
    stream.close()
    for i, state in enumerate(states):
        text = json.dumps(state)
        assert len(text) < 4096
        with store.stream(**options) as resumed:
            resumed.load_state_dict(json.loads(text))
            assert resumed.state_dict() == state
            rest, again = [], None
            for batch in resumed:  # stop once more, half-way, and go on in yet another stream
                rest.append(check_rows(truth, batch))
                if len(rest) * 2 >= len(expected) - i:
                    again = json.loads(json.dumps(resumed.state_dict()))
                    break
        if again is not None:
            assert again == states[i + len(rest)]
            with store.stream(**options) as last:
                last.load_state_dict(again)
                rest += [check_rows(truth, batch) for batch in last]
        assert len(rest) == len(expected) - i
        for a, b in zip(rest, expected[i:], strict=True):
            assert np.array_equal(a, b)


def test_reading_ahead_does_not_show_in_the_cursor(truth):
    with actcache.open(truth.root).stream(**SMALL, threads=8) as stream:
        first = stream.state_dict()
        batches = iter(stream)
        next(batches)
        wait_until(lambda: stream._filling._fills and all(f.is_done for f in stream._filling._fills.values()))
        after_one = stream.state_dict()
        assert (after_one["epoch"], after_one["window"], after_one["slot"]) == (0, 0, SMALL["batch_size"])
        assert first["slot"] == 0
        batches.close()


def wait_until(condition, seconds=5.0):
    ended = threading.Event()
    for _ in range(int(seconds * 1000)):
        if condition():
            return
        ended.wait(0.001)
    raise AssertionError("it never came")


def test_iterating_again_goes_on_from_the_cursor(truth):
    expected = order_of(truth)
    with actcache.open(truth.root).stream(**SMALL) as stream:
        found = [check_rows(truth, batch) for batch in itertools.islice(stream, 5)]
        found += [check_rows(truth, batch) for batch in stream]
        assert list(stream) == []
        stream.set_epoch(0)
        again = ids_of(truth, stream)
    assert np.array_equal(np.concatenate(found), expected)
    assert np.array_equal(again, expected)


def test_one_stream_may_go_back(truth):
    expected = order_of(truth)
    with actcache.open(truth.root).stream(**SMALL) as stream:
        state = stream.state_dict()
        for n in (3, 1, 6):
            assert np.array_equal(ids_of(truth, itertools.islice(stream, n)), expected[: n * 7])
            stream.load_state_dict(state)
        assert np.array_equal(ids_of(truth, stream), expected)


def test_a_cursor_of_another_stream_is_refused_by_name(truth, tmp_path):
    other_store = write_store(tmp_path / "other.zarr", n_sequences=15, seq_len=9, n_padding=4, seed=1)
    store = actcache.open(truth.root)
    state = json.loads(json.dumps(store.stream(**SMALL).state_dict()))
    changes = {
        "layers": {"layers": [0]},
        "stack": {"stack": "layers"},
        "order": {"order": "commit"},
        "commit_shards": {"order": "commit", "commit_shards": 2},
        "positions": {"positions": slice(1, None)},
        "exclude_tokens": {"exclude_tokens": [7]},
        "split": {"split": "holdout"},
        "seed": {"seed": 1},
        "batch_size": {"batch_size": 8},
        "window_rows": {"window_rows": 33},
        "partitions": {"partitions": 4},
        "norm_limits": {"outlier_norm_ratio": 2.0},
        "drop_last": {"drop_last": True},
        "run_chunks": {"run_chunks": 2},
        "shards": {"partial": "1-2"},
    }
    assert {*changes, "plan", "captures", "hooks"} == set(state["settings"])
    streams = {name: store.stream(**SMALL | change) for name, change in changes.items()}
    streams["plan"] = streams["captures"] = actcache.open(other_store.root).stream(**SMALL)
    for name, stream in streams.items():
        before = stream.state_dict()
        with pytest.raises(CursorError, match=rf"\b{name} is "):
            stream.load_state_dict(state)
        assert stream.state_dict() == before
        assert stream.fingerprint != store.stream(**SMALL).fingerprint
    for harmless in ({"threads": 8}, {"epochs": 5}, {"rank": 1, "world_size": 2}, {"memory": 10**9}):
        store.stream(**SMALL | harmless).load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"version": 2}, {"version": 1, "settings": {}}, {"version": 1}])
def test_what_is_no_cursor_is_refused(truth, state):
    with actcache.open(truth.root).stream(**SMALL) as stream, pytest.raises(CursorError):
        stream.load_state_dict(state)


# Peeking, keeping, leaving.


def test_peek_moves_nothing(truth):
    expected = order_of(truth)
    with actcache.open(truth.root).stream(**SMALL) as stream:
        next(iter(stream))
        before = stream.state_dict()
        for n in (1, 7, 30, 10**6):
            peeked = stream.peek(n)
            ids = np.stack([peeked.layer, peeked.sequence, peeked.position], 1)
            assert np.array_equal(ids, expected[:n])
            assert np.array_equal(as_bits(peeked.rows), truth.bits(*ids.T))
            assert stream.state_dict() == before
        assert np.array_equal(ids_of(truth, stream), expected[7:])
    assert not stream_threads()


def test_batches_are_the_consumers_to_keep_and_to_write_into(truth):
    """Each is filled with its own number; at the end all still hold it: no two share memory, none is used again."""
    expected = order_of(truth, epochs=3)
    kept, found = [], []
    with actcache.open(truth.root).stream(**SMALL, epochs=3) as stream:
        for i, batch in enumerate(stream):
            found.append(check_rows(truth, batch))
            batch.rows.fill_(i)
            kept.append(batch)
    assert np.array_equal(np.concatenate(found), expected)
    for i, batch in enumerate(kept):
        assert (batch.rows == i).all()
        assert np.array_equal(np.stack([batch.layer, batch.sequence, batch.position], 1), found[i])


def test_buffers_are_used_again(truth):
    with actcache.open(truth.root).stream(**SMALL, epochs=8) as stream:
        n_batches = sum(len(batch) > 0 for batch in stream)
        assert n_batches == len(stream)
        assert 8 * stream._filling.order(0).n_windows >= 24
        assert stream._filling.windows.pools[0].n_allocated <= 3


def test_two_buffers_are_enough_and_still_read_ahead(truth):
    options = SMALL | {"epochs": 4}
    with pytest.raises(MemoryBoundError) as refused:
        actcache.open(truth.root).stream(**options, memory=1)
    least = int(str(refused.value).split("take ")[1].split(" bytes")[0].replace(",", ""))
    with pytest.raises(MemoryBoundError):
        actcache.open(truth.root).stream(**options, memory=least - 1)
    ahead = set()
    with actcache.open(truth.root).stream(**options, memory=least) as stream:
        for _batch in stream:
            ahead |= set(stream._filling._fills)
        assert stream._filling.windows.pools[0].n_allocated == 2
        assert len(ahead) >= 3 * stream._filling.order(0).n_windows


def test_converted_batches_do_not_hold_the_window(truth):
    with actcache.open(truth.root).stream(**SMALL, epochs=4, dtype=torch.float32) as stream:
        kept = list(stream)
        assert stream._filling.windows.pools[0].n_allocated <= 3
    assert len(kept) > 3


def stream_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("actcache-stream", "actcache-fetch"))]


def test_leaving_early_leaves_nothing(truth):
    for n in range(4):
        stream = actcache.open(truth.root).stream(**SMALL, epochs=None, threads=4)
        kept = list(itertools.islice(stream, n))
        stream.close()
        assert not stream_threads()
        assert not stream._filling._fills
        assert all(np.array_equal(as_bits(b.rows), truth.bits(b.layer, b.sequence, b.position)) for b in kept)
        del kept
        wait_until(
            lambda stream=stream: (
                stream._filling.windows.pools[0].n_free == stream._filling.windows.pools[0].n_allocated
            )
        )
        stream.close()


def test_closing_does_not_wait_for_what_was_read_ahead(truth):
    gate, read = threading.Event(), ShardReader.load
    options = SMALL | {"window_rows": 64, "threads": 1}
    with actcache.open(truth.root).stream(**options) as stream:
        n_chunks = len(stream._filling._lay_out(0, 0).sources)
    loaded, waiting = [], []

    def gated(self, *args, **kwargs):
        loaded.append(1)
        if len(loaded) > n_chunks:  # of the second window
            waiting.append(1)
            gate.wait(5)
        return read(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "load", gated)
        stream = actcache.open(truth.root).stream(**options)
        next(iter(stream))
        wait_until(lambda: waiting)
        closing = threading.Thread(target=stream.close)
        closing.start()
        wait_until(lambda: not stream._filling._fills)
        gate.set()
        closing.join(5)
        assert not closing.is_alive()
        assert len(waiting) == 1  # the one in flight, and no chunk more


def test_the_next_window_is_begun_before_this_one_is_whole(truth):
    """So that a disk has work while the last chunks are decoded; after this one's, which come first."""
    gate, begun, read, begin = threading.Event(), [], ShardReader.load, Filling._begin
    loaded = []

    def counted(self, epoch, window):
        begun.append(window)
        return begin(self, epoch, window)

    def gated(self, *args, **kwargs):
        assert gate.wait(30)
        loaded.append(len(loaded))
        return read(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "load", gated)
        patch.setattr(Filling, "_begin", counted)
        with actcache.open(truth.root).stream(**SMALL | {"window_rows": 64}, threads=1) as stream:
            reader = threading.Thread(target=lambda: next(iter(stream)))
            reader.start()
            wait_until(lambda: len(begun) == 2)
            assert loaded == []
            gate.set()
            reader.join(30)
    assert begun[:2] == [0, 1]


def test_a_stream_may_be_used_after_close(truth):
    stream = actcache.open(truth.root).stream(**SMALL)
    first = ids_of(truth, itertools.islice(stream, 3))
    stream.close()
    rest = ids_of(truth, stream)
    stream.close()
    assert np.array_equal(np.concatenate([first, rest]), order_of(truth))


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"window_rows": 0}, "window_rows=0"),
        ({"partitions": 0}, "partitions=0"),
        ({"world_size": 3}, "rank 0 of 3"),
        ({"world_size": 2, "rank": 2}, "rank 2 of 2"),
        ({"layers": []}, "distinct layers"),
        ({"layers": [0, 0]}, "distinct layers"),
        ({"layers": [1]}, "layer 1 is not in resid_post"),
        ({"split": "test"}, "split='test'"),
        ({"hook": "mlp_in"}, "no capture 'mlp_in'"),
        ({"outlier_norm_ratio": 1.0}, "outlier_norm_ratio=1.0"),
    ],
)
def test_arguments_that_cannot_be_used(truth, options, message):
    with pytest.raises(UsageError, match=message):
        actcache.open(truth.root).stream(**SMALL | options)


def test_no_holdout_says_so(tmp_path):
    truth = write_store(tmp_path / "s.zarr", n_holdout_shards=0)
    with pytest.raises(UsageError, match="built with --holdout 0"):
        actcache.open(truth.root).stream(split="holdout")


def test_an_unfinished_store_is_refused_until_it_is_finished(tmp_path):
    truth = write_store(tmp_path / "s.zarr", commit=[0, 2])
    store = actcache.open(truth.root)
    with pytest.raises(UncommittedError, match=r"1 of 2 train shards .*the first is 1"):
        store.stream()
    assert not store.is_complete
    with store.stream(split="holdout", batch_size=5) as stream:
        assert np.array_equal(sorted_rows(ids_of(truth, stream)), truth.kept(split="holdout"))
    commit_shards(truth, [1])
    assert store.is_complete
    with store.stream(batch_size=5) as stream:
        assert np.array_equal(sorted_rows(ids_of(truth, stream)), truth.kept())
