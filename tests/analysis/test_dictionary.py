"""Directions against full matrices, whatever the size of the blocks."""

import numpy as np
import pytest
import torch

from actcache.errors import UsageError
from analysis import dictionary as subject
from analysis.dictionary import cosine_by_distance, max_cosines, nearest_tokens, unit_rows


@pytest.fixture(params=[7, 64, 2**23], autouse=True)
def block(request, monkeypatch):
    """Sizes of blocks that divide nothing, some, everything."""
    monkeypatch.setattr(subject, "_BLOCK_VALUES", request.param)


@pytest.fixture
def w():
    return torch.randn(37, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 38)[:, None]


def full_cosines(w, v):
    w, v = w.double().numpy(), v.double().numpy()
    return (w @ v.T) / np.linalg.norm(w, axis=1)[:, None] / np.linalg.norm(v, axis=1)


def test_max_cosines_within_a_dictionary(w):
    cosines = full_cosines(w, w)
    np.fill_diagonal(cosines, -np.inf)
    done = []
    found = max_cosines(w, on_rows=done.append)
    np.testing.assert_allclose(found.numpy(), cosines.max(1), rtol=1e-5)
    assert sum(done) == 37


def test_a_duplicate_has_cosine_one_with_its_copy_wherever_it_stands(w):
    for a, b in ((0, 36), (36, 0), (5, 6), (17, 3)):
        twice = w.clone()
        twice[a] = 3 * twice[b]
        found = max_cosines(twice)
        assert found[a].item() == pytest.approx(1.0, abs=1e-6)
        assert found[b].item() == pytest.approx(1.0, abs=1e-6)


def test_max_cosines_between_dictionaries(w):
    v = torch.randn(11, 9, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(max_cosines(w, v).numpy(), full_cosines(w, v).max(1), rtol=1e-5)
    np.testing.assert_allclose(max_cosines(w, w).numpy(), 1.0, rtol=1e-5)
    with pytest.raises(UsageError, match="width 9 and 4"):
        max_cosines(w, v[:, :4])
    with pytest.raises(UsageError, match="nothing to compare"):
        max_cosines(w[:1])


def test_cosine_by_distance_counts_every_pair_once(w):
    mean_layer = np.random.default_rng(0).random(37) * 20
    found = cosine_by_distance(w, mean_layer, 5, 8)
    upper = np.triu_indices(37, 1)
    cosines, distance = full_cosines(w, w)[upper], np.abs(mean_layer[:, None] - mean_layer)[upper]
    span = np.ptp(mean_layer)
    expected, *_ = np.histogram2d(distance, cosines, [np.linspace(0, span, 6), np.linspace(-1, 1, 9)])
    assert found.counts.sum() == 37 * 36 // 2
    assert np.array_equal(found.counts, expected)
    assert np.allclose(found.distance_edges, np.linspace(0, span, 6))
    at = np.minimum((distance / span * 5).astype(int), 4)
    np.testing.assert_allclose(found.mean, [cosines[at == x].mean() for x in range(5)], rtol=1e-4, atol=1e-6)


def test_cosine_by_distance_does_not_depend_on_the_order_of_latents(w):
    mean_layer = np.random.default_rng(0).random(37) * 20
    order = np.random.default_rng(1).permutation(37)
    one, other = (
        cosine_by_distance(w, mean_layer),
        cosine_by_distance(w[torch.from_numpy(order)], mean_layer[order]),
    )
    assert np.array_equal(one.counts, other.counts)
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5)


def test_latents_of_one_mean_layer_have_distance_zero(w):
    found = cosine_by_distance(w, np.full(37, 3.0), 4, 8)
    assert found.counts[0].sum() == 37 * 36 // 2


def test_nearest_tokens(w):
    embedding = torch.randn(50, 9, generator=torch.Generator().manual_seed(2))
    embedding[13] = w[4] * 0.1
    found = nearest_tokens(w, embedding, 3)
    cosines = full_cosines(w, embedding)
    expected = np.argsort(-cosines, axis=1)[:, :3]
    assert np.array_equal(found.tokens.numpy(), expected)
    np.testing.assert_allclose(found.cosines.numpy(), np.take_along_axis(cosines, expected, 1), rtol=1e-5)
    assert found.tokens[4, 0] == 13
    with pytest.raises(UsageError, match="not of one space"):
        nearest_tokens(w, embedding[:, :5])


def test_a_direction_of_zeros_has_no_cosine():
    assert unit_rows(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]
