"""A trained run as analyses see it: rows of a layer in, active latents, rows out, and which rows it was trained on.

Axes: b rows, d width, f latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actcache.errors import UsageError
from trainer.checkpoint import load_sae
from trainer.durable import file_digest
from trainer.trained import Code, TrainedSAE
from trainer.transform import standardise

if TYPE_CHECKING:
    from actcache.patching import Edit
    from actcache.reader.access import Split, Store
    from actcache.reader.shard_rows import ShardRows

_FILTERS = ("outlier_norm_ratio", "norm_limits", "positions", "exclude_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One SAE, with the store whose rows it is looked at on.

    name    of the run's folder.
    digest  SHA-256 of its sae.json, which names all that decides what the SAE computes.
    sae     the SAE.
    store   of the model it was trained on.
    """

    name: str
    digest: str
    sae: TrainedSAE
    store: Store

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layer numbers it was trained on."""
        return self.sae.layers

    @property
    def n_latents(self) -> int:
        """Number of latents f."""
        return self.sae.sae.n_latents

    @property
    def k(self) -> int | None:
        """Active latents per row."""
        return self.sae.sae.k

    @property
    def directions(self) -> Tensor:
        """[f, d] what a unit of each latent adds to a standardised row."""
        return self.sae.sae.w_dec.detach()

    @property
    def selection(self) -> dict[str, Any]:
        """What the run was trained on, as it was asked for."""
        return self.sae.provenance["selection"]

    @property
    def hook(self) -> str:
        """Where in a block its rows come from."""
        named = self.selection["hook"]
        return named or ("resid_post" if "resid_post" in self.store.hooks else self.store.hooks[0])

    @property
    def target_hook(self) -> str:
        """Where in a block the rows are that it reconstructs."""
        return self.hook

    @property
    def filters(self) -> dict[str, Any]:
        """The run's row filter: arguments of `Store.stream` and `Store.iter_shards`."""
        return {name: self.selection[name] for name in _FILTERS if self.selection.get(name) is not None}

    def shards(self, split: Split, n_tokens: int | None = None) -> Iterator[ShardRows]:
        """The store's kept tokens at this SAE's hook and layers, marked by the run's filter."""
        return self.store.iter_shards(
            split, hook=self.hook, layers=self.layers, n_tokens=n_tokens, **self.filters
        )

    def encode(self, rows: Tensor, layer: int) -> Code:  # noqa: ARG002 - one dictionary for all layers
        """Raw rows [b, d] of one layer to their active latents."""
        return self.sae.encode(rows)

    def decode(self, code: Code, layer: int) -> Tensor:  # noqa: ARG002 - one dictionary for all layers
        """Raw rows [b, d] float32 of one layer."""
        return self.sae.decode(code)

    def reconstruct(self, rows: Tensor, layer: int, values: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Raw rows [b, d] decoded from stored activations [b, k] and latents [b, k], and from none at all."""
        standardised = standardise(rows.to(self.directions.device))
        values, latents = values.to(self.directions.device), latents.to(self.directions.device)
        code = Code(values, latents, standardised.mean, standardised.scale)
        return self.decode(code, layer), self.decode(code._replace(values=torch.zeros_like(values)), layer)

    def edits(self, layer: int, patched: Tensor) -> dict[tuple[str, int], Edit]:
        """What puts reconstructions in the place of rows `patched` [q, t] of a layer, in a patched forward."""

        def reconstruct(acts: Tensor) -> Tensor:
            rows = acts[patched]
            xhat = self.decode(self.encode(rows.to(torch.float32), layer), layer)
            out = acts.clone()
            out[patched] = xhat.to(acts.device, acts.dtype)
            return out

        return {(self.target_hook, layer): reconstruct}


def load_subject(run: Path, store: Store, device: str = "cpu") -> Subject:
    """The SAE of a finished run, to be looked at on a store of the same model.

    Raises:
        NotFoundError: no finished run is there.
        UsageError: it was trained on another model's rows, or at a hook or layers that the store does not have.
    """
    sae = load_sae(run, device=device)
    if "window_rows" not in sae.provenance.get("selection", {}):
        raise UsageError(
            f"{run} does not say which rows it was trained on; it was not made by 'actcache train'"
        )
    model = sae.provenance["model"]
    if store.plan.request.model.digest != model["digest"]:
        raise UsageError(
            f"{run} was trained on activations of {model['name']}, {store.url} holds those of "
            f"{store.plan.request.model.name} (other weights)"
        )
    subject = Subject(name=run.resolve().name, digest=file_digest(run / "sae.json"), sae=sae, store=store)
    missing = sorted(set(sae.layers) - set(store.layers_of(subject.hook)))
    if missing:
        raise UsageError(
            f"{run} was trained on layers {list(sae.layers)}; {store.url} lacks {missing} of them"
        )
    return subject
