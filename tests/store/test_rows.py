"""Where rows lie: kept ones first, excluded ones after them, padding nowhere; mixed by the shard alone."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import UncommittedError, UsageError
from actcache.store.arrays import NO_DOCUMENT
from actcache.store.mixing import mix
from tests.conftest import as_bits, commit_shards, make_grid, write_store
from tests.store.strategies import store_settings


@settings(max_examples=80, deadline=None)
@given(
    per_shard=st.integers(1, 9),
    seq_len=st.integers(1, 9),
    rows_per_chunk=st.integers(1, 12),
    shard=st.integers(0, 3),
    seed=st.integers(0, 1 << 40),
    data=st.data(),
)
def test_mixing_is_a_permutation_kept_first(per_shard, seq_len, rows_per_chunk, shard, seed, data):
    grid = make_grid(4 * per_shard, seq_len, per_shard, rows_per_chunk, 0)
    kinds = data.draw(
        st.lists(st.sampled_from("kxp"), min_size=per_shard * seq_len, max_size=per_shard * seq_len)
    )
    kind = np.array(kinds).reshape(per_shard, seq_len)  # kept, excluded, padding
    document = np.where(kind == "p", NO_DOCUMENT, 7).astype(np.uint32)
    mixed = mix(grid, seed, shard, kind != "x", document)  # padding that claims to be kept is still padding
    assert (mixed.kept, mixed.stored) == ((kind == "k").sum(), (kind != "p").sum())
    rows = mixed.row_of_token
    assert (rows[kind == "p"] == -1).all()
    assert sorted(rows[kind == "k"].tolist()) == list(range(mixed.kept))
    assert sorted(rows[kind == "x"].tolist()) == list(range(mixed.kept, mixed.stored))
    for q, t in np.argwhere(kind != "p"):
        row = rows[q, t]
        assert (mixed.row_sequence[row], mixed.row_position[row]) == (shard * per_shard + q, t)
    assert len(mixed.row_sequence) == len(mixed.row_position) == grid.rows_per_shard
    assert (mixed.row_sequence[mixed.stored :] == NO_DOCUMENT).all()
    assert (mixed.row_position[mixed.stored :] == NO_DOCUMENT).all()
    again = mix(grid, seed, shard, kind != "x", document)
    assert np.array_equal(again.row_of_token, rows)


def test_mixing_depends_on_seed_and_shard():
    grid = make_grid(80, 64, 20, 64, 0)
    keep, document = np.ones((20, 64), bool), np.zeros((20, 64), np.uint32)
    base = mix(grid, 0, 0, keep, document).row_of_token
    for seed, shard in ((1, 0), (0, 1)):
        other = mix(grid, seed, shard, keep, document).row_of_token
        assert (base == other).mean() < 0.01


def test_any_chunk_is_a_fair_sample_of_its_shard():
    """A chunk of 256 rows from 32 sequences has 8 of each, give or take: chi-square with 31 degrees of freedom."""
    grid = make_grid(32, 128, 32, 256, 0)
    mixed = mix(grid, 3, 0, np.ones((32, 128), bool), np.zeros((32, 128), np.uint32))
    for chunk in np.split(mixed.row_sequence.astype(int), grid.chunks_per_shard):
        counts = np.bincount(chunk, minlength=32)
        assert ((counts - 8) ** 2 / 8).sum() < 75


def test_the_plan_says_what_the_arrays_hold(tmp_path):
    truth = write_store(tmp_path / "s.zarr", n_padding=3, hooks=("resid_post", "mlp_out"))
    catalog = actcache.open(truth.root)._catalog
    for shard in range(truth.grid.n_shards):
        at = truth.grid.sequences_of(shard)
        assert catalog.shards.kept[shard] == truth.keep[at].sum()
        assert catalog.shards.stored[shard] == truth.is_stored[at].sum()
    assert catalog.plan.n_kept == truth.keep.sum()


@settings(max_examples=25, deadline=None)
@given(chosen=store_settings(hooks=(("resid_post",), ("mlp_in", "resid_pre"))), data=st.data())
def test_reading_is_looking_up(chosen, data):
    with tempfile.TemporaryDirectory() as folder:
        truth = write_store(Path(folder) / "s.zarr", **chosen)
        store, n, seq_len = actcache.open(truth.root), chosen["n_sequences"], chosen["seq_len"]
        assert store.n_tokens == truth.is_stored.sum()
        assert store.n_kept == truth.keep.sum()
        for name in ("tokens", "document", "keep"):
            assert np.array_equal(getattr(store, name), getattr(truth, name))
        for _ in range(4):
            hook, layer = (
                data.draw(st.sampled_from(chosen["hooks"])),
                data.draw(st.sampled_from(chosen["layers"])),
            )
            index = st.integers(-n, n - 1), st.integers(-seq_len, seq_len - 1)
            q, t = (
                data.draw(st.one_of(st.none(), i, st.lists(i, max_size=5), st.slices(m)))
                for i, m in zip(index, (n, seq_len), strict=True)
            )
            rows = np.atleast_1d(np.arange(n)[slice(None) if q is None else q])
            columns = np.atleast_1d(np.arange(seq_len)[slice(None) if t is None else t])
            at = np.ix_(rows.astype(int), columns.astype(int))
            if not truth.is_stored[at].all():
                with pytest.raises(UsageError, match="padding"):
                    store.read(hook=hook, layer=layer, sequences=q, positions=t)
                continue
            found = store.read(hook=hook, layer=layer, sequences=q, positions=t)
            expected = truth.acts[hook][truth.layers.index(layer)][at]
            assert tuple(found.shape) == expected.shape
            assert np.array_equal(as_bits(found), as_bits(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1}, r"layer 1 is not in resid_post; it holds layers \[0, 3\]"),
        ({"layer": 0, "hook": "mlp_out"}, r"no capture 'mlp_out' .* it has \['resid_post'\]"),
        ({"layer": 0, "sequences": 12}, "sequences=12 is out of range: there are 12"),
        ({"layer": 0, "sequences": [0, -13]}, "out of range"),
        ({"layer": 0, "positions": [8]}, "positions=.* is out of range: there are 8"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, options, message):
    truth = write_store(tmp_path / "s.zarr")
    with pytest.raises(UsageError, match=message):
        actcache.open(truth.root).read(**options)


def test_uncommitted_rows_say_so_until_they_are_committed(tmp_path):
    truth = write_store(tmp_path / "s.zarr", commit=[0])
    store = actcache.open(truth.root)
    assert store.committed() == [0]
    assert np.array_equal(
        as_bits(store.read(layer=3, sequences=slice(0, 4))), as_bits(truth.acts["resid_post"][1, :4])
    )
    for sequences in (4, [0, 4], None):
        with pytest.raises(UncommittedError, match="shard 1 of resid_post"):
            store.read(layer=3, sequences=sequences)
    commit_shards(truth, [2, 1])
    assert store.committed() == [0, 1, 2]
    assert np.array_equal(as_bits(store.read(layer=3)), as_bits(truth.acts["resid_post"][1]))


def test_reading_some_positions_reads_only_their_chunks(tmp_path, monkeypatch):
    from actcache.store.shard import ShardReader

    truth, seen, read = write_store(tmp_path / "s.zarr"), [], ShardReader.read
    monkeypatch.setattr(
        ShardReader, "read", lambda self, *a, **k: (seen.append(a[:2]), read(self, *a, **k))[1]
    )
    actcache.open(truth.root).read(layer=3, sequences=5, positions=2)
    assert len(seen) == 1
    assert seen[0][0] == 1
