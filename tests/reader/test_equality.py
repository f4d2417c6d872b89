"""What decides the order, and nothing else does: any threads, delays, ranks, memory, codec and place give the same batches."""

import itertools
import json
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import UsageError
from actcache.reader import fetching, placement, window
from actcache.store.local import LocalFiles
from tests.conftest import as_bits, sorted_rows, write_store
from tests.reader.test_stream import delayed
from tests.store.strategies import store_settings


def selections(n_positions: int) -> st.SearchStrategy[dict]:
    """Arguments that decide the order."""
    return st.fixed_dictionaries(
        {
            "batch_size": st.integers(1, 40),
            "window_rows": st.integers(1, 200),
            "run_chunks": st.sampled_from([1, 1, 2, 5]),
            "partitions": st.sampled_from([8, 16]),
            "order": st.sampled_from(["global", "commit"]),
            "stack": st.sampled_from(["data", "feature", "layers"]),
            "seed": st.integers(0, 99),
            "drop_last": st.booleans(),
            "positions": st.sampled_from([None, None, [0], slice(0, None, 2), slice(0, n_positions)]),
        }
    )


def numbers_of(batch, stack: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each row of a batch came from, and its bits."""
    layer = batch.layer.numpy()
    layer = layer if stack == "data" else np.broadcast_to(layer[:1], len(batch))
    ids = np.stack([layer, batch.sequence.numpy(), batch.position.numpy()], 1)
    return ids, as_bits(batch.rows.flatten(1).clone())


def batches_of(store, **options) -> list[tuple[np.ndarray, ...]]:
    with store.stream(**options) as stream:
        return [numbers_of(batch, options["stack"]) for batch in stream]


def together(ranks: list[list[tuple[np.ndarray, ...]]]) -> list[tuple[np.ndarray, ...]]:
    """The batches of all ranks, rows in no order."""
    return [
        tuple(np.concatenate(parts) for parts in zip(*shares, strict=True))
        for shares in zip(*ranks, strict=True)
    ]


def assert_same(found, expected, *, ordered: bool = True, is_lossy: bool = False) -> None:
    assert len(found) == len(expected)
    for (ids, rows), (true_ids, true_rows) in zip(found, expected, strict=True):
        at = slice(None) if ordered else np.lexsort(ids.T[::-1])
        true_at = slice(None) if ordered else np.lexsort(true_ids.T[::-1])
        assert np.array_equal(ids[at], true_ids[true_at])
        assert is_lossy or np.array_equal(rows[at], true_rows[true_at])


@settings(max_examples=40)
@given(chosen=store_settings(), data=st.data())
def test_the_order_is_that_of_one_thread_whatever_delivers_it(chosen, data):
    options = data.draw(selections(chosen["seq_len"])) | {"epochs": data.draw(st.integers(1, 2))}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        truth = write_store(Path(folder) / "s.zarr", **chosen)
        store = actcache.open(truth.root)
        expected = batches_of(store, **options, threads=1)
        patch.setattr(window, "JOB_BYTES", data.draw(st.sampled_from([1, 300, 1 << 20])))
        patch.setattr(window, "_READ_AHEAD_BYTES", data.draw(st.sampled_from([0, 1000, 16 << 20])))
        patch.setattr(fetching, "FETCHED_BYTES", data.draw(st.sampled_from([1, 500, 64 << 20])))
        patch.setattr(
            placement, "MOST_WINDOWS", data.draw(st.sampled_from([1, 2, 5]))
        )  # 1: nothing is read ahead
        threads = data.draw(st.sampled_from([1, 2, 8]))
        delivery, other = {"threads": threads}, chosen["codec"]
        if data.draw(st.booleans()):
            url = f"memory://{truth.root.as_posix().strip('/').replace('/', '-')}"
            fsspec.filesystem("memory").put(str(truth.root), url, recursive=True)
            store = actcache.open(url)
            delivery |= {"io_threads": data.draw(st.sampled_from([1, 4]))}
        elif data.draw(st.booleans()):  # the same rows, compressed differently
            other = data.draw(st.sampled_from(["zstd", "lz4", "none", "uint8"]))
            store = actcache.open(write_store(Path(folder) / "other.zarr", **chosen | {"codec": other}).root)
        if data.draw(st.booleans()):  # matters to a local store only
            delivery |= {"page_cache": False}
            patch.setattr(LocalFiles, "is_cached", lambda *_args: False)
            patch.setattr(fetching, "_LARGE_PAGE", data.draw(st.sampled_from([4096, 2 << 20])))
            patch.setattr(fetching, "AROUND_BYTES", data.draw(st.sampled_from([1, 3 << 20])))
        world_size = data.draw(st.sampled_from([1, 2, 4, 8]))
        with delayed(threads) if data.draw(st.booleans()) else pytest.MonkeyPatch.context():
            ranks = [
                batches_of(store, **options, **delivery, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
        is_lossy = "uint8" in (chosen["codec"], other) and other != chosen["codec"]
        assert_same(together(ranks), expected, ordered=world_size == 1, is_lossy=is_lossy)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    root = tmp_path_factory.mktemp("equality") / "s.zarr"
    return write_store(root, n_sequences=15, seq_len=9, n_padding=4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stack": "layers", "run_chunks": 3},
        {"order": "commit", "commit_shards": 2, "drop_last": True},
        {"positions": [0, 3, 4, 7], "batch_size": 50},
    ],
    ids=str,
)
def test_a_cursor_goes_on_at_another_world_size_twice(truth, options):
    """From every batch, with 2 ranks, and from every batch after that, with 4: always the rest of one reader's batches."""
    options = {"batch_size": 16, "window_rows": 48, "epochs": 2, "stack": "data"} | options
    store = actcache.open(truth.root)
    with store.stream(**options) as stream:
        states = [stream.state_dict(), *(stream.state_dict() for _ in stream)]
    whole = batches_of(store, **options)
    assert len(states) == len(whole) + 1
    for i, state in enumerate(states[:-1]):
        j = i + 1 + i % 3  # where the second interruption is
        parts, middle = rest_of(store, state, 2, j - i, **options)
        assert_same(parts, whole[i:j], ordered=False)
        if j < len(whole):
            assert all(json.dumps(s, sort_keys=True) == json.dumps(states[j], sort_keys=True) for s in middle)
            rest, _ = rest_of(store, middle[0], 4, None, **options)
            assert_same(rest, whole[j:], ordered=False)


def rest_of(store, state, world_size, n, **options):
    """The next batches of all ranks together, and their cursors."""
    ranks, states = [], []
    for rank in range(world_size):
        with store.stream(**options, rank=rank, world_size=world_size) as stream:
            stream.load_state_dict(json.loads(json.dumps(state)))
            ranks.append([numbers_of(batch, options["stack"]) for batch in itertools.islice(stream, n)])
            states.append(stream.state_dict())
    return together(ranks), states


def test_the_run_length_is_part_of_the_order_and_one_is_the_default(truth):
    store = actcache.open(truth.root)
    options = {"batch_size": 16, "window_rows": 48, "stack": "data"}
    default = batches_of(store, **options)
    assert_same(batches_of(store, **options, run_chunks=1), default)
    in_runs = batches_of(store, **options, run_chunks=2)
    assert not np.array_equal(in_runs[0][0], default[0][0])
    everything = [np.concatenate([ids for ids, _ in found]) for found in (in_runs, default)]
    assert np.array_equal(*map(sorted_rows, everything))
    with pytest.raises(UsageError, match="run_chunks=0: expected at least 1"):
        store.stream(run_chunks=0)


def test_another_place_has_no_other_default(truth):
    """Nothing of the order depends on where a store is."""
    fsspec.filesystem("memory").put(str(truth.root), "/another-place", recursive=True)
    with (
        actcache.open("memory://another-place").stream() as remote,
        actcache.open(truth.root).stream() as local,
    ):
        assert remote.settings == local.settings
        assert remote.fingerprint == local.fingerprint


def test_rows_of_one_batch_do_not_depend_on_the_dtype_asked_for(truth):
    store = actcache.open(truth.root)
    with store.stream(batch_size=16) as stored, store.stream(batch_size=16, dtype=torch.float32) as asked:
        for a, b in zip(stored, asked, strict=True):
            assert torch.equal(a.rows.float(), b.rows)
            assert torch.equal(a.position, b.position)
