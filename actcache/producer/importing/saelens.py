"""SAELens' cached activations: a Hugging Face `datasets` folder of Arrow streams, one hook per cache.

A folder of such caches, made of the same text with one layer each, is one source of all their layers.

    state.json           _data_files: the names of the Arrow files, in order
    dataset_info.json    features: <hook name> = Array2D(shape (t, d), dtype), token_ids = Sequence(int32, t)
    data-00000-of-00002.arrow ...

A column of Array2D is stored as a list of lists; `datasets` itself is not needed. The Arrow library finds the batches
and checks them once; afterwards their numbers are read from the file as they lie there.
Source: sae_lens/cache_activations_runner.py, datasets/features/features.py.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actcache.errors import CorpusError, NotFoundError, UsageError
from actcache.producer.importing.raw import Piece, RawArray
from actcache.producer.importing.source import (
    SOURCE_DTYPES,
    Facts,
    RawSource,
    check_alike,
    check_unique,
    layers_of,
    merged,
    natural,
    relative_files,
)

STATE, INFO, TOKENS = "state.json", "dataset_info.json", "token_ids"
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_VALUES = {"halffloat": "float16", "float": "float32", "double": "float64"}
_INTEGERS = ("int32", "int64", "uint32", "uint16", "int16", "uint8")
_HOOKS = (
    (re.compile(r"hook_resid_post$"), "resid_post"),
    (re.compile(r"hook_resid_pre$"), "resid_pre"),
    (re.compile(r"(hook_mlp_in|ln2\.hook_normalized)$"), "mlp_in"),
    (re.compile(r"hook_mlp_out$"), "mlp_out"),
    (re.compile(r"hook_attn_out$"), "attn_out"),
)
"""TransformerLens hook name -> hook here."""


@dataclass(slots=True)
class _Column:
    """One column over all files: its dtype, and where its numbers lie."""

    shape: tuple[int, ...]
    dtypes: dict[str, str] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)

    def array(self) -> RawArray:
        """[q, *shape]."""
        name = check_alike(self.dtypes, "dtype")
        return RawArray(self.pieces, self.shape, np.dtype(SOURCE_DTYPES.get(name, name)))


def open_saelens(path: Path, *, layer_of: Mapping[str, int], hook: str | None) -> RawSource:
    """A source of one SAELens cache folder, or of a folder of them with one layer each.

    Args:
        path: `new_cached_activations_path` of the runner, or the folder that several of those are in.
        layer_of: column -> layer, where the hook's name does not say it.
        hook: where the rows come from; told from the hook's name where it is one of TransformerLens'.

    Raises:
        CorpusError: a file is damaged, cut short, ragged or does not fit the others; it is named.
        NotFoundError: a file that the folder's own list names is missing.
        UsageError: the hook or its layer cannot be told from the column's name.
    """
    inside = sorted(
        {file.parent for file in path.glob(f"*/{STATE}")}, key=lambda folder: natural(folder.name)
    )
    if (path / STATE).exists() or not inside:
        return _open_cache(path, layer_of, hook)
    columns = {folder: _shapes(folder) for folder in inside}
    unknown = set(layer_of) - {name for shapes in columns.values() for name in shapes}
    if unknown:
        raise UsageError(f"no cache in {path} has a column {', '.join(sorted(unknown))}")
    chosen = {f: {n: layer_of[n] for n in shapes if n in layer_of} for f, shapes in columns.items()}
    return merged(
        path,
        {
            folder: _open_cache(folder, chosen[folder], hook)
            for folder in inside
            if chosen[folder] or not layer_of
        },
    )


def _open_cache(path: Path, layer_of: Mapping[str, int], hook: str | None) -> RawSource:
    if (path / ".tmp_shards").exists():
        raise CorpusError(
            f"{path}: caching was interrupted ({path / '.tmp_shards'} is still there); cache again"
        )
    files = _data_files(path)
    shapes = _shapes(path)
    layers = layers_of(shapes, layer_of, path, "blocks.3.hook_resid_post")
    check_unique(layers, path)
    t, d = check_alike({f"{path / INFO}: {name}": shapes[name] for name in layers}, "shape")
    columns = {name: _Column((t, d)) for name in layers} | {TOKENS: _Column((t,))}
    for file in files:
        _find_batches(file, columns)
    acts = {layer: columns[name].array() for name, layer in layers.items()}
    dtype = check_alike({name: check_alike(columns[name].dtypes, "dtype") for name in layers}, "dtype")
    ids = columns[TOKENS].array() if columns[TOKENS].pieces else None
    lengths = {name: len(acts[layer]) for name, layer in layers.items()}
    q = check_alike(lengths | ({} if ids is None else {TOKENS: len(ids)}), "sequences")
    facts = Facts(
        format="saelens",
        name=path.name,
        files=relative_files(path, [path / STATE, path / INFO, *files]),
        hook=hook or _hook(layers, path),
        layers=tuple(sorted(layers.values())),
        n_sequences=q,
        seq_len=t,
        width=d,
        dtype=dtype,
        has_tokens=ids is not None,
        document=None,
        exclude_first=min(1, t - 1),
        model=None,
        family=None,
        layout={"layers": dict(sorted(layers.items()))},
    )
    return RawSource(facts, acts, ids)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing: not a finished SAELens cache") from error
    except ValueError as error:
        raise CorpusError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CorpusError(f"{path} holds a {type(found).__name__}; expected an object")
    return found


def _data_files(path: Path) -> list[Path]:
    state = _json(path / STATE)
    if state.get("_indices_data_files"):
        raise CorpusError(
            f"{path / STATE} reorders the rows by an index file, which is not read; save it flattened"
        )
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{path / STATE} has no list of _data_files with their names") from error
    if not names or any(name != Path(name).name for name in names):
        raise CorpusError(f"{path / STATE} names the data files {names}; expected names of files beside it")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise NotFoundError(f"{path / missing[0]} is missing; {path / STATE} names {len(names)} data files")
    return [path / name for name in names]


def _shapes(path: Path) -> dict[str, tuple[int, int]]:
    """Column -> (t, d) of every Array2D."""
    features = _json(path / INFO).get("features")
    if not isinstance(features, dict):
        raise CorpusError(f"{path / INFO} has no features")
    found: dict[str, tuple[int, int]] = {}
    for name, feature in features.items():
        if isinstance(feature, dict) and feature.get("_type") == "Array2D":
            shape = feature.get("shape")
            if not (
                isinstance(shape, list)
                and len(shape) == 2
                and all(isinstance(n, int) and n > 0 for n in shape)
            ):
                raise CorpusError(f"{path / INFO}: {name} has shape {shape}; expected [context, width]")
            found[name] = (shape[0], shape[1])
    return found


def _hook(layers: Mapping[str, int], path: Path) -> str:
    found = {name: hook for name in layers for pattern, hook in _HOOKS if pattern.search(name)}
    unknown = [name for name in layers if name not in found]
    if unknown:
        raise UsageError(
            f"{path}: which hook {unknown[0]} is cannot be told from its name; say it with --hook, for example resid_post"
        )
    return str(check_alike(found, "hook"))


def _find_batches(path: Path, columns: Mapping[str, _Column]) -> None:
    """Check every batch of one file and note where its numbers lie."""
    try:
        with pa.memory_map(str(path)) as mapped:
            whole = mapped.read_buffer()
            if whole.size < 8 or whole[whole.size - 8 :].to_pybytes() != _END_OF_STREAM:
                raise CorpusError(
                    f"{path} is cut short: an Arrow stream has a mark at its end, and this has none"
                )
            with pa.ipc.open_stream(pa.BufferReader(whole)) as stream:
                lacking = [n for n in columns if n not in stream.schema.names and n != TOKENS]
                if lacking:
                    raise CorpusError(
                        f"{path} has no column {lacking[0]}; it has {', '.join(stream.schema.names)}"
                    )
                for batch in stream:
                    for name, column in columns.items():
                        if name in batch.schema.names:
                            _add(path, name, batch.column(name), column, whole)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, CorpusError | NotFoundError):
            raise
        raise CorpusError(f"{path} cannot be read as an Arrow stream: {error}") from error


def _add(path: Path, name: str, values: pa.Array, column: _Column, whole: pa.Buffer) -> None:
    """Note one batch of one column. `datasets` stores [t, d] as a list of lists."""
    n = len(values)
    for length in column.shape:
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        values = _flattened(path, name, values, length)
    leaf = str(values.type)
    if leaf not in (_INTEGERS if name == TOKENS else _VALUES):
        raise CorpusError(
            f"{path}: {name} holds {leaf}; expected {', '.join(_INTEGERS if name == TOKENS else _VALUES)}"
        )
    if values.null_count:
        raise CorpusError(f"{path}: {name} holds {values.null_count} missing numbers")
    dtype = np.dtype(SOURCE_DTYPES[_VALUES[leaf]] if leaf in _VALUES else leaf)
    if n == 0:
        return
    offset = values.buffers()[1].address - whole.address + values.offset * dtype.itemsize
    if not 0 <= offset <= whole.size - len(values) * dtype.itemsize:
        raise CorpusError(
            f"{path} is compressed; `datasets` writes its files uncompressed, and only those are read"
        )
    column.dtypes[str(path)] = _VALUES.get(leaf, leaf)
    stride = int(np.prod(column.shape, dtype=np.int64)) * dtype.itemsize
    column.pieces.append(Piece(path=path, offset=offset, stride=stride, n_sequences=n))


def _flattened(path: Path, name: str, lists: pa.Array, length: int) -> pa.Array:
    """What is in lists that must all have one length."""
    kind = lists.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise CorpusError(f"{path}: {name} is {kind} where a list of {length} was expected")
    if lists.null_count:
        raise CorpusError(f"{path}: {name} holds {lists.null_count} missing sequences or positions")
    if pa.types.is_fixed_size_list(kind):
        least = most = kind.list_size
    else:
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        least, most = lengths.min(initial=length), lengths.max(initial=length)
    if (least, most) != (length, length):
        raise CorpusError(f"{path}: {name} has lengths from {least} to {most} where {INFO} says {length}")
    return lists.flatten()
