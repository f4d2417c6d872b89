"""Keyed randomness: values that must never change, and that they are as random as they are used for."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.store import keyed

KEYS = st.integers(0, (1 << 64) - 1)


def sha(values):
    return hashlib.sha256(values.astype("<i8").tobytes()).hexdigest()


def test_values_never_change():
    assert keyed.derive(0, "mix", 3) == 15601300657171448824
    assert keyed.derive(7, "global", 1) == 15107200118406209915
    assert keyed.hash_u64(0x0123456789ABCDEF, np.arange(4)).tolist() == [
        0xFD1FF12D5EF4C58,
        0x2263EAF0002BCEA9,
        0x96520D32983F150C,
        0xC5543AC92A426D20,
    ]
    assert keyed.permutation(5, 12).tolist() == [6, 7, 8, 9, 2, 0, 5, 3, 10, 4, 1, 11]
    assert keyed.feistel(5, np.arange(12), 12).tolist() == [9, 4, 6, 5, 8, 2, 0, 7, 3, 1, 10, 11]
    assert (
        sha(keyed.permutation(1, 10_000))
        == "e2d8f25957d718baa6b07a9434b514e0bc863fbfc7735b21248d0b67672cf209"
    )
    assert (
        sha(keyed.feistel(1, np.arange(10_000), 10_000))
        == "32e0173aa6f6d20d5f5460390b322b249f828de715faac118722af036480586e"
    )


@settings(max_examples=60, deadline=None)
@given(key=KEYS, n=st.integers(1, 3000))
def test_both_permutations_are_bijections(key, n):
    everything = np.arange(n)
    assert np.array_equal(np.sort(keyed.permutation(key, n)), everything)
    assert np.array_equal(np.sort(keyed.feistel(key, everything, n)), everything)


@settings(max_examples=20, deadline=None)
@given(key=KEYS, n=st.integers(1, 1 << 40), index=st.lists(st.integers(0, (1 << 40) - 1), max_size=20))
def test_feistel_answers_one_index_as_it_answers_all(key, n, index):
    chosen = np.array(index, dtype=np.int64) % n
    sent = keyed.feistel(key, chosen, n)
    assert ((sent >= 0) & (sent < n)).all()
    assert [int(keyed.feistel(key, np.array([i]), n)[0]) for i in chosen] == sent.tolist()
    assert len(set(sent.tolist())) == len(set(chosen.tolist()))


@pytest.mark.parametrize("send", [keyed.permutation, lambda key, n: keyed.feistel(key, np.arange(n), n)])
def test_every_place_is_equally_likely(send):
    """Chi-square over 4,000 keys of where each of 10 goes: 81 degrees of freedom, 141 is one in 30,000."""
    n, n_keys = 10, 4000
    seen = np.zeros((n, n))
    for key in range(n_keys):
        seen[np.arange(n), send(keyed.derive(key, "test"), n)] += 1
    expected = n_keys / n
    assert ((seen - expected) ** 2 / expected).sum() < 141


def test_neighbouring_keys_and_labels_are_unrelated():
    base = keyed.permutation(keyed.derive(0, "a", 1), 1000)
    for other in (keyed.derive(0, "a", 2), keyed.derive(1, "a", 1), keyed.derive(0, "b", 1)):
        shared = (base == keyed.permutation(other, 1000)).sum()
        assert shared < 10  # one is expected
    assert keyed.derive(0, "a", 1) != keyed.derive(0, "a1")
    assert keyed.derive(1, 2) != keyed.derive(12)
