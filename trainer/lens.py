"""A lens: one invertible affine map per layer, between raw rows and the space an SAE is trained in.

    y = (x - centre_l) A_l^T + offset_l            x = A_l^{-1} (y - offset_l) + centre_l

A tuned lens (A = I + W) brings every layer towards the last one's space; mean and scale, or whitening, bring all layers to a
common size. Rows are looked at through it while they stream: the trainer takes y for its rows and knows nothing else.

Axes: b rows, d width, l layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from actcache.errors import DamageError, NotFoundError, UsageError
from actcache.flow import Batch, BatchSource
from trainer import durable
from trainer.provenance import layer_index

FORMAT = "1"
LENS = "lens.safetensors"
"""What a lens is called in the folder of a run that was trained through it."""


@dataclass(frozen=True, kw_only=True)
class Lens:
    """The maps of some layers, float32.

    layers  the model's layer numbers, ascending.
    centre  [l, d].
    weight  [l, d, d] the matrices A; or [l], one number each.
    offset  [l, d].
    about   how it was made: JSON.
    """

    layers: tuple[int, ...]
    centre: Tensor
    weight: Tensor
    offset: Tensor
    about: dict[str, Any]

    @property
    def width(self) -> int:
        """Width d of a row."""
        return self.centre.shape[1]

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of everything that decides what it computes."""
        found = hashlib.sha256(json.dumps(list(self.layers)).encode())
        for tensor in (self.centre, self.weight, self.offset):
            found.update(str(tuple(tensor.shape)).encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def to(self, device: torch.device | str) -> Lens:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("centre", "weight", "offset")}
        return Lens(layers=self.layers, about=self.about, **moved)

    def apply(self, rows: Tensor, layer: Tensor) -> Tensor:
        """Rows y [b, d] float32 of raw rows [b, d]; layer [b] or [1]: the model's layer number of each.

        Raises:
            UsageError: the lens has no map for a layer.
        """

        def through(x: Tensor, i: int) -> Tensor:
            centred = x.to(torch.float32) - self.centre[i]
            seen = centred @ self.weight[i].T if self.weight.ndim == 3 else centred * self.weight[i]
            return seen + self.offset[i]

        return self._by_layer(rows, layer, through)

    def invert(self, rows: Tensor, layer: Tensor) -> Tensor:
        """Raw rows x [b, d] float32 of rows y [b, d]: solved in float64, so the error is that of y times the condition."""

        def back(y: Tensor, i: int) -> Tensor:
            known = y.double() - self.offset[i].double()
            if self.weight.ndim == 3:
                factors, pivots = self._factors
                x = torch.linalg.lu_solve(factors[i], pivots[i], known.T).T
            else:
                x = known / self.weight[i].double()
            return (x + self.centre[i].double()).to(torch.float32)

        return self._by_layer(rows, layer, back)

    def conditions(self) -> dict[int, float]:
        """Condition number of each A: its largest singular value over its smallest."""
        if self.weight.ndim == 1:
            return dict.fromkeys(self.layers, 1.0)
        values = torch.linalg.svdvals(self.weight.double())
        return dict(zip(self.layers, (values[:, 0] / values[:, -1]).tolist(), strict=True))

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        factors, pivots = torch.linalg.lu_factor(self.weight.double())
        return factors, pivots

    def _by_layer(self, rows: Tensor, layer: Tensor, change: Any) -> Tensor:
        try:
            layer_i = layer_index(layer, self.layers)
        except UsageError as error:
            raise UsageError(f"the lens has maps for layers {list(self.layers)} only: {error}") from error
        out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        if len(layer_i) == 1:
            return change(rows, int(layer_i[0]))
        for i in layer_i.unique().tolist():
            at = (layer_i == i).nonzero().squeeze(1)
            out[at] = change(rows[at], i)
        return out


class LensSource:
    """A source whose rows are seen through a lens; its order, cursor and provenance are the source's.

    Raises:
        UsageError: the source's rows hold several layers, are of another width, or of layers that the lens has no map for.
    """

    def __init__(self, source: BatchSource, lens: Lens, device: torch.device | str = "cpu") -> None:
        missing = sorted(set(source.layers) - set(lens.layers))
        if missing or source.width != lens.width:
            raise UsageError(
                f"a lens for layers {list(lens.layers)} of width {lens.width} does not fit rows of layers {list(source.layers)} and "
                f"width {source.width}" + (f": layers {missing} are missing" if missing else "")
            )
        self._source, self._lens = source, lens.to(device)

    @property
    def width(self) -> int:
        """Width d."""
        return self._source.width

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that occur."""
        return self._source.layers

    @property
    def fingerprint(self) -> str:
        """Digest of the source's and the lens's."""
        return hashlib.sha256(f"{self._source.fingerprint} {self._lens.digest}".encode()).hexdigest()

    def __len__(self) -> int:
        if not isinstance(self._source, Sized):
            raise TypeError("the source does not say how long it is")
        return len(self._source)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the cursor on."""
        for batch in self._source:
            yield self._through(batch)

    def peek(self, n_rows: int) -> Batch:
        """The first rows of the order."""
        return self._through(self._source.peek(n_rows))

    def _through(self, batch: Batch) -> Batch:
        if batch.rows.ndim != 2 or len(batch.layer) != len(batch.rows):
            raise UsageError(
                "a lens needs rows of one layer each; make the source with stack='data' and a form that takes it"
            )
        batch.rows = self._lens.apply(batch.rows, batch.layer)
        batch.hooks = dict.fromkeys(batch.hooks, batch.rows)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The source's cursor."""
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move the source's cursor."""
        self._source.load_state_dict(state)

    def waited_s(self) -> float:
        """Seconds waited for data."""
        return self._source.waited_s()

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def save_lens(lens: Lens, path: Path) -> None:
    """Write a lens as one safetensors file, as a whole."""
    metadata = {
        "format": FORMAT,
        "layers": json.dumps(list(lens.layers)),
        "about": json.dumps(lens.about),
        "digest": lens.digest,
    }
    tensors = {name: getattr(lens, name).cpu().contiguous() for name in ("centre", "weight", "offset")}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(durable.TEMPORARY + path.name)
    temporary.write_bytes(save(tensors, metadata))
    durable.sync(temporary)
    durable.put_in_place(temporary, path)


def load_lens(path: Path) -> Lens:
    """Read a lens.

    Raises:
        NotFoundError: no such file.
        DamageError: it is no lens, or its numbers are not those that were written.
    """
    if not path.is_file():
        raise NotFoundError(f"no lens at {path}; 'actcache lens train' and 'actcache lens import' make them")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("format") != FORMAT:
            raise DamageError(f"{path} is no lens of format {FORMAT} (format {metadata.get('format')!r})")
        lens = Lens(
            layers=tuple(json.loads(metadata["layers"])), about=json.loads(metadata["about"]), **tensors
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamageError(f"{path} cannot be read as a lens: {error}") from error
    if lens.digest != metadata["digest"]:
        raise DamageError(f"{path}: its numbers are not those that were written; make it again")
    return lens
