"""Every array of a store: its shape, chunks, dtype and codec, in one table.

`plan_arrays` and `capture_arrays` are the whole layout. From an `ArraySpec` come the Zarr metadata (written by
zarr-python itself), the key of each object, and the object's bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from actcache.store.codec import CRC_BYTES, Codec, crc32c, with_trailer
from actcache.store.dtypes import disk_dtype, row_fill
from actcache.store.quantise import EXACT
from actcache.store.schema import LEDGER_GENERATIONS, Capture, Grid

NO_DOCUMENT = 0xFFFFFFFF
"""Document, sequence and position of padding."""
SHARDS_PER_RECORD_OBJECT = 4096

MOMENTS = ("mean", "sum_squared_deviations", "min", "max")
TOTALS = ("n_rows", "norm_sum", "norm_sum_squares", "norm_max", "n_non_finite")
ERRORS = ("n_rows", "mean", "sum_squared_deviations", "sum_squared_errors")


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One Zarr array: `chunk` is the shape of an object; `inner` that of the chunks inside a sharded one."""

    path: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: np.dtype[Any] | None  # None: strings
    fill: Any
    codec_name: str = "zstd"
    inner: tuple[int, ...] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def codec(self) -> Codec:
        """The codec of one chunk (of one inner chunk where sharded)."""
        assert self.dtype is not None
        return Codec(self.codec_name, self.dtype, math.prod(self.inner or self.chunk))

    def key(self, *chunk: int, generation: int = 0) -> str:
        """Key of the object that holds chunk number `chunk`; of a shard that was rebuilt, in that generation."""
        prefix = f"g{generation}" if generation else "c"
        return f"{self.path}/{prefix}.{'.'.join(str(i) for i in chunk)}"

    def encode(self, values: NDArray[Any]) -> bytes:
        """The bytes of one unsharded object; a short edge is padded with the fill value."""
        if values.shape != self.chunk:
            whole = np.full(self.chunk, self.fill, dtype=self.dtype)
            whole[tuple(slice(0, n) for n in values.shape)] = values
            values = whole
        return with_trailer(*self.codec.encode(values))

    def decode(self, data: bytes) -> NDArray[Any]:
        """The numbers of one unsharded object, shape `chunk`; ValueError says what is wrong."""
        body = memoryview(data)[:-CRC_BYTES]
        if len(data) <= CRC_BYTES or crc32c(body) != int.from_bytes(data[-CRC_BYTES:], "little"):
            raise ValueError("its crc32c does not match its bytes")
        out = np.empty(self.chunk, dtype=self.dtype)
        problem = self.codec.decode_into(body, out)
        if problem:
            raise ValueError(problem)
        return out


def checksum(data: bytes) -> tuple[int, int]:
    """Bytes and crc32c of an object of numbers, as the plan and the ledger hold them.

    The crc32c is over all but the object's own trailer: over both it would be one and the same number for every
    object, and objects of equal length could change places unnoticed.
    """
    return len(data), crc32c(memoryview(data)[:-CRC_BYTES])


def encode_strings(texts: Sequence[str]) -> bytes:
    """The bytes of an object of a Zarr `string` array (vlen-utf8)."""
    return bytes(numcodecs.VLenUTF8().encode(np.array(list(texts), dtype=object)))


