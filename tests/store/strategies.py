"""Stores of every shape: sizes that divide and that do not, one of anything, and padding."""

from hypothesis import strategies as st


@st.composite
def store_settings(draw, dtypes=("bfloat16", "float16", "float32"), hooks=(("resid_post",),)):
    """Arguments for `write_store`."""
    seq_len, per_shard = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    n_holdout_shards = draw(st.integers(0, 2))
    n_train = draw(st.integers(1, 4 * per_shard))
    return {
        "seq_len": seq_len,
        "per_shard": per_shard,
        "n_holdout_shards": n_holdout_shards,
        "n_sequences": n_holdout_shards * per_shard + n_train,
        "rows_per_chunk": draw(st.one_of(st.integers(1, 50), st.just(seq_len * per_shard))),
        "layers": tuple(sorted(draw(st.sets(st.integers(0, 6), min_size=1, max_size=3)))),
        "width": draw(st.integers(1, 9)),
        "dtype": draw(st.sampled_from(dtypes)),
        "codec": draw(st.sampled_from(["zstd", "lz4", "none", "uint8"])),
        "drop": draw(st.sampled_from([0.0, 0.3, 0.9])),
        "n_padding": draw(st.integers(0, seq_len - 1)),
        "hooks": draw(st.sampled_from(hooks)),
        "seed": draw(st.integers(0, 1 << 20)),
    }
