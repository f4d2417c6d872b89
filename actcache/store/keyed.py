"""Keyed counter-based randomness: the same numbers on every machine, library version and day.

NumPy's generators promise no stable streams across versions, so everything that decides an order
(mixing inside a shard, shuffling of sequences, windows, partitions) comes from here.
The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied twice with a key between.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 6
_MOST_TIMES = 4
"""Where all numbers of a network are so many times those that are asked for, at most, all are sent through it once."""


def derive(seed: int, *labels: int | str) -> int:
    """A 64-bit key for one purpose: `derive(seed, "mix", shard)`. Different labels, unrelated keys."""
    text = json.dumps([int(seed), *labels], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _mix(x: NDArray[np.uint64], scratch: NDArray[np.uint64]) -> None:
    """Replace x by its hash. In place: memory touched for the first time costs more than the arithmetic."""
    for shift, factor in ((np.uint64(30), _M1), (np.uint64(27), _M2), (np.uint64(31), None)):
        np.right_shift(x, shift, out=scratch)
        np.bitwise_xor(x, scratch, out=x)
        if factor is not None:
            np.multiply(x, factor, out=x)


def hash_u64(key: int | NDArray[np.uint64], counter: NDArray[np.integer]) -> NDArray[np.uint64]:
    """A uniform 64-bit hash of every counter under `key`, or under the key that stands opposite. Shape as given."""
    k = np.uint64(key & _MASK) if isinstance(key, int) else key
    x = np.atleast_1d(np.asarray(counter).astype(np.uint64))
    x *= _GOLDEN
    x += k
    scratch = np.empty_like(x)
    _mix(x, scratch)
    x ^= k
    _mix(x, scratch)
    return x.reshape(np.shape(counter))


def permutation(key: int, n: int) -> NDArray[np.int64]:
    """A uniform permutation of 0..n-1: the stable argsort of the hashes of 0..n-1. O(n) memory."""
    return np.argsort(hash_u64(key, np.arange(n, dtype=np.uint64)), kind="stable").astype(np.int64)


def feistel(key: int, index: NDArray[np.integer], n: int) -> NDArray[np.int64]:
    """Where a keyed permutation of 0..n-1 sends each index, in O(1) memory.

    A balanced Feistel network over the next even power of two, walked until it lands below `n`
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    return feistel_each([key], np.asarray(index)[None], n)[0]


def feistel_each(keys: Sequence[int], index: NDArray[np.integer], n: int) -> NDArray[np.int64]:
    """`feistel` under several keys at once: row i of `index` [keys, m] under key i."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    rounds = np.array(
        [[derive(key, "feistel", r) for key in keys] for r in range(_FEISTEL_ROUNDS)], np.uint64
    )
    out = np.asarray(index).astype(np.uint64)
    if 1 << 2 * half <= _MOST_TIMES * out.shape[1]:
        everything = np.tile(np.arange(1 << 2 * half, dtype=np.uint64), (len(keys), 1))
        sent = _network(rounds[:, :, None], everything, half)
        out = np.take_along_axis(sent, out.astype(np.int64), 1)
        while (beyond := out >= n).any():
            out[beyond] = sent[np.nonzero(beyond)[0], out[beyond]]
        return out.astype(np.int64)
    todo = np.ones(out.shape, dtype=bool)
    while todo.any():
        out[todo] = _network(rounds[:, np.nonzero(todo)[0]], out[todo], half)
        todo[todo] = out[todo] >= np.uint64(n)
    return out.astype(np.int64)


def _network(rounds: NDArray[np.uint64], x: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    """Numbers of 2 * `half` bits, once through the Feistel network; in `rounds` [round, ...] the keys stand opposite."""
    n_bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> n_bits, x & mask
    for key in rounds:
        left, right = right, left ^ (hash_u64(key, right) & mask)
    return (left << n_bits) | right
