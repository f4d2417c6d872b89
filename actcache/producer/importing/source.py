"""What a source of activations is: its facts, known before anything is read, and reads of a bounded size.

Axes: q sequences, t positions, d width.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorpusError, NotFoundError, UsageError
from actcache.producer.importing.raw import RawArray
from actcache.store.schema import digest_of

SOURCE_DTYPES = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}
"""Logical dtype of a source -> the dtype its numbers are read as; bfloat16 is its bits."""
MOST_SEQUENCES = 0xFFFFFFFF - 1
_HASH_BYTES = 1 << 20
TOKENS_AT_A_TIME = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a source; `name` is what it is called in the plan: relative, with forward slashes."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything about a source that is known before its activations are read.

    format         "npy", "safetensors", "saelens" or "saev".
    name           what the source is called in the plan: the name of its file or folder.
    files          every file that is read.
    hook, layers   the hook the rows come from, and the model's layer numbers, ascending.
    n_sequences, seq_len, width  q, t and d; rows without sequences have t = 1.
    dtype          a key of `SOURCE_DTYPES`.
    has_tokens     whether token ids are known.
    document       [q] uint32, the document of each sequence; None: every sequence is one of its own.
    exclude_first  positions at the start of a sequence that are not trained on unless asked for otherwise.
    model, family  what the source says of the model; None where it says nothing.
    layout         JSON: what decides how the bytes of `files` are understood. Part of the source's digest.
    """

    format: str
    name: str
    files: tuple[SourceFile, ...]
    hook: str
    layers: tuple[int, ...]
    n_sequences: int
    seq_len: int
    width: int
    dtype: str
    has_tokens: bool
    document: NDArray[np.uint32] | None
    exclude_first: int
    model: str | None
    family: str | None
    layout: dict[str, Any]

    def __post_init__(self) -> None:
        shape = (self.n_sequences, self.seq_len, self.width)
        if min(shape) < 1 or not self.layers:
            raise CorpusError(
                f"{self.name} holds no activations: {list(shape)} for layers {list(self.layers)}"
            )
        if self.n_sequences > MOST_SEQUENCES:
            raise CorpusError(
                f"{self.name} holds {self.n_sequences:,} sequences; a store takes {MOST_SEQUENCES:,}"
            )

    @property
    def n_bytes_per_sequence(self) -> int:
        """Bytes of one sequence of one layer, as they are in the source."""
        return self.seq_len * self.width * SOURCE_DTYPES[self.dtype].itemsize


