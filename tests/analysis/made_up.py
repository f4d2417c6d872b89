"""Made-up activations: dense arrays for oracles to look at, and the same as the accumulators take them."""

import numpy as np
from hypothesis import strategies as st

from analysis.entries import Entries

LAYERS = (0, 3, 4, 9)


def dense(seed: int, n_tokens: int, n_layers: int, n_latents: int, share: float = 0.3) -> np.ndarray:
    """[t, l, f] activations: mostly 0, some small, some large, never between 0 and 1e-3."""
    rng = np.random.default_rng(seed)
    shape = (n_tokens, n_layers, n_latents)
    return np.where(rng.random(shape) < share, 0.01 + rng.lognormal(0, 1.5, shape), 0.0).astype(np.float32)


def entries(a: np.ndarray) -> Entries:
    """[t, l, f] as entries, in a scrambled order."""
    token, layer_i, latent = np.nonzero(a)
    order = np.random.default_rng(len(token)).permutation(len(token))
    return Entries(
        token=token[order],
        layer_i=layer_i[order],
        latent=latent[order],
        activation=a[token, layer_i, latent][order].astype(np.float64),
    )


def padded(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[t, f] of one layer as values [t, k] and latents [t, k], largest first."""
    order = np.argsort(-a, axis=1, kind="stable")
    return np.take_along_axis(a, order, 1), order


@st.composite
def cuts(draw, n: int) -> list[slice]:
    """A way to cut n tokens into shards, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return [slice(a, b) for a, b in zip([0, *places], [*places, n], strict=True)]


def merged(make, update, parts):
    """An accumulator per part, merged in order: what several shards' workers would do."""
    whole = make()
    for part in parts:
        one = make()
        update(one, part)
        whole.merge(one)
    return whole
