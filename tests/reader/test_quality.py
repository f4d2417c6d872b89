"""Shuffle quality: expectations against simulation, and what the meter says of good and bad orders."""

import numpy as np
import pytest
import torch

import actcache
from actcache.errors import UsageError
from actcache.flow import Batch
from actcache.reader.quality import QualityMeter, expected
from tests.conftest import write_store


def test_expectations_equal_a_simulation():
    counts, b, rng = np.array([1, 1, 2, 5, 9, 30, 0]), 12, np.random.default_rng(0)
    rows = np.repeat(np.arange(len(counts)), counts)
    distinct, previous, largest = [], [], []
    for _ in range(4000):
        order = rng.permutation(rows)
        first, second = order[:b], order[b : 2 * b]
        distinct.append(len(set(first)))
        previous.append(np.isin(second, first).mean())
        largest.append(np.bincount(first).max() / b)
    found = expected(counts, b)
    assert found.distinct == pytest.approx(np.mean(distinct), rel=0.02)
    assert found.previous == pytest.approx(np.mean(previous), rel=0.02)
    assert found.largest == pytest.approx(np.mean(largest), rel=0.1)


def test_expectations_of_a_batch_of_everything():
    assert expected(np.array([3, 4]), 100).distinct == 2


def batches_of(rows, groups, size):
    for at in range(0, len(rows) - size + 1, size):
        one = torch.from_numpy(groups[at : at + size])
        yield Batch(
            torch.from_numpy(rows[at : at + size]), one * 0, one, one * 0, lookup=lambda _name, one=one: one
        )


def test_variance_ratio_of_random_and_of_sorted_rows():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(400), 50)
    rows = rng.normal(size=(400, 8))[groups] + rng.normal(size=(len(groups), 8))
    ratios = {}
    for name, order in (("random", rng.permutation(len(groups))), ("sorted", np.arange(len(groups)))):
        meter = QualityMeter(len(groups))
        for batch in batches_of(rows[order], groups[order], 100):
            meter.update(batch)
        ratios[name] = meter.variance_ratio()
    assert 0.85 < ratios["random"] < 1.15
    assert ratios["sorted"] > 20


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """40 training shards of strongly correlated rows: each sequence has a mean of its own."""
    rng = np.random.default_rng(2)
    shape = (2, 656, 16, 8)
    acts = rng.normal(size=shape) * 0.5 + rng.normal(size=(2, 656, 1, 8))
    bits = (acts.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    root = tmp_path_factory.mktemp("quality") / "s.zarr"
    return write_store(
        root, n_sequences=656, seq_len=16, per_shard=16, rows_per_chunk=16, width=8, drop=0.0, acts=bits
    )


def test_a_wide_window_is_as_good_as_chance(truth):
    with actcache.open(truth.root).stream(batch_size=256, window_rows=8192) as stream:
        before = stream.state_dict()
        quality = stream.quality(80)
        assert stream.state_dict() == before
    assert quality.n_batches == 80
    assert 0.8 < quality.variance_ratio < 1.2
    assert quality.sequences == pytest.approx(quality.window["sequences"], rel=0.03)
    assert quality.documents == pytest.approx(quality.window["documents"], rel=0.03)
    assert quality.previous_sequence == pytest.approx(quality.window["previous_sequence"], rel=0.05)
    assert not quality.warnings


def test_a_narrow_window_is_told_apart_and_warned_of(truth):
    with actcache.open(truth.root).stream(batch_size=256, window_rows=256) as stream:
        quality = stream.quality(80)
    assert quality.variance_ratio > 1.5
    assert any("raise window_rows" in warning for warning in quality.warnings)
    assert quality.sequences < 0.8 * quality.everything["sequences"]
    assert quality.previous_sequence > 0


def test_at_the_end_there_is_nothing_to_measure(truth):
    with actcache.open(truth.root).stream(batch_size=4096) as stream:
        list(stream)
        with pytest.raises(UsageError, match="at its end"):
            stream.quality()
