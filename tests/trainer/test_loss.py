import pytest
import torch

from actcache.errors import NonFiniteError, UsageError
from actcache.flow import Batch
from trainer import loss, transform
from trainer.window import measure_window

CPU = torch.device("cpu")


def test_raw_loss_equals_the_direct_formula_after_the_inverse():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=g, dtype=torch.float64) * 7 + 2
    mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True) + transform.EPS
    z = (x - mean) / scale
    zhat = z + torch.randn(50, 16, generator=g, dtype=torch.float64)
    layer_i = torch.arange(50) % 3
    var_layer = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    xhat = transform.restore(zhat, mean, scale)
    direct = ((x - xhat).square().sum(1) / (16 * var_layer[layer_i])).sum() / 50
    weights = loss.row_weights(scale, layer_i, var_layer, 16, "raw")
    torch.testing.assert_close(loss.reconstruction_loss((z - zhat).square().sum(1), weights, 50), direct)


def test_standardised_space_weighs_rows_alike():
    weights = loss.row_weights(
        torch.tensor([[1.0], [9.0]]), torch.tensor([0, 0]), torch.tensor([2.0]), 4, "standardised"
    )
    assert weights.tolist() == [1 / 8, 1 / 8]


def test_hand_numbers():
    # two rows of width 2, squared errors 4 and 6, weights 1/2 and 1/3
    value = loss.reconstruction_loss(torch.tensor([4.0, 6.0]), torch.tensor([1 / 2, 1 / 3]), 2)
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


def test_window_moments_against_float64():
    g = torch.Generator().manual_seed(0)
    layer = torch.tensor([4, 9])[torch.arange(20_001) % 2]
    rows = (torch.randn(20_001, 6, generator=g) * layer[:, None] + 100).to(torch.bfloat16)
    window = measure_window(batch_of(rows, layer), (4, 9), "raw", CPU)
    for i, number in enumerate((4, 9)):
        x = rows[layer == number].double()
        torch.testing.assert_close(window.mean_layer[i].double(), x.mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            window.var_layer[i].double(), x.var(0, correction=0).mean(), rtol=1e-5, atol=0
        )


def test_window_variance_in_standardised_space():
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 50
    window = measure_window(batch_of(rows, torch.zeros(500, dtype=torch.int64)), (0,), "standardised", CPU)
    z = transform.standardise(rows).z
    torch.testing.assert_close(window.var_layer[0], z.var(0, correction=0).mean())


def test_window_refusals():
    rows = torch.randn(10, 4)
    layer = torch.zeros(10, dtype=torch.int64)
    with pytest.raises(UsageError, match="0 of the first 10 rows are of layer 1"):
        measure_window(batch_of(rows, layer), (0, 1), "raw", CPU)
    with pytest.raises(UsageError, match="a row of layer 0"):
        measure_window(batch_of(rows, layer), (1, 2), "raw", CPU)
    with pytest.raises(UsageError, match="alike"):
        measure_window(batch_of(torch.ones(10, 4), layer), (0,), "raw", CPU)
    rows[3, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="layer 0, sequence 3, position 103"):
        measure_window(batch_of(rows, layer), (0,), "raw", CPU)
