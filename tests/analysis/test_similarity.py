"""Norms and neighbouring layers' cosines against numpy in two passes over everything."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.similarity import LayerMeans, NeighbourCosines
from tests.analysis.made_up import cuts

LAYERS = (0, 5, 6)


@pytest.fixture(scope="module")
def stream():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 90, 12, generator=generator) + 40  # a large constant part, as residual streams have
    x[1:] += 0.8 * x[:1]
    passes = torch.rand(3, 90, generator=generator) < 0.8
    return x, passes


def two_passes(x, passes):
    x, passes = x.double().numpy(), passes.numpy()
    means = [x[i][passes[i]].mean(0) for i in range(3)]
    cosines = []
    for i in range(2):
        both = passes[i] & passes[i + 1]
        a, b = x[i][both] - means[i], x[i + 1][both] - means[i + 1]
        cosines.append((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    return means, cosines


def update_means(means, part):
    for i, layer in enumerate(LAYERS):
        means.update(layer, part[0][i][part[1][i]])


def update_cosines(cosines, part):
    x, passes = part
    for i in range(2):
        both = passes[i] & passes[i + 1]
        cosines.update((LAYERS[i], LAYERS[i + 1]), x[i][both], x[i + 1][both])


def accumulate(parts):
    means = LayerMeans(LAYERS, 12)
    for part in parts:
        one = LayerMeans(LAYERS, 12)
        update_means(one, part)
        means.merge(one)
    cosines = NeighbourCosines(means)
    for part in parts:
        one = NeighbourCosines(means)
        update_cosines(one, part)
        cosines.merge(one)
    return cosines.compute()


@given(st.data())
def test_merged_shards_equal_two_passes_over_everything(stream, data):
    x, passes = stream
    found = accumulate([(x[:, cut], passes[:, cut]) for cut in data.draw(cuts(90))])
    means, cosines = two_passes(x, passes)
    for i, layer in enumerate(LAYERS):
        norms = np.linalg.norm(x[i][passes[i]].double().numpy(), axis=1)
        assert found.norms[layer].n == passes[i].sum()
        assert found.norms[layer].mean == pytest.approx(norms.mean(), rel=1e-12)
        assert found.norms[layer].var == pytest.approx(norms.var(ddof=1), rel=1e-9)
        assert found.mean_norms[layer] == pytest.approx(np.linalg.norm(means[i]), rel=1e-12)
    for pair, expected in zip(((0, 5), (5, 6)), cosines, strict=True):
        assert found.cosines[pair].n == len(expected)
        assert found.cosines[pair].mean == pytest.approx(expected.mean(), rel=1e-9)
        assert found.cosines[pair].var == pytest.approx(expected.var(ddof=1), rel=1e-9)
        assert found.cosines[pair].sem == pytest.approx(expected.std(ddof=1) / len(expected) ** 0.5, rel=1e-9)


def test_the_constant_part_counts_unless_it_is_taken_off(stream):
    x, _passes = stream
    plain = torch.cosine_similarity(x[0].double(), x[1].double(), dim=1).mean()
    found = accumulate([(x, torch.ones(3, 90, dtype=torch.bool))])
    assert plain > 0.99
    assert found.cosines[0, 5].mean < 0.8


def test_a_row_that_equals_the_mean_has_no_direction():
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]]] * 2)
    means = LayerMeans((0, 1), 2)
    for layer in (0, 1):
        means.update(layer, x[layer])
    cosines = NeighbourCosines(means)
    cosines.update((0, 1), x[0], x[1])
    assert cosines.compute().cosines[0, 1].n == 2
