"""The forms of dictionary: what a row is, and what is to be reconstructed from it.

A form is two things: a view of a source's batches as slices (the layers a row holds side by side; mostly one), and a
standardisation of what goes in and of what is to come out. Everything else (dictionary, losses, steps) is the same code
for all of them.

    stacked      one layer of one token in, the same out: a multi-layer SAE, or an SAE of one layer
    feature      all layers of a token side by side, each slice standardised by itself
    crosscoder   all layers of a token at once, by one fixed mean and scale per layer
    transcoder   one hook's vector in, another's out; the target by fixed numbers of its layer, since its own row's would
                 tell what is to be predicted

Axes: b rows, s slices, d width, l layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from actcache.errors import UsageError
from actcache.flow import Batch
from trainer.config import FormName
from trainer.provenance import layer_index


class Rows(NamedTuple):
    """A batch as a form sees it; raw, in the source's dtype.

    inputs   [b, s, d].
    targets  [b, s, d], `inputs` itself where a row is to be reconstructed.
    layer_i  [b or 1, s] int64, index of each slice's layer among the layers looked at; 1: the same in all rows.
    """

    inputs: Tensor
    targets: Tensor
    layer_i: Tensor

    def split(self, n_rows: int) -> list[Rows]:
        """Parts of at most `n_rows` rows; none where there are no rows."""
        return [self.cut(start, start + n_rows) for start in range(0, len(self.inputs), n_rows)]

    def cut(self, start: int, stop: int) -> Rows:
        """Rows [start, stop)."""
        inputs = self.inputs[start:stop]
        targets = inputs if self.targets is self.inputs else self.targets[start:stop]
        return Rows(inputs, targets, self.layer_i if len(self.layer_i) == 1 else self.layer_i[start:stop])

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        inputs = self.inputs.to(device)
        targets = inputs if self.targets is self.inputs else self.targets.to(device)
        return Rows(inputs, targets, self.layer_i.to(device))


class Arrived(NamedTuple):
    """A batch that all ranks have their share of.

    batch      the share of this rank.
    n_rows     rows over all ranks.
    by_layer   rows over all ranks of every layer of the source; where a row holds all layers, `n_rows` for each.
    """

    batch: Batch
    n_rows: int
    by_layer: dict[int, int]

    @classmethod
    def alone(cls, batch: Batch) -> Arrived:
        """A batch of which this process has everything."""
        if batch.rows.ndim == 2 and len(batch.layer) == len(batch):
            layers, counts = batch.layer.unique(return_counts=True)
            return cls(batch, len(batch), dict(zip(layers.tolist(), counts.tolist(), strict=True)))
        return cls(batch, len(batch), dict.fromkeys(batch.layer.tolist(), len(batch)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form; all there is to know of it.

    stack        what a store's stream is asked for.
    n_hooks      1, or 2: input and target.
    """

    name: FormName
    stack: Literal["data", "feature", "layers"]
    n_hooks: Literal[1, 2] = 1

    @property
    def is_joint(self) -> bool:
        """Whether a row holds all layers of a token."""
        return self.stack != "data"

    @property
    def is_autoencoder(self) -> bool:
        """Whether rows are to come out as they went in."""
        return self.n_hooks == 1

    def n_slices(self, layers: tuple[int, ...]) -> int:
        """Layers side by side in a row."""
        return len(layers) if self.is_joint else 1

    def rows_per_token(self, layers: tuple[int, ...]) -> int:
        """Rows that one token gives."""
        return 1 if self.is_joint else len(layers)

    def width(self, source_width: int, layers: tuple[int, ...]) -> int:
        """Width d of one layer, out of what a source calls its width."""
        return source_width // len(layers) if self.stack == "feature" else source_width

    def view(self, batch: Batch, layers: tuple[int, ...]) -> Rows:
        """A batch of rows of `layers` as slices.

        Raises:
            UsageError: the source hands out something else than the form needs.
        """
        inputs, targets = self._pair(batch)
        if not self.is_joint:
            if inputs.ndim != 2 or len(batch.layer) != len(inputs):
                raise self._misfit(batch, "[b, d] rows, each of one layer", "data")
            layer_i = layer_index(batch.layer, layers).unsqueeze(1)
            x = inputs.unsqueeze(1)
            return Rows(x, x if targets is inputs else targets.unsqueeze(1), layer_i)
        if tuple(batch.layer.tolist()) != layers:
            raise self._misfit(batch, f"all of layers {layers} in every row", self.stack)
        x = inputs.reshape(len(inputs), len(layers), -1)
        return Rows(x, x, torch.arange(len(layers), device=batch.layer.device).unsqueeze(0))

    def _pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.n_hooks == 1:
            return batch.rows, batch.rows
        hooks = list(batch.hooks.values())
        if len(hooks) != 2:
            raise UsageError(
                f"form {self.name!r} reads one hook and predicts another; this source hands out {list(batch.hooks) or 'one'}. "
                "Make the source with two hooks, the input first"
            )
        return hooks[0], hooks[1]

    def _misfit(self, batch: Batch, needed: str, stack: str) -> UsageError:
        return UsageError(
            f"form {self.name!r} needs {needed}; this source hands out rows {list(batch.rows.shape)} with layers "
            f"{list(batch.layer.shape)}. Make the source with stack={stack!r}"
        )


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(name="stacked", stack="data"),
        Form(name="feature", stack="feature"),
        Form(name="crosscoder", stack="layers"),
        Form(name="transcoder", stack="data", n_hooks=2),
    )
}


def take_rows(batch: Batch, ids: Tensor, form: Form) -> Batch:
    """Some rows of a batch, copied, with their provenance. ids [n] int64."""
    rows = batch.rows[ids]
    return Batch(
        rows,
        batch.layer if form.is_joint else batch.layer[ids],
        slot=batch.slot[ids],
        lookup=lambda name: getattr(batch, name)[ids],
        hooks={name: rows if x is batch.rows else x[ids] for name, x in batch.hooks.items()},
    )


def pick_layers(batch: Batch, layers: tuple[int, ...], form: Form) -> Batch:
    """The rows of these layers; the batch itself where all are, or where a row holds all layers."""
    if form.is_joint:
        return batch
    is_wanted = torch.isin(batch.layer, torch.tensor(layers, device=batch.layer.device))
    return batch if bool(is_wanted.all()) else take_rows(batch, is_wanted.nonzero().squeeze(1), form)