class Source(Protocol):
    """Activations of some layers. `sequences` is always [n] int64, ascending and distinct."""

    @property
    def facts(self) -> Facts:
        """What is known without reading activations."""
        ...

    def read(self, layer: int, sequences: NDArray[np.int64]) -> NDArray[Any]:
        """Activations [n, t, d] of some sequences, in the dtype of `facts.dtype`; memory is that of the result."""
        ...

    def tokens(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids [n, t] of some sequences; only where `facts.has_tokens`."""
        ...

    def locate(self, layer: int, sequence: int) -> str:
        """The file that holds a sequence of a layer, for messages."""
        ...


class RawSource:
    """A source whose numbers lie in its files as they are.

    facts    of it.
    arrays   layer -> [q, t, d].
    ids      [q, t] integers, or None where tokens are unknown.
    """

    def __init__(self, facts: Facts, acts: Mapping[int, RawArray], ids: RawArray | None) -> None:
        self.facts, self.arrays, self.ids = facts, acts, ids

    def read(self, layer: int, sequences: NDArray[np.int64]) -> NDArray[Any]:
        """Activations [n, t, d] of some sequences."""
        return self.arrays[layer].read(sequences)

    def tokens(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids [n, t] of some sequences. CorpusError where a store cannot hold them."""
        assert self.ids is not None
        ids = self.ids.read(sequences)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > MOST_SEQUENCES:
            bad = int(sequences[np.flatnonzero((ids < 0).any(1) | (ids > MOST_SEQUENCES).any(1))[0]])
            raise CorpusError(
                f"{self.ids.locate(bad)}: sequence {bad} holds token id {low if low < 0 else high}; expected 0 to "
                f"{MOST_SEQUENCES}"
            )
        return ids.astype(np.int64)

    def locate(self, layer: int, sequence: int) -> str:
        """The file that holds a sequence of a layer."""
        return str(self.arrays[layer].locate(sequence))


def merged(root: Path, sources: Mapping[Path, RawSource]) -> RawSource:
    """One source of the layers of several, which must be of the same sequences.

    Raises:
        CorpusError: their shapes, dtypes, hooks or tokens differ, or two hold the same layer; both are named.
    """
    facts = {str(path): source.facts for path, source in sources.items()}
    for what in ("hook", "n_sequences", "seq_len", "width", "dtype", "has_tokens"):
        check_alike({name: getattr(f, what) for name, f in facts.items()}, what)
    check_unique({f"{name} (layer {layer})": layer for name, f in facts.items() for layer in f.layers}, root)
    first = next(iter(facts.values()))
    files = relative_files(root, [file.path for f in facts.values() for file in f.files])
    together = replace(
        first,
        name=root.name,
        files=files,
        layers=tuple(sorted(layer for f in facts.values() for layer in f.layers)),
        layout={"sources": {path.name: source.facts.layout for path, source in sources.items()}},
    )
    if together.has_tokens:
        _check_tokens(sources, together)
    acts = {layer: array for source in sources.values() for layer, array in source.arrays.items()}
    return RawSource(together, acts, next(iter(sources.values())).ids)


def _check_tokens(sources: Mapping[Path, RawSource], facts: Facts) -> None:
    step = max(1, TOKENS_AT_A_TIME // facts.seq_len)
    for start in range(0, facts.n_sequences, step):
        sequences = np.arange(start, min(start + step, facts.n_sequences))
        (first, ids), *others = ((path, source.tokens(sequences)) for path, source in sources.items())
        for path, there in others:
            if not np.array_equal(ids, there):
                bad = int(sequences[np.flatnonzero((ids != there).any(1))[0]])
                raise CorpusError(
                    f"sequence {bad} has other tokens in {path} than in {first}: not caches of one text"
                )


class Fingerprint:
    """The identity of a source's content, and whether its files are still what they were.

    digest  SHA-256 over `facts.layout` and every file's name, size and SHA-256.
    sizes   (name, bytes) of every file.
    """

    def __init__(
        self, facts: Facts, on_bytes: Callable[[int, int], None] = lambda _done, _total: None
    ) -> None:
        self._files = {file.path: _state(file.path) for file in facts.files}
        self.sizes = tuple((file.name, self._files[file.path][0]) for file in facts.files)
        done, total = 0, sum(size for size, _time in self._files.values())
        hashes = []
        for file in facts.files:
            digest = hashlib.sha256()
            with file.path.open("rb", buffering=0) as content:
                while part := content.read(_HASH_BYTES):
                    digest.update(part)
                    done += len(part)
                    on_bytes(done, total)
            hashes.append([file.name, self._files[file.path][0], digest.hexdigest()])
        self.check()
        layout = {**facts.layout, "format": facts.format, "dtype": facts.dtype, "hook": facts.hook}
        self.digest = digest_of({"layout": layout, "files": hashes})

    def check(self) -> None:
        """CorpusError naming the first file that is no longer what it was."""
        for path, before in self._files.items():
            if _state(path) != before:
                raise CorpusError(
                    f"{path} changed while it was imported. What is committed is of the old content: wait until the file "
                    f"is finished, remove the store and import again."
                )


def _state(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing") from error
    return stat.st_size, stat.st_mtime_ns


# What the format modules share.

_LAYER = re.compile(r"(?:^|[^a-z])(?:layers?|blocks?|h)[._/-]?(\d+)(?!\d)", re.IGNORECASE)


def layer_in(name: str) -> int | None:
    """The layer number in a name such as layer_3.npy, blocks.3.hook_resid_post, model.layers.3 or 3, or None."""
    if (plain := name.removesuffix(".npy")).isdigit():
        return int(plain)
    found = {int(number) for number in _LAYER.findall(name)}
    return found.pop() if len(found) == 1 else None


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts part-10 after part-2."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def layers_of(names: Iterable[str], layer_of: Mapping[str, int], where: Path, example: str) -> dict[str, int]:
    """Name -> layer, from `layer_of` where it is given (names not in it are left out), else from the names themselves.

    Raises:
        UsageError: `layer_of` has a name that is not there, or a name has no layer in it.
        NotFoundError: there are no names at all.
    """
    there = sorted(names, key=natural)
    if not there:
        raise NotFoundError(f"{where} holds no activations: expected something like {example}")
    unknown = sorted(set(layer_of) - set(there))
    if unknown:
        raise UsageError(f"{where} has no {', '.join(unknown)}; it has {', '.join(there)}")
    if any(layer < 0 for layer in layer_of.values()):
        raise UsageError(f"layers {dict(layer_of)}: expected numbers from 0")
    found = dict(layer_of) or {name: layer_in(name.rsplit("/", 1)[-1]) for name in there}
    nameless = [name for name, layer in found.items() if layer is None]
    if nameless:
        raise UsageError(
            f"{where}: no layer number in {', '.join(nameless)}; expected a name like {example}, or say which layer it is "
            f"with --layer-of {nameless[0]}=N"
        )
    return {name: layer for name, layer in found.items() if layer is not None}


def sequence_shape(shape: Sequence[int], where: str) -> tuple[int, int, int]:
    """(q, t, d) of an array [q, t, d], or of rows [n, d] as n sequences of one position."""
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    if len(shape) == 2:
        return (shape[0], 1, shape[1])
    raise CorpusError(
        f"{where} has shape {list(shape)}; expected [sequence, position, width] or [row, width]"
    )


def check_alike(found: Mapping[str, Any], what: str) -> Any:
    """The one value that all have. CorpusError naming two that differ."""
    (first, value), *others = found.items()
    for name, other in others:
        if other != value:
            raise CorpusError(f"{name} has {what} {other}, but {first} has {value}; expected the same")
    return value


def check_unique(layers: Mapping[str, int], where: Path) -> None:
    """CorpusError where two names are of one layer."""
    names: dict[int, str] = {}
    for name, layer in layers.items():
        if layer in names:
            raise CorpusError(
                f"{where}: {names[layer]} and {name} are both layer {layer}; choose with --layer-of"
            )
        names[layer] = name


def as_documents(numbers: NDArray[Any], n_sequences: int, where: str) -> NDArray[np.uint32]:
    """[q] uint32 documents. CorpusError where they are not one number below 2**32 - 1 per sequence."""
    if numbers.shape != (n_sequences,) or numbers.dtype.kind not in "iu":
        raise CorpusError(
            f"{where} is {numbers.dtype} {list(numbers.shape)}; expected one integer for each of {n_sequences} sequences"
        )
    if int(numbers.min()) < 0 or int(numbers.max()) > MOST_SEQUENCES:
        raise CorpusError(f"{where} holds numbers outside 0 to {MOST_SEQUENCES}")
    return numbers.astype(np.uint32)


def relative_files(root: Path, paths: Iterable[Path]) -> tuple[SourceFile, ...]:
    """Files under their names inside `root` (or beside it, where the source is one file), in order of their names."""
    base = root if root.is_dir() else root.parent
    names = {os.path.relpath(path, base).replace(os.sep, "/"): path for path in paths}
    return tuple(SourceFile(name=name, path=names[name]) for name in sorted(names))
