"""What an SAE computes, in one form that every format is written from and read into.

    pre  = W_enc (x - b_in) [+ b_enc]
    a    = the k largest of pre through ReLU (topk), or all that are at least `threshold` and positive
    out  = W_dec^T a + b_out [+ W_skip x]

where x is a raw row, or one that has been standardised first (`rows`). Fixed means and scales are folded into the weights,
which is exact.

Axes: d width of what goes in, e of what comes out, f latents, s slices (layers side by side).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from actcache.errors import UsageError
from trainer.trained import TrainedSAE
from trainer.transform import EPS, LayerStandardise

Rows = Literal["raw", "row", "slices"]

_IN = {
    "row": f"each row is standardised first, z = (x - mean(x)) / (std(x) + {EPS}), std with divisor d - 1",
    "slices": "a row is several layers side by side, and each of them is standardised by itself first, "
    f"z = (x - mean(x)) / (std(x) + {EPS}), std with divisor d - 1",
}
_OUT = f"and what comes out is restored, x = z * (std(x) + {EPS}) + mean(x)"


def treatment(rows: Rows, *, is_autoencoder: bool) -> str:
    """In words, what has to be done to rows outside of the weights."""
    if rows == "raw":
        return "raw rows go in and come out"
    return f"{_IN[rows]}; {_OUT if is_autoencoder else 'what comes out is raw'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Portable:
    """An SAE, or transcoder, as formulas say at the top; tensors float32.

    w_enc       [f, d].
    w_dec       [f, e].
    b_in        [d].
    b_out       [e]; of an autoencoder b_in, unless a format says otherwise.
    b_enc       [f] or None.
    w_skip      [e, d] or None.
    activation  "topk": k of every row; "threshold": those at least `threshold`, a ReLU where it is 0.
    k           of topk; on average where it was trained with batch top-k; else None.
    threshold   0 with topk.
    rows        what has to be done to rows first; a transcoder's output is raw in any case.
    is_autoencoder  false: it predicts another vector than its input.
    layers      the model's layer numbers it was trained on; empty where that is not known.
    n_slices    of these side by side in a row.
    hooks       where in a block rows come from, and are predicted; empty where that is not known.
    about       provenance and settings, JSON.
    """

    w_enc: Tensor
    w_dec: Tensor
    b_in: Tensor
    b_out: Tensor
    b_enc: Tensor | None = None
    w_skip: Tensor | None = None
    activation: Literal["topk", "threshold"]
    k: int | None = None
    threshold: float = 0.0
    rows: Rows = "raw"
    is_autoencoder: bool = True
    layers: tuple[int, ...] = ()
    n_slices: int = 1
    hooks: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Width d of what goes in."""
        return self.w_enc.shape[1]

    @property
    def n_latents(self) -> int:
        """Number of latents f."""
        return self.w_enc.shape[0]

    @property
    def is_relu(self) -> bool:
        """Whether every positive pre-activation is active."""
        return self.activation == "threshold" and self.threshold == 0

    @property
    def exclusive_threshold(self) -> float:
        """A float32 such that a > it exactly where a >= threshold: other projects compare so."""
        return _neighbour(self.threshold, -math.inf) if self.threshold > 0 else 0.0

    def folded_b_enc(self, b_in: Tensor) -> Tensor:
        """The bias [f] of latents where W_enc (x - b_in) is written with this `b_in`: b_enc + W_enc (b_in - self.b_in)."""
        own = self.w_enc.new_zeros(self.n_latents) if self.b_enc is None else self.b_enc
        if torch.equal(b_in, self.b_in):
            return own
        moved = self.w_enc.double() @ (b_in.double() - self.b_in.double())
        return (own.double() + moved).to(self.w_enc.dtype)


NOTE = "actcache"
"""The field of other formats' configurations that holds what they have no place for."""


def write_note(sae: Portable, *, carries_rows: bool = False) -> dict[str, Any]:
    """What a format has no place for, and in words what has to be done to rows.

    Args:
        sae: the SAE.
        carries_rows: the format itself standardises rows as this SAE needs it.
    """
    rows: Rows = "raw" if carries_rows else sae.rows
    return {
        "rows": treatment(rows, is_autoencoder=sae.is_autoencoder),
        "standardise": rows,
        "layers": list(sae.layers),
        "n_slices": sae.n_slices,
        "hooks": list(sae.hooks),
        **sae.about,
    }


