"""Evaluation against formulas written out in numpy, and pictures that exist."""

import numpy as np
import pytest
import torch

from actcache.errors import UsageError
from analysis.figures import save_overview
from analysis.metrics import evaluate, layer_distribution
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
        ]
        np.testing.assert_allclose(list(scores), expected, rtol=2e-5)
        assert found.counts[i].tolist() == (a[at] > 1e-3).sum(0).tolist()
        np.testing.assert_allclose(
            found.totals[i].numpy(), (a[at] * (a[at] > 1e-3)).sum(0).numpy(), rtol=1e-4, atol=1e-5
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
        evaluate(sae, ListSource(torch.randn(4, 8), torch.ones(4, dtype=torch.int64), batch_rows=2))


def test_distribution_over_layers_is_sorted_by_mean_layer():
    totals = torch.tensor([[0.0, 3.0, 0.0, 1.0], [5.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    p, alive = layer_distribution(totals)
    assert alive.tolist() == [1, 3, 0]  # latent 2 is dead
    np.testing.assert_allclose(p.numpy(), [[0.75, 0.5, 0.0], [0.25, 0.5, 1.0]])


def test_picture(rows, sae, tmp_path):
    evaluation = evaluate(sae, ListSource(*rows, batch_rows=100))
    save_overview(evaluation, "three layers", tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
