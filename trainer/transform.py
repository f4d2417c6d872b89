"""From a raw row to what the SAE sees, and exactly back.

Axes: b rows, d width.
"""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-5
"""Added to the standard deviation. Source: tim-lawson/mlsae autoencoder.py:213-222."""

DESCRIPTION = {"name": "standardise", "version": 1, "eps": EPS, "std": "bessel", "dtype": "float32"}
"""All that decides what the transform computes; its digest is stored with every SAE."""


class Standardised(NamedTuple):
    """Rows of mean 0 and standard deviation 1, with what it takes to undo that.

    z      [b, d] float32, (x - mean) / scale.
    mean   [b, 1] float32, mean over the width.
    scale  [b, 1] float32, s + EPS; s is the standard deviation over the width (divisor d - 1).
    """

    z: Tensor
    mean: Tensor
    scale: Tensor


def standardise(rows: Tensor) -> Standardised:
    """Each row z = (x - mu) / (s + eps) by itself, in float32 whatever the dtype of `rows` [b, d]."""
    x = rows.to(torch.float32)
    variance, mean = torch.var_mean(x, dim=1, correction=1, keepdim=True)
    scale = variance.sqrt_().add_(EPS)
    return Standardised((x - mean).div_(scale), mean, scale)


def restore(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Raw rows x = z * (s + eps) + mu [b, d]: the exact inverse of `standardise`."""
    return z * scale + mean


def digest() -> str:
    """Hex digest of the transform's description; an SAE trained under another one must not be evaluated with this."""
    return hashlib.sha256(json.dumps(DESCRIPTION, sort_keys=True).encode()).hexdigest()[:16]
