"""Stacked layers, pairs of hooks, filters, the commit order, the DataLoader wrapper and the counters."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import actcache
from actcache.errors import UsageError
from actcache.reader import dataset
from actcache.reader.dataset import StreamDataset
from actcache.reader.order import CommitOrder, list_chunks, runs_of
from tests.conftest import as_bits, sorted_rows, write_store
from tests.store.strategies import store_settings


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Two captures of three layers; 4 training shards, 1 held out."""
    root = tmp_path_factory.mktemp("selection") / "s.zarr"
    return write_store(
        root, n_sequences=20, seq_len=9, layers=(0, 3, 7), hooks=("resid_post", "mlp_out"), n_padding=5
    )


SMALL = {"batch_size": 11, "window_rows": 64}


def tokens_of(batch) -> np.ndarray:
    """[b, 2] sequence and position."""
    return np.stack([batch.sequence.numpy(), batch.position.numpy()], 1)


def kept_tokens(truth, split="train") -> np.ndarray:
    return np.unique(truth.kept(split=split)[:, 1:], axis=0)


@pytest.mark.parametrize("stack", ["feature", "layers"])
@pytest.mark.parametrize("order", ["global", "commit"])
def test_stacked_layers_are_the_layers_of_one_token(truth, stack, order):
    with actcache.open(truth.root).stream(**SMALL, stack=stack, order=order) as stream:
        assert stream.width == (4 * 3 if stack == "feature" else 4)
        batches = list(stream)
        assert len(batches) == len(stream)
    found = np.concatenate([tokens_of(batch) for batch in batches])
    assert np.array_equal(sorted_rows(found), sorted_rows(kept_tokens(truth)))
    for batch in batches:
        assert batch.layer.tolist() == [0, 3, 7]
        rows = batch.rows.reshape(len(batch), 3, 4)
        assert batch.rows.ndim == (2 if stack == "feature" else 3)
        for i, layer in enumerate((0, 3, 7)):
            assert np.array_equal(
                as_bits(rows[:, i].contiguous()), truth.bits(layer, batch.sequence, batch.position)
            )


@pytest.mark.parametrize("stack", ["data", "layers"])
def test_pairs_of_hooks_are_aligned_row_for_row(truth, stack):
    with actcache.open(truth.root).stream(**SMALL, hook=("mlp_out", "resid_post"), stack=stack) as stream:
        for batch in stream:
            assert list(batch.hooks) == ["mlp_out", "resid_post"]
            assert batch.rows is batch.hooks["mlp_out"]
            for hook, rows in batch.hooks.items():
                if stack == "data":
                    layer = batch.layer
                    expected = truth.bits(layer, batch.sequence, batch.position, hook)
                    assert np.array_equal(as_bits(rows), expected)
                else:
                    expected = truth.bits(7, batch.sequence, batch.position, hook)
                    assert np.array_equal(as_bits(rows[:, 2].contiguous()), expected)


def test_pairs_see_the_same_order_as_one_hook_alone(truth):
    store = actcache.open(truth.root)
    with store.stream(**SMALL, hook=("resid_post", "mlp_out")) as both, store.stream(**SMALL) as one:
        for a, b in zip(both, one, strict=True):
            assert torch.equal(a.rows.view(torch.uint16), b.rows.view(torch.uint16))


