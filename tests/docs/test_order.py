"""docs/explanation/order.md, followed in plain Python, against a real stream."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

import actcache
from actcache.store.open import open_catalog
from tests.conftest import write_store
from tests.docs.pages import DOCS, blocks

LAYERS = (0, 3)


@pytest.fixture(scope="module")
def page() -> dict:
    """The functions of the page."""
    names: dict = {}
    (code,) = [b for b in blocks(DOCS / "explanation" / "order.md") if b.language == "python"]
    exec(compile(code.text, "order.md", "exec"), names)
    return names


@pytest.mark.parametrize("n", [1, 2, 3, 100, 1025])
def test_feistel_of_the_page_is_a_permutation(page, n):
    assert sorted(page["feistel"](7, i, n) for i in range(n)) == list(range(n))


def rows_in_order(page, chunks, *, seed, epoch, window_rows, run_chunks, partitions, rows_per_chunk):
    """(layer index, shard, row within it) of every slot, as the page's five steps say."""

    def permutation(key, n):
        return sorted(range(n), key=lambda i: page["hash_u64"](key, i))

    runs = [
        list(run)
        for _, run in itertools.groupby(chunks, key=lambda found: (found[0], found[1] // run_chunks))
    ]
    derive, n = page["derive"], len(runs)
    key = derive(seed, "global", epoch)
    g = min(n, max(1, math.ceil(window_rows / (len(LAYERS) * run_chunks * rows_per_chunk))))
    n_windows = -(-n // g)
    for w in range(n_windows):
        places = range(w * n // n_windows, (w + 1) * n // n_windows)
        members = [
            (i, runs[page["feistel"](derive(key, "chunk", i), place, n)])
            for i in range(len(LAYERS))
            for place in places
        ]
        partition = {
            c: j % partitions for j, c in enumerate(permutation(derive(key, "deal", w), len(members)))
        }
        rows = [
            (partition[c], i, shard, chunk * rows_per_chunk + r)
            for c, (i, run) in enumerate(members)
            for shard, chunk, n_rows in run
            for r in range(n_rows)
        ]
        left_out = len(rows).bit_length() + partitions.bit_length()
        slots = []
        for p in range(partitions):
            own = [number for number, row in enumerate(rows) if row[0] == p]
            own.sort(
                key=lambda number: (page["hash_u64"](derive(key, "rows", w), number) >> left_out, number)
            )
            slots += [(Fraction(2 * j + 1, 2 * len(own)), p, number) for j, number in enumerate(own)]
        yield from (rows[number][1:] for _, _, number in sorted(slots))


@pytest.mark.parametrize(
    ("window_rows", "run_chunks", "partitions", "epoch"),
    [(10_000, 1, 8, 0), (48, 1, 3, 1), (1, 1, 1, 0), (48, 3, 3, 1), (10_000, 2, 8, 0)],
)
def test_the_page_says_which_row_comes_when(tmp_path, page, window_rows, run_chunks, partitions, epoch):
    truth = write_store(tmp_path / "t.zarr", n_sequences=30, seq_len=8, per_shard=4, rows_per_chunk=8)
    catalog, grid = open_catalog(str(truth.root)), truth.grid
    chunks = [
        (shard, chunk, min(8, kept - 8 * chunk))
        for shard in range(grid.n_holdout_shards, grid.n_shards)
        for kept in [catalog.shards.records[shard].kept]
        for chunk in range(-(-kept // 8))
    ]
    expected = []
    for layer_i, shard, row in rows_in_order(
        page,
        chunks,
        seed=3,
        epoch=epoch,
        window_rows=window_rows,
        run_chunks=run_chunks,
        partitions=partitions,
        rows_per_chunk=8,
    ):
        place = [catalog.plan_object(name, shard)[row] for name in ("row_sequence", "row_position")]
        expected.append((LAYERS[layer_i], *place))
    store = actcache.open(truth.root)
    with store.stream(
        batch_size=50,
        seed=3,
        window_rows=window_rows,
        run_chunks=run_chunks,
        partitions=partitions,
        epochs=epoch + 1,
    ) as stream:
        stream.set_epoch(epoch)
        found = [np.stack([batch.layer, batch.sequence, batch.position], 1) for batch in stream]
    assert np.array_equal(np.concatenate(found), np.array(expected))
