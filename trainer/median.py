"""The geometric median: where an autoencoder's bias starts.

Axes: n rows, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.ranks import ALONE, Ranks

BLOCK_ROWS = 8192


def geometric_median(
    z: Tensor, *, max_iterations: int = 100, tolerance: float = 1e-5, ranks: Ranks = ALONE
) -> Tensor:
    """The point with the least sum of distances to the rows z [n, d]; a few outliers hardly move it.

    Weiszfeld's iteration from the mean: c <- sum_i z_i / |z_i - c|  /  sum_i 1 / |z_i - c|, until a step is shorter than
    `tolerance` times the typical distance (1 / mean of 1/|z_i - c|). Distances in z's dtype, sums in float64.

    Args:
        z: the rows of this process; those of all `ranks` count.
        max_iterations: at most.
        tolerance: see above.
        ranks: who else has rows.

    Returns:
        [d] in z's dtype.

    Source: Weiszfeld (1937); mlsae geom_median.py (same start, iterations and tolerance).
    """
    blocks = z.split(BLOCK_ROWS)
    n_rows = torch.tensor(float(len(z)), dtype=torch.float64, device=z.device)
    centre = torch.stack([block.sum(0, dtype=torch.float64) for block in blocks]).sum(0)
    ranks.sum_([n_rows, centre])
    centre /= n_rows
    tiny = torch.finfo(z.dtype).tiny ** 0.5
    for _ in range(max_iterations):
        point = centre.to(z.dtype)
        total = torch.zeros((), dtype=torch.float64, device=z.device)
        weighted = torch.zeros_like(centre)
        for block in blocks:
            weight = torch.linalg.vector_norm(block - point, dim=1).clamp_min_(tiny).reciprocal_()
            total += weight.sum(dtype=torch.float64)
            weighted += (weight @ block).to(torch.float64)
        ranks.sum_([total, weighted])
        moved = weighted / total
        step = torch.linalg.vector_norm(moved - centre)
        centre = moved
        if step <= tolerance * n_rows / total:
            break
    return centre.to(z.dtype)
