"""The decomposition against the definition in full arrays, on cases whose answer is known, and where weightings disagree."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.variance import LayerVariance
from tests.analysis.made_up import LAYERS, cuts, dense, entries, merged


def accumulate(a, layers=LAYERS):
    found = LayerVariance(layers, a.shape[2])
    found.update(entries(a), len(a))
    return found


def by_definition(a, layers, weighting, min_tokens=1):
    """Two passes over P(l, t, f) [t, l, f] in full: conditional means first, then squared deviations."""
    a = a.astype(np.float64)
    numbers = np.array(layers, float)
    n_active = (a.sum(1) > 0).sum(0)
    a = a[:, :, n_active >= min_tokens]
    mass_f = a.sum((0, 1))
    weight = 1 / mass_f / len(mass_f) if weighting == "latent" else np.full(len(mass_f), 1 / mass_f.sum())
    p = a * weight
    var = {}
    p_l = p.sum((0, 2))
    mean = numbers @ p_l
    var["var_l"] = ((numbers - mean) ** 2 * p_l).sum()
    mean_f = (p * numbers[None, :, None]).sum((0, 1)) / p.sum((0, 1))
    var["var_l_f"] = (p * (numbers[None, :, None] - mean_f) ** 2).sum()
    p_tf = p.sum(1)
    mean_tf = (p * numbers[None, :, None]).sum(1) / np.where(p_tf > 0, p_tf, 1)
    var["var_l_tf"] = (p * (numbers[None, :, None] - mean_tf[:, None]) ** 2).sum()
    var["between_t"] = (p_tf * (mean_tf - mean_f) ** 2).sum()
    var["between_f"] = (p.sum((0, 1)) * (mean_f - mean) ** 2).sum()
    return var


def check(found, expected, rel=1e-9):
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=rel, abs=1e-12), name
    assert found.rel_f == pytest.approx(expected["var_l_f"] / expected["var_l"], rel=1e-9)
    assert found.rel_t == pytest.approx(expected["var_l_tf"] / expected["var_l_f"], rel=1e-9)
    assert found.identity < 1e-12


@pytest.mark.parametrize("weighting", ["mass", "latent"])
@pytest.mark.parametrize("min_tokens", [1, 12])
def test_equals_the_definition(weighting, min_tokens):
    a = dense(3, 200, 4, 25, share=0.02)
    a[:, :, 0] = 0
    found = accumulate(a).compute(weighting, min_tokens)
    check(found, by_definition(a, LAYERS, weighting, min_tokens))
    n_active = (a.sum(1) > 0).sum(0)
    assert found.n_latents == (n_active >= min_tokens).sum()
    assert found.n_pairs == n_active[n_active >= min_tokens].sum()
    assert found.n_tokens == 200


@pytest.mark.parametrize("weighting", ["mass", "latent"])
def test_each_latent_on_a_fixed_equal_pair_of_layers(weighting):
    """All of a latent's spread is then within each token: the ratio for tokens is 1."""
    n_layers, n_latents, n_tokens = 6, 400, 2048
    rng = np.random.default_rng(0)
    a = np.zeros((n_tokens, n_layers, n_latents), np.float32)
    first = rng.integers(0, n_layers - 1, n_latents)
    active = rng.random((n_tokens, n_latents)) < 0.005
    value = rng.lognormal(0, 1, active.shape)
    for f in range(n_latents):
        for layer in (first[f], first[f] + 1):
            a[:, layer, f] = np.where(active[:, f], value[:, f], 0)
    found = accumulate(a, tuple(range(6))).compute(weighting)
    expected = by_definition(a, range(6), weighting)
    assert found.rel_t == pytest.approx(1.0, abs=1e-9)
    assert found.rel_f == pytest.approx(expected["var_l_f"] / expected["var_l"], rel=1e-9)
    assert found.rel_f == pytest.approx(0.115, abs=0.02)
    assert found.between_t == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("weighting", ["mass", "latent"])
def test_one_layer_drawn_for_every_token(weighting):
    """A latent is then at one layer on a token, and nearly everywhere in aggregate: the ratio for tokens is 0."""
    n_layers, n_latents, n_tokens = 6, 400, 2048
    rng = np.random.default_rng(1)
    token, latent = np.nonzero(rng.random((n_tokens, n_latents)) < 0.005)
    a = np.zeros((n_tokens, n_layers, n_latents), np.float32)
    a[token, rng.integers(0, n_layers, len(token)), latent] = 1
    found = accumulate(a, tuple(range(6))).compute(weighting)
    assert found.rel_t == 0
    assert found.var_l_tf == 0
    assert found.rel_f == pytest.approx(0.89, abs=0.03)


def test_the_two_weightings_disagree_where_one_latent_is_always_on():
    """One latent on all layers of every token, strongly; the others at one layer each, rarely."""
    n_tokens, n_latents = 1000, 60
    a = np.zeros((n_tokens, 6, n_latents), np.float32)
    a[:, :, 0] = 10
    rng = np.random.default_rng(2)
    for f in range(1, n_latents):
        a[rng.random(n_tokens) < 0.02, rng.integers(6), f] = 1
    found = accumulate(a, tuple(range(6)))
    assert found.compute("mass").rel_f > 0.9
    assert found.compute("latent").rel_f < 0.05


def test_pairs_by_layers():
    a = np.zeros((3, 4, 2), np.float32)
    a[0, 0, 0] = a[0, 3, 0] = a[1, 1, 0] = 1  # two layers, one layer
    a[2, :, 1] = 1  # all four
    assert accumulate(a).pairs.tolist() == [0, 1, 1, 0, 1]


def test_nothing_active():
    found = LayerVariance(LAYERS, 5)
    found.update(entries(np.zeros((4, 4, 5), np.float32)), 4)
    shares = found.compute("mass")
    assert shares.n_latents == 0
    assert shares.n_tokens == 4
    assert math.isnan(shares.var_l)
    assert math.isnan(shares.rel_f)


def test_one_layer_has_no_variance():
    a = dense(5, 20, 1, 6)
    shares = accumulate(a, (7,)).compute("latent")
    assert shares.var_l == 0
    assert math.isnan(shares.rel_f)
    assert shares.identity == 0


def test_counting_layers_from_elsewhere_changes_nothing():
    a = dense(6, 60, 4, 10)
    here, there = (accumulate(a, layers).compute("mass") for layers in ((0, 1, 2, 3), (100, 101, 102, 103)))
    for name in ("var_l", "var_l_f", "var_l_tf", "between_t", "rel_f", "rel_t"):
        assert getattr(here, name) == pytest.approx(getattr(there, name), rel=1e-9)


@given(st.data())
def test_merged_shards_equal_one_pass(data):
    a = dense(data.draw(st.integers(0, 99)), 30, 4, 8, share=data.draw(st.sampled_from((0.02, 0.3))))
    parts = [a[cut] for cut in data.draw(cuts(30))]
    found = merged(
        lambda: LayerVariance(LAYERS, 8), lambda v, part: v.update(entries(part), len(part)), parts
    )
    expected = accumulate(a)
    assert found.n_tokens == expected.n_tokens
    assert np.array_equal(found.n_active, expected.n_active)
    assert np.array_equal(found.pairs, expected.pairs)
    for name in ("layer_mass", "mass", "mean", "within", "between"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
