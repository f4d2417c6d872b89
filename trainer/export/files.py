"""Files of other projects: written whole, read with errors that say which file and what is wrong with it."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 (only to catch its errors; `torch.load` reads tensors and plain values, no code)
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from actcache.errors import DamageError, NotFoundError
from trainer import durable


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    durable.write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_torch(path: Path, state: Mapping[str, Any]) -> None:
    """Write what `torch.load` of other projects expects."""
    temporary = path.with_name(durable.TEMPORARY + path.name)
    torch.save(dict(state), temporary)  # noqa: TID251 (their format)
    durable.sync(temporary)
    durable.put_in_place(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        NotFoundError: no such file.
        DamageError: it holds something else.
    """
    _check_there(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamageError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DamageError(f"{path} holds {type(found).__name__}, expected a JSON object")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    _check_there(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamageError(f"{path} is not a safetensors file: {error}") from error


def read_torch(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: tensors and plain values only, on the CPU; code in the file is refused, never run."""
    _check_there(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (their format)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamageError(f"{path} is not a file of tensors that torch can load safely: {error}") from error
    if not isinstance(found, dict):
        raise DamageError(f"{path} holds {type(found).__name__}, expected a dictionary of tensors")
    return found


def read_count(path: Path, config: Mapping[str, Any], name: str) -> int:
    """The positive integer `name` of a configuration.

    Raises:
        DamageError: it is missing or something else; `path` is where it should be.
    """
    found = config.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise DamageError(f"{path}: {name} is {found!r}, expected a positive integer")
    return found


class Tensors:
    """Tensors of one file by name, as float32, with clear errors."""

    def __init__(self, path: Path, tensors: Mapping[str, Any]) -> None:
        self._path, self._tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor `name`; its shape must be this, None is any.

        Raises:
            DamageError: it is missing, has another shape, or holds NaN or infinity.
        """
        found = self._tensors.get(name)
        if not isinstance(found, Tensor):
            raise DamageError(
                f"{self._path}: no tensor {name!r}; it has {', '.join(map(str, self._tensors))}"
            )
        fits = found.ndim == len(shape) and all(
            w in (None, n) for n, w in zip(found.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise DamageError(f"{self._path}: {name} has shape {list(found.shape)}, expected [{wanted}]")
        if not bool(torch.isfinite(found).all()):
            raise DamageError(f"{self._path}: {name} holds NaN or infinity")
        return found.detach().to(torch.float32).contiguous()


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise NotFoundError(f"no file {path}")
