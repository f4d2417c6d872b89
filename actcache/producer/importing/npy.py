"""`.npy`: one file per layer, [sequence, position, width] or [row, width]; beside them `tokens.npy` and `document.npy`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import CorpusError, NotFoundError
from actcache.producer.importing.raw import Piece, RawArray
from actcache.producer.importing.source import (
    SOURCE_DTYPES,
    Facts,
    RawSource,
    as_documents,
    check_alike,
    check_unique,
    layers_of,
    relative_files,
    sequence_shape,
)

TOKENS, DOCUMENT = "tokens.npy", "document.npy"
_BITS = ("uint16", "void16")  # numpy writes ml_dtypes.bfloat16 as two void bytes


@dataclass(frozen=True, slots=True)
class _Header:
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int


def open_npy(path: Path, *, layer_of: Mapping[str, int], hook: str | None, bfloat16_bits: bool) -> RawSource:
    """A source of one `.npy` file or of a folder of them.

    Args:
        path: a file, or a folder with one file per layer, such as layer_3.npy.
        layer_of: file name -> layer, where the names do not say it.
        hook: where the rows come from; resid_post where left out.
        bfloat16_bits: files of uint16 (or of two void bytes) are the bits of bfloat16.

    Raises:
        CorpusError: a file is not an array of the right shape and dtype, or is cut short; it is named.
        UsageError: a name that says no layer. NotFoundError: no file at all.
    """
    found = {path.name: path} if path.is_file() else {file.name: file for file in path.glob("*.npy")}
    beside = path if path.is_dir() else path.parent
    acts = {name: file for name, file in found.items() if name not in (TOKENS, DOCUMENT)}
    layers = layers_of(acts, layer_of, path, "layer_3.npy")
    check_unique(layers, path)
    headers = {name: _header(acts[name]) for name in layers}
    shapes = {name: sequence_shape(header.shape, str(header.path)) for name, header in headers.items()}
    q, t, d = check_alike(shapes, "shape [sequence, position, width]")
    dtype = check_alike({n: _logical(h, bfloat16_bits=bfloat16_bits) for n, h in headers.items()}, "dtype")
    extra = {name: beside / name for name in (TOKENS, DOCUMENT) if (beside / name).is_file()}
    ids = _ids(extra.get(TOKENS), (q, t))
    document = None
    if DOCUMENT in extra:
        _header(extra[DOCUMENT])  # a sound file, or an error that names it
        document = as_documents(np.load(extra[DOCUMENT], allow_pickle=False), q, str(extra[DOCUMENT]))
    facts = Facts(
        format="npy",
        name=path.name,
        files=relative_files(path, [*(headers[name].path for name in layers), *extra.values()]),
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
    arrays = {layer: _raw(headers[name], (t, d), SOURCE_DTYPES[dtype]) for name, layer in layers.items()}
    return RawSource(facts, arrays, ids)


def _header(path: Path) -> _Header:
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing") from error
    except (ValueError, OSError) as error:
        raise CorpusError(f"{path} cannot be read as an .npy array: {error}") from error
    end = mapped.offset + mapped.nbytes
    if path.stat().st_size != end:
        raise CorpusError(f"{path} holds {path.stat().st_size:,} bytes where its one array ends at {end:,}")
    if not mapped.flags.c_contiguous:
        raise CorpusError(f"{path} is in Fortran order; save it again with numpy.ascontiguousarray")
    return _Header(path, mapped.shape, mapped.dtype, mapped.offset)


def _logical(header: _Header, *, bfloat16_bits: bool) -> str:
    name = header.dtype.name
    if name in _BITS:
        if not bfloat16_bits:
            raise CorpusError(
                f"{header.path} holds {name}, which may be the bits of bfloat16 or anything else; give --bfloat16-bits if "
                f"they are"
            )
        return "bfloat16"
    if header.dtype.kind != "f" or SOURCE_DTYPES.get(name) != header.dtype:
        raise CorpusError(
            f"{header.path} holds {header.dtype.str} ({name}); expected little-endian float16, float32, float64, or bfloat16 "
            f"as uint16"
        )
    return name


def _raw(header: _Header, shape: tuple[int, ...], dtype: np.dtype[Any]) -> RawArray:
    stride = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    piece = Piece(path=header.path, offset=header.offset, stride=stride, n_sequences=header.shape[0])
    return RawArray([piece], shape, dtype)


def _ids(path: Path | None, shape: tuple[int, int]) -> RawArray | None:
    if path is None:
        return None
    header = _header(path)
    allowed = {shape, shape[:1]} if shape[1] == 1 else {shape}
    if header.shape not in allowed or header.dtype.kind not in "iu":
        raise CorpusError(
            f"{path} is {header.dtype} {list(header.shape)}; expected integers {list(shape)}, one token id for every position"
        )
    return _raw(header, shape[1:], header.dtype)
