"""A trained run as analyses see it: rows of a layer in, active latents, rows out, and which rows it was trained on.

One SAE for all layers, or one for each: then their latents are numbered one dictionary after the other, so that every
analysis takes both. A transcoder's rows go in at one hook and come out at another.

Axes: b rows, d width, f latents (of all dictionaries), k slots.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actcache.errors import NotFoundError, UsageError
from trainer.checkpoint import load_sae
from trainer.durable import file_digest
from trainer.lens import Lens
from trainer.trained import Code, TrainedSAE

if TYPE_CHECKING:
    from actcache.patching import Edit
    from actcache.reader.access import Split, Store
    from actcache.reader.shard_rows import ShardRows

FILTERS = ("outlier_norm_ratio", "norm_limits", "positions", "exclude_tokens")
"""Parts of a run's selection that say which rows pass."""

_RESULT = "sae.json"


def filters_of(selection: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The row filter of a run's selection, on some of its layers: arguments of `Store.stream` and `Store.iter_shards`."""
    found = {name: selection[name] for name in FILTERS if selection.get(name) is not None}
    if "norm_limits" in found:  # JSON has no numbers for keys
        found["norm_limits"] = {layer: found["norm_limits"][str(layer)] for layer in layers}
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One run, with the store whose rows it is looked at on.

    name    of the run's folder.
    digest  SHA-256 of its sae.json (of several: of their digests), which names all that decides what an SAE computes.
    saes    the SAE of each of the model's layers: the same for all, or one each.
    store   of the model it was trained on.
    """

    name: str
    digest: str
    saes: dict[int, TrainedSAE]
    store: Store

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layer numbers it was trained on."""
        return tuple(self.saes)

    @property
    def is_shared(self) -> bool:
        """Whether one SAE serves all layers."""
        return len({id(sae) for sae in self.saes.values()}) == 1

    @property
    def sae(self) -> TrainedSAE:
        """The SAE of the first layer; of all, where one serves all."""
        return self.saes[self.layers[0]]

    @property
    def n_latents(self) -> int:
        """Number of latents f, over all dictionaries."""
        return self._first_latent(None)

    def first_latent(self, layer: int) -> int:
        """The number that latent 0 of a layer's dictionary has here."""
        return 0 if self.is_shared else self._first_latent(layer)

    def _first_latent(self, layer: int | None) -> int:
        total, seen = 0, set()
        for other, sae in self.saes.items():
            if other == layer:
                break
            if id(sae) not in seen:
                total += sae.sae.n_latents
            seen.add(id(sae))
        return total

    @property
    def k(self) -> int | None:
        """Active latents per row, on average at least; None where a penalty decides."""
        return self.sae.sae.k

    @property
    def out_width(self) -> int:
        """Width d of a row that comes out."""
        return self.sae.sae.w_dec.shape[1]

    @property
    def directions(self) -> Tensor:
        """[f, d] what a unit of each latent adds to a standardised row."""
        dictionaries = {id(sae): sae.sae.w_dec.detach() for sae in self.saes.values()}
        return torch.cat(list(dictionaries.values()))

    @property
    def selection(self) -> dict[str, Any]:
        """What the run was trained on, as it was asked for."""
        return self.sae.provenance["selection"]

    @property
    def _hooks(self) -> tuple[str, ...]:
        named = self.selection["hook"]
        if named is None:
            return ("resid_post" if "resid_post" in self.store.hooks else self.store.hooks[0],)
        return (named,) if isinstance(named, str) else tuple(named)

    @property
    def hook(self) -> str:
        """Where in a block the rows are that go in."""
        return self._hooks[0]

    @property
    def target_hook(self) -> str:
        """Where in a block the rows are that come out: the same, but for a transcoder."""
        return self._hooks[-1]

    @property
    def filters(self) -> dict[str, Any]:
        """The run's row filter: arguments of `Store.stream` and `Store.iter_shards`."""
        return filters_of(self.selection, self.layers)

    def shards(self, split: Split, n_tokens: int | None = None) -> Iterator[ShardRows]:
        """The store's kept tokens at this run's hooks and layers, marked by its filter."""
        return self.store.iter_shards(
            split, hook=self._hooks, layers=self.layers, n_tokens=n_tokens, **self.filters
        )

    @property
    def lens(self) -> Lens | None:
        """What the run's rows were seen through."""
        return self.sae.lens

    @property
    def inside(self) -> Subject:
        """The same in the space of its lens: `see` gives the rows it takes."""
        bare = {id(sae): replace(sae, lens=None) for sae in self.saes.values()}
        return replace(self, saes={layer: bare[id(sae)] for layer, sae in self.saes.items()})

    def see(self, rows: Tensor, layer: int) -> Tensor:
        """Raw rows [b, d] of one layer through the lens."""
        if self.lens is None:
            return rows
        return self.lens.apply(
            rows.to(self.directions.device), torch.tensor([layer]).to(self.directions.device)
        )

    def encode(self, rows: Tensor, layer: int) -> Code:
        """Raw rows [b, d] of one layer to their active latents, numbered within the layer's own dictionary."""
        return self.saes[layer].encode(rows, _all_of(layer, rows))

    def decode(self, code: Code, layer: int) -> Tensor:
        """Raw rows [b, d] float32 of one layer."""
        return self.saes[layer].decode(code)

    def reconstruct(self, rows: Tensor, layer: int, values: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Raw rows [b, d] made of rows that go in and their stored latents [b, k], and made of no latents at all.

        Args:
            rows: [b, d] raw.
            layer: their layer.
            values: [b, k] activations, 0 in slots that are not used.
            latents: [b, k] int64, numbered over all dictionaries.
        """
        own = (latents - self.first_latent(layer)).clamp_(min=0)
        code = self.saes[layer].with_latents(rows, values, own, _all_of(layer, rows))
        return self.decode(code, layer), self.decode(
            code._replace(values=torch.zeros_like(code.values)), layer
        )

    def edits(self, layer: int, patched: Tensor) -> dict[tuple[str, int], Edit]:
        """What puts reconstructions in the place of rows `patched` [q, t] of a layer, in a patched forward."""
        went_in: dict[str, Tensor] = {}

        def look(acts: Tensor) -> Tensor:
            went_in["acts"] = acts
            return acts

        def reconstruct(acts: Tensor) -> Tensor:
            rows = went_in.get("acts", acts)[patched]
            xhat = self.decode(self.encode(rows.to(torch.float32), layer), layer)
            out = acts.clone()
            out[patched] = xhat.to(acts.device, acts.dtype)
            return out

        looked_at = {} if self.hook == self.target_hook else {(self.hook, layer): look}
        return {**looked_at, (self.target_hook, layer): reconstruct}


def _all_of(layer: int, rows: Tensor) -> Tensor:
    return torch.full((len(rows),), layer)


def load_subject(run: Path, store: Store, device: str = "cpu") -> Subject:
    """The SAE or SAEs of a finished run, to be looked at on a store of the same model.

    Args:
        run: a run's folder; or one that holds a run for each layer, as `actcache train --per-layer` makes it.
        store: of the same model.
        device: where the SAE goes.

    Raises:
        NotFoundError: no finished run is there.
        UsageError: it was trained on another model's rows, at a hook or layers that the store does not have, or on rows that
            hold several layers, whose latents are active at none of them.
    """
    folders = find_runs(run)
    loaded = {folder: load_sae(folder, device=device) for folder in folders}
    for folder, sae in loaded.items():
        check_run(folder, sae, store)
        _check_form(folder, sae)
    saes = {layer: sae for sae in loaded.values() for layer in sae.layers}
    if len(saes) != sum(len(sae.layers) for sae in loaded.values()):
        raise UsageError(
            f"{run} holds two SAEs of one layer: {[folder.name for folder in folders]}; name one"
        )
    digests = [file_digest(folder / _RESULT) for folder in folders]
    subject = Subject(
        name=run.resolve().name,
        digest=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        saes=dict(sorted(saes.items())),
        store=store,
    )
    for hook in (subject.hook, subject.target_hook):
        missing = sorted(set(subject.layers) - set(store.layers_of(hook)))
        if missing:
            raise UsageError(
                f"{run} was trained on layers {list(subject.layers)} of {hook}; {store.url} lacks {missing} of them"
            )
    return subject


def find_runs(run: Path) -> list[Path]:
    """The folders of a run: itself, or those of its layers.

    OUT/layer=05, OUT/layer=10 are found as OUT; OUT/k=16,layer=05, OUT/k=16,layer=10 as OUT/k=16.

    Raises:
        NotFoundError: no finished run is there.
        UsageError: there are several that are not one for each layer.
    """
    if (run / _RESULT).exists():
        return [run]
    inside = sorted(path.parent for path in run.glob(f"*/{_RESULT}"))
    of_layers = [path for path in inside if re.fullmatch(r"layer=\d+", path.name)]
    if of_layers:
        return of_layers
    prefix = re.escape(run.name) + r",layer=\d+"
    swept = [
        path.parent for path in run.parent.glob(f"*/{_RESULT}") if re.fullmatch(prefix, path.parent.name)
    ]
    if swept:
        return sorted(swept)
    if inside:
        names = sorted({re.sub(r",layer=\d+$", "", path.name) for path in inside})
        raise UsageError(
            f"{run} holds several runs; name one of {', '.join(str(run / name) for name in names)}"
        )
    raise NotFoundError(
        f"no finished run in {run} (no {_RESULT}); train it to its end, resuming if it was stopped"
    )


def check_run(run: Path, sae: TrainedSAE, store: Store) -> None:
    """Raises UsageError unless a run says which rows it was trained on, and they are of the store's model."""
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


def _check_form(run: Path, sae: TrainedSAE) -> None:
    if sae.form.is_joint:
        raise UsageError(
            f"{run} is a {sae.form.name}: its latents are of a token, not of one of its layers, so they have no distribution over "
            f"layers. 'actcache eval' shows its scores and the norms of its decoder per layer"
        )
