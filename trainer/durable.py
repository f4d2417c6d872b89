"""Files that are there completely or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

TEMPORARY = ".tmp-"
"""Names that start so are unfinished; whoever finds one may remove it."""


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a finished file or folder to its final name, durably."""
    os.replace(temporary, final)  # noqa: PTH105 (one function to break in crash tests)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a small file as a whole."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    put_in_place(temporary, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Replace a safetensors file as a whole; returns its SHA-256."""
    temporary = path.with_name(TEMPORARY + path.name)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    sync(temporary)
    digest = file_digest(temporary)
    put_in_place(temporary, path)
    return digest


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
