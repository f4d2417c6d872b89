"""A finished SAE: raw rows in, raw rows out, always through the transforms it was trained with.

Axes: b rows, s slices of a row (the layers side by side in it; mostly one), d width, f latents, k slots per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actcache.errors import UsageError
from actcache.flow import Batch
from trainer.config import TrainConfig
from trainer.forms import FORMS, Form, Rows
from trainer.lens import Lens
from trainer.provenance import layer_index
from trainer.sae import Dictionary
from trainer.transform import RowStandardise, Transforms, restore


class Code(NamedTuple):
    """Rows as the SAE holds them.

    values   [b, k] float32 activations >= 0, in standardised units. A slot of value 0 is not active. Where the number of
             active latents differs from row to row (batch top-k, ReLU), k is that of the fullest row.
    indices  [b, k] int64 latents.
    mean     [b, 1] what standardising took from each row, and
    scale    [b, 1] float32: kept to give it back. Where fixed numbers of a layer do that, [b or 1, d] and [b or 1, 1]; where
             a row has several layers, with one more axis: [b or 1, s, ...].
    skip     [b, s * d] what a skip connection adds to the standardised row, or None.
    layer    [b] or [1] the model's layer number of each row, where a lens is to be undone; else None.
    """

    values: Tensor
    indices: Tensor
    mean: Tensor
    scale: Tensor
    skip: Tensor | None = None
    layer: Tensor | None = None


class Reconstruction(NamedTuple):
    """A batch's rows beside what an SAE makes of them, slice by slice.

    code      of its rows, [b].
    target    [b, s, d] raw rows that were to be restored or predicted.
    restored  [b, s, d].
    nothing   [b, s, d] with no latent active: what mean, scale, bias and skip connection give by themselves.
    layer_i   [b, s] int64, index of each slice's layer among the SAE's layers.
    """

    code: Code
    target: Tensor
    restored: Tensor
    nothing: Tensor
    layer_i: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSAE:
    """An SAE with all that decides what it computes.

    sae         the dictionary, without gradients.
    config      of its run, resolved.
    layers      the model's layer numbers it was trained on.
    var_layer   per layer, the variance that weighed the loss.
    source      fingerprint of the rows and their order.
    provenance  what the caller of the run knew: model, store, versions.
    transforms  what rows go through on their way in and out.
    lens        what they were seen through before that; undone on their way out.
    """

    sae: Dictionary
    config: TrainConfig
    layers: tuple[int, ...]
    var_layer: dict[int, float]
    source: str
    provenance: dict[str, Any]
    transforms: Transforms = field(default_factory=lambda: Transforms(RowStandardise()))
    lens: Lens | None = None

    @property
    def form(self) -> Form:
        """What a row is."""
        return FORMS[self.config.form]

    @property
    def n_slices(self) -> int:
        """Layers side by side in a row."""
        return self.form.n_slices(self.layers)

    def encode(self, rows: Tensor, layer: Tensor | None = None) -> Code:
        """Raw rows, of any float dtype, to their active latents.

        Args:
            rows: [b, d]; [b, s, d] or [b, s * d] where a row has several layers.
            layer: [b] the model's layer number of each row. Needed only where a lens or fixed numbers of the layer change
                something and the SAE has several layers.
        """
        seen, known = self._see(rows, layer)
        return self._encode(self._view(seen, layer))._replace(layer=known)

    @torch.no_grad()
    def with_latents(
        self, rows: Tensor, values: Tensor, indices: Tensor, layer: Tensor | None = None
    ) -> Code:
        """The code of rows whose active latents are known already, values [b, k] and indices [b, k]; else as `encode`."""
        seen, known = self._see(rows, layer)
        code = self._frame(self._view(seen, layer), lambda z: (values.to(z.device), indices.to(z.device)))
        return code._replace(layer=known)

    @torch.no_grad()
    def decode(self, code: Code) -> Tensor:
        """Raw rows xhat float32, [b, d] or [b, s, d]. Change `code.values` first (`code._replace`) to ablate or steer."""
        zhat = self.sae.decode(code.values, code.indices)
        if code.skip is not None:
            zhat = zhat + code.skip
        if self.n_slices > 1:
            zhat = zhat.unflatten(1, (self.n_slices, -1))
        xhat = restore(zhat, code.mean, code.scale)
        if self.lens is None:
            return xhat
        assert code.layer is not None  # `encode` knows it
        return self.lens.invert(xhat, code.layer)

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """A batch of a source made for this SAE's form, beside what comes out.

        Raises:
            UsageError: the source hands out something else than the form needs.
        """
        rows = self.form.view(batch, self.layers).to(self.sae.w_enc.device)
        code = self.encode(batch.rows, batch.layer) if self.lens is not None else self._encode(rows)
        restored, nothing = (
            self.decode(code),
            self.decode(code._replace(values=torch.zeros_like(code.values))),
        )
        target = rows.targets.to(torch.float32)
        layer_i = rows.layer_i.expand(target.shape[:2])
        return Reconstruction(code, target, restored.view_as(target), nothing.view_as(target), layer_i)

    def relative_norms(self) -> Tensor:
        """To which layers each latent writes, see `Dictionary.relative_norms`; [f, s], rows sum to 1."""
        return self.sae.relative_norms(self.n_slices)

    def _see(self, rows: Tensor, layer: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raw rows through the lens, and their layers; unchanged where there is none."""
        if self.lens is None:
            return rows, None
        device = self.sae.w_enc.device
        if layer is None and len(self.layers) > 1:
            raise UsageError(
                f"this SAE sees layers {list(self.layers)} through a lens: say which layer every row is of, encode(rows, layer)"
            )
        known = torch.tensor(self.layers) if layer is None else layer
        return self.lens.apply(rows.to(device), known.to(device)), known.to(device)

    @torch.no_grad()
    def _encode(self, rows: Rows) -> Code:
        def select(z: Tensor) -> tuple[Tensor, Tensor]:
            found = self.sae.encode(z)
            return found.values, found.indices

        return self._frame(rows, select)

    def _frame(self, rows: Rows, select: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Code:
        """The values and indices that `select` gives for standardised rows z, with what makes raw rows of them."""
        z, mean, scale = self.transforms.feed(rows.inputs, rows.layer_i)
        values, indices = select(z)
        skip = self.sae.skipped(z) if self.sae.w_skip is not None else None
        if self.n_slices == 1:
            mean, scale = mean.squeeze(1), scale.squeeze(1)
        return Code(values, indices, mean, scale, skip)

    def _view(self, rows: Tensor, layer: Tensor | None) -> Rows:
        device = self.sae.w_enc.device
        x = rows.to(device)
        x = x.reshape(len(x), self.n_slices, -1)
        if self.form.is_joint:
            layer_i = torch.arange(self.n_slices, device=device).unsqueeze(0)
        elif len(self.layers) == 1 or not self.transforms.tensors:
            layer_i = torch.zeros(1, 1, dtype=torch.int64, device=device)
        elif layer is None:
            raise UsageError(
                f"this SAE of layers {list(self.layers)} uses fixed numbers of each layer: say which layer every row is of, "
                "encode(rows, layer)"
            )
        else:
            layer_i = layer_index(layer.to(device), self.layers).unsqueeze(1)
        return Rows(x, x, layer_i)

    def __repr__(self) -> str:
        return (
            f"TrainedSAE({self.config.form}, width={self.sae.width}, n_latents={self.sae.n_latents}, "
            f"k={self.sae.k}, layers={self.layers})"
        )


def weights_digest(sae: Dictionary) -> str:
    """Hex SHA-256 of a dictionary's weights, by name: what a run that starts from them was started from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        content = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(content.shape)} {content.dtype}".encode())
        digest.update(content.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
