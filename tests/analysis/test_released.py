"""Formulas of the released MLSAE code (tim-lawson/mlsae at ba90c51) beside ours, on the same weights and rows.

Where they are right, ours give the same numbers. Where they are not, a test shows both numbers and the case that tells them
apart; docs/reference/analyses.md says why ours differs. The formulas are written out here in numpy from what they compute.
"""

import numpy as np
import pytest
import torch

from analysis.contexts import iter_contexts
from analysis.dictionary import cosine_by_distance, max_cosines
from analysis.examples import TopExamples
from analysis.latents import encode_store
from analysis.layers import LayerCounts
from analysis.loss import clean_scores, score
from analysis.metrics import Reconstruction
from analysis.similarity import LayerMeans, NeighbourCosines
from analysis.variance import LayerVariance
from tests.analysis.made_up import dense, entries, padded


@pytest.fixture(scope="module")
def rows():
    """Rows [t, d] of one layer with a large constant part, and reconstructions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator) + torch.linspace(-20, 20, 16)
    return x, x + 0.3 * torch.randn(200, 16, generator=generator)


def reconstruction(x, xhat, values, latents, n_latents=40):
    found = Reconstruction((0,), x.shape[1], n_latents)
    found.update(0, x, xhat, x, torch.from_numpy(values), torch.from_numpy(latents))
    return found.compute().layers[0]


# The same.


def test_fvu_about_one_scalar_mean(rows):
    """mse_loss.py:39-43: mean over tokens and dimensions of the squared error, over the unbiased variance of all numbers."""
    x, xhat = (r.double().numpy() for r in rows)
    released = ((xhat - x) ** 2).mean() / x.var(ddof=1)
    ours = reconstruction(*rows, *padded(dense(0, 200, 1, 40)[:, 0])).fvu_scalar
    assert ours * (x.size - 1) / x.size == pytest.approx(released, rel=1e-6)


def test_mse_l1_and_l0(rows):
    """layerwise_mse.py, layerwise_l1_norm.py, layerwise_l0_norm.py."""
    x, xhat = (r.double().numpy() for r in rows)
    values, latents = padded(dense(0, 200, 1, 40)[:, 0])
    ours = reconstruction(*rows, values, latents)
    assert ours.mse == pytest.approx(((xhat - x) ** 2).mean(), rel=1e-6)
    assert ours.l1 == pytest.approx(np.abs(values).sum() / 200, rel=1e-6)
    assert ours.l0 == pytest.approx((values > 1e-3).sum() / 200)


def test_loss_change_and_logit_mse():
    """layerwise_loss_delta.py:32 and layerwise_logit_mse.py:37-40, for the same patched logits."""
    generator = torch.Generator().manual_seed(1)
    true, patched = (torch.randn(30, 80, generator=generator) * 3 for _ in range(2))
    target = torch.randint(0, 80, (30,), generator=generator)
    cross_entropy = torch.nn.functional.cross_entropy
    unpatched = clean_scores(true)
    ours = (score(patched, target, unpatched).loss - score(true, target, unpatched).loss).mean()
    assert float(ours) == pytest.approx(
        float(cross_entropy(patched, target) - cross_entropy(true, target)), rel=1e-5
    )
    mse = ((patched - true) ** 2).mean()
    assert float(score(patched, target, unpatched).logit_mse.mean()) == pytest.approx(float(mse), rel=1e-5)


def test_distributions_where_every_selected_activation_is_positive():
    """dists.py:143-173: p = totals / sum, layer_mean = sum l p, layer_var = sum l^2 p - layer_mean^2."""
    a = dense(2, 300, 5, 20)
    counts = LayerCounts(tuple(range(5)), 20)
    for layer in range(5):
        counts.update(layer, *padded(a[:, layer]))
    ours, totals = counts.compute(), a.astype(np.float64).sum(0)
    p = totals / totals.sum(0)
    mean = (np.arange(5)[:, None] * p).sum(0)
    np.testing.assert_allclose(ours.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(ours.var, (np.arange(5)[:, None] ** 2 * p).sum(0) - mean**2, rtol=1e-6)


def test_neighbouring_layers():
    """resid_cos_sim.py: cosines after the mean of each layer is taken off."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 100, 8, generator=generator).double() + 3
    means = LayerMeans((0, 1), 8)
    for layer in (0, 1):
        means.update(layer, x[layer])
    cosines = NeighbourCosines(means)
    cosines.update((0, 1), x[0], x[1])
    released = torch.cosine_similarity(x[0] - x[0].mean(0), x[1] - x[1].mean(0), dim=1)
    assert cosines.compute().cosines[0, 1].mean == pytest.approx(float(released.mean()), rel=1e-9)


