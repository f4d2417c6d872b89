"""saev's sharded activation files, protocols 1.0.0, 1.1, 2.0 and 2.1.

    metadata.json    what was recorded: layers, tokens per example, [CLS] or not, width, examples
    shards.json      [{name, number of examples}]
    acts000000.bin   float32, no header, [example, layer, token, width]; [CLS], where there is one, is token 0

Every shard file is allocated at its full size, so the last one usually holds more than its examples; and where the
examples fill the shards exactly, saev adds a full-size file of no examples. Only the examples that shards.json counts
are read. `data` in metadata.json is a pickle and is never opened; `labels.bin` is not imported.
Source: saev docs/src/developers/protocol.md and src/saev/data/shards.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import CorpusError, NotFoundError
from actcache.producer.importing.raw import Piece, RawArray
from actcache.producer.importing.source import Facts, RawSource, check_unique, layers_of, relative_files

METADATA, SHARDS = "metadata.json", "shards.json"
PROTOCOLS = ("1.0.0", "1.1", "2.0", "2.1")
_FLOAT32 = np.dtype("<f4")
_NAMES = {
    "family": ("family", "vit_family"),
    "ckpt": ("ckpt", "vit_ckpt"),
    "content_tokens": ("content_tokens_per_example", "patches_per_ex", "n_patches_per_img"),
    "width": ("d_model", "d_vit"),
    "n_examples": ("n_examples", "n_ex", "n_imgs"),
    "shard_budget": ("max_tokens_per_shard", "patches_per_shard", "max_patches_per_shard"),
}
"""Our word -> what the protocols have called it, newest first."""


@dataclass(frozen=True, slots=True)
class _Metadata:
    family: str
    ckpt: str
    layers: tuple[int, ...]
    tokens: int
    has_cls: bool
    width: int
    n_examples: int
    examples_per_shard: int

    @property
    def example_bytes(self) -> int:
        return len(self.layers) * self.tokens * self.width * _FLOAT32.itemsize


def open_saev(path: Path, *, layer_of: Mapping[str, int], hook: str | None) -> RawSource:
    """A source of one saev shards folder: an example is a sequence, and a document.

    Args:
        path: the folder with metadata.json and shards.json.
        layer_of: layer as metadata.json has it -> layer, for those counted from the end (-2).
        hook: where the rows come from; resid_post, which saev records, where left out.

    Raises:
        CorpusError: an unknown protocol, a shard cut short, or fewer examples than metadata.json says; named.
        NotFoundError: a file is missing.
    """
    meta = _metadata(path / METADATA)
    shards = _shards(path, meta)
    names = {str(layer): layer for layer in meta.layers}
    layers = layers_of(names, layer_of, path, "3") if layer_of or min(meta.layers) < 0 else names
    check_unique(layers, path)
    item = meta.tokens * meta.width * _FLOAT32.itemsize
    acts = {
        layer: RawArray(
            [
                Piece(
                    path=file,
                    offset=meta.layers.index(int(name)) * item,
                    stride=meta.example_bytes,
                    n_sequences=n,
                )
                for file, n in shards
            ],
            (meta.tokens, meta.width),
            _FLOAT32,
        )
        for name, layer in layers.items()
    }
    facts = Facts(
        format="saev",
        name=path.name,
        files=relative_files(path, [path / METADATA, path / SHARDS, *(file for file, n in shards if n)]),
        hook=hook or "resid_post",
        layers=tuple(sorted(layers.values())),
        n_sequences=meta.n_examples,
        seq_len=meta.tokens,
        width=meta.width,
        dtype="float32",
        has_tokens=False,
        document=None,
        exclude_first=min(int(meta.has_cls), meta.tokens - 1),
        model=meta.ckpt,
        family=meta.family,
        layout={"layers": dict(sorted(layers.items()))},
    )
    return RawSource(facts, acts, None)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing: not a folder of saev shards") from error
    except ValueError as error:
        raise CorpusError(f"{path} is not JSON: {error}") from error


def _metadata(path: Path) -> _Metadata:
    found = _json(path)
    if not isinstance(found, dict) or found.get("protocol") not in PROTOCOLS:
        protocol = found.get("protocol") if isinstance(found, dict) else None
        raise CorpusError(
            f"{path}: protocol {protocol!r} is not supported; those that are: {', '.join(PROTOCOLS)}"
        )
    if found.get("dtype") != "float32":
        raise CorpusError(
            f"{path}: dtype {found.get('dtype')!r} is not supported; saev's protocols know float32"
        )

    def field(word: str, kind: type) -> Any:
        for name in _NAMES.get(word, (word,)):
            if isinstance(found.get(name), kind):
                return found[name]
        raise CorpusError(f"{path} has no {kind.__name__} named {' or '.join(_NAMES.get(word, (word,)))}")

    layers = field("layers", list)
    if not layers or not all(isinstance(layer, int) for layer in layers):
        raise CorpusError(f"{path}: layers {layers}; expected a list of numbers")
    has_cls = bool(field("cls_token", bool))
    tokens = field("content_tokens", int) + has_cls
    if min(tokens, field("width", int), field("n_examples", int)) < 1:
        raise CorpusError(f"{path} describes no activations: {tokens} tokens, width {field('width', int)}")
    return _Metadata(
        family=field("family", str),
        ckpt=field("ckpt", str),
        layers=tuple(layers),
        tokens=tokens,
        has_cls=has_cls,
        width=field("width", int),
        n_examples=field("n_examples", int),
        examples_per_shard=field("shard_budget", int) // (tokens * len(layers)),
    )


def _shards(path: Path, meta: _Metadata) -> list[tuple[Path, int]]:
    """Every shard file and how many examples it holds; checked against the sizes on disk and the metadata."""
    listed = _json(path / SHARDS)
    try:
        entries = [
            (str(entry["name"]), int(next(entry[name] for name in _NAMES["n_examples"] if name in entry)))
            for entry in listed
        ]
    except (KeyError, TypeError, StopIteration) as error:
        raise CorpusError(f"{path / SHARDS} is not a list of shards with their names and examples") from error
    for name, n in entries:
        file = path / name
        if name != Path(name).name or n < 0:
            raise CorpusError(f"{path / SHARDS} has a shard {name!r} of {n} examples")
        if n and not file.is_file():
            raise NotFoundError(f"{file} is missing; {path / SHARDS} says that it holds {n} examples")
        allowed = {n * meta.example_bytes, meta.examples_per_shard * meta.example_bytes}
        if n and (file.stat().st_size not in allowed or file.stat().st_size < n * meta.example_bytes):
            raise CorpusError(
                f"{file} has {file.stat().st_size:,} bytes; {n} examples take {n * meta.example_bytes:,}, a full shard "
                f"{meta.examples_per_shard * meta.example_bytes:,}"
            )
    total = sum(n for _name, n in entries)
    if total != meta.n_examples:
        raise CorpusError(
            f"{path / SHARDS} counts {total} examples and {path / METADATA} {meta.n_examples}: recording was interrupted"
        )
    return [(path / name, n) for name, n in entries]
