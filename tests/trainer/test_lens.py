"""A lens undoes itself, survives the disk, and is between the source and a trainer that knows nothing of it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actcache.errors import DamageError, NotFoundError, PlanMismatchError, UsageError
from tests.trainer.list_source import ListSource, form_source, random_rows
from trainer.checkpoint import load_sae
from trainer.config import TrainConfig
from trainer.lens import LENS, Lens, LensSource, load_lens, save_lens
from trainer.loop import train

LAYERS = (2, 5)


def random_lens(width=12, seed=0, scalar=False, layers=LAYERS):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    weight = (
        draw(len(layers)).abs() + 0.5 if scalar else torch.eye(width) + 0.2 * draw(len(layers), width, width)
    )
    return Lens(layers=layers, centre=3 * draw(len(layers), width), weight=weight, offset=draw(len(layers), width), about={"kind": "random"})  # fmt: skip


@given(seed=st.integers(0, 50), scalar=st.booleans(), n=st.integers(1, 20))
def test_what_is_seen_through_a_lens_comes_back(seed, scalar, n):
    lens = random_lens(seed=seed, scalar=scalar)
    x, layer = random_rows(n, 12, LAYERS, seed)
    y = lens.apply(x, layer)
    back = lens.invert(y, layer)
    worst = max(lens.conditions().values())
    assert float((back - x).abs().max()) <= 1e-6 * worst * float(x.abs().max() + lens.centre.abs().max() + 1)


def test_by_formula_and_layer_by_layer():
    lens = random_lens()
    x, layer = random_rows(9, 12, LAYERS)
    for i, number in enumerate(LAYERS):
        at = layer == number
        expected = (x[at].double() - lens.centre[i].double()) @ lens.weight[i].double().T + lens.offset[
            i
        ].double()
        torch.testing.assert_close(lens.apply(x, layer)[at].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lens.apply(x[at], torch.tensor([number])), lens.apply(x, layer)[at])
        inverse = torch.linalg.inv(lens.weight[i].double())
        undone = (expected - lens.offset[i]) @ inverse.T + lens.centre[i]
        torch.testing.assert_close(lens.invert(expected.float(), torch.tensor([number])).double(), undone, rtol=1e-4, atol=1e-4)  # fmt: skip
    values = torch.linalg.svdvals(lens.weight[1].double())
    assert lens.conditions()[5] == pytest.approx(float(values[0] / values[-1]))
    assert random_lens(scalar=True).conditions() == {2: 1.0, 5: 1.0}


def test_the_diagonal_of_the_inverse_is_not_the_inverse():
    """The released MLSAE code undoes its lens by einsum "n n, b p n -> b p n": the diagonal of the inverse alone
    (lightning.py:87), so what comes back is another vector."""
    lens = random_lens()
    x, _layer = random_rows(6, 12, (2,))
    y = lens.apply(x, torch.tensor([2]))
    inverse = torch.linalg.inv(lens.weight[0])
    known = y - lens.offset[0]
    released = torch.diagonal(inverse) * known + lens.centre[0]
    ours = lens.invert(y, torch.tensor([2]))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert float((released - x).abs().max()) > 0.5


def test_a_layer_without_a_map_is_refused():
    x, _ = random_rows(3, 12, (2,))
    with pytest.raises(UsageError, match=r"maps for layers \[2, 5\] only"):
        random_lens().apply(x, torch.tensor([3]))


def test_on_disk(tmp_path):
    lens = random_lens()
    path = tmp_path / "new" / "lens.safetensors"
    save_lens(lens, path)
    again = load_lens(path)
    assert again.layers == lens.layers
    assert again.about == {"kind": "random"}
    assert again.digest == lens.digest
    assert torch.equal(again.weight, lens.weight)
    assert random_lens(seed=1).digest != lens.digest
    assert dataclasses.replace(lens, layers=(2, 6)).digest != lens.digest


def test_damage_is_named(tmp_path):
    path = tmp_path / "lens.safetensors"
    with pytest.raises(NotFoundError, match="actcache lens train"):
        load_lens(path)
    save_lens(random_lens(), path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match="not those that were written"):
        load_lens(path)
    for broken in (data[:-50], b"", b"{}"):
        path.write_bytes(broken)
        with pytest.raises(DamageError, match="cannot be read"):
            load_lens(path)


def test_a_source_seen_through_a_lens_keeps_its_order_cursor_and_provenance():
    lens = random_lens()
    x, layer = random_rows(50, 12, LAYERS)
    plain, seen = ListSource(x, layer, batch_rows=16), LensSource(ListSource(x, layer, batch_rows=16), lens)
    assert (seen.width, seen.layers, len(seen)) == (plain.width, plain.layers, len(plain))
    assert seen.fingerprint not in (plain.fingerprint, LensSource(plain, random_lens(seed=1)).fingerprint)
    torch.testing.assert_close(seen.peek(5).rows, lens.apply(plain.peek(5).rows, plain.peek(5).layer))
    iterator, batches = iter(seen), iter(plain)
    first, expected = next(iterator), next(batches)
    assert torch.equal(first.rows, lens.apply(expected.rows, expected.layer))
    assert torch.equal(first.sequence, expected.sequence)
    cursor = seen.state_dict()
    rest = [batch.rows for batch in iterator]
    seen.load_state_dict(cursor)
    assert all(torch.equal(a, b.rows) for a, b in zip(rest, seen, strict=True))


def test_sources_that_do_not_fit():
    with pytest.raises(UsageError, match=r"layers \[5\] are missing"):
        LensSource(ListSource(*random_rows(4, 12, LAYERS), batch_rows=2), random_lens(layers=(2,)))
    with pytest.raises(UsageError, match=r"width 12 does not fit rows .* width 4"):
        LensSource(ListSource(*random_rows(4, 4, LAYERS), batch_rows=2), random_lens())
    with pytest.raises(UsageError, match="rows of one layer each"):
        list(LensSource(form_source("crosscoder"), random_lens()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("lens") / "run"
    train(source(), config(), out, lens=random_lens(), provenance={"who": "a test"})
    return out


def source():
    return ListSource(*random_rows(400, 12, LAYERS), batch_rows=32, epochs=2)


def config(**more):
    return TrainConfig(n_latents=30, k=4, auxk=0, batch_rows=32, epochs=2, **more)


def test_training_through_a_lens_is_training_on_what_it_shows(run, tmp_path):
    lens = random_lens()
    x, layer = random_rows(400, 12, LAYERS)
    train(ListSource(lens.apply(x, layer), layer, batch_rows=32, epochs=2), config(), tmp_path / "direct")
    direct, through = load_sae(tmp_path / "direct"), load_sae(run)
    for name, weights in direct.sae.state_dict().items():
        assert torch.equal(weights, through.sae.state_dict()[name])
    y = lens.apply(x, layer)
    inside = dataclasses.replace(through, lens=None)
    assert torch.equal(direct.decode(direct.encode(y)), inside.decode(inside.encode(y)))


def test_an_sae_trained_through_a_lens_takes_and_gives_raw_rows(run):
    lens, sae = random_lens(), load_sae(run)
    x, layer = random_rows(50, 12, LAYERS, seed=9)
    inside = dataclasses.replace(sae, lens=None)
    code = sae.encode(x, layer)
    expected = inside.encode(lens.apply(x, layer))
    assert torch.equal(code.values, expected.values)
    assert torch.equal(code.indices, expected.indices)
    torch.testing.assert_close(sae.decode(code), lens.invert(inside.decode(expected), layer))
    again = sae.with_latents(x, code.values, code.indices, layer)
    torch.testing.assert_close(sae.decode(again), sae.decode(code))
    with pytest.raises(UsageError, match="say which layer every row is of"):
        sae.encode(x)


def test_the_lens_stays_with_the_run(run, tmp_path):
    assert load_lens(run / LENS).digest == random_lens().digest
    assert load_sae(run).provenance["who"] == "a test"
    assert json.loads((run / "sae.json").read_text())["provenance"]["lens"]["about"] == {"kind": "random"}
    save_lens(random_lens(seed=1), run / LENS)
    with pytest.raises(DamageError, match="not the lens this SAE was trained through"):
        load_sae(run)
    (run / LENS).unlink()
    with pytest.raises(NotFoundError, match="no lens"):
        load_sae(run)
    save_lens(random_lens(), run / LENS)


def test_going_on_through_another_lens_is_refused_and_harms_nothing(tmp_path):
    out = tmp_path / "run"
    steps = []
    train(source(), config(checkpoint_every_steps=3), out, lens=random_lens(), stop=lambda: len(steps) >= 5, on_step=steps.append)  # fmt: skip
    before = load_lens(out / LENS).digest
    for other in (None, random_lens(seed=1)):
        with pytest.raises(PlanMismatchError):
            train(source(), config(checkpoint_every_steps=3), out, lens=other, resume=True)
    assert load_lens(out / LENS).digest == before
    train(source(), config(checkpoint_every_steps=3), out, lens=random_lens(), resume=True)
    straight = tmp_path / "straight"
    train(source(), config(checkpoint_every_steps=3), straight, lens=random_lens())
    for name, weights in load_sae(straight).sae.state_dict().items():
        assert np.array_equal(weights.numpy(), load_sae(out).sae.state_dict()[name].numpy())
