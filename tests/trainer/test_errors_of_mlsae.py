"""Every error that is known of the released MLSAE training code, and that it is not here.

Seen in tim-lawson/mlsae at commit ba90c51; file and line in each docstring.
"""

import json
from itertools import chain

import numpy as np
import pytest
import torch

import actcache
from tests.conftest import as_bits, write_store
from tests.trainer.list_source import ListSource, random_source
from trainer import heldout
from trainer.checkpoint import load_sae
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.state import TrainState
from trainer.transform import standardise

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fast(fast_disk):
    return fast_disk


def start(source=None, **fields):
    config = TrainConfig(**{"n_latents": 40, "k": 4, "rows": 3200, "batch_rows": 32, **fields}).resolve(12)
    return TrainState.start(source or random_source(epochs=20), config, CPU)


@pytest.mark.parametrize("micro_rows", [None, 1])
def test_dead_after_tokens_not_after_steps_or_micro_batches(micro_rows):
    """lightning.py:193-197, autoencoder.py:134-149: a threshold in optimiser steps, a counter of micro-batches: 64 times early."""
    state = start(
        n_latents=400, k=1, dead_after_tokens=80, micro_rows=micro_rows
    )  # 160 rows of two layers: 5 steps
    source, dead = random_source(epochs=20), []
    for batch in source:
        state.advance(batch)
        dead.append(len(state.dead.dead()))
        if len(dead) == 6:
            break
    assert dead[:4] == [0, 0, 0, 0]
    assert dead[4] > 0


def test_evaluation_moves_no_counter():
    """autoencoder.py:134-145: any call of encode advanced the counters."""
    source = random_source(epochs=20)
    state = start(source)
    state.advance(next(iter(source)))
    before = state.dead.rows_since.clone()
    heldout.evaluate({"": state.trained(source, {})}, random_source(90))
    assert torch.equal(state.dead.rows_since, before)


def test_the_auxiliary_loss_is_in_one_space_and_reaches_the_encoder():
    """autoencoder.py:179, auxiliary_loss.py:46-53: e in raw space, its estimate in standardised space with a bias added."""
    source = random_source(epochs=20)
    state = start(source, dead_after_tokens=1, n_latents=400, k=1)
    model = state.model
    state.advance(next(iter(source)))
    dead = state.dead.dead()
    assert len(dead) > 256
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = next(iter(source))
    z = standardise(batch.rows).z
    with torch.no_grad():
        found = model.encode(z)
        e = z - model.decode(found.values, found.indices)
        pre = torch.relu((z - model.bias) @ model.w_enc[dead].T)
        values, at = pre.topk(256)
        ehat = torch.zeros(len(z), 400).scatter_add(1, dead[at], values) @ model.w_dec
        expected = ((ehat - e).square().sum(1) / e.square().sum(1)).mean() / 32
    sums, _ = state.advance(batch)
    assert sums.aux_loss == pytest.approx(float(expected), rel=1e-4)
    moved = (model.w_enc.detach() - before["w_enc"])[dead].abs().sum(1) > 0
    assert moved.float().mean() > 0.5


def test_without_dead_latents_the_auxiliary_loss_is_zero():
    """There it was about 1/32: its estimate was the bias alone."""
    source = random_source(epochs=20)
    state = start(source, dead_after_tokens=10**6)
    assert state.advance(next(iter(source)))[0].aux_loss == 0.0


def test_no_auxiliary_loss_is_a_choice():
    """autoencoder.py:176-181: auxk=None raised UnboundLocalError."""
    source = random_source(epochs=20)
    state = start(source, auxk=None, dead_after_tokens=1)
    for _, batch in zip(range(3), source, strict=False):
        assert state.advance(batch)[0].aux_loss == 0.0