# Not the same, and why.


def test_divergence_is_of_the_model_from_the_patched_one_per_token():
    """layerwise_logit_kl_div.py:37-45 gives sum over positions of KL(patched || model) / batch size: reversed, and longer
    texts have more of it."""
    generator = torch.Generator().manual_seed(3)
    true, patched = (torch.randn(50, 90, generator=generator) * sharp for sharp in (3, 1))
    logp, logq = (torch.log_softmax(x.double(), 1) for x in (true, patched))
    released = float((logq.exp() * (logq - logp)).sum())  # batch of one text
    ours = float(score(patched, torch.zeros(50, dtype=torch.int64), clean_scores(true)).kl.mean())
    assert ours == pytest.approx(float((logp.exp() * (logp - logq)).sum(1).mean()), rel=1e-4)
    assert released > 10 * ours
    assert abs(released / 50 - ours) > 0.2 * ours


def test_negative_activations_are_not_active():
    """dists.py:94-95 takes top-k values before ReLU: every selected latent counts, and negative values lower totals."""
    pre = np.array([[0.5, -0.2], [0.3, -0.9]])
    latents = np.array([[0, 1], [0, 1]])
    released_counts = np.bincount(latents.ravel(), minlength=2)
    released_totals = np.bincount(latents.ravel(), pre.ravel(), minlength=2)
    counts = LayerCounts((0,), 2)
    counts.update(0, np.maximum(pre, 0), latents)
    ours = counts.compute()
    assert released_counts.tolist() == [2, 2]
    assert released_totals.tolist() == pytest.approx([0.8, -1.1])
    assert ours.count.tolist() == [2, 0]
    assert ours.total.tolist() == pytest.approx([0.8, 0.0])


def test_counters_do_not_stop_at_two_to_the_twentyfourth():
    """dists.py counts in float32, where 2^24 + 1 = 2^24."""
    assert np.float32(2**24) + np.float32(1) == np.float32(2**24)
    counts = LayerCounts((0,), 1)
    counts.counts[0, 0] = 2**24
    counts.update(0, np.array([[1.0]]), np.array([[0]]))
    assert counts.compute().count.tolist() == [2**24 + 1]


def released_variance(a):
    """variances.py:47-68: p = a / sum_l a (0 where inactive), V(q) = sum_l l^2 q - (sum_l l q)^2 of means that do not sum to 1."""
    a = a.astype(np.float64)
    numbers = np.arange(a.shape[1])
    total = a.sum(1, keepdims=True)
    p = np.divide(a, total, out=np.zeros_like(a), where=total > 0)  # [t, l, f]

    def spread(q, axis):
        shaped = numbers.reshape([-1 if i == axis else 1 for i in range(q.ndim)])
        return (shaped**2 * q).sum(axis) - (shaped * q).sum(axis) ** 2

    within_f, within_tf, all_of_it = (
        spread(p.mean(0), 0).mean(),
        spread(p, 1).mean(),
        spread(p.mean((0, 2)), 0),
    )
    return within_f / all_of_it, within_tf / within_f