def read_note(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Portable` out of a configuration with a note of ours; without one: that nothing is known."""
    note = config.get(NOTE, {})
    return {
        "rows": note.get("standardise", "raw"),
        "layers": tuple(note.get("layers", ())),
        "n_slices": note.get("n_slices", 1),
        "hooks": tuple(note.get("hooks", ())),
        "about": {name: note[name] for name in ("config", "source", "provenance") if name in note},
    }


def inclusive_threshold(exclusive: float) -> float:
    """A float32 such that a >= it exactly where a > exclusive."""
    return _neighbour(exclusive, math.inf) if exclusive > 0 else 0.0


def _neighbour(value: float, towards: float) -> float:
    return float(torch.nextafter(torch.tensor(value, dtype=torch.float32), torch.tensor(towards)))


def make_portable(trained: TrainedSAE, layer: int | None = None) -> Portable:
    """An SAE of ours; on the CPU, its weights shared where nothing is folded.

    Args:
        trained: the SAE.
        layer: for rows of which layer. Needed where fixed numbers of the layer standardise rows and the SAE has several
            layers; else it only says which layer others are told of.

    Raises:
        UsageError: there is no such layer, or it was not said.
    """
    layers = _layers(trained, layer)
    sae = trained.sae
    w_enc, w_dec, b_in = sae.w_enc.cpu(), sae.w_dec.cpu(), sae.bias.cpu()
    b_out = b_in if sae.out_bias is None else sae.out_bias.cpu()
    w_skip = None if sae.w_skip is None else sae.w_skip.cpu()
    into, out = trained.transforms
    if isinstance(into, LayerStandardise):
        mean, scale = _fixed(into, trained, layer)
        w_enc, b_in = w_enc / scale, mean + scale * b_in
        if out is None:
            w_dec, b_out = w_dec * scale, mean + scale * b_out
        if w_skip is not None:  # W_skip (x - mean) / scale
            w_skip = w_skip / scale
            b_out = b_out - w_skip @ mean
    if isinstance(out, LayerStandardise):
        mean, scale = _fixed(out, trained, layer)
        w_dec, b_out = w_dec * scale, mean + scale * b_out
        if w_skip is not None:
            w_skip = scale.unsqueeze(1) * w_skip
    selects = trained.config.activation
    return Portable(
        w_enc=w_enc.contiguous(),
        w_dec=w_dec.contiguous(),
        b_in=b_in,
        b_out=b_out,
        b_enc=None if sae.latent_bias is None else sae.latent_bias.cpu(),
        w_skip=w_skip,
        activation="topk" if selects == "topk" else "threshold",
        k=None if selects == "relu" else trained.config.k,
        threshold=float(sae.get_buffer("threshold")) if selects == "batchtopk" else 0.0,
        rows=rows_of(trained),
        is_autoencoder=sae.is_autoencoder,
        layers=layers,
        n_slices=trained.n_slices,
        hooks=hooks_of(trained),
        about={
            "config": trained.config.model_dump(mode="json", exclude_defaults=True),
            "source": trained.source,
            "provenance": trained.provenance,
        },
    )


def rows_of(trained: TrainedSAE) -> Rows:
    """What has to be done to rows outside of the weights, once fixed numbers are folded into them."""
    if isinstance(trained.transforms.into, LayerStandardise):
        return "raw"
    return "row" if trained.n_slices == 1 else "slices"


def _layers(trained: TrainedSAE, layer: int | None) -> tuple[int, ...]:
    if layer is None or trained.n_slices > 1:
        if layer is None and len(trained.layers) > trained.n_slices and trained.transforms.tensors:
            raise UsageError(
                f"this SAE of layers {list(trained.layers)} standardises rows by fixed numbers of their layer, which other "
                "formats have one set of: say for which layer, and write one for each"
            )
        return trained.layers
    if layer not in trained.layers:
        raise UsageError(f"layer {layer}: this SAE was trained on layers {list(trained.layers)}")
    return (layer,)


def _fixed(transform: LayerStandardise, trained: TrainedSAE, layer: int | None) -> tuple[Tensor, Tensor]:
    """Mean and scale of every number of a row, [s * d] both."""
    mean, scale = transform.mean.cpu(), transform.scale.cpu()
    if trained.n_slices == 1:
        i = 0 if layer is None else trained.layers.index(layer)
        mean, scale = mean[i : i + 1], scale[i : i + 1]
    return mean.flatten(), scale.unsqueeze(1).expand_as(mean).flatten()


def hooks_of(trained: TrainedSAE) -> tuple[str, ...]:
    """Where in a block an SAE's rows come from, as its run says; one made from Python may say nothing."""
    hook = trained.provenance.get("selection", {}).get("hook")
    if hook is None and "selection" in trained.provenance:
        hook = "resid_post"
    return () if hook is None else (hook,) if isinstance(hook, str) else tuple(hook)
