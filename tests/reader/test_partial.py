"""An unfinished store: refused, or what is committed frozen into the order, so that what comes later changes nothing."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import actcache
from actcache.errors import CursorError, UncommittedError, UsageError
from actcache.reader.selection import parse_shards, shards_text
from tests.conftest import check_rows, commit_shards, sorted_rows, write_store

SMALL = {"batch_size": 7, "window_rows": 32}


def ids_of(truth, batches) -> np.ndarray:
    return np.concatenate([np.empty((0, 3), np.int64), *(check_rows(truth, batch) for batch in batches)])


def kept_in(truth, shards) -> np.ndarray:
    kept = truth.kept()
    return kept[np.isin(kept[:, 1] // truth.grid.sequences_per_shard, list(shards))]


@pytest.fixture
def truth(tmp_path):
    """Shard 0 held out; of 1 to 5 three are committed, with a gap."""
    return write_store(tmp_path / "s.zarr", n_sequences=24, commit=[0, 1, 2, 4])


@pytest.mark.parametrize("order", ["global", "commit"])
def test_what_is_committed_is_frozen_into_the_order(truth, order):
    store = actcache.open(truth.root)
    with pytest.raises(UncommittedError, match=r"2 of 5 train shards .*the first is 3.*--partial"):
        store.stream(**SMALL, order=order)
    with store.stream(**SMALL, order=order, partial=True) as stream:
        assert stream.shards == stream.settings["shards"] == "1-2,4"
        first = ids_of(truth, stream)
        state = json.loads(json.dumps(stream.state_dict()))
    assert np.array_equal(sorted_rows(first), sorted_rows(kept_in(truth, {1, 2, 4})))
    commit_shards(truth, [3])
    with actcache.open(truth.root).stream(**SMALL, order=order, partial="1-2,4") as again:
        assert np.array_equal(ids_of(truth, again), first)
        again.load_state_dict(state)
    with actcache.open(truth.root).stream(**SMALL, order=order, partial=True) as more:
        assert more.shards == "1-4"
        with pytest.raises(
            CursorError, match=r"shards is '1-2,4' in the cursor and '1-4' here .partial= takes"
        ):
            more.load_state_dict(state)
        assert np.array_equal(sorted_rows(ids_of(truth, more)), sorted_rows(kept_in(truth, {1, 2, 3, 4})))


def test_a_cursor_goes_on_while_the_build_does(truth):
    """From every batch, after more was committed."""
    store = actcache.open(truth.root)
    with store.stream(**SMALL, partial=True) as stream:
        shards, states, expected = stream.shards, [stream.state_dict()], []
        for batch in stream:
            expected.append(check_rows(truth, batch))
            states.append(stream.state_dict())
    commit_shards(truth, [3, 5])
    for i, state in enumerate(states):
        with actcache.open(truth.root).stream(**SMALL, partial=shards) as resumed:
            resumed.load_state_dict(state)
            assert np.array_equal(ids_of(truth, resumed), np.concatenate([expected[0][:0], *expected[i:]]))


def test_of_a_finished_store_it_is_everything(truth):
    commit_shards(truth, [3, 5])
    store = actcache.open(truth.root)
    with store.stream(**SMALL) as whole, store.stream(**SMALL, partial=True) as partial:
        assert partial.settings == whole.settings
        assert partial.settings["shards"] is None
        assert partial.shards == "1-5"
        assert np.array_equal(ids_of(truth, partial), ids_of(truth, whole))


def test_several_captures_have_in_common_what_both_have(tmp_path):
    truth = write_store(
        tmp_path / "s.zarr", n_sequences=24, hooks=("resid_post", "mlp_out"), commit=[0, 1, 2, 4]
    )
    (truth.root / "acts/mlp_out/ledger/c.0.2").unlink()
    with actcache.open(truth.root).stream(**SMALL, hook=("resid_post", "mlp_out"), partial=True) as stream:
        assert stream.shards == "1,4"
        assert len(ids_of(truth, stream)) == stream.n_rows


def test_filters_count_what_is_streamed(truth):
    """Also a limit relative to the median: of the shards that are frozen, and no others."""
    norms = np.linalg.norm(truth.floats(), axis=-1).astype(np.float32)
    kept = kept_in(truth, {1, 2, 4})
    with actcache.open(truth.root).stream(**SMALL, partial=True, outlier_norm_ratio=1.3) as stream:
        limits = stream.selection.rules.norm_limits
        assert limits is not None
        for i, layer in enumerate(truth.layers):
            of_layer = kept[kept[:, 0] == layer]
            assert limits[i] == float(np.median(norms[i][of_layer[:, 1], of_layer[:, 2]])) * 1.3
        found = ids_of(truth, stream)
        assert len(found) == stream.n_rows == len(kept) - stream.n_dropped


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"partial": True, "world_size": 2}, UsageError, "partial=stream.shards"),
        ({"partial": "1-3"}, UncommittedError, "1 of 3 train shards .*the first is 3"),
        ({"partial": "0-2"}, UsageError, "the train split has shards 1-5"),
        ({"partial": "7"}, UsageError, "the train split has shards 1-5"),
        ({"partial": "all"}, UsageError, "expected shards such as '3-57,60'"),
        ({"partial": "2,1"}, UsageError, "distinct shards, ascending"),
        ({"partial": "1-"}, UsageError, "expected shards such as"),
    ],
)
def test_what_cannot_be_frozen_is_refused(truth, options, error, message):
    with pytest.raises(error, match=message):
        actcache.open(truth.root).stream(**SMALL | options)


def test_ranks_are_told_the_shards(truth):
    store = actcache.open(truth.root)
    with store.stream(**SMALL, partial=True) as stream:
        shards, alone = stream.shards, [check_rows(truth, batch) for batch in stream]
    ranks = []
    for rank in range(2):
        with store.stream(**SMALL, partial=shards, rank=rank, world_size=2) as stream:
            ranks.append([check_rows(truth, batch) for batch in stream])
    for parts, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert np.array_equal(sorted_rows(np.concatenate(parts)), sorted_rows(whole))


def test_nothing_committed_yet(tmp_path):
    truth = write_store(tmp_path / "s.zarr", n_sequences=24, commit=[0])
    with pytest.raises(UncommittedError, match=r"no train shard .* is committed yet"):
        actcache.open(truth.root).stream(partial=True)


@given(st.sets(st.integers(0, 60), min_size=1).map(sorted))
def test_shards_as_text(shards):
    assert parse_shards(shards_text(shards)) == shards


def test_a_cursor_stays_small_whatever_is_committed(tmp_path):
    """Every other of 2,000 shards would be a long text."""
    truth = write_store(
        tmp_path / "s.zarr",
        n_sequences=2000,
        seq_len=1,
        per_shard=1,
        rows_per_chunk=1,
        drop=0.0,
        n_holdout_shards=0,
        commit=range(0, 2000, 2),
    )
    with actcache.open(truth.root).stream(batch_size=100, partial=True) as stream:
        assert len(json.dumps(stream.state_dict())) < 4096
        assert parse_shards(stream.shards) == list(range(0, 2000, 2))
        assert len(ids_of(truth, stream)) == 2000