def test_variance_of_a_distribution_that_sums_to_one():
    """The released ratio for latents is near 1 whatever the data, as latents are rare: mean_t p sums to the share of tokens on
    which a latent is active."""
    rng = np.random.default_rng(0)
    n_tokens, n_latents = 2048, 200
    pairs = np.zeros((n_tokens, 6, n_latents), np.float32)
    first = rng.integers(0, 5, n_latents)
    active = rng.random((n_tokens, n_latents)) < 0.005
    for f in range(n_latents):
        pairs[active[:, f], first[f] : first[f] + 2, f] = 1
    token, latent = np.nonzero(active)
    one_layer = np.zeros_like(pairs)
    one_layer[token, rng.integers(0, 6, len(token)), latent] = 1
    ours = {}
    for name, a in (("pairs", pairs), ("one_layer", one_layer)):
        found = LayerVariance(tuple(range(6)), n_latents)
        found.update(entries(a), n_tokens)
        shares = found.compute("latent")
        ours[name] = (shares.rel_f, shares.rel_t)
    released_pairs, released_one = released_variance(pairs), released_variance(one_layer)
    assert released_pairs[0] > 0.99
    assert released_one[0] > 0.99
    assert released_pairs[1] < 0.05
    assert ours["pairs"] == pytest.approx((0.115, 1.0), abs=0.02)
    assert ours["one_layer"] == pytest.approx((0.89, 0.0), abs=0.03)


def released_mmcs(w, chunk=None):
    """mmcs.py: below 16,384 latents the maximum over earlier latents only (0 for the first)."""
    cosines = w @ w.T
    return np.tril(cosines, -1).max(1)


def test_the_nearest_other_latent_may_be_a_later_one():
    w = np.random.default_rng(0).standard_normal((60, 12))
    w[0] = w[59]  # an exact duplicate
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    ours, released = max_cosines(torch.from_numpy(w)).numpy(), released_mmcs(w)
    assert ours[0] == pytest.approx(1.0)
    assert released[0] == 0
    assert released.mean() < ours.mean()
    cosines = w @ w.T
    np.fill_diagonal(cosines, -1)
    np.testing.assert_allclose(ours, cosines.max(1), rtol=1e-5)


def test_cosine_and_distance_are_of_the_same_pair():
    """dists_cos_sim_heatmaps.py:22-31 sorts decoder columns by mean layer and the pairwise distances not at all."""
    rng = np.random.default_rng(1)
    mean_layer = rng.random(40) * 5
    w = np.stack([np.cos(mean_layer), np.sin(mean_layer)], 1)  # the farther apart, the less alike
    ours = cosine_by_distance(torch.from_numpy(w), mean_layer, 4, 40)
    order = np.argsort(mean_layer)
    upper = np.triu_indices(40, 1)
    released_x = np.abs(mean_layer[:, None] - mean_layer)[upper]
    released_y = (w[order] @ w[order].T)[upper]
    true_y = (w @ w.T)[upper]
    assert np.corrcoef(released_x, released_y)[0, 1] > -0.5
    assert np.corrcoef(np.cos(released_x), true_y)[0, 1] == pytest.approx(1)
    assert ours.mean[0] > 0.7 > 0 > ours.mean[2]


def test_contexts_are_even_and_never_empty(subject, tmp_path):
    """examples.py takes [pos - 4, pos + 4): uneven, and empty for pos < 4, where the start is negative."""
    tokens = list(range(16))
    assert tokens[2 - 4 : 2 + 4] == []
    assert tokens[8 - 4 : 8 + 4] == [4, 5, 6, 7, 8, 9, 10, 11]
    latents = encode_store(subject, tmp_path / "latents")
    top = TopExamples(2, subject.n_latents, 2)
    for codes in latents:
        top.update(codes.entries(), codes.sequence, codes.position, codes.token, codes.document)
    examples = top.compute()
    for part in iter_contexts(examples, subject, latents, 4):
        position = examples.position[part.example]
        assert ((part.tokens >= 0).sum(1) == np.minimum(position, 4) + 1 + np.minimum(15 - position, 4)).all()


def test_rows_that_are_not_kept_are_in_no_statistic(subject):
    """transformer.py:104-105 sets special tokens' activations to 0 and keeps the rows: they fire the same latents every time."""
    zeroed = subject.sae.encode(torch.zeros(1, 16))
    assert (zeroed.values > 1e-3).any(), "a zeroed row has active latents"
    for split in ("train", "holdout"):
        for shard in subject.shards(split):
            assert subject.store.keep[shard.sequence, shard.position].all()
            assert (shard.position > 0).all()
