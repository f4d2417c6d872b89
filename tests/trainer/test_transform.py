import pytest
import torch

from trainer import transform


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formula_against_float64(dtype):
    rows = (torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * 5 + 3).to(dtype)
    x = rows.double()
    mean, scale = x.mean(1, keepdim=True), x.std(1, correction=1, keepdim=True) + 1e-5
    out = transform.standardise(rows)
    assert out.z.dtype == torch.float32
    torch.testing.assert_close(out.z.double(), (x - mean) / scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.scale.double(), scale, rtol=1e-6, atol=0)


def test_inverse_gives_the_row_back():
    rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 30
    rows[3] = 1.5  # a constant row: s = 0
    z, mean, scale = transform.standardise(rows)
    torch.testing.assert_close(transform.restore(z, mean, scale), rows, rtol=1e-6, atol=1e-5)
    assert (z[3] == 0).all()


def test_the_input_is_not_written_to():
    rows = torch.randn(4, 8)
    before = rows.clone()
    transform.standardise(rows)
    assert torch.equal(rows, before)


def test_digest_is_pinned():
    # a change here makes every stored SAE unreadable on purpose
    assert transform.digest() == "53c8f4e51e6cacc5"
