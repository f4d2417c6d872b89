"""The most active rows against a full sort, ties and merging included."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.examples import TopExamples
from tests.analysis.made_up import cuts, dense, entries, merged


def places(n):
    """Sequence, position, token id and document of n tokens."""
    return np.arange(n) // 7, np.arange(n) % 7, np.arange(n) * 3, np.arange(n) // 20


def update(top, a, columns):
    top.update(entries(a), *columns)


def by_sorting(a, n):
    """latent, layer_i, rank, activation, sequence, position of the top rows."""
    sequence, position, token, document = places(len(a))
    rows = []
    for f in range(a.shape[2]):
        for layer_i in range(a.shape[1]):
            active = np.flatnonzero(a[:, layer_i, f])
            order = sorted(active, key=lambda t: (-a[t, layer_i, f], sequence[t], position[t]))[:n]
            rows += [
                (f, layer_i, rank, a[t, layer_i, f], sequence[t], position[t], token[t], document[t])
                for rank, t in enumerate(order)
            ]
    return rows


def as_rows(found):
    names = ("latent", "layer_i", "rank", "activation", "sequence", "position", "token", "document")
    return list(zip(*(getattr(found, name).tolist() for name in names), strict=True))


@pytest.mark.parametrize("n", [1, 3, 32, 1000])
def test_equals_a_full_sort(n):
    a = dense(2, 150, 3, 9)
    top = TopExamples(3, 9, n)
    for start in range(0, 150, 40):
        update(top, a[start : start + 40], [c[start : start + 40] for c in places(150)])
    assert as_rows(top.compute()) == by_sorting(a, n)


def test_of_equal_activations_the_earlier_place_wins_in_any_order_of_blocks():
    a = np.ones((20, 2, 3), np.float32)
    columns = places(20)
    for order in ((0, 10), (10, 0)):
        top = TopExamples(2, 3, 4)
        for start in order:
            update(top, a[start : start + 10], [c[start : start + 10] for c in columns])
        assert as_rows(top.compute()) == by_sorting(a, 4)


@given(st.data())
def test_merged_shards_equal_one_pass(data):
    a = np.round(dense(data.draw(st.integers(0, 99)), 40, 2, 5), 0)  # many ties
    columns = places(40)
    n = data.draw(st.integers(1, 6))
    parts = [(a[cut], [c[cut] for c in columns]) for cut in data.draw(cuts(40))]
    found = merged(lambda: TopExamples(2, 5, n), lambda top, part: update(top, *part), parts)
    assert as_rows(found.compute()) == by_sorting(a, n)


def test_of_one_latent_at_one_layer():
    a = dense(4, 60, 2, 5)
    top = TopExamples(2, 5, 3)
    update(top, a, places(60))
    mine = top.compute().of(4, 1)
    assert as_rows(mine) == [row for row in by_sorting(a, 3) if row[:2] == (4, 1)]
