"""Which rows of a batch an error is about."""

from __future__ import annotations

import torch
from torch import Tensor

from actcache.errors import UsageError
from actcache.flow import Batch

SHOWN_ROWS = 5


def layer_index(layer: Tensor, layers: tuple[int, ...]) -> Tensor:
    """[b] int64, where each row's layer number stands in `layers` (ascending).

    Raises:
        UsageError: a row is of a layer that is not among them.
    """
    known = torch.tensor(layers, dtype=torch.int64, device=layer.device)
    index = torch.searchsorted(known, layer).clamp_max_(len(layers) - 1)
    strange = (known[index] != layer).nonzero().squeeze(1)
    if len(strange):
        raise UsageError(
            f"a row of layer {int(layer[strange[0]])} came from a source that announced layers {layers}; "
            "the source must list every layer it hands out"
        )
    return index


def describe_non_finite(batch: Batch) -> str:
    """Says which rows of `batch` hold NaN or infinity, by layer, sequence and position."""
    tensors = list(batch.hooks.values()) or [batch.rows]
    is_bad = torch.stack([~torch.isfinite(x).flatten(1).all(dim=1) for x in tensors]).any(0)
    bad = is_bad.nonzero().squeeze(1).cpu()
    if not len(bad):
        return (
            f"its {len(batch)} rows are finite (layers {sorted(set(batch.layer.tolist()))}{_sequences(batch)}), "
            "so the weights have diverged: use a smaller lr"
        )
    places = "; ".join(_place(batch, i) for i in bad[:SHOWN_ROWS].tolist())
    more = f"; and {len(bad) - SHOWN_ROWS} more" if len(bad) > SHOWN_ROWS else ""
    return (
        f"{len(bad)} of its {len(batch)} rows hold NaN or infinity: {places}{more}. "
        "Verify the store, or filter these rows out"
    )


def _place(batch: Batch, i: int) -> str:
    where = f"row {i}"
    if len(batch.layer) == len(batch) and batch.rows.ndim == 2:
        where += f" of layer {int(batch.layer[i])}"
    try:
        return f"{where}, sequence {int(batch.sequence[i])}, position {int(batch.position[i])}"
    except LookupError:  # tensors in memory have no sequences
        return where


def _sequences(batch: Batch) -> str:
    try:
        return f", sequences {int(batch.sequence.min())}-{int(batch.sequence.max())}"
    except LookupError:
        return ""
