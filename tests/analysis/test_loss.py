"""Losses per token against plain formulas, ratios and errors against numpy, masks by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.loss import QUANTITIES, LossSums, clean_scores, score, scored_positions
from tests.analysis.made_up import cuts


def test_scores_equal_the_formulas():
    generator = torch.Generator().manual_seed(0)
    clean, patched = (torch.randn(20, 300, generator=generator) * 4 for _ in range(2))
    target = torch.randint(0, 300, (20,), generator=generator)
    found = score(patched, target, clean_scores(clean))
    p, q = (torch.softmax(x.double(), 1) for x in (clean, patched))
    loss = torch.nn.functional.cross_entropy(patched.double(), target, reduction="none")
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(found.kl, (p * (p.log() - q.log())).sum(1), rtol=1e-4)
    np.testing.assert_allclose(found.logit_mse, ((patched - clean).double() ** 2).mean(1), rtol=1e-5)
    assert found.loss.dtype == found.kl.dtype == found.logit_mse.dtype == torch.float64


def test_a_model_has_no_divergence_from_itself():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 30
    found = score(logits, torch.zeros(5, dtype=torch.int64), clean_scores(logits))
    assert found.kl.tolist() == [0.0] * 5
    assert found.logit_mse.tolist() == [0.0] * 5


def made_up(n, seed=0):
    rng = np.random.default_rng(seed)
    per_token = {name: torch.from_numpy(rng.random(n) + 1) for name in QUANTITIES if name != "n"}
    return per_token, torch.from_numpy(np.sort(rng.integers(0, 9, n)))


def test_ratios_are_of_means_with_errors_over_sequences():
    per_token, sequence = made_up(200)
    per_token["zero_loss"] += 3
    sums = LossSums()
    sums.update(per_token, sequence)
    found = sums.compute()
    clean, sae, zero = (per_token[name].numpy() for name in ("clean", "sae_loss", "zero_loss"))
    assert found.n_tokens == 200
    assert found.n_sequences == len(sequence.unique())
    assert found.loss.value == pytest.approx(clean.mean())
    assert found.change.value == pytest.approx((sae - clean).mean())
    assert found.recovered_zero.value == pytest.approx((zero - sae).mean() / (zero - clean).mean())
    names = sequence.unique().tolist()
    above, below = (
        np.array([x[sequence.numpy() == q].sum() for q in names]) for x in (zero - sae, zero - clean)
    )
    residual = above - found.recovered_zero.value * below
    expected = np.sqrt(len(names) / (len(names) - 1) * (residual**2).sum()) / below.sum()
    assert found.recovered_zero.se == pytest.approx(expected, rel=1e-9)


def test_the_error_is_that_of_repeated_draws():
    """Sequences drawn again and again: the spread of the ratio is what one draw says of itself."""
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(300):
        sizes = rng.integers(5, 30, 40)
        level = np.repeat(rng.normal(2, 1, 40), sizes)  # tokens of a sequence are alike
        per_token = {name: torch.ones(len(level), dtype=torch.float64) for name in QUANTITIES if name != "n"}
        per_token["sae_loss"] = torch.from_numpy(level + rng.normal(0, 0.1, len(level)))
        sums = LossSums()
        sums.update(per_token, torch.from_numpy(np.repeat(np.arange(40), sizes)))
        found = sums.compute().change
        values.append(found.value)
        errors.append(found.se)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_one_sequence_has_no_error_and_no_tokens_no_value():
    per_token, _ = made_up(5)
    sums = LossSums()
    assert math.isnan(sums.compute().loss.value)
    sums.update(per_token, torch.zeros(5, dtype=torch.int64))
    found = sums.compute()
    assert found.loss.value > 0
    assert math.isnan(found.loss.se)
    assert found.as_json()["loss"] == {"value": found.loss.value, "se": None}


@given(st.data())
def test_merged_shards_equal_one_pass(data):
    per_token, sequence = made_up(60, data.draw(st.integers(0, 9)))
    whole = LossSums()
    whole.update(per_token, sequence)
    merged = LossSums()
    for cut in data.draw(cuts(9)):  # by sequences: one is never split
        at = (sequence >= cut.start) & (sequence < cut.stop)
        one = LossSums()
        if at.any():
            one.update({name: values[at] for name, values in per_token.items()}, sequence[at])
        merged.merge(one)
    assert merged.n_sequences == whole.n_sequences
    np.testing.assert_allclose(merged.first, whole.first, rtol=1e-12)
    np.testing.assert_allclose(merged.second, whole.second, rtol=1e-12)


def test_scored_positions_need_their_row_and_the_next():
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    assert scored_positions(mask).tolist() == [
        [True, False, False, True, False],
        [False, True, True, False, False],
    ]
