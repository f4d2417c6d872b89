"""How alike latents' decoder directions are: to each other, across layers, to other dictionaries, and to tokens.

Everything is exact and blocked: no [f, f] or [f, v] array is held. Products are float32, as the weights are.

Axes: f latents, g latents of the other dictionary, d width, v vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import UsageError

_BLOCK_VALUES = 2**23
"""Cosines computed at once: 32 MiB of float32."""

OnRows = Callable[[int], None]


def _nothing(_n: int) -> None: ...


def unit_rows(directions: Tensor) -> Tensor:
    """Rows of norm 1, float32; a row of zeros stays so."""
    rows = directions.float()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp_min(torch.finfo(torch.float32).tiny)


def _blocks(n: int, other: int) -> Iterator[slice]:
    size = max(1, _BLOCK_VALUES // max(other, 1))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@torch.no_grad()
def max_cosines(directions: Tensor, others: Tensor | None = None, on_rows: OnRows = _nothing) -> Tensor:
    """Each direction's largest cosine with another one.

    max over g of cos(w_f, w_g): among the same directions, g != f, where `others` is None; else among `others`. Its mean
    over f is the MMCS of a dictionary, or of one dictionary with another (Sharkey et al. 2022).

    Args:
        directions: [f, d].
        others: [g, d].
        on_rows: called with how many more are done.

    Returns:
        [f] float32.

    Raises:
        UsageError: nothing to compare with, or another width.
    """
    w, v = unit_rows(directions), unit_rows(directions if others is None else others)
    if len(v) < (2 if others is None else 1):
        raise UsageError(f"{len(w)} directions and {len(v)} others: nothing to compare with")
    if w.shape[1] != v.shape[1]:
        raise UsageError(
            f"directions of width {w.shape[1]} and {v.shape[1]}: dictionaries of the same model and hook have the same width"
        )
    found = w.new_empty(len(w))
    for rows in _blocks(len(w), len(v)):
        cosines = w[rows] @ v.T
        if others is None:
            at = torch.arange(rows.start, rows.stop, device=w.device)
            cosines[at - rows.start, at] = -torch.inf
        found[rows] = cosines.amax(1)
        on_rows(rows.stop - rows.start)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineByDistance:
    """Pairs of latents by how far apart their mean layers are and how alike their directions.

    counts          [x, y] int64, pairs f < g.
    distance_edges  [x + 1] of |mean layer of f - mean layer of g|.
    cosine_edges    [y + 1].
    mean            [x] mean cosine; NaN where there is no pair.
    """

    counts: NDArray[np.int64]
    distance_edges: NDArray[np.float64]
    cosine_edges: NDArray[np.float64]
    mean: NDArray[np.float64]


@torch.no_grad()
def cosine_by_distance(
    directions: Tensor,
    mean_layer: NDArray[np.float64],
    n_distances: int = 24,
    n_cosines: int = 80,
    on_rows: OnRows = _nothing,
) -> CosineByDistance:
    """Histogram of all pairs f < g: |difference of mean layers| against cos(w_f, w_g).

    Args:
        directions: [f, d] of alive latents.
        mean_layer: [f] their mean layers.
        n_distances: bins from 0 to the largest distance.
        n_cosines: bins from -1 to 1.
        on_rows: called with how many more latents are done.
    """
    w = unit_rows(directions)
    at = torch.from_numpy(np.asarray(mean_layer, np.float64)).to(w.device)
    span = float(at.max() - at.min()) or 1.0
    counts = torch.zeros(n_distances * n_cosines, dtype=torch.int64, device=w.device)
    sums = torch.zeros(n_distances, dtype=torch.float64, device=w.device)
    for rows in _blocks(len(w), len(w)):
        cosines = w[rows] @ w.T
        distance = (at[rows, None] - at).abs()
        upper = torch.ones_like(cosines, dtype=torch.bool).triu(rows.start + 1)
        cosines, distance = cosines[upper].double(), distance[upper]
        x = (distance * (n_distances / span)).long().clamp_(0, n_distances - 1)
        y = ((cosines + 1) * (n_cosines / 2)).long().clamp_(0, n_cosines - 1)
        counts += torch.bincount(x * n_cosines + y, minlength=len(counts))
        sums += torch.bincount(x, cosines, minlength=n_distances)
        on_rows(rows.stop - rows.start)
    table = counts.reshape(n_distances, n_cosines)
    return CosineByDistance(
        counts=table.cpu().numpy(),
        distance_edges=np.linspace(0, span, n_distances + 1),
        cosine_edges=np.linspace(-1, 1, n_cosines + 1),
        mean=(sums / table.sum(1)).cpu().numpy(),
    )


class NearestTokens(NamedTuple):
    """cosines [f, n] float32, largest first; tokens [f, n] int64."""

    cosines: Tensor
    tokens: Tensor


@torch.no_grad()
def nearest_tokens(
    directions: Tensor, embedding: Tensor, n: int = 8, on_rows: OnRows = _nothing
) -> NearestTokens:
    """The n tokens whose embedding (or unembedding) vectors have the largest cosine with each direction.

    Args:
        directions: [f, d].
        embedding: [v, d].
        n: how many, at most v.
        on_rows: called with how many more latents are done.

    Raises:
        UsageError: the embedding has another width than the directions.
    """
    w, e = unit_rows(directions), unit_rows(embedding.to(directions.device))
    if w.shape[1] != e.shape[1]:
        raise UsageError(f"directions of width {w.shape[1]}, embedding of {e.shape[1]}: not of one space")
    parts = []
    for rows in _blocks(len(w), len(e)):
        parts.append(torch.topk(w[rows] @ e.T, n, dim=1))
        on_rows(rows.stop - rows.start)
    return NearestTokens(torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]))
