"""safetensors: one tensor per layer, [sequence, position, width] or [row, width]; optionally `tokens` and `document`.

A tensor that occurs in several files of a folder (part-0.safetensors, part-1.safetensors, ...) is laid end to end, in
the order of the file names. A file: 8 bytes of header length, the header (JSON), then the numbers, little endian.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from actcache.errors import CorpusError
from actcache.producer.importing.raw import Piece, RawArray
from actcache.producer.importing.source import (
    SOURCE_DTYPES,
    Facts,
    RawSource,
    as_documents,
    check_alike,
    check_unique,
    layers_of,
    natural,
    relative_files,
    sequence_shape,
)

TOKENS, DOCUMENT = "tokens", "document"
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "|u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}


@dataclass(frozen=True, slots=True)
class _Tensor:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def open_safetensors(path: Path, *, layer_of: Mapping[str, int], hook: str | None) -> RawSource:
    """A source of one `.safetensors` file or of a folder of them.

    Args:
        path: a file or a folder.
        layer_of: tensor name -> layer, where the names do not say it.
        hook: where the rows come from; resid_post where left out.

    Raises:
        CorpusError: a file is damaged or cut short, or tensors do not fit together; the file is named.
        UsageError: a tensor's name says no layer. NotFoundError: no tensor at all.
    """
    files = (
        [path] if path.is_file() else sorted(path.glob("*.safetensors"), key=lambda file: natural(file.name))
    )
    tensors: dict[str, list[_Tensor]] = {}
    for file in files:
        for name, tensor in _tensors(file).items():
            tensors.setdefault(name, []).append(tensor)
    layers = layers_of(tensors.keys() - {TOKENS, DOCUMENT}, layer_of, path, "layer_3")
    check_unique(layers, path)
    shapes = {
        f"{name} in {t.path}": sequence_shape(t.shape, f"{t.path}: {name}")[1:]
        for name in layers
        for t in tensors[name]
    }
    t, d = check_alike(shapes, "shape [position, width]")
    dtype = check_alike(
        {f"{name} in {x.path}": _logical(name, x) for name in layers for x in tensors[name]}, "dtype"
    )
    acts = {layer: _raw(tensors[name], (t, d), SOURCE_DTYPES[dtype]) for name, layer in layers.items()}
    q = check_alike({f"{path}: {name}": len(acts[layer]) for name, layer in layers.items()}, "sequences")
    ids, document = None, None
    if TOKENS in tensors:
        ids = _raw(tensors[TOKENS], (t,), _integers(TOKENS, tensors[TOKENS], (t,)))
        check_alike({f"{path}: {next(iter(layers))}": q, f"{path}: {TOKENS}": len(ids)}, "sequences")
    if DOCUMENT in tensors:
        numbers = _raw(tensors[DOCUMENT], (), _integers(DOCUMENT, tensors[DOCUMENT], ()))
        document = as_documents(numbers.read(np.arange(len(numbers))), q, f"{path}: {DOCUMENT}")
    used = [x.path for name in (*layers, TOKENS, DOCUMENT) for x in tensors.get(name, [])]
    facts = Facts(
        format="safetensors",
        name=path.name,
        files=relative_files(path, used),
        hook=hook or "resid_post",
        layers=tuple(sorted(layers.values())),
        n_sequences=q,
        seq_len=t,
        width=d,
        dtype=dtype,
        has_tokens=ids is not None,
        document=document,
        exclude_first=min(1, t - 1),
        model=None,
        family=None,
        layout={"layers": dict(sorted(layers.items()))},
    )
    return RawSource(facts, acts, ids)


def _tensors(path: Path) -> dict[str, _Tensor]:
    """Where every tensor of a file lies. The library checks the header, and that it covers the file exactly."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(n_header))
    except (SafetensorError, OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read as safetensors: {error}") from error
    return {
        name: _Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + n_header + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _logical(name: str, tensor: _Tensor) -> str:
    if tensor.dtype not in _FLOATS:
        raise CorpusError(f"{tensor.path}: {name} is {tensor.dtype}; expected one of {', '.join(_FLOATS)}")
    return _FLOATS[tensor.dtype]


def _integers(name: str, tensors: list[_Tensor], shape: tuple[int, ...]) -> np.dtype[Any]:
    """The dtype of a tensor of token ids or documents; CorpusError where it is none."""
    for x in tensors:
        tail = x.shape[1:]
        if (
            x.dtype not in _INTEGERS
            or len(x.shape) < 1
            or not (tail == shape or (shape == (1,) and tail == ()))
        ):
            raise CorpusError(
                f"{x.path}: {name} is {x.dtype} {list(x.shape)}; expected integers {['sequence', *shape]}"
            )
    return np.dtype(_INTEGERS[check_alike({str(x.path): x.dtype for x in tensors}, f"{name} of dtype")])


def _raw(tensors: list[_Tensor], shape: tuple[int, ...], dtype: np.dtype[Any]) -> RawArray:
    stride = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    pieces = [Piece(path=x.path, offset=x.offset, stride=stride, n_sequences=x.shape[0]) for x in tensors]
    return RawArray(pieces, shape, dtype)
