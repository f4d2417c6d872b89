"""The dictionary: one sparse autoencoder, or transcoder, over standardised rows.

Axes: b rows, d width of what goes in, e width of what comes out (d for an autoencoder), f latents, k active latents,
m auxiliary latents.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.codes import Code
from trainer.config import Precision, TrainConfig
from trainer.forms import FORMS
from trainer.kernels import Kernels, Selected, sparse
from trainer.selection import BatchTopK, Selection, TopK, make_selection

PAD = 8
"""A latent bias takes this many more columns of the encoder's product, so that its rows stay aligned."""


class Dictionary(nn.Module):
    """a = select(ReLU(W_enc (z - b) [+ b_latent])), zhat = W_dec^T a + b.

    w_enc        [f, d] uniform in +-1/sqrt(d), what nn.Linear (Kaiming uniform, a=sqrt 5) starts with.
    w_dec        [f, e] one row per latent. Of an autoencoder it starts as w_enc's rows with norm 1, and training keeps the
                 norms at 1 by `project_decoder_gradient` and `normalise_decoder`; over all layers jointly where a row has
                 several. So a_f = a_f ||w_dec[f]||: the selection is one by what latents add to the row.
                 Of a transcoder it starts at 0 and its norms are free (EleutherAI/sparsify sparse_coder.py).
    bias         [d] starts at 0; training sets it to the geometric median of the first window.
    out_bias     [e], of a transcoder only: zhat = W_dec^T a + out_bias. 0 is the target's mean, which is standardised away.
    latent_bias  [f] where asked for, starts at 0.
    w_skip       [e, d] where asked for, starts at 0: zhat gets W_skip z as well.
    threshold    scalar, of batch top-k: evaluation selects what is at least this.

    Source: Gao et al. (arXiv 2406.04093), section 2 and appendix A; tim-lawson/mlsae autoencoder.py:105-119.
    """

    def __init__(
        self,
        width: int,
        n_latents: int,
        selection: Selection,
        *,
        generator: torch.Generator,
        kernels: Kernels = sparse,
        out_width: int | None = None,
        latent_bias: bool = False,
        skip: bool = False,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        self.selection, self.kernels, self.precision = selection, kernels, precision
        self.is_autoencoder = out_width is None
        bound = width**-0.5
        w_enc = torch.empty(n_latents, width, dtype=torch.float32).uniform_(
            -bound, bound, generator=generator
        )
        self.w_enc = nn.Parameter(w_enc)
        self.w_dec = nn.Parameter(w_enc.clone() if out_width is None else torch.zeros(n_latents, out_width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.out_bias = None if out_width is None else nn.Parameter(torch.zeros(out_width))
        self.latent_bias = nn.Parameter(torch.zeros(n_latents)) if latent_bias else None
        self.w_skip = nn.Parameter(torch.zeros(out_width or width, width)) if skip else None
        if isinstance(selection, BatchTopK):
            self.register_buffer("threshold", torch.zeros(()))
        self.normalise_decoder()

    @property
    def width(self) -> int:
        """Width d of what goes in."""
        return self.w_enc.shape[1]

    @property
    def n_latents(self) -> int:
        """Number of latents f."""
        return self.w_enc.shape[0]

    @property
    def k(self) -> int | None:
        """Active latents per row; of batch top-k on average; None where a penalty decides."""
        return self.selection.k

    # Rows in.

    def encoder(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, w_enc and bias such that pre-activations are w_enc (z - bias).

        A latent bias becomes a column of w_enc, against a column of ones in z.
        """
        w_enc, bias = self.w_enc, self.bias
        if self.latent_bias is not None:
            ones = z.new_zeros(len(z), PAD)
            ones[:, 0] = 1
            z = torch.cat([z, ones], dim=1)
            column = torch.nn.functional.pad(self.latent_bias.unsqueeze(1), (0, PAD - 1))
            w_enc = torch.cat([w_enc, column], dim=1)
            bias = torch.nn.functional.pad(bias, (0, PAD))
        return z, w_enc, bias

    def products(self) -> AbstractContextManager[Any]:
        """Within it the encoder's product takes its inputs in `precision`; weights and gradients stay float32."""
        is_rough = self.precision == "bfloat16"
        return torch.autocast(self.w_enc.device.type, dtype=torch.bfloat16, enabled=is_rough)

    def select(self, z: Tensor, k: int, dead: Tensor, n_aux: int) -> Selected:
        """The k largest of every row, and of the latents `dead`; see `Kernels.encode`."""
        with self.products():
            return self.kernels.encode(z, self.w_enc, self.bias, k, dead, n_aux, latent_bias=self.latent_bias)

    def encode(self, z: Tensor) -> Selected:
        """The active latents of standardised rows z [b, d], as evaluation has them; changes nothing in the module."""
        return self.selection.infer(self, z)

    # Rows out.

    def reconstruct(self, code: Code, z: Tensor) -> Tensor:
        """Standardised rows zhat [b, e] of a code of rows z [b, d]."""
        out = code.decode(self.w_dec) + self._out_bias
        return out if self.w_skip is None else out + self.skipped(z)

    def directions(self, code: Code) -> Tensor:
        """What a code's latents add to a row, without any bias. [b, e]."""
        return code.decode(self.w_dec)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Standardised rows zhat [b, e] = sum_j values[b, j] w_dec[indices[b, j]] + b, without a skip connection."""
        return self.decode_directions(values, indices) + self._out_bias

    def decode_directions(self, values: Tensor, indices: Tensor) -> Tensor:
        """The same without b: what latents add to a row. [b, e]."""
        return self.kernels.decode(values, indices, self.w_dec)

    def skipped(self, z: Tensor) -> Tensor:
        """What the skip connection adds, W_skip z [b, e]; z [b, d]."""
        assert self.w_skip is not None
        return z @ self.w_skip.T

    @property
    def _out_bias(self) -> Tensor:
        return self.bias if self.out_bias is None else self.out_bias

    # Norms.

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """g_f -= (g_f . w_f) w_f: drop the part that would only change a norm that is set to 1 again anyway."""
        if self.is_autoencoder and self.w_dec.grad is not None:
            along = torch.linalg.vecdot(self.w_dec.grad, self.w_dec).unsqueeze(1)
            self.w_dec.grad.addcmul_(self.w_dec, along, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Every row of an autoencoder's w_dec to norm 1."""
        if self.is_autoencoder:
            self.w_dec.div_(self._norms())

    @torch.no_grad()
    def fold_norms(self) -> None:
        """The same without changing what latents add to a row: the norm goes into the activation."""
        if self.is_autoencoder:
            norms = self._norms()
            self.w_dec.div_(norms)
            self.w_enc.mul_(norms)
            if self.latent_bias is not None:
                self.latent_bias.mul_(norms.squeeze(1))

    def _norms(self) -> Tensor:
        norms = torch.linalg.vector_norm(self.w_dec, dim=1, keepdim=True)
        return norms.clamp_min_(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def relative_norms(self, n_slices: int) -> Tensor:
        """||w_dec[f, s]|| / sum over s of it, [f, s]: to which of the layers side by side in a row a latent writes.

        Source: Lindsey et al. 2024 (Sparse Crosscoders), relative decoder norm.
        """
        norms = torch.linalg.vector_norm(self.w_dec.unflatten(1, (n_slices, -1)), dim=2)
        return norms / norms.sum(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)


class TopKSAE(Dictionary):
    """The autoencoder with k active latents in every row."""

    def __init__(self, width: int, n_latents: int, k: int, **more: Any) -> None:
        super().__init__(width, n_latents, TopK(k), **more)


def make_dictionary(
    config: TrainConfig, width: int, out_width: int, *, n_slices: int, kernels: Kernels = sparse
) -> Dictionary:
    """The dictionary of a run, as its seed starts it.

    Args:
        config: resolved.
        width: of one layer's input.
        out_width: of one layer's target; only a transcoder's may differ.
        n_slices: layers side by side in a row.
        kernels: what computes products and sums.
    """
    return Dictionary(
        n_slices * width,
        config.n_latents or 0,
        make_selection(config),
        generator=torch.Generator().manual_seed(config.seed),
        kernels=kernels,
        out_width=None if FORMS[config.form].is_autoencoder else n_slices * out_width,
        latent_bias=config.latent_bias,
        skip=config.skip,
        precision=config.precision,
    )


def dictionary_of(weights: dict[str, Tensor], config: TrainConfig, layers: tuple[int, ...]) -> Dictionary:
    """The dictionary of a run with these weights, on their device."""
    n_slices = FORMS[config.form].n_slices(layers)
    width, out_width = (weights[name].shape[1] // n_slices for name in ("w_enc", "w_dec"))
    resolved = config.model_copy(update={"n_latents": weights["w_enc"].shape[0]})
    model = make_dictionary(resolved, width, out_width, n_slices=n_slices)
    model.to(weights["w_enc"].device).load_state_dict(weights)
    return model
