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


def fixed(n_layers=3, width=8, seed=2):
    g = torch.Generator().manual_seed(seed)
    return {
        "into.mean": torch.randn(n_layers, width, generator=g) * 9,
        "into.scale": torch.rand(n_layers, generator=g) + 1,
        "out.mean": torch.randn(n_layers, width, generator=g) * 9,
        "out.scale": torch.rand(n_layers, generator=g) + 1,
    }


def test_slices_are_standardised_by_themselves():
    x = (
        torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 30, 900])[:, None]
    )
    z, wanted = transform.Transforms(transform.RowStandardise())(x, x, torch.arange(3).unsqueeze(0))
    assert torch.equal(z, transform.standardise(x.reshape(15, 8)).z.view(5, 24))
    torch.testing.assert_close(wanted.z.std(2), torch.ones(5, 3), rtol=1e-3, atol=0)
    torch.testing.assert_close(transform.restore(*wanted), x)


@pytest.mark.parametrize("layer_i", [torch.tensor([[0, 1, 2]]), torch.tensor([[2], [0], [2], [1], [1]])])
def test_fixed_numbers_of_each_layer(layer_i):
    tensors = fixed()
    x = torch.randn(5, layer_i.shape[1], 8, generator=torch.Generator().manual_seed(0))
    through = transform.LayerStandardise(tensors["into.mean"], tensors["into.scale"])
    found = through(x, layer_i)
    for b in range(5):
        for s in range(x.shape[1]):
            i = int(layer_i.expand(5, -1)[b, s])
            expected = (x[b, s] - tensors["into.mean"][i]) / tensors["into.scale"][i]
            torch.testing.assert_close(found.z[b, s], expected)
    torch.testing.assert_close(transform.restore(*found), x)


def test_a_target_s_own_row_says_nothing_about_it():
    """Another row of targets at one place changes no other number: mean and scale are the layer's."""
    transforms = transform.make_transforms(by_row=True, predicts=True, tensors=fixed())
    x, y = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    layer_i = torch.tensor([[0], [2]])
    _, first = transforms(x, y, layer_i)
    _, second = transforms(x, y * 5 + 3, layer_i)
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.scale, second.scale)


def test_tensors_come_back():
    for by_row in (True, False):
        for predicts in (True, False):
            made = transform.make_transforms(by_row=by_row, predicts=predicts, tensors=fixed())
            again = transform.make_transforms(by_row=by_row, predicts=predicts, tensors=made.tensors)
            assert made.tensors.keys() == again.tensors.keys()
            assert len(made.tensors) == 2 * (not by_row) + 2 * predicts
            assert made.digest == again.digest


def test_digests_are_pinned():
    # a change here makes every stored SAE unreadable on purpose
    digests = [
        transform.make_transforms(by_row=by_row, predicts=predicts, tensors=fixed()).digest
        for by_row in (True, False)
        for predicts in (False, True)
    ]
    assert digests == ["19a36758ec0a9d40", "3a5ba1237a32375f", "b3c2d6884c69cfef", "14434733cb7b824d"]
