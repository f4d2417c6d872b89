"""Kept rows in the order of the text against the arrays the store was written from, and against the stream's filters."""

import numpy as np
import pytest
import torch

import actcache
from actcache.errors import UncommittedError, UsageError
from tests.conftest import as_bits, write_store


@pytest.mark.parametrize("split", ["train", "holdout"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kept_row_once_in_the_order_of_the_text(tmp_path, split, dtype):
    truth = write_store(tmp_path / "s.zarr", n_padding=11, n_sequences=13, dtype=dtype)
    places = []
    for shard in actcache.open(truth.root).iter_shards(split):
        for i, layer in enumerate(truth.layers):
            rows = shard.rows(layer)
            assert np.array_equal(as_bits(rows), truth.bits(layer, shard.sequence, shard.position))
            assert shard.passes[i].all()
        assert np.array_equal(shard.token, truth.tokens[shard.sequence, shard.position])
        assert np.array_equal(shard.document, truth.document[shard.sequence, shard.position])
        assert np.array_equal(shard.tokens, truth.tokens[shard.sequences])
        assert shard.rows(layer, dtype=torch.float64).dtype == torch.float64
        places.append(np.stack([shard.sequence, shard.position], 1))
    expected = truth.kept(layers=truth.layers[:1], split=split)[:, 1:]
    assert np.array_equal(np.concatenate(places), expected)


def test_what_passes_is_what_the_stream_hands_out(tmp_path):
    truth = write_store(tmp_path / "s.zarr", layers=(0, 3, 5), n_sequences=20)
    store = actcache.open(truth.root)
    rules = {
        "outlier_norm_ratio": 1.3,
        "positions": slice(1, 7),
        "exclude_tokens": truth.tokens[3, :5].tolist(),
    }
    passing = {
        (layer, int(q), int(t))
        for shard in store.iter_shards("train", **rules)
        for i, layer in enumerate(shard.layers)
        for q, t in zip(shard.sequence[shard.passes[i]], shard.position[shard.passes[i]], strict=True)
    }
    streamed = set()
    with store.stream(batch_size=16, **rules) as stream:
        for batch in stream:
            streamed |= set(
                zip(batch.layer.tolist(), batch.sequence.tolist(), batch.position.tolist(), strict=True)
            )
    assert passing == streamed
    assert len(passing) < len(truth.kept(split="train"))


def test_stops_with_the_sequence_that_completes_the_tokens(tmp_path):
    truth = write_store(tmp_path / "s.zarr", n_sequences=20)
    places = truth.kept(layers=truth.layers[:1])[:, 1:]
    for wanted in (1, 7, 30, 10**6):
        shards = list(actcache.open(truth.root).iter_shards("train", n_tokens=wanted))
        found = np.concatenate([np.stack([s.sequence, s.position], 1) for s in shards])
        assert np.array_equal(found, places[: len(found)])
        last = found[-1, 0]
        assert (found[:, 0] < last).sum() < wanted
        assert len(found) == (places[:, 0] <= last).sum()


def test_refusals(tmp_path):
    truth = write_store(tmp_path / "s.zarr", commit=[0], n_holdout_shards=1)
    store = actcache.open(truth.root)
    with pytest.raises(UncommittedError):
        store.iter_shards("train")
    (shard,) = store.iter_shards("holdout")
    with pytest.raises(UsageError, match="layer 1 is not in resid_post"):
        shard.rows(1)
    with pytest.raises(UsageError, match="mlp_out"):
        shard.rows(0, hook="mlp_out")
    none_held_out = write_store(tmp_path / "t.zarr", n_holdout_shards=0)
    with pytest.raises(UsageError, match="--holdout"):
        actcache.open(none_held_out.root).iter_shards("holdout")
