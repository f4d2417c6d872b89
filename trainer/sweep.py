"""Many SAEs on the same batches: which, what they are called, and what memory they take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from pydantic import ValidationError

from actcache.errors import UsageError
from trainer.config import TrainConfig
from trainer.forms import FORMS
from trainer.kernels.ragged import TILE_VALUES


def parse_setting(text: str) -> tuple[str, str]:
    """`name=value` of a field of TrainConfig; UsageError says what is wrong with it."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not value.strip():
        raise UsageError(f"{text!r}: expected NAME=VALUE, such as k=32")
    if name not in TrainConfig.model_fields:
        raise UsageError(
            f"{text!r}: there is no setting {name!r}; the settings are {', '.join(TrainConfig.model_fields)}"
        )
    return name, value.strip()


def value_of(text: str) -> Any:
    """A setting's value as JSON has it: 32, 1e-4, true, null, [0.25, 0.75]; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def grid(sweeps: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every combination of swept settings, by name: "k=16,expansion=64": {"k": 16, "expansion": 64}.

    Args:
        sweeps: such as "k=16,32,64"; the first varies slowest. None of them: one combination called "".

    Raises:
        UsageError: a setting is unknown, given twice, or has a value twice.
    """
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        name, values = parse_setting(text)
        listed = [value.strip() for value in values.split(",")]
        if name in axes or len(set(listed)) != len(listed) or not all(listed):
            raise UsageError(f"--sweep {text}: every setting once, with values that differ")
        axes[name] = listed
    found = {}
    for values in product(*axes.values()):
        pairs = list(zip(axes, values, strict=True))
        found[",".join(f"{name}={value}" for name, value in pairs)] = {n: value_of(v) for n, v in pairs}
    return found


def make_configs(
    settings: Mapping[str, Any], sweeps: Sequence[str], layers: Sequence[int] | None = None
) -> dict[str, TrainConfig]:
    """A configuration for every SAE, by name; "" for one alone.

    Args:
        settings: what all have in common.
        sweeps: see `grid`.
        layers: one SAE for each of these layers, called "layer=05" after what the sweep calls it. None: one for all.

    Raises:
        UsageError: a setting is wrong; says of which SAE.
    """
    made = {}
    for name, swept in grid(sweeps).items():
        for layer in layers if layers is not None else (None,):
            own = {**settings, **swept}
            called = name
            if layer is not None:
                own["layers"] = (layer,)
                called = ",".join(filter(None, [name, f"layer={layer:0{len(str(max(layers or ())))}d}"]))
            try:
                made[called] = TrainConfig(**own)
            except ValidationError as error:
                raise UsageError(f"{called + ': ' if called else ''}{describe(error)}") from error
    if layers is not None and made and FORMS[next(iter(made.values())).form].is_joint:
        raise UsageError("--per-layer trains one SAE per layer; this form puts all layers into one row")
    return made


def describe(error: ValidationError) -> str:
    """What is wrong, setting by setting."""
    found = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        found.append(f"{where + ': ' if where else ''}{problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(found)


class Memory(NamedTuple):
    """Bytes an SAE in training takes on its device.

    weights    parameters, their gradients, Adam's two moments and, where asked for, the average.
    working    standardised rows and pre-activations of one part of a batch, about.
    """

    weights: int
    working: int


def memory_of(config: TrainConfig, width: int, n_layers: int) -> Memory:
    """What an SAE will take.

    Args:
        config: need not be resolved.
        width: of one layer's rows.
        n_layers: how many layers there are.
    """
    resolved = config.resolve(width)
    n_latents = resolved.n_latents or 0
    row = width * FORMS[resolved.form].n_slices(tuple(range(n_layers)))
    n_parameters = 2 * row * n_latents + 2 * row + n_latents + (row * row if resolved.skip else 0)
    copies = 4 + (resolved.ema_decay is not None)
    rows = min(resolved.micro_rows or resolved.batch_rows, resolved.batch_rows)
    if resolved.activation == "relu":
        pre_activations = 3 * rows * n_latents
    else:
        pre_activations = max(TILE_VALUES, min(rows, 128) * n_latents)
    return Memory(4 * copies * n_parameters, 4 * (6 * rows * row + pre_activations))
