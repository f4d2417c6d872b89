"""Quantised captures: the rows of every kind of stream are those that zarr-python reads, here and on a device."""

import numpy as np
import pytest
import torch

import actcache
from actcache.reader import placement
from tests.conftest import as_bits, random_acts, sorted_rows, write_store
from tests.reader.late import LateSide

LAYERS = (0, 3, 7)
HOOKS = ("resid_post", "mlp_out")


def spiked(dtype: str) -> np.ndarray:
    """[l, q, t, d]: ordinary rows, and rows a hundred times longer."""
    rng = np.random.default_rng(3)
    acts = random_acts(rng, (len(LAYERS), 20, 9, 12), dtype)
    if dtype == "bfloat16":
        longer = (acts.astype(np.uint32) << 16).view(np.float32) * 100
        longer = (longer.view(np.uint32) >> 16).astype(np.uint16)
    else:
        longer = acts * acts.dtype.type(100)
    is_long = rng.random(acts.shape[:3]) < 0.1
    acts[is_long] = longer[is_long]
    return acts


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def truth(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised") / "s.zarr"
    return write_store(
        root,
        n_sequences=20,
        seq_len=9,
        layers=LAYERS,
        width=12,
        hooks=HOOKS,
        n_padding=5,
        codec="uint8",
        dtype=request.param,
        acts=spiked(request.param),
    )


@pytest.fixture(params=["cpu", "device", "pinned"])
def place(request, monkeypatch) -> dict:
    if request.param == "cpu":
        return {}
    side = LateSide()
    monkeypatch.setattr(placement, "open_side", lambda _name: side)
    return {"device": "cuda", "device_memory": None if request.param == "device" else 0}


@pytest.mark.parametrize("stack", ["data", "feature", "layers"])
@pytest.mark.parametrize("hook", [*HOOKS, HOOKS])
@pytest.mark.parametrize("order", ["global", "commit"])
def test_every_kind_of_stream_hands_out_what_others_read(truth, place, stack, hook, order):
    assert not np.array_equal(truth.acts["resid_post"], truth.given["resid_post"])  # it is lossy
    found = []
    with actcache.open(truth.root).stream(
        batch_size=11, window_rows=64, hook=hook, stack=stack, order=order, **place
    ) as stream:
        for batch in stream:
            sequence, position = batch.sequence.numpy(), batch.position.numpy()
            for name, rows in batch.hooks.items():
                if stack == "data":
                    expected = truth.bits(batch.layer.numpy(), sequence, position, name)
                else:
                    parts = [truth.bits(layer, sequence, position, name) for layer in LAYERS]
                    expected = np.stack(parts, 1).reshape(len(batch), -1)
                assert np.array_equal(as_bits(rows.reshape(len(batch), -1).clone()), expected)
            found.append(np.stack([sequence, position], 1))
    kept = truth.kept()[:, 1:] if stack == "data" else np.unique(truth.kept()[:, 1:], axis=0)
    assert np.array_equal(sorted_rows(np.concatenate(found)), sorted_rows(kept))


def test_filters_and_other_dtypes_towards_a_device(truth, monkeypatch):
    """Few rows of a chunk, as float32."""
    options = {"batch_size": 7, "window_rows": 48, "positions": [2, 5], "dtype": torch.float32, "epochs": 2}
    with actcache.open(truth.root).stream(**options) as stream:
        expected = [(as_bits(b.rows.clone()), b.sequence.numpy()) for b in stream]
    side = LateSide(seed=1)
    monkeypatch.setattr(placement, "open_side", lambda _name: side)
    with actcache.open(truth.root).stream(**options, device="cuda") as stream:
        found = [(as_bits(b.rows.clone()), b.sequence.numpy()) for b in stream]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_codes_cross_the_bus_and_not_what_they_stand_for(tmp_path, monkeypatch):
    truth = write_store(
        tmp_path / "s.zarr",
        n_sequences=32,
        seq_len=32,
        per_shard=8,
        rows_per_chunk=64,
        width=256,
        drop=0.02,
        codec="uint8",
    )
    side = LateSide(rate=1.0)
    monkeypatch.setattr(placement, "open_side", lambda _name: side)
    sent, move = [], torch.Tensor.to

    def counted(tensor, *given, **named):
        sent.append(tensor.nbytes if named.get("non_blocking") else 0)
        return move(tensor, *given, **named)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    with actcache.open(truth.root).stream(batch_size=64, window_rows=512, device="cuda") as stream:
        n_bytes = sum(batch.rows.nbytes for batch in stream)
        assert stream.counters.row_bytes == n_bytes
        assert stream.counters.read_bytes < 0.9 * n_bytes
    assert (
        0.5 * n_bytes < sum(sent) < 0.8 * n_bytes
    )  # bfloat16 is two bytes; and scales, slots, rows that are not kept


@pytest.mark.gpu
@pytest.mark.parametrize("stack", ["data", "layers"])
def test_cuda_finds_the_same_bits(truth, stack):
    options = {"batch_size": 11, "window_rows": 64, "hook": HOOKS, "stack": stack, "epochs": 2}
    with actcache.open(truth.root).stream(**options) as stream:
        expected = [[as_bits(rows.clone()) for rows in batch.hooks.values()] for batch in stream]
    with actcache.open(truth.root).stream(**options, device="cuda") as stream:
        found = [[as_bits(rows.cpu()) for rows in batch.hooks.values()] for batch in stream]
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