@pytest.mark.parametrize("stack", ["data", "layers"])
def test_filters_by_position_token_and_norm(truth, stack):
    store = actcache.open(truth.root)
    common = [int(x) for x in np.unique(truth.tokens)[:30]]
    limits = {0: 3.0, 3: 2.5, 7: 3.5}
    options = {"positions": slice(2, -1), "exclude_tokens": common, "norm_limits": limits, "stack": stack}
    with store.stream(**SMALL, **options) as stream:
        batches = list(stream)
        assert sum(len(batch) for batch in batches) == stream.n_rows
        everything = len(kept_tokens(truth)) * (3 if stack == "data" else 1)
        assert stream.n_dropped == everything - stream.n_rows > 0
    norms = np.linalg.norm(truth.floats(), axis=-1)
    expected = []
    for sequence, position in kept_tokens(truth):
        if not 2 <= position < 8 or truth.tokens[sequence, position] in common:
            continue
        passing = [norms[i, sequence, position] <= limits[layer] for i, layer in enumerate((0, 3, 7))]
        if stack == "data":
            expected += [
                (layer, sequence, position) for layer, ok in zip((0, 3, 7), passing, strict=True) if ok
            ]
        elif all(passing):
            expected.append((0, sequence, position))
    found = [
        (int(layer), *map(int, token))
        for batch in batches
        for layer, token in zip(
            batch.layer if stack == "data" else np.zeros(len(batch)), tokens_of(batch), strict=True
        )
    ]
    assert sorted(found) == sorted((int(a), int(b), int(c)) for a, b, c in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stack": "side"}, "expected one of data, feature, layers"),
        ({"order": "random"}, "expected one of global, commit"),
        ({"positions": [99]}, "out of range: sequences have 9"),
        ({"positions": slice(5, 5)}, "selects none of 9 positions"),
        ({"norm_limits": {0: 1.0}}, "one limit for each of layers"),
        (
            {"norm_limits": {0: 1.0, 3: 1.0, 7: 1.0}, "outlier_norm_ratio": 5.0},
            "no outlier_norm_ratio beside them",
        ),
        ({"outlier_norm_ratio": 0.5}, "multiple of the median norm"),
        ({"hook": ("resid_post", "resid_post")}, "name each once"),
        ({"hook": ("resid_post", "nose")}, "no capture 'nose'"),
        ({"layers": [0, 0]}, "expected distinct layers"),
        ({"layers": []}, "expected distinct layers"),
        ({"layers": [1]}, "layer 1 is not in"),
        ({"world_size": 3}, "must divide partitions=8"),
        ({"partitions": 8192}, "expected at most 4096"),
        ({"commit_shards": 0}, "commit_shards=0: expected at least 1"),
    ],
)
def test_what_cannot_be_streamed_is_refused(truth, options, message):
    with pytest.raises(UsageError, match=message):
        actcache.open(truth.root).stream(**SMALL | options)


def test_an_endless_stream_without_batches_is_refused(truth):
    stream = actcache.open(truth.root).stream(batch_size=10_000, epochs=None, drop_last=True)
    with stream, pytest.raises(UsageError, match="holds no batch of 10000"):
        next(iter(stream))


# The commit order.


@settings(max_examples=40, deadline=None)
@given(chosen=store_settings(), data=st.data())
def test_an_epoch_of_the_commit_order_is_every_kept_row_once(chosen, data):
    with tempfile.TemporaryDirectory() as folder:
        truth = write_store(Path(folder) / "s.zarr", **chosen)
        options = {
            "order": "commit",
            "commit_shards": data.draw(st.integers(1, 6)),
            "window_rows": data.draw(st.integers(1, 300)),
            "batch_size": data.draw(st.integers(1, 50)),
            "seed": data.draw(st.integers(0, 9)),
        }
        with actcache.open(truth.root).stream(**options, threads=2) as stream:
            batches = list(stream)
            found = np.concatenate([np.column_stack([b.layer, tokens_of(b)]) for b in batches])
            assert len(batches) == len(stream)
        assert np.array_equal(sorted_rows(found), sorted_rows(truth.kept()))


