"""How well rows are mixed, measured on rows that betray their sequence."""

import numpy as np
import pytest

import actcache
from tests.conftest import write_store

N_SEQUENCES, SEQ_LEN, WIDTH, BATCH = 1600, 128, 32, 2048


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """204,800 rows; those of a sequence differ by a hundredth of what sequences differ by."""
    rng = np.random.default_rng(0)
    acts = np.repeat(rng.standard_normal((1, N_SEQUENCES, 1, WIDTH), np.float32), SEQ_LEN, 2)
    acts += 0.1 * rng.standard_normal(acts.shape, np.float32)
    root = tmp_path_factory.mktemp("shuffle") / "s.zarr"
    write_store(
        root,
        n_sequences=N_SEQUENCES,
        seq_len=SEQ_LEN,
        per_shard=64,
        rows_per_chunk=256,
        layers=(0,),
        width=WIDTH,
        dtype="float32",
        codec="none",
        n_holdout_shards=0,
        drop=0.0,
        acts=acts,
    )
    return actcache.open(root)


def batch_mean_variance(store, **options) -> float:
    """Variance of batch means over that of means of as many rows drawn at random."""
    total = store.stats()[0]
    with store.stream(batch_size=BATCH, drop_last=True, **options) as stream:
        means = np.stack([batch.rows.numpy().mean(0, dtype=np.float64) for batch in stream])
    assert len(means) == N_SEQUENCES * SEQ_LEN // BATCH
    return float(((means - total.mean) ** 2 / (total.variance / BATCH)).mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batches_are_as_good_as_drawn_at_random(store, seed):
    """With the default window. 100 batches of 32 dimensions: the measurement itself is good to 0.025."""
    assert 0.9 < batch_mean_variance(store, seed=seed) <= 1.1


def test_the_measure_can_tell(store):
    """A window of 8,192 rows holds some 1,400 sequences, expected 1 + 2048 * (1/1400 - 1/8192) = 2.2."""
    assert 1.7 < batch_mean_variance(store, window_rows=8192) < 2.7
