import pytest
import torch

from trainer.kernels import reference, sparse
from trainer.median import geometric_median
from trainer.sae import TopKSAE


def make(width=8, n_latents=32, k=3, seed=0, **more):
    return TopKSAE(width, n_latents, k, generator=torch.Generator().manual_seed(seed), **more)


def test_init_is_uniform_tied_and_unit_norm():
    sae = make(64, 512)
    assert sae.w_enc.abs().max() <= 64**-0.5
    assert float(sae.w_enc.detach().std()) == pytest.approx(64**-0.5 / 3**0.5, rel=0.02)
    torch.testing.assert_close(sae.w_dec.norm(dim=1), torch.ones(512))
    torch.testing.assert_close(sae.w_dec * sae.w_enc.norm(dim=1, keepdim=True), sae.w_enc)
    assert torch.equal(make(seed=1).w_enc, make(seed=1).w_enc)
    assert not torch.equal(make(seed=1).w_enc, make(seed=2).w_enc)


def test_forward_formula():
    sae = make()
    with torch.no_grad():
        sae.bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(2)))
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    code = sae.encode(z)
    pre = torch.relu((z - sae.bias) @ sae.w_enc.T)
    kept = torch.zeros_like(pre).scatter_(1, pre.topk(3).indices, pre.topk(3).values)
    torch.testing.assert_close(sae.decode(code.values, code.indices), kept @ sae.w_dec + sae.bias)
    torch.testing.assert_close(sae.decode_directions(code.values, code.indices), kept @ sae.w_dec)


def test_kernels_are_interchangeable():
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    a, b = (make(kernels=kernels).encode(z) for kernels in (sparse, reference))
    torch.testing.assert_close(a.values, b.values)


def test_encode_has_no_side_effects():
    sae = make()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    z = torch.randn(5, 8)
    z_before = z.clone()
    sae.encode(z)
    assert torch.equal(z, z_before)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())


def test_projection_leaves_nothing_along_the_latent():
    sae = make()
    sae.w_dec.grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(4))
    expected = sae.w_dec.grad - (sae.w_dec.grad * sae.w_dec).sum(1, keepdim=True) * sae.w_dec
    sae.project_decoder_gradient()
    torch.testing.assert_close(sae.w_dec.grad, expected.detach())
    assert (sae.w_dec.grad * sae.w_dec).sum(1).abs().max() < 1e-6


def test_geometric_median_of_hand_numbers():
    # the Fermat point of a symmetric cross is its centre, wherever one arm's end lies
    z = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -900.0]])
    torch.testing.assert_close(geometric_median(z), torch.zeros(2), atol=1e-2, rtol=0)


def test_geometric_median_ignores_outliers_that_move_the_mean():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 6, generator=g) + 3
    z[:200] = 1e4
    assert (z.mean(0) - 3).abs().max() > 50
    assert (geometric_median(z) - 3).abs().max() < 0.1


def test_geometric_median_when_a_row_is_the_start():
    z = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    assert geometric_median(z).isfinite().all()