def test_the_bias_lives_where_it_is_used():
    """lightning.py:313: the median of raw rows, subtracted from standardised ones."""
    rows = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * 3 + 500
    source = ListSource(rows, torch.arange(500) % 2, batch_rows=50)
    bias = start(source).model.bias.detach()
    assert bias.abs().max() < 1.5
    z = standardise(rows).z
    assert (z - bias).norm(dim=1).mean() <= (z - z.mean(0)).norm(dim=1).mean()


def test_the_fraction_of_dead_latents_is_that_of_dead_latents(tmp_path):
    """dead_latents.py:36-53: a fraction absent from one micro-batch, logged as dead."""
    config = TrainConfig(n_latents=400, k=1, rows=333, batch_rows=32, dead_after_tokens=80, log_every_steps=1)
    seen = []
    train(random_source(epochs=2), config, tmp_path, on_step=lambda report: seen.append(report.n_dead))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["dead_frac"] for line in lines] == [n / 400 for n in seen]
    assert seen[3] == 0 < seen[4]


def test_rows_that_are_not_kept_are_nowhere(tmp_path):
    """transformer.py:104-105: separators were zeroed, trained on, counted and kept in the bias.

    Here their squares are beyond float32, so one of them anywhere would show.
    """
    options = {"n_sequences": 24, "width": 12, "n_holdout_shards": 2, "drop": 0.3, "dtype": "float32"}
    truth = write_store(tmp_path / "first.zarr", **options)
    acts = truth.floats().astype(np.float32)
    acts[:, ~truth.keep] = 1e25
    truth = write_store(tmp_path / "store.zarr", acts=acts, **options)
    store = actcache.open(str(tmp_path / "store.zarr"))
    config = TrainConfig(n_latents=40, k=4, epochs=3, batch_rows=32, eval_every_steps=3, dead_after_tokens=40)
    with (
        store.stream(batch_size=32, epochs=3) as source,
        store.stream(batch_size=32, split="holdout") as held_out,
    ):
        n_rows = source.n_rows
        summary = train(source, config, tmp_path / "run", held_out=held_out)
    assert summary.rows == 3 * n_rows == 3 * len(truth.kept())
    sae = load_sae(tmp_path / "run")
    assert all(p.isfinite().all() for p in sae.sae.parameters())
    x = torch.from_numpy(acts[0].reshape(-1, 12))
    every = ListSource(x, torch.zeros(len(x), dtype=torch.int64), batch_rows=32)
    with pytest.raises(ArithmeticError):  # and it would show
        train(every, TrainConfig(n_latents=40, k=4, batch_rows=32), tmp_path / "bad")


def test_validation_rows_are_not_training_rows(tmp_path):
    """train.py:25-31: the first million training tokens were the validation set."""
    truth = write_store(tmp_path / "store.zarr", n_sequences=24, n_holdout_shards=2)
    store = actcache.open(str(tmp_path / "store.zarr"))
    documents = {}
    for split in ("train", "holdout"):
        with store.stream(batch_size=32, split=split) as stream:
            documents[split] = {int(d) for batch in stream for d in batch.document}
    assert documents["train"]
    assert documents["holdout"]
    assert not documents["train"] & documents["holdout"]
    assert len(truth.kept(split="holdout"))


def test_a_resumed_run_goes_on_with_the_rows_that_come_next(tmp_path):
    """train.py: no state of the data was saved, a resumed run began the stream again."""
    seen = []

    class Watched(ListSource):
        def _batch(self, ids):
            if self.watched:
                seen.append(ids.tolist())
            return super()._batch(ids)

        watched = False

    def run(out, n_steps, **more):
        source = random_source(kind=Watched, epochs=2)
        original = source.load_state_dict

        def load_state_dict(state):
            original(state)
            source.watched = True  # from the run's first batch on, after the first window

        source.load_state_dict = load_state_dict
        count = iter(range(100))
        config = TrainConfig(n_latents=40, k=4, epochs=2, batch_rows=32)
        train(source, config, out, stop=lambda: next(count) >= n_steps, **more)

    run(tmp_path / "a", 100)
    straight, seen[:] = list(seen), []
    run(tmp_path / "b", 5)
    run(tmp_path / "b", 100, resume=True)
    assert seen == straight
    assert sorted(chain.from_iterable(straight)) == sorted(2 * list(range(210)))


