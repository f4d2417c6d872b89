"""Statistics of any shards are those of their rows, whoever wrote them and however often that was interrupted."""

import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.store.merged import layer_statistics
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from tests.conftest import as_others_read, commit_shards, write_store
from tests.producer.test_build import check_statistics
from tests.producer.test_crash import Died, Mortal

pytestmark = pytest.mark.usefixtures("fast_disk")


@settings(max_examples=20, deadline=None)
@given(
    per_shard=st.integers(1, 5),
    n_sequences=st.integers(6, 17),
    seq_len=st.integers(3, 9),
    rows_per_chunk=st.integers(4, 12),
    width=st.integers(1, 5),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    codec=st.sampled_from(["zstd", "none", "uint8"]),
    drop=st.sampled_from([0.0, 0.3, 0.9]),
    shards=st.sets(st.integers(0, 16), min_size=1),
    n_deaths=st.integers(0, 3),
    seed=st.integers(0, 1 << 16),
)
def test_statistics_of_any_shards_of_a_store_whose_makers_died(
    per_shard, n_sequences, seq_len, rows_per_chunk, width, dtype, codec, drop, shards, n_deaths, seed
):
    """Shards are committed in a random order by processes that die at random steps; those chosen add up."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        truth = write_store(
            Path(folder) / "s.zarr", n_sequences=n_sequences, seq_len=seq_len, per_shard=per_shard,
            rows_per_chunk=rows_per_chunk, width=width, dtype=dtype, codec=codec, drop=drop, commit=[], seed=seed,
        )  # fmt: skip
        n_shards = truth.grid.n_shards
        for _ in range(n_deaths):
            with suppress(Died):
                commit_shards(truth, rng.permutation(n_shards).tolist(), Mortal(int(rng.integers(1, 40))))
        commit_shards(truth, [s for s in rng.permutation(n_shards).tolist() if not is_committed(truth, s)])
        chosen = sorted(shards & set(range(n_shards)))
        acts = (
            replace(truth, acts={"resid_post": as_others_read(truth, "resid_post")})
            if codec == "uint8"
            else truth
        ).floats()
        kept = truth.keep & np.isin(np.arange(n_sequences) // per_shard, chosen)[:, None]
        found = layer_statistics(Catalog(LocalObjects(truth.root)).capture("resid_post"), chosen)
        for i, layer in enumerate(truth.layers):
            if kept.any():
                check_statistics(found[layer], acts[i][kept])
            else:
                assert found[layer].n_rows == 0


def is_committed(truth, shard: int) -> bool:
    return Catalog(LocalObjects(truth.root)).capture("resid_post").is_committed(shard)
