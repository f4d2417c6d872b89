"""From raw rows to what the SAE sees, and exactly back.

Every standardisation is z = (x - mean) / scale with numbers that are kept, so x = z * scale + mean is its inverse whatever
it was: by the row's own mean and standard deviation, or by fixed ones of the row's layer.

Axes: b rows, s slices of a row (layers side by side; mostly 1), d width, l layers.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

EPS = 1e-5
"""Added to a row's standard deviation. Source: tim-lawson/mlsae autoencoder.py:213-222."""


class Standardised(NamedTuple):
    """Rows as an SAE sees them, with what it takes to undo that.

    z      [..., d] float32, (x - mean) / scale.
    mean   [..., 1 or d] float32.
    scale  [..., 1] float32.
    """

    z: Tensor
    mean: Tensor
    scale: Tensor


class Transform(Protocol):
    """A standardisation of slices."""

    @property
    def description(self) -> dict[str, Any]:
        """All that decides what it computes, apart from `tensors`; JSON."""
        ...

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its fixed numbers, by name."""
        ...

    def __call__(self, x: Tensor, layer_i: Tensor) -> Standardised:
        """Standardise slices x [b, s, d], of layers layer_i [b or 1, s], in float32."""
        ...


def standardise(rows: Tensor) -> Standardised:
    """Each row z = (x - mu) / (s + eps) by itself, in float32 whatever the dtype of `rows` [..., d].

    s is the standard deviation over the width (divisor d - 1).
    """
    x = rows.to(torch.float32)
    variance, mean = torch.var_mean(x, dim=-1, correction=1, keepdim=True)
    scale = variance.sqrt_().add_(EPS)
    return Standardised((x - mean).div_(scale), mean, scale)


def restore(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Raw rows x = z * scale + mean: the exact inverse of any standardisation."""
    return z * scale + mean


class RowStandardise:
    """Every slice by its own mean and standard deviation."""

    description: dict[str, Any] = {  # noqa: RUF012 (a constant)
        "name": "row",
        "version": 1,
        "eps": EPS,
        "std": "bessel",
        "dtype": "float32",
    }
    tensors: dict[str, Tensor] = {}  # noqa: RUF012 (a constant)

    def __call__(self, x: Tensor, layer_i: Tensor) -> Standardised:  # noqa: ARG002 (of any layer)
        """See `Transform`."""
        return standardise(x)


class LayerStandardise:
    """Every slice by fixed numbers of its layer: z = (x - mean_l) / scale_l.

    mean   [l, d] mean of each dimension.
    scale  [l] one number for all dimensions, the root of their mean variance.
    """

    description: dict[str, Any] = {  # noqa: RUF012 (a constant)
        "name": "layer",
        "version": 1,
        "scale": "root of the mean variance",
        "dtype": "float32",
    }

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        self.mean, self.scale = mean, scale

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Transform`."""
        return {"mean": self.mean, "scale": self.scale}

    def __call__(self, x: Tensor, layer_i: Tensor) -> Standardised:
        """See `Transform`."""
        mean, scale = self.moments(layer_i)
        return Standardised((x.to(torch.float32) - mean).div_(scale), mean, scale)

    def moments(self, layer_i: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [b or 1, s, d] and scale [b or 1, s, 1] of slices of these layers."""
        return self.mean[layer_i], self.scale[layer_i].unsqueeze(-1)


class Transforms(NamedTuple):
    """What an SAE is fed, and what it is to give.

    into  of inputs.
    out   of targets; None where the target is the input, standardised alike.
    """

    into: Transform
    out: LayerStandardise | None = None

    def __call__(self, inputs: Tensor, targets: Tensor, layer_i: Tensor) -> tuple[Tensor, Standardised]:
        """Inputs z [b, s * d] for the encoder, and standardised targets [b, s, d] with their inverse."""
        fed = self.into(inputs, layer_i)
        wanted = fed if self.out is None else self.out(targets, layer_i)
        return fed.z.flatten(1), wanted

    def feed(self, inputs: Tensor, layer_i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs z [b, s * d] alone, with the mean and scale that make raw rows of what comes out."""
        fed = self.into(inputs, layer_i)
        mean, scale = (fed.mean, fed.scale) if self.out is None else self.out.moments(layer_i)
        return fed.z.flatten(1), mean, scale

    @property
    def description(self) -> dict[str, Any]:
        """All that decides what they compute, apart from `tensors`; JSON."""
        return {"into": self.into.description, "out": None if self.out is None else self.out.description}

    @property
    def digest(self) -> str:
        """Hex digest of the description; an SAE trained under another one must not be evaluated with this."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Their fixed numbers, by name; `make` is the way back."""
        found = {"into": self.into, "out": self.out}
        return {
            f"{end}.{name}": tensor
            for end, transform in found.items()
            if transform is not None
            for name, tensor in transform.tensors.items()
        }


def apply(
    transforms: Transforms, inputs: Tensor, targets: Tensor, layer_i: Tensor
) -> tuple[Tensor, Standardised]:
    """`transforms(inputs, targets, layer_i)`, as a function."""
    return transforms(inputs, targets, layer_i)


def make_transforms(*, by_row: bool, predicts: bool, tensors: dict[str, Tensor]) -> Transforms:
    """The transforms of a form.

    Args:
        by_row: inputs by the row's own numbers, else by fixed ones of its layer.
        predicts: the target is another vector than the input; it goes by fixed numbers of its layer.
        tensors: those of `Transforms.tensors`.
    """

    def fixed(end: str) -> LayerStandardise:
        return LayerStandardise(tensors[f"{end}.mean"], tensors[f"{end}.scale"])

    return Transforms(RowStandardise() if by_row else fixed("into"), fixed("out") if predicts else None)