def test_ranks_read_disjoint_rows_of_the_same_batches(tmp_path):
    """Every rank read the same stream."""
    write_store(tmp_path / "store.zarr", n_sequences=24)
    store = actcache.open(str(tmp_path / "store.zarr"))
    with store.stream(batch_size=32) as stream:
        whole = [as_bits(batch.rows) for batch in stream]
    shares = []
    for rank in range(2):
        with store.stream(batch_size=32, rank=rank, world_size=2) as stream:
            shares.append([(batch.slot.numpy(), as_bits(batch.rows)) for batch in stream])
    for i, rows in enumerate(whole):
        slots = np.concatenate([share[i][0] for share in shares])
        assert sorted(slots) == list(range(len(rows)))
        assert np.array_equal(np.concatenate([share[i][1] for share in shares])[np.argsort(slots)], rows)


def test_the_same_run_gives_the_same_bits(tmp_path):
    """kernels.py: atomics added in whatever order, under deterministic=True."""
    config = TrainConfig(n_latents=40, k=4, rows=333, batch_rows=32, dead_after_tokens=40)
    for name in "ab":
        train(random_source(epochs=2), config, tmp_path / name)
    assert (tmp_path / "a" / "sae.safetensors").read_bytes() == (
        tmp_path / "b" / "sae.safetensors"
    ).read_bytes()


def test_gradients_are_float32_whatever_the_products_are():
    """kernels.py:68: float16 buffers for the decoder's gradient."""
    source = random_source(epochs=20)
    state = start(source, precision="bfloat16", activation="batchtopk", clip_norm=None)
    seen = {}
    for name, p in state.model.named_parameters():
        p.register_hook(lambda grad, name=name: seen.__setitem__(name, grad.dtype))
    state.advance(next(iter(source)))
    assert seen == dict.fromkeys(("w_enc", "w_dec", "bias"), torch.float32)
    assert all(m.dtype == torch.float32 for s in state.optimizer.state.values() for m in s.values())


@pytest.mark.parametrize("micro_rows", [None, 5])
def test_a_run_s_length_is_in_rows(tmp_path, micro_rows):
    """config.py:27, train.py:61: `max_steps`, documented as batches, was used as optimiser steps: 64 times the rows."""
    config = TrainConfig(n_latents=40, k=4, rows=200, batch_rows=32, micro_rows=micro_rows)
    summary = train(random_source(), config, tmp_path)
    assert (summary.rows, summary.step) == (200, 7)


def test_what_is_standardised_comes_back_exactly(tmp_path):
    """autoencoder.py:162, 213-222: divided by s + eps, multiplied by s; it shows where s is small."""
    rows = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) * 1e-4 + 1
    source = ListSource(rows, torch.zeros(300, dtype=torch.int64), batch_rows=50)
    train(source, TrainConfig(n_latents=40, k=4, batch_rows=50), tmp_path)
    sae = load_sae(tmp_path)
    code = sae.encode(rows)
    zhat = sae.sae.decode(code.values, code.indices)
    back = (sae.decode(code) - code.mean) / (rows.std(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(back, zhat, rtol=2e-2, atol=1e-2)
    wrong = zhat * rows.std(1, keepdim=True) + code.mean
    assert (wrong - sae.decode(code)).abs().max() > 1e-6


def test_decoder_norms_are_one_after_the_step(tmp_path):
    """autoencoder.py:184-210: normalised before the optimiser's step, not after it."""
    train(random_source(), TrainConfig(n_latents=40, k=4, rows=64, batch_rows=32, lr=0.1), tmp_path)
    torch.testing.assert_close(load_sae(tmp_path).sae.w_dec.norm(dim=1), torch.ones(40))