def decode_strings(data: bytes) -> list[str]:
    """The strings of an object; ValueError where the bytes are not such an object."""
    n_strings = int.from_bytes(data[:4], "little")
    if len(data) < 4 + 4 * n_strings or not data:  # before anything of that many items is made
        raise ValueError(f"{len(data)} bytes cannot be an object of {n_strings} strings")
    try:
        texts = [str(text) for text in numcodecs.VLenUTF8().decode(data)]
    except (UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    if encode_strings(texts) != data:
        raise ValueError("its bytes are not those of the strings in it")
    return texts


def plan_arrays(grid: Grid) -> dict[str, ArraySpec]:
    """The arrays every capture shares, one object per shard (the last: one per 4,096 shards)."""
    u4, per_sequence = np.dtype("<u4"), (grid.n_sequences, grid.seq_len)
    sequences, dims = (grid.sequences_per_shard, grid.seq_len), ("sequence", "position")
    rows, per_shard = (grid.n_rows,), (grid.rows_per_shard,)
    shards = (grid.n_shards,)
    return {
        "tokens": ArraySpec("tokens", per_sequence, sequences, dims, u4, 0),
        "document": ArraySpec("document", per_sequence, sequences, dims, u4, NO_DOCUMENT),
        "keep": ArraySpec("keep", per_sequence, sequences, dims, np.dtype(np.bool_), fill=False),
        "row_sequence": ArraySpec("row_sequence", rows, per_shard, ("row",), u4, NO_DOCUMENT),
        "row_position": ArraySpec("row_position", rows, per_shard, ("row",), u4, NO_DOCUMENT),
        "shards": ArraySpec("shards", shards, (SHARDS_PER_RECORD_OBJECT,), ("shard",), None, ""),
        "retired": ArraySpec("retired", shards, (1,), ("shard",), None, ""),
    }


PER_SHARD_PLAN_ARRAYS = ("tokens", "document", "keep", "row_sequence", "row_position")


def capture_arrays(grid: Grid, capture: Capture) -> dict[str, ArraySpec]:
    """The arrays of one capture: the rows, and what is small beside them."""
    root, n_layers, width = f"acts/{capture.name}", len(capture.layers), capture.width
    f8, n_shards = np.dtype("<f8"), grid.n_shards
    rows = ArraySpec(
        f"{root}/rows",
        (n_layers, grid.n_rows, width),
        (n_layers, grid.rows_per_shard, width),
        ("layer", "row", "width"),
        disk_dtype(capture.dtype),
        row_fill(capture.dtype),
        capture.codec,
        inner=(1, grid.rows_per_chunk, width),
        attributes={"actcache": {"dtype": capture.dtype}},
    )
    quantised: dict[str, ArraySpec] = {}
    if is_quantised(capture):
        attributes = {"actcache": {"dtype": capture.dtype, "codec": capture.codec}}
        exact = replace(rows, path=f"{root}/exact", codec_name="zstd")
        rows = replace(rows, dtype=np.dtype("u1"), fill=EXACT, codec_name="none", attributes=attributes)
        quantised = {"exact": exact, **_scale_arrays(root, grid, capture)}
    return {
        "rows": rows,
        "norm": ArraySpec(
            f"{root}/norm",
            (n_layers, grid.n_rows),
            (n_layers, grid.rows_per_shard),
            ("layer", "row"),
            np.dtype("<f4"),
            float("nan"),
        ),
        "moments": ArraySpec(
            f"{root}/moments",
            (n_shards, n_layers, len(MOMENTS), width),
            (1, n_layers, len(MOMENTS), width),
            ("shard", "layer", "moment", "width"),
            f8,
            float("nan"),
            attributes={"actcache": {"moments": list(MOMENTS)}},
        ),
        "totals": ArraySpec(
            f"{root}/totals",
            (n_shards, n_layers, len(TOTALS)),
            (1, n_layers, len(TOTALS)),
            ("shard", "layer", "total"),
            f8,
            float("nan"),
            attributes={"actcache": {"totals": list(TOTALS)}},
        ),
        "layer": ArraySpec(
            f"{root}/layer", (n_layers,), (n_layers,), ("layer",), np.dtype("<u4"), NO_DOCUMENT
        ),
        "ledger": ArraySpec(
            f"{root}/ledger", (LEDGER_GENERATIONS, n_shards), (1, 1), ("generation", "shard"), None, ""
        ),
        **quantised,
    }


def _scale_arrays(root: str, grid: Grid, capture: Capture) -> dict[str, ArraySpec]:
    n_layers, width, n_chunks = len(capture.layers), capture.width, grid.chunks_per_shard
    scales = {
        name: ArraySpec(
            f"{root}/{name}",
            (n_layers, grid.n_shards * n_chunks, width),
            (n_layers, n_chunks, width),
            ("layer", "chunk", "width"),
            np.dtype("<f4"),
            float("nan"),
        )
        for name in ("scale", "offset")
    }
    error = ArraySpec(
        f"{root}/error",
        (grid.n_shards, n_layers, len(ERRORS), width),
        (1, n_layers, len(ERRORS), width),
        ("shard", "layer", "error", "width"),
        np.dtype("<f8"),
        float("nan"),
        attributes={"actcache": {"error": list(ERRORS)}},
    )
    return {**scales, "error": error}


def is_quantised(capture: Capture) -> bool:
    """Whether the rows are codes, to be read with scales and exact rows."""
    return capture.codec == "uint8"


_SIDE_ARRAYS = ("norm", "moments", "totals")
_QUANTISED_SIDE_ARRAYS = (*_SIDE_ARRAYS, "scale", "offset", "exact", "error")


def side_arrays(capture: Capture) -> tuple[str, ...]:
    """The arrays of a capture with one object per shard that the ledger covers beside the rows."""
    return _QUANTISED_SIDE_ARRAYS if is_quantised(capture) else _SIDE_ARRAYS


def side_key(spec: ArraySpec, shard: int, generation: int = 0) -> str:
    """Key of one shard's object in the rows or in a side array."""
    at = 1 if spec.dims[0] == "layer" else 0
    return spec.key(*(shard if axis == at else 0 for axis in range(len(spec.shape))), generation=generation)