def test_a_window_of_the_commit_order_needs_no_later_shard():
    n_shards, depth, steps = 7, 3, 2
    chunks = list_chunks(np.arange(2, 2 + n_shards), np.full(n_shards, 60), 5)
    order = CommitOrder(
        seed=1,
        epoch=0,
        chunks=chunks,
        runs=runs_of(chunks, 1),
        n_layers=2,
        depth=depth,
        steps=steps,
        partitions=4,
    )
    assert order.n_windows == (n_shards + depth - 1) * steps
    seen = []
    for window in range(order.n_windows):
        members = order.members(window)
        shards = chunks.shard[members.listed] - 2
        newest = window // steps
        assert set(shards) == set(range(max(0, newest - depth + 1), min(newest + 1, n_shards)))
        counts = np.bincount(shards, minlength=n_shards)[
            max(0, newest - depth + 1) : min(newest + 1, n_shards)
        ]
        assert (counts == 2 * 12 // (depth * steps)).all()  # equal parts of each
        seen += [(int(a), int(b)) for a, b in zip(members.layer_i, members.listed, strict=True)]
    assert len(seen) == len(set(seen)) == 2 * len(chunks)


@pytest.mark.parametrize(
    "options", [{"stack": "layers"}, {"order": "commit", "commit_shards": 3}, {"positions": [1, 4, 5]}]
)
def test_ranks_share_and_cursors_resume_for_every_selection(truth, options):
    store = actcache.open(truth.root)
    with store.stream(**SMALL, **options) as stream:
        whole = [(tokens_of(batch), batch.layer.numpy()) for batch in stream]
    for world in (2, 8):
        ranks = []
        for rank in range(world):
            with store.stream(**SMALL, **options, rank=rank, world_size=world) as stream:
                ranks.append([tokens_of(batch) for batch in stream])
        for i, (expected, _layer) in enumerate(whole):
            parts = np.concatenate([batches[i] for batches in ranks])
            assert np.array_equal(sorted_rows(parts), sorted_rows(expected))
    for n in range(len(whole) + 1):
        with store.stream(**SMALL, **options) as stream:
            list(itertools.islice(stream, n))
            state = json.loads(json.dumps(stream.state_dict()))
        with store.stream(**SMALL, **options) as stream:
            stream.load_state_dict(state)
            rest = [tokens_of(batch) for batch in stream]
        assert len(rest) == len(whole) - n
        assert all(np.array_equal(a, b) for a, (b, _layer) in zip(rest, whole[n:], strict=True))


# The rim.


def test_a_dataloader_hands_out_whole_batches(truth):
    store = actcache.open(truth.root)
    with store.stream(**SMALL) as stream, store.stream(**SMALL) as same:
        loader = DataLoader(stream.as_dataset(), batch_size=None)
        batches = list(loader)
        assert len(batches) == len(loader)
        for a, b in zip(batches, same, strict=True):
            assert torch.equal(a.rows.view(torch.uint16), b.rows.view(torch.uint16))
        assert stream.state_dict() == StreamDataset(same).state_dict()


def test_workers_of_a_dataloader_are_refused(truth, monkeypatch):
    """A worker is told by its worker info; starting a real one would fork this process with its threads."""
    monkeypatch.setattr(dataset, "get_worker_info", lambda: object())
    with (
        actcache.open(truth.root).stream(**SMALL) as stream,
        pytest.raises(UsageError, match="num_workers=0"),
    ):
        next(iter(StreamDataset(stream)))


def test_counters_add_up(truth):
    with actcache.open(truth.root).stream(**SMALL) as stream:
        n = sum(batch.rows.nbytes for batch in stream)
        counted = stream.counters.as_json()
    assert counted["row_bytes"] == n
    assert counted["read_bytes"] > 0
    assert all(counted[name] > 0 for name in ("layout_s", "decode_s", "scatter_s", "waited_s"))


def test_one_layer_reads_its_share_of_the_bytes(truth):
    def bytes_read(layers):
        with actcache.open(truth.root).stream(**SMALL, layers=layers) as stream:
            list(stream)
            return stream.counters.read_bytes

    assert bytes_read([3]) <= 1.05 * bytes_read([0, 3, 7]) / 3
