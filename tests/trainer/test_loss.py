import pytest
import torch

from actcache.errors import NonFiniteError, UsageError
from actcache.flow import Batch
from trainer import loss, transform
from trainer.config import TrainConfig
from trainer.forms import FORMS
from trainer.window import measure

CPU = torch.device("cpu")


@pytest.mark.parametrize("n_slices", [1, 3])
def test_raw_loss_equals_the_direct_formula_after_the_inverse(n_slices):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, n_slices, 16, generator=g, dtype=torch.float64) * 7 + 2
    mean, scale = x.mean(2, keepdim=True), x.std(2, keepdim=True) + transform.EPS
    z = (x - mean) / scale
    zhat = z + torch.randn(50, n_slices, 16, generator=g, dtype=torch.float64)
    layer_i = torch.arange(50).unsqueeze(1) % 3 if n_slices == 1 else torch.tensor([[2, 0, 1]])
    var_layer = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    xhat = transform.restore(zhat, mean, scale)
    by_slice = (x - xhat).square().sum(2) / (16 * var_layer[layer_i])
    weights = loss.slice_weights(scale, layer_i, var_layer, 16, "raw")
    found = loss.reconstruction_loss((z - zhat).square().sum(2), weights, 50)
    torch.testing.assert_close(found, by_slice.mean(1).mean())


def test_standardised_space_weighs_rows_alike():
    scale = torch.tensor([1.0, 9.0]).view(2, 1, 1)
    weights = loss.slice_weights(scale, torch.tensor([[0], [0]]), torch.tensor([2.0]), 4, "standardised")
    assert weights.tolist() == [[1 / 8], [1 / 8]]


def test_hand_numbers():
    # two rows of width 2, squared errors 4 and 6, weights 1/2 and 1/3
    value = loss.reconstruction_loss(torch.tensor([[4.0], [6.0]]), torch.tensor([[1 / 2], [1 / 3]]), 2)
    assert float(value) == pytest.approx(2.0)


def test_auxk_hand_numbers_and_rows_without_residual():
    e = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    ehat = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    value = loss.auxk_loss(ehat, e, e.square().sum(1), 1 / 32, 2)
    assert float(value) == pytest.approx((16 / 25) / 32 / 2)


def test_auxk_does_not_push_the_residual():
    e = torch.randn(4, 3, requires_grad=True)
    ehat = torch.randn(4, 3, requires_grad=True)
    loss.auxk_loss(ehat, e, e.square().sum(1), 1 / 32, 4).backward()
    assert e.grad is None
    assert ehat.grad is not None


def batch_of(rows, layer):
    return Batch(rows, layer, torch.arange(len(rows)), torch.arange(len(rows)) + 100)


def measured(batch, layers, space="raw"):
    config = TrainConfig(loss_space=space, n_latents=40, rows=10).resolve(batch.rows.shape[1])
    return measure(batch, FORMS["stacked"].view(batch, layers), layers, config, CPU)[0]


def test_window_moments_against_float64():
    g = torch.Generator().manual_seed(0)
    layer = torch.tensor([4, 9])[torch.arange(20_001) % 2]
    rows = (torch.randn(20_001, 6, generator=g) * layer[:, None] + 100).to(torch.bfloat16)
    window = measured(batch_of(rows, layer), (4, 9))
    for i, number in enumerate((4, 9)):
        x = rows[layer == number].double()
        torch.testing.assert_close(window.mean_layer[i].double(), x.mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            window.var_layer[i].double(), x.var(0, correction=0).mean(), rtol=1e-5, atol=0
        )


def test_window_variance_in_standardised_space():
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 50
    window = measured(batch_of(rows, torch.zeros(500, dtype=torch.int64)), (0,), "standardised")
    z = transform.standardise(rows).z
    torch.testing.assert_close(window.var_layer[0], z.var(0, correction=0).mean())


def test_window_refusals():
    rows = torch.randn(10, 4)
    layer = torch.zeros(10, dtype=torch.int64)
    with pytest.raises(UsageError, match="0 of the first 10 rows are of layer 1"):
        measured(batch_of(rows, layer), (0, 1))
    with pytest.raises(UsageError, match="a row of layer 0"):
        measured(batch_of(rows, layer), (1, 2))
    with pytest.raises(UsageError, match="alike"):
        measured(batch_of(torch.ones(10, 4), layer), (0,))
    rows[3, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="layer 0, sequence 3, position 103"):
        measured(batch_of(rows, layer), (0,))
