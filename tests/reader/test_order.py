"""The order as a pure function: a bijection, stratified, shared out without remainder, and never another one."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.reader.order import CommitOrder, GlobalOrder, Runs, arrange, groups_of, list_chunks, runs_of
from actcache.store import keyed

GOLDEN = "625c26614302dd0609e7f44689fa719c7c570dc14dbda05700686a9cb7ea00be"
"""Of the first 10,000 row numbers of one order: changed by nothing, ever, but a new name for a new order."""
OTHERS = {
    ("global", 4): "349c851fd47a5e11ef14591d4d2f0c70afb03fc28747d4a1a7f9644d4bd986e8",
    ("commit", 1): "980c7364a6612dd0f12ad1842afa36fafa1d5aa3d9e8f5619392cbcb04cb4c68",
    ("commit", 3): "98d852257313082cdaf0c66d67766ea7e8b052877a74824c2fab91fe80112438",
}


def ids_in_windows(order, chunks, windows):
    """(layer index, chunk, row of it) as one number, for every row in some windows of an order."""
    for window in windows:
        members = order.members(window)
        counts = chunks.n_rows[members.listed]
        arranged = arrange(order.key_of(window), counts, members.partition, order.partitions)
        ids = np.repeat((members.layer_i * len(chunks) + members.listed) * 64, counts)
        ids += np.concatenate([counts[:0], *(np.arange(n) for n in counts)])
        out = np.empty_like(ids)
        out[arranged.slot] = ids
        yield out, arranged


@pytest.mark.parametrize(("name", "run_chunks"), OTHERS)
def test_the_other_orders_never_change_either(name, run_chunks):
    """31 shards, of 1,001 chunks in all; runs are cut short at the end of a shard."""
    chunks = list_chunks(np.arange(2, 33), 2000 + 40 * (np.arange(31) % 3), 64)
    common = {"seed": 0, "epoch": 0, "n_layers": 3, "partitions": 8, "runs": runs_of(chunks, run_chunks)}
    if name == "global":
        order = GlobalOrder(**common, groups=9)
    else:
        order = CommitOrder(**common, chunks=chunks, depth=4, steps=2)
    windows = range(order.n_windows)
    first = np.concatenate([ids for ids, _ in ids_in_windows(order, chunks, windows)])[:10_000]
    assert len(first) == 10_000
    assert hashlib.sha256(first.astype("<i8").tobytes()).hexdigest() == OTHERS[name, run_chunks]


@settings(max_examples=60, deadline=None)
@given(
    kept=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any),
    run_chunks=st.integers(1, 9),
    n_layers=st.integers(1, 3),
    partitions=st.sampled_from([1, 2, 8]),
    name=st.sampled_from(["global", "commit"]),
    size=st.integers(1, 9),
)
def test_runs_stay_together(kept, run_chunks, n_layers, partitions, name, size):
    """In one window and one partition; and every chunk comes once, whatever the run length."""
    chunks = list_chunks(np.arange(len(kept)), np.array(kept), 7)
    runs = runs_of(chunks, run_chunks)
    common = {"seed": 5, "epoch": 1, "n_layers": n_layers, "partitions": partitions, "runs": runs}
    if name == "global":
        order = GlobalOrder(**common, groups=min(size, len(runs)))
    else:
        order = CommitOrder(**common, chunks=chunks, depth=size, steps=2)
    seen, places = [], {}
    for window in range(order.n_windows):
        members = order.members(window)
        begins = np.isin(members.listed, runs.first)
        n_runs = np.bincount(members.layer_i[begins], minlength=n_layers)
        assert (n_runs == n_runs[0]).all()  # each layer equally present
        assert n_runs[0] <= order.most_runs
        for layer, listed, partition in zip(*members, strict=True):
            seen.append((int(layer), int(listed)))
            places[layer, listed] = (window, int(partition))
    assert sorted(seen) == [(layer, c) for layer in range(n_layers) for c in range(len(chunks))]
    for layer in range(n_layers):
        for first, n in zip(*runs, strict=True):
            shards = chunks.shard[first : first + n]
            assert (shards == shards[0]).all()
            assert len({places[layer, c] for c in range(first, first + n)}) == 1


def row_ids(
    *, seed, epoch, n_chunks=1001, n_layers=3, groups=9, partitions=8, rows=64, last=17, windows=None
):
    """(layer index, chunk, row of it) as one number, for every row in the order."""
    order = GlobalOrder(
        seed=seed,
        epoch=epoch,
        runs=Runs(np.arange(n_chunks), np.ones(n_chunks, np.int64)),
        n_layers=n_layers,
        groups=groups,
        partitions=partitions,
    )
    for window in range(order.n_windows if windows is None else windows):
        members = order.members(window)
        counts = np.where(members.listed == n_chunks - 1, last, rows)
        arranged = arrange(order.key_of(window), counts, members.partition, partitions)
        ids = np.repeat((members.layer_i * n_chunks + members.listed) * rows, counts)
        ids += np.concatenate([np.arange(n) for n in counts])
        out = np.empty_like(ids)
        out[arranged.slot] = ids
        yield out, arranged


def test_the_order_never_changes():
    first = np.concatenate([ids for ids, _ in row_ids(seed=0, epoch=0, windows=8)])[:10_000]
    assert len(first) == 10_000
    assert hashlib.sha256(first.astype("<i8").tobytes()).hexdigest() == GOLDEN


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    epoch=st.integers(0, 3),
    n_chunks=st.integers(1, 60),
    n_layers=st.integers(1, 4),
    groups=st.integers(1, 70),
    partitions=st.sampled_from([1, 2, 3, 8, 64]),
    rows=st.integers(1, 20),
    data=st.data(),
)
def test_an_epoch_is_every_row_once(seed, epoch, n_chunks, n_layers, groups, partitions, rows, data):
    last = data.draw(st.integers(1, rows))
    windows = list(
        row_ids(
            seed=seed,
            epoch=epoch,
            n_chunks=n_chunks,
            n_layers=n_layers,
            groups=min(groups, n_chunks),
            partitions=partitions,
            rows=rows,
            last=last,
        )
    )
    found = np.sort(np.concatenate([ids for ids, _ in windows]))
    per_layer = np.arange((n_chunks - 1) * rows + last)
    assert np.array_equal(found, np.concatenate([per_layer + i * n_chunks * rows for i in range(n_layers)]))
    sizes = [len(np.unique(ids // rows)) for ids, _ in windows]
    assert max(sizes) - min(sizes) <= n_layers  # windows as equal as can be
    assert max(sizes) <= min(groups, n_chunks) * n_layers
    for ids, _ in windows:  # and every layer equally present in each
        chunks_of_layer = np.bincount(np.unique(ids // rows) // n_chunks, minlength=n_layers)
        assert (chunks_of_layer == chunks_of_layer[0]).all()


def slow_arrange(key, counts, dealt, partitions):
    """The definition, a row at a time: (member, row) of each slot."""
    total = sum(counts)
    rows = [(m, r) for m, n in enumerate(counts) for r in range(n)]
    dropped_bits = max(1, total.bit_length()) + max(1, partitions.bit_length())
    hashes = [int(h) >> dropped_bits for h in keyed.hash_u64(key, np.arange(total))]
    timed = []
    for p in range(partitions):
        mine = sorted((hashes[i], i) for i, (m, _) in enumerate(rows) if dealt[m] == p)
        timed += [(Fraction(2 * j + 1, 2 * len(mine)), p, rows[i]) for j, (_, i) in enumerate(mine)]
    return [(row, p) for _, p, row in sorted(timed)]


@settings(max_examples=80, deadline=None)
@given(
    key=st.integers(0, (1 << 64) - 1),
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    partitions=st.integers(1, 9),
    data=st.data(),
)
def test_arranging_is_a_merge_by_virtual_time(key, counts, partitions, data):
    n = len(counts)
    dealt = np.array(data.draw(st.lists(st.integers(0, partitions - 1), min_size=n, max_size=n)))
    arranged = arrange(key, np.array(counts), dealt, partitions)
    rows = [(m, r) for m, n in enumerate(counts) for r in range(n)]
    found = sorted(zip(arranged.slot.tolist(), rows, strict=True))
    expected = slow_arrange(key, counts, dealt, partitions)
    assert [slot for slot, _ in found] == list(range(len(rows)))
    assert [(row, p) for (_, row), p in zip(found, arranged.partition.tolist(), strict=True)] == expected


def test_rows_of_a_partition_are_uniformly_permuted():
    """Chi-square over 2,000 keys of the slot of each of 8 rows: 49 degrees of freedom, 100 is one in 50,000."""
    seen = np.zeros((8, 8))
    for key in range(2000):
        slot = arrange(key * 7919, np.array([5, 3]), np.array([0, 0]), 1).slot
        seen[np.arange(8), slot] += 1
    assert ((seen - 250) ** 2 / 250).sum() < 100


def test_another_seed_or_epoch_is_another_order():
    orders = {
        (seed, epoch): next(row_ids(seed=seed, epoch=epoch, windows=1))[0]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    again = next(row_ids(seed=0, epoch=0, windows=1))[0]
    assert np.array_equal(again, orders[0, 0])
    for key, other in orders.items():
        if key != (0, 0):
            n = min(len(again), len(other))
            assert (again[:n] == other[:n]).mean() < 0.02


@settings(max_examples=60, deadline=None)
@given(
    kept=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    first=st.integers(0, 3),
    rows_per_chunk=st.integers(1, 12),
)
def test_chunks_cover_the_kept_rows(kept, first, rows_per_chunk):
    chunks = list_chunks(np.arange(first, first + len(kept)), np.array(kept), rows_per_chunk)
    found = [
        (int(s) - first, int(c) * rows_per_chunk + r)
        for s, c, n in zip(*chunks, strict=True)
        for r in range(n)
    ]
    assert found == [(s, r) for s, n in enumerate(kept) for r in range(n)]
    assert (chunks.n_rows > 0).all()


def test_windows_are_rounded_up_to_whole_runs_of_every_layer():
    assert groups_of(window_rows=1, n_layers=4, rows_per_run=256, n_runs=9) == 1
    assert groups_of(window_rows=4 * 256, n_layers=4, rows_per_run=256, n_runs=9) == 1
    assert groups_of(window_rows=4 * 256 + 1, n_layers=4, rows_per_run=256, n_runs=9) == 2
    assert groups_of(window_rows=10**9, n_layers=4, rows_per_run=256, n_runs=9) == 9
