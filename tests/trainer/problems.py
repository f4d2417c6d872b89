"""Inputs for kernels, and everything that comes out of them.

Axes: b rows, d width, f latents, k active latents, m auxiliary latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels import Kernels, Selected


class Problem(NamedTuple):
    """z [b, d], w_enc [f, d], bias [d], w_dec [f, d], latent_bias [f] or None; dead [n_dead]; k and m."""

    z: Tensor
    w_enc: Tensor
    bias: Tensor
    w_dec: Tensor
    latent_bias: Tensor | None
    dead: Tensor
    k: int
    n_aux: int

    @property
    def variables(self) -> list[Tensor]:
        return [t for t in self[:5] if t is not None]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        """The same numbers, rounded, as new leaves."""
        moved = [None if t is None else t.detach().to(device, dtype).requires_grad_() for t in self[:5]]
        return Problem(*moved, self.dead.to(device), self.k, self.n_aux)  # type: ignore[arg-type]

    def encode(self, kernels: Kernels) -> Selected:
        return kernels.encode(
            self.z, self.w_enc, self.bias, self.k, self.dead, self.n_aux, latent_bias=self.latent_bias
        )


def make_problem(
    b: int,
    d: int,
    f: int,
    k: int,
    *,
    n_aux: int = 0,
    n_dead: int | None = None,
    latent_bias: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Normal numbers; every second latent is dead unless told how many, and so some dead ones are among the k."""
    g = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(b, d, generator=g),
        torch.randn(f, d, generator=g),
        torch.randn(d, generator=g) * 0.1,
        torch.randn(f, d, generator=g),
        torch.randn(f, generator=g) if latent_bias else None,
    ]
    dead = torch.arange(0, f, 2) if n_dead is None else torch.randperm(f, generator=g)[:n_dead].sort().values
    return Problem(*tensors, dead, k, min(n_aux, len(dead))).to(dtype)  # type: ignore[arg-type]


class Outcome(NamedTuple):
    """The code, both decoded rows [b, d], and gradients of a scalar that depends on everything differentiable."""

    code: Selected
    decoded: Tensor
    aux_decoded: Tensor
    gradients: tuple[Tensor, ...]


def run(kernels: Kernels, problem: Problem) -> Outcome:
    code = problem.encode(kernels)
    decoded = kernels.decode(code.values, code.indices, problem.w_dec)
    if problem.n_aux:
        aux = kernels.decode(code.aux_values, code.aux_indices, problem.w_dec, candidates=problem.dead)
    else:
        aux = torch.zeros(())
    slope = torch.arange(1, decoded.shape[1] + 1, device=decoded.device)
    scalar = (decoded.double().sin() * slope).sum() + (aux.double().cos() * 0.3).sum()
    scalar = scalar + code.values.double().square().sum()
    return Outcome(code, decoded, aux, torch.autograd.grad(scalar, problem.variables))


def as_sets(values: Tensor, indices: Tensor) -> list[set[int]]:
    """Active latents of every row."""
    return [set(i[v > 0].tolist()) for v, i in zip(values, indices, strict=True)]


def assert_same(mine: Outcome, oracle: Outcome, **tolerance: float) -> None:
    """The same latents, values, decoded rows and gradients; equal and auxiliary latents in any order."""
    assert as_sets(mine.code.values, mine.code.indices) == as_sets(oracle.code.values, oracle.code.indices)
    torch.testing.assert_close(mine.code.values, oracle.code.values, **tolerance)
    assert as_sets(mine.code.aux_values, mine.code.aux_indices) == as_sets(
        oracle.code.aux_values, oracle.code.aux_indices
    )
    torch.testing.assert_close(
        mine.code.aux_values.sort(1).values, oracle.code.aux_values.sort(1).values, **tolerance
    )
    torch.testing.assert_close(mine.decoded, oracle.decoded, **tolerance)
    torch.testing.assert_close(mine.aux_decoded, oracle.aux_decoded, **tolerance)
    for a, b in zip(mine.gradients, oracle.gradients, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def worst(tensor: Tensor, truth: Tensor) -> float:
    """Largest error relative to the largest true number."""
    return float(
        (tensor.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max().clamp_min(1e-300)
    )
