"""Trained SAEs of every form with made-up weights, rows for them, and what they compute.

Axes: b rows, s slices, d width, e width of what comes out, f latents, l layers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.forms import FORMS
from trainer.sae import make_dictionary
from trainer.trained import TrainedSAE
from trainer.transform import Transforms, make_transforms

WIDTH, N_LATENTS, K = 12, 40, 4

PROVENANCE = {
    "store": "acts.zarr",
    "plan": "0123456789abcdef",
    "model": {"name": "someone/a-model", "revision": "abc123", "digest": "f" * 64},
    "corpus": "texts.jsonl",
    "selection": {"hook": None, "layers": [3], "outlier_norm_ratio": 10.0, "window_rows": 131_072},
    "actcache_version": "0.1.0",
}


def make_sae(
    layers: tuple[int, ...] = (3,),
    *,
    out_width: int | None = None,
    provenance: dict[str, Any] = PROVENANCE,
    seed: int = 0,
    **settings: Any,
) -> TrainedSAE:
    """An SAE whose every parameter is something; `settings` are those of TrainConfig."""
    g = torch.Generator().manual_seed(seed)
    config = TrainConfig(n_latents=N_LATENTS, k=K, layers=layers, seed=seed, **settings).resolve(WIDTH)
    form = FORMS[config.form]
    n_slices, out = form.n_slices(layers), out_width or WIDTH
    model = make_dictionary(config, WIDTH, out, n_slices=n_slices)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("w_enc", "w_dec") or not bool(parameter.any()):
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
        if config.activation == "batchtopk":
            model.get_buffer("threshold").fill_(0.4)
    tensors = {
        f"{end}.{name}": value
        for end, width in (("into", WIDTH), ("out", out))
        for name, value in (
            ("mean", torch.randn(len(layers), width, generator=g)),
            ("scale", 1 + torch.rand(len(layers), generator=g)),
        )
    }
    transforms: Transforms = make_transforms(
        by_row=config.standardise == "row", predicts=not form.is_autoencoder, tensors=tensors
    )
    return TrainedSAE(
        sae=model.eval().requires_grad_(requires_grad=False),
        config=config,
        layers=layers,
        var_layer=dict.fromkeys(layers, 1.0),
        source="fingerprint",
        provenance=provenance,
        transforms=transforms,
    )


class Computed(NamedTuple):
    """What an SAE makes of raw rows.

    x      [b, s * d] raw rows.
    z      [b, s * d] the same standardised, as the weights see them.
    acts   [b, f] dense activations.
    zhat   [b, s * e] as the weights give it; of a transcoder with the target's fixed numbers put back, so raw.
    xhat   [b, s * e] raw.
    """

    x: Tensor
    z: Tensor
    acts: Tensor
    zhat: Tensor
    xhat: Tensor


def compute(trained: TrainedSAE, layer: int | None = None, n_rows: int = 64, seed: int = 1) -> Computed:
    """Rows of standard deviation 5 or so about a mean, and everything that comes of them; `layer` is theirs."""
    g = torch.Generator().manual_seed(seed)
    n_slices = trained.n_slices
    x = torch.randn(n_rows, n_slices, WIDTH, generator=g) * 5 + 2
    if n_slices == 1:
        x = x.squeeze(1)
    which = torch.full((n_rows,), trained.layers[0] if layer is None else layer)
    code = trained.encode(x, which)
    xhat = trained.decode(code)
    acts = torch.zeros(n_rows, trained.sae.n_latents).scatter_add_(1, code.indices, code.values)
    rows = trained._view(x, which)
    z, mean, scale = trained.transforms.feed(rows.inputs, rows.layer_i)
    zhat = xhat
    if trained.sae.is_autoencoder:
        zhat = (xhat.reshape(n_rows, n_slices, -1) - mean) / scale
    return Computed(x.flatten(1), z, acts, zhat.reshape(n_rows, -1), xhat.reshape(n_rows, -1))


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
