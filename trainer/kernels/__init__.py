"""The two operations an SAE is made of, in several implementations that agree.

    reference  plain torch, dense: the oracle
    sparse     plain torch, any device: what trains on a CPU
    triton     CUDA

`make_kernels` chooses one by name; nothing is chosen, and triton not imported, before it is called.

Axes: b rows, d width, f latents, k active latents, m auxiliary latents, c candidates.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from actcache.errors import UsageError

NAMES = ("auto", "reference", "sparse", "triton")


class Selected(NamedTuple):
    """The latents chosen for each row.

    values       [b, k] activations max(pre, 0), largest first. A slot whose value is 0 is not active and its index means
                 nothing, so add to a dense array (`scatter_add_`), never assign.
    indices      [b, k] int64, distinct within a row.
    aux_values   [b, m] the same for the best m of the dead latents, in any order; m = 0 unless asked for.
    aux_indices  [b, m] int64, latent numbers.
    """

    values: Tensor
    indices: Tensor
    aux_values: Tensor
    aux_indices: Tensor


class Kernels(Protocol):
    """An implementation of both operations, with gradients."""

    def encode(
        self,
        z: Tensor,
        w_enc: Tensor,
        bias: Tensor,
        k: int,
        dead: Tensor,
        n_aux: int,
        *,
        latent_bias: Tensor | None = None,
    ) -> Selected:
        """The k largest of pre = W_enc (z - b) [+ latent_bias], and the n_aux largest among the latents `dead`, through ReLU.

        Of equal pre-activations at the edge of the selection the lowest index is taken. Under `torch.autocast` the product
        takes its inputs in autocast's dtype and adds in float32; values and gradients keep the dtype of z and the weights.

        Args:
            z: [b, d].
            w_enc: [f, d].
            bias: [d].
            k: at most f.
            dead: [n_dead] int64, ascending latent numbers.
            n_aux: at most n_dead.
            latent_bias: [f].
        """
        ...

    def decode(
        self, values: Tensor, indices: Tensor, w_dec: Tensor, *, candidates: Tensor | None = None
    ) -> Tensor:
        """sum_j values[b, j] * w_dec[indices[b, j]].

        Args:
            values: [b, s].
            indices: [b, s] int64.
            w_dec: [f, d].
            candidates: [c] int64, distinct latents among which all indices are, where that is known: if there are few of
                them, a product over them all is faster than sums over the chosen ones.

        Returns:
            [b, d].
        """
        ...


def make_kernels(name: str, device: torch.device | str) -> Kernels:
    """The implementation called `name` for tensors on `device`.

    Args:
        name: one of `NAMES`; "auto" is triton on CUDA where it is installed, else sparse.
        device: where the tensors are.

    Raises:
        UsageError: no such name, or triton where it cannot run.
    """
    kind = torch.device(device).type
    if name not in NAMES:
        raise UsageError(f"kernels {name!r}: expected one of {', '.join(NAMES)}")
    if name == "auto":
        name = "triton" if kind == "cuda" and _has_triton() else "sparse"
    if name == "triton":
        if not _has_triton():
            raise UsageError("kernels 'triton': triton is not installed; pip install triton, or use 'sparse'")
        chosen: Any = importlib.import_module("trainer.kernels.triton")
        chosen.check_device(kind)
    else:
        chosen = importlib.import_module(f"trainer.kernels.{name}")
    return chosen


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
