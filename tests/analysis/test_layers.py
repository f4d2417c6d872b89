"""Distributions over layers against dense arrays, by formula, and against a published dataset's row."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.layers import LayerCounts, histogram_of_distances, histogram_of_means, spread
from tests.analysis.made_up import LAYERS, cuts, dense, merged, padded


def update(counts, a):
    for i, layer in enumerate(LAYERS):
        counts.update(layer, *padded(a[:, i]))


def test_counts_totals_and_what_follows_from_them():
    a = dense(1, 300, 4, 30)
    a[:, :, 7] = 0  # dead
    a[:, [0, 2, 3], 8] = 0  # one layer only
    counts = LayerCounts(LAYERS, 30)
    update(counts, a)
    found = counts.compute()
    assert found.counts.dtype == np.int64
    assert found.totals.dtype == np.float64
    assert np.array_equal(found.counts, (a > 1e-3).sum(0))
    np.testing.assert_allclose(found.totals, a.astype(np.float64).sum(0), rtol=1e-12)
    assert found.n_rows.tolist() == [300] * 4
    numbers = np.array(LAYERS, float)
    for f in range(30):
        if f == 7:
            assert not found.is_alive[f]
            assert math.isnan(found.mean[f])
            continue
        p = a[:, :, f].astype(np.float64).sum(0)
        p /= p.sum()
        mean = (numbers * p).sum()
        moments = {k: ((numbers - mean) ** k * p).sum() for k in (2, 3, 4)}
        np.testing.assert_allclose(found.p[:, f], p, rtol=1e-12)
        assert found.mean[f] == pytest.approx(mean, rel=1e-12)
        assert found.var[f] == pytest.approx(moments[2], rel=1e-9, abs=1e-12)
        assert found.std[f] == pytest.approx(moments[2] ** 0.5, rel=1e-9, abs=1e-6)
        assert found.n_layers[f] == (a[:, :, f] > 0).any(0).sum()
        if f == 8:
            assert found.entropy[f] == 0
            assert math.isnan(found.bimodality[f])
            continue
        assert found.entropy[f] == pytest.approx(-(p * np.log(p)).sum() / np.log(4), rel=1e-9)
        skewness, kurtosis = moments[3] / moments[2] ** 1.5, moments[4] / moments[2] ** 2
        assert found.bimodality[f] == pytest.approx((skewness**2 + 1) / kurtosis, rel=1e-9)
    order = found.by_mean_layer()
    assert sorted(order) == sorted(set(range(30)) - {7})
    assert (np.diff(found.mean[order]) >= 0).all()


def test_histograms_of_mean_layers_hold_every_alive_latent_once():
    counts = LayerCounts(LAYERS, 40)
    update(
        counts, np.concatenate([dense(5, 200, 4, 39, share=0.05), np.zeros((200, 4, 1), np.float32)], axis=2)
    )
    found = counts.compute()
    means = found.mean[:39]
    h = histogram_of_means(found)
    assert np.array_equal(h.edges, np.linspace(0, 9, 65))
    assert h.counts.sum() == 39
    for count, start, stop in zip(h.counts[:-1], h.edges[:-2], h.edges[1:-1], strict=True):
        assert count == ((means >= start) & (means < stop)).sum()
    assert (h.density * np.diff(h.edges)).sum() == pytest.approx(1)
    near = histogram_of_distances(found)
    assert near.edges[0] == 0
    assert near.edges[-1] == 2.5  # layers 4 and 9 are 5 apart
    assert near.counts.sum() == 39
    assert near.counts[0] == (np.abs(means[:, None] - np.array(LAYERS)).min(1) < 2.5 / 24).sum()


def test_histograms_of_one_layer_and_of_no_latent():
    counts = LayerCounts((7,), 3)
    assert histogram_of_means(counts.compute()).counts.sum() == 0
    counts.update(7, np.array([[1.0]]), np.array([[1]]))
    found = counts.compute()
    assert histogram_of_means(found).counts[0] == 1
    assert histogram_of_distances(found).counts[0] == 1


def test_known_shapes():
    counts = LayerCounts((0, 1, 2, 3), 3)
    for layer, values in zip((0, 1, 2, 3), ([1, 1, 0], [0, 1, 1], [0, 1, 0], [1, 1, 0]), strict=True):
        counts.update(layer, np.array([values], float), np.array([[0, 1, 2]]))
    found = counts.compute(min_count=1)
    assert found.entropy.tolist() == pytest.approx([0.5, 1.0, 0.0])
    assert found.bimodality[0] == pytest.approx(1.0)  # two equal points
    assert found.bimodality[1] == pytest.approx(1 / 1.64)  # uniform on four points: kurtosis 1.64
    assert found.n_layers.tolist() == [2, 4, 1]
    assert counts.compute(min_count=2).n_layers.tolist() == [0, 0, 0]


def test_what_is_at_or_below_the_threshold_is_not_active():
    counts = LayerCounts((5,), 2)
    counts.update(5, np.array([[1e-3, 1.1e-3]]), np.array([[0, 1]]))
    assert counts.compute().counts.tolist() == [[0, 1]]


def test_a_published_row_is_consistent_with_its_counts():
    """Latent 0 of the dataset mlsae-gpt2-x64-k32-dists: count 126, layer_mean 5.220, layer_std 3.968."""
    published = [40, 0, 9, 8, 3, 8, 12, 3, 4, 12, 27, 0]
    counts = LayerCounts(tuple(range(12)), 1)
    for layer, n in enumerate(published):
        counts.update(layer, np.full((n, 1), 163.78 / 126), np.zeros((n, 1), np.int64))
    found = counts.compute()
    assert found.count.tolist() == [126]
    assert found.total.tolist() == pytest.approx([163.78])
    assert found.n_layers.tolist() == [10]
    # ours weighs by counts here, theirs by totals that are not published: the same order of size
    assert found.mean[0] == pytest.approx(5.220, abs=0.6)
    assert found.std[0] == pytest.approx(3.968, abs=0.4)


@given(st.data())
def test_merged_shards_equal_one_pass(data):
    a = dense(data.draw(st.integers(0, 99)), 40, 4, 12)
    whole = LayerCounts(LAYERS, 12)
    update(whole, a)
    parts = [a[cut] for cut in data.draw(cuts(40))]
    found, expected = merged(lambda: LayerCounts(LAYERS, 12), update, parts), whole
    assert np.array_equal(found.counts, expected.counts)
    assert np.array_equal(found.n_rows, expected.n_rows)
    np.testing.assert_allclose(found.totals, expected.totals, rtol=1e-12)


def test_spread():
    values = np.array([1.0, 4.0, np.nan, 9.0])
    found = spread(values)
    known = [1.0, 4.0, 9.0]
    assert found.n == 3
    assert found.mean == pytest.approx(np.mean(known))
    assert found.var == pytest.approx(np.var(known, ddof=1))
    assert found.sem == pytest.approx(np.std(known, ddof=1) / 3**0.5)
    assert math.isnan(spread(np.array([np.nan])).mean)
    assert math.isnan(spread(np.array([2.0])).var)
