"""The dictionary: one top-k sparse autoencoder over standardised rows.

Axes: b rows, d width, f latents, k active latents, m auxiliary latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.kernels import Kernels, Selected, sparse


class TopKSAE(nn.Module):
    """a = TopK(ReLU(W_enc (z - b))), zhat = W_dec^T a + b.

    w_enc  [f, d] uniform in +-1/sqrt(d), what nn.Linear (Kaiming uniform, a=sqrt 5) starts with.
    w_dec  [f, d] one row of norm 1 per latent; starts as w_enc's rows. Norms are kept at 1 by training, jointly with
           `project_decoder_gradient` and `normalise_decoder`.
    bias   [d] starts at 0; training sets it to the geometric median of the first window.

    Source: Gao et al. (arXiv 2406.04093), section 2 and appendix A; tim-lawson/mlsae autoencoder.py:105-119.
    """

    def __init__(
        self, width: int, n_latents: int, k: int, *, generator: torch.Generator, kernels: Kernels = sparse
    ) -> None:
        super().__init__()
        self.k = k
        self.kernels = kernels
        bound = width**-0.5
        w_enc = torch.empty(n_latents, width, dtype=torch.float32).uniform_(
            -bound, bound, generator=generator
        )
        self.w_enc = nn.Parameter(w_enc)
        self.w_dec = nn.Parameter(w_enc.clone())
        self.bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.normalise_decoder()

    @property
    def width(self) -> int:
        """Width d of a row."""
        return self.w_enc.shape[1]

    @property
    def n_latents(self) -> int:
        """Number of latents f."""
        return self.w_enc.shape[0]

    def encode(self, z: Tensor, *, dead: Tensor | None = None, n_aux: int = 0) -> Selected:
        """The active latents of standardised rows z [b, d]; changes nothing in the module.

        Args:
            z: standardised rows.
            dead: [n_dead] int64, ascending; with `n_aux` > 0 the best `n_aux` of them are selected as well.
            n_aux: m, at most n_dead.
        """
        if dead is None:
            dead = torch.empty(0, dtype=torch.int64, device=z.device)
        return self.kernels.encode(z, self.w_enc, self.bias, self.k, dead, n_aux)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Standardised rows zhat [b, d] = sum_j values[b, j] w_dec[indices[b, j]] + b."""
        return self.decode_directions(values, indices) + self.bias

    def decode_directions(
        self, values: Tensor, indices: Tensor, *, candidates: Tensor | None = None
    ) -> Tensor:
        """The same without b: what latents add to a row. [b, d]. All indices are among `candidates`, if that is given."""
        return self.kernels.decode(values, indices, self.w_dec, candidates=candidates)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """g_f -= (g_f . w_f) w_f: drop the part that would only change a norm that is set to 1 again anyway."""
        if self.w_dec.grad is not None:
            along = torch.linalg.vecdot(self.w_dec.grad, self.w_dec).unsqueeze(1)
            self.w_dec.grad.addcmul_(self.w_dec, along, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Every row of w_dec to norm 1."""
        norms = torch.linalg.vector_norm(self.w_dec, dim=1, keepdim=True)
        self.w_dec.div_(norms.clamp_min_(torch.finfo(norms.dtype).tiny))


def geometric_median(z: Tensor, *, max_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least sum of distances to the rows z [n, d]; a few outliers hardly move it.

    Weiszfeld's iteration from the mean: c <- sum_i z_i / |z_i - c|  /  sum_i 1 / |z_i - c|, until a step is shorter than
    `tolerance` times the typical distance (1 / mean of 1/|z_i - c|). Distances in z's dtype, sums in float64.

    Returns:
        [d] in z's dtype.

    Source: Weiszfeld (1937); mlsae geom_median.py (same start, iterations and tolerance).
    """
    blocks = z.split(8192)
    centre = torch.stack([block.sum(0, dtype=torch.float64) for block in blocks]).sum(0) / len(z)
    tiny = torch.finfo(z.dtype).tiny ** 0.5
    for _ in range(max_iterations):
        point = centre.to(z.dtype)
        total = torch.zeros((), dtype=torch.float64, device=z.device)
        weighted = torch.zeros_like(centre)
        for block in blocks:
            weight = torch.linalg.vector_norm(block - point, dim=1).clamp_min_(tiny).reciprocal_()
            total += weight.sum(dtype=torch.float64)
            weighted += (weight @ block).to(torch.float64)
        moved = weighted / total
        step = torch.linalg.vector_norm(moved - centre)
        centre = moved
        if step <= tolerance * len(z) / total:
            break
    return centre.to(z.dtype)
