"""Evaluation against formulas written out in numpy, and pictures that exist."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actcache.errors import UsageError
from analysis.figures import save_overview
from analysis.metrics import Reconstruction, evaluate
from tests.analysis.made_up import cuts, merged
from tests.trainer.list_source import ListSource
from trainer.checkpoint import load_sae
from trainer.config import TrainConfig
from trainer.loop import train

LAYERS = (1, 4, 9)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(3)
    layer = torch.tensor(LAYERS)[torch.randint(0, 3, (500,), generator=generator)]
    x = torch.randn(500, 12, generator=generator) * layer[:, None] + torch.arange(12.0) * 3
    return x, layer


@pytest.fixture(scope="module")
def sae(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    config = TrainConfig(n_latents=24, k=4, auxk=0, batch_rows=64, epochs=3, lr=1e-2)
    train(ListSource(*rows, batch_rows=64, epochs=3), config, out)
    return load_sae(out)


def dense_xhat(sae, x):
    """The whole path of a row, written out with full matrices in float64."""
    x = x.double()
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    z = (x - mean) / std
    w_enc, w_dec, b = (p.detach().double() for p in (sae.sae.w_enc, sae.sae.w_dec, sae.sae.bias))
    pre = torch.relu((z - b) @ w_enc.T)
    kept = torch.zeros_like(pre).scatter(1, pre.topk(4, dim=1).indices, 1.0)
    a = pre * kept
    return (a @ w_dec + b) * std + mean, (0 * a @ w_dec + b) * std + mean, a


@pytest.mark.parametrize("batch_rows", [500, 37])
def test_scores_equal_the_formulas(rows, sae, batch_rows):
    x, layer = rows
    found = evaluate(sae, ListSource(x, layer, batch_rows=batch_rows))
    xhat, nothing, a = dense_xhat(sae, x)
    for i, number in enumerate(LAYERS):
        at = layer == number
        mine, error = x[at].double().numpy(), ((x[at] - xhat[at]) ** 2).sum().item()
        error_k0 = ((x[at] - nothing[at]) ** 2).sum().item()
        per_dimension, scalar = ((mine - mine.mean(0)) ** 2).sum(), ((mine - mine.mean()) ** 2).sum()
        scores = found.layers[number]
        expected = [
            int(at.sum()),
            error / per_dimension,
            error / scalar,
            error_k0 / per_dimension,
            error_k0 / scalar,
            error / mine.size,
            (a[at] > 1e-3).sum().item() / int(at.sum()),
            a[at].sum().item() / int(at.sum()),
            int((a[at] > 1e-3).any(0).sum()),
            int((~(a[at] > 1e-3).any(0)).sum()),
        ]
        expected.insert(5, 1 - expected[1])
        np.testing.assert_allclose(list(scores), expected, rtol=2e-5)
        assert found.latents.counts[i].tolist() == (a[at] > 1e-3).sum(0).tolist()
        np.testing.assert_allclose(
            found.latents.totals[i], (a[at] * (a[at] > 1e-3)).sum(0).numpy(), rtol=1e-4, atol=1e-5
        )
    assert found.mean.n_rows == 500
    assert found.mean.fvu == pytest.approx(np.mean([found.layers[n].fvu for n in LAYERS]))
    assert found.mean.n_alive == int((a > 1e-3).any(0).sum())
    assert found.layers[1].explained_variance == pytest.approx(1 - found.layers[1].fvu)


def test_the_two_conventions_differ_where_dimensions_have_different_means(rows, sae):
    scores = evaluate(sae, ListSource(*rows, batch_rows=100)).layers[1]
    assert scores.fvu_scalar < 0.5 * scores.fvu


def test_rows_of_another_width_are_refused(sae):
    with pytest.raises(UsageError, match="8 wide and the SAE 12"):
        evaluate(sae, ListSource(torch.randn(6, 8), torch.tensor(LAYERS).repeat(2), batch_rows=2))


def test_rows_that_are_all_alike_are_refused(sae):
    x = torch.randn(1, 12).repeat(10, 1)
    with pytest.raises(UsageError, match="alike"):
        evaluate(sae, ListSource(x, torch.tensor(LAYERS).repeat(4)[:10], batch_rows=4))


def test_saes_of_one_layer_each_are_one_dictionary_after_the_other(rows, tmp_path):
    x, layer = rows
    saes = []
    for number in LAYERS:
        at = layer == number
        config = TrainConfig(n_latents=10, k=3, auxk=0, batch_rows=64, epochs=1, seed=number)
        train(ListSource(x[at], layer[at], batch_rows=64), config, tmp_path / str(number))
        saes.append(load_sae(tmp_path / str(number)))
    found = evaluate(saes, ListSource(x, layer, batch_rows=100))
    for i, (number, sae) in enumerate(zip(LAYERS, saes, strict=True)):
        at = layer == number
        alone = evaluate(sae, ListSource(x[at], layer[at], batch_rows=50))
        np.testing.assert_allclose(list(found.layers[number]), list(alone.layers[number]), rtol=1e-6)
        expected = np.zeros(30, np.int64)
        expected[10 * i : 10 * i + 10] = alone.latents.counts[0]
        assert np.array_equal(found.latents.counts[i], expected)
    assert found.mean.n_alive == (found.latents.counts > 0).any(0).sum()
    assert found.mean.fvu == pytest.approx(np.mean([found.layers[n].fvu for n in LAYERS]))


@given(st.data())
def test_merged_shards_equal_one_pass(rows, sae, data):
    x, layer = rows
    code = sae.encode(x)
    xhat, nothing = sae.decode(code), sae.decode(code._replace(values=torch.zeros_like(code.values)))

    def update(found, cut):
        for number in LAYERS:
            at = torch.arange(len(x))[cut][(layer == number)[cut]]
            found.update(number, x[at], xhat[at], nothing[at], code.values[at], code.indices[at])

    whole = Reconstruction(LAYERS, 12, 24)
    update(whole, slice(None))
    parts = data.draw(cuts(len(x)))
    found = merged(lambda: Reconstruction(LAYERS, 12, 24), update, parts).compute()
    expected = whole.compute()
    for number in LAYERS:
        np.testing.assert_allclose(list(found.layers[number]), list(expected.layers[number]), rtol=1e-10)
    np.testing.assert_allclose(list(found.mean), list(expected.mean), rtol=1e-10)
    assert np.array_equal(found.latents.counts, expected.latents.counts)


def test_picture(rows, sae, tmp_path):
    evaluation = evaluate(sae, ListSource(*rows, batch_rows=100))
    save_overview(evaluation.scores, evaluation.latents, "three layers", tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
