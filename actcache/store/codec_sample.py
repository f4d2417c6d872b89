"""What each codec would make of a store's own rows: ratio, speed and error, on a sample; and which one to use.

Speeds are bytes of rows per second of CPU time on one thread, so a busy machine does not change them much. Sizes count all
that a codec puts on disk for the rows: of `uint8` also the scales and the exact rows, twice, as a store holds them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UncommittedError, UsageError
from actcache.store.arrays import is_quantised
from actcache.store.codec import CRC_BYTES, Codec
from actcache.store.dtypes import as_float32, disk_dtype, row_fill
from actcache.store.open import CaptureCatalog
from actcache.store.quantise import dequantise, quantise
from actcache.store.statistics import QuantisationError, merge, no_moments, quantisation_error, row_statistics

LOSSLESS = ("zstd", "lz4", "none")
_HARDLY = 1.05
_ABOUT_EQUAL = 1.03
_MUCH_FASTER = 1.3


class Chunk(NamedTuple):
    """Rows [r, d] of one chunk in the dtype on disk, of which the first `kept` are kept."""

    layer: int
    rows: NDArray[Any]
    kept: int


@dataclass(frozen=True, slots=True)
class CodecResult:
    """One codec on the sample.

    ratio            bytes of rows over bytes on disk.
    encode, decode   bytes of rows per CPU second of one thread, statistics not counted.
    ratio_of_layer   the ratio by layer.
    error            of `uint8`, by layer; None for the others, which lose nothing.
    """

    ratio: float
    encode: float
    decode: float
    ratio_of_layer: dict[int, float]
    error: dict[int, QuantisationError] | None = None


@dataclass(frozen=True, slots=True)
class CodecReport:
    """All codecs on the same sample, and the one to use, with the reason."""

    dtype: str
    n_rows: int
    row_bytes: int
    codecs: dict[str, CodecResult]
    recommended: str
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = asdict(self)
        for name, result in self.codecs.items():
            if result.error is not None:
                found["codecs"][name]["error"] = {k: e._asdict() for k, e in result.error.items()}
        return found


def sample_chunks(
    capture: CaptureCatalog, kept: NDArray[np.int64], most_bytes: int, layers: Sequence[int] | None = None
) -> list[Chunk]:
    """Whole chunks of kept rows, spread evenly over the committed shards of every layer.

    Raises:
        UncommittedError: nothing is committed yet, or no chunk has kept rows only.
        UsageError: the rows are quantised already: nothing can be said about the ones they came from.
    """
    grid, record = capture.plan.grid, capture.capture
    if is_quantised(record):
        raise UsageError(
            f"{record.name} in {capture.objects.url} is quantised already; codecs are compared on rows as a model gives "
            f"them: use a store of another codec, or --model and --corpus"
        )
    r, places = grid.rows_per_chunk, []
    for shard in capture.live():
        places += [(shard, chunk) for chunk in range(int(kept[shard]) // r)]
    chosen_layers = list(layers or record.layers)
    if not places:
        raise UncommittedError(
            f"{record.name} in {capture.objects.url} has no committed chunk of {r} kept rows to sample"
        )
    chunk_bytes = r * record.width * disk_dtype(record.dtype).itemsize
    n = max(1, min(len(places), most_bytes // (chunk_bytes * len(chosen_layers))))
    spread = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, n).astype(int))]
    return [
        Chunk(layer, np.array(capture.reader(shard).read(capture.layer_index(layer), chunk)), r)
        for layer in chosen_layers
        for shard, chunk in spread
    ]


def compare_codecs(
    chunks: Sequence[Chunk], dtype: str, on_codec: Callable[[str], None] = lambda _: None
) -> CodecReport:
    """Every codec on chunks of one shape. `on_codec` is called before each."""
    rows = chunks[0].rows
    results: dict[str, CodecResult] = {}
    for name in LOSSLESS:
        on_codec(name)
        results[name] = _lossless(chunks, Codec(name, rows.dtype, rows.size))
    on_codec("uint8")
    results["uint8"] = _quantised(chunks, dtype)
    recommended, reason = recommend(results, dtype)
    n_rows = sum(len(c.rows) for c in chunks)
    return CodecReport(dtype, n_rows, rows.nbytes // len(rows), results, recommended, reason)


def recommend(results: dict[str, CodecResult], dtype: str) -> tuple[str, str]:
    """A lossless codec and why; what `uint8` would cost is said, and left to whoever knows what the rows are for."""
    best = max(LOSSLESS, key=lambda name: results[name].ratio)
    if results[best].ratio < _HARDLY:
        why = f"{dtype} rows hardly compress ({best}: {results[best].ratio:.2f}x), and uncompressed ones cost no decoding"
        return "none", why + _instead(results)
    faster = [
        name
        for name in LOSSLESS
        if results[name].ratio * _ABOUT_EQUAL >= results[best].ratio
        and results[name].decode >= _MUCH_FASTER * results[best].decode
    ]
    chosen = max(faster, key=lambda name: results[name].decode) if faster else best
    found = results[chosen]
    if chosen == best:
        why = f"it is the smallest that loses nothing ({found.ratio:.2f}x)"
    else:
        why = f"it is nearly the smallest ({found.ratio:.2f}x; {best} {results[best].ratio:.2f}x) and decodes faster"
    speed = f", and decodes {found.decode / 1e9:.1f} GB of rows per second and core"
    return chosen, why + speed + _instead(results)


def _instead(results: dict[str, CodecResult]) -> str:
    found = results["uint8"]
    assert found.error is not None
    fvu, worst = (max(getattr(e, name) for e in found.error.values()) for name in ("fvu", "worst"))
    return f". Where a FVU of {fvu:.1e} is no loss (worst dimension {worst:.1e}), uint8 makes it {found.ratio:.2f}x"


def _lossless(chunks: Sequence[Chunk], codec: Codec) -> CodecResult:
    encoded, encode = _timed(lambda: [bytes(codec.encode(c.rows)[0]) for c in chunks], chunks)
    out = np.empty(chunks[0].rows.shape, codec.dtype)

    def decode() -> None:
        for data in encoded:
            problem = codec.decode_into(memoryview(data), out)
            assert problem is None, problem

    _, decoded = _timed(decode, chunks)
    sizes = [len(data) + CRC_BYTES for data in encoded]
    return CodecResult(_ratio(chunks, sizes), encode, decoded, _ratio_of_layer(chunks, sizes))


def _quantised(chunks: Sequence[Chunk], dtype: str) -> CodecResult:
    def encode() -> list[tuple[Any, NDArray[Any]]]:
        found = []
        for c in chunks:
            run = quantise(c.rows, 1, dtype, c.kept)
            found.append((run.chunks[0], run.said.copy()))
        return found

    found, encoded = _timed(encode, chunks)
    out = np.empty(chunks[0].rows.shape, chunks[0].rows.dtype)
    _, decoded = _timed(lambda: [dequantise(q, dtype, out) for q, _ in found], chunks)
    width = chunks[0].rows.shape[1]
    errors: dict[int, QuantisationError] = {}
    for layer in dict.fromkeys(c.layer for c in chunks):
        kept, ordinary, squared = no_moments(width), no_moments(width), np.zeros(width)
        for c, (q, said) in zip(chunks, found, strict=True):
            if c.layer == layer:
                x, y = (as_float32(rows, dtype, np.empty(rows.shape, np.float32)) for rows in (c.rows, said))
                statistics = row_statistics(y, "float32", c.kept, q.exact_rows)
                kept, ordinary = merge(kept, statistics.moments), merge(ordinary, statistics.ordinary)
                x[q.exact_rows], y[q.exact_rows] = 0, 0
                squared += ((x - y)[: c.kept].astype(np.float64) ** 2).sum(0)
        errors[layer] = quantisation_error(kept, ordinary, squared)
    sizes = list(_quantised_sizes(chunks, [q for q, _ in found], dtype))
    return CodecResult(_ratio(chunks, sizes), encoded, decoded, _ratio_of_layer(chunks, sizes), errors)


def _quantised_sizes(chunks: Sequence[Chunk], found: Sequence[Any], dtype: str) -> Iterator[int]:
    """Codes and block, and what the chunk adds to the arrays `scale`, `offset` and `exact`."""
    rows = chunks[0].rows
    scales = np.stack([[q.scale, q.offset] for q in found])
    of_scales = len(Codec("zstd", scales.dtype, scales.size).encode(scales)[0]) / len(found)
    zstd = Codec("zstd", rows.dtype, rows.size)
    for q in found:
        size = q.codes.nbytes + len(q.block()) + 2 * CRC_BYTES + of_scales
        if len(q.exact_rows):
            holes = np.full(rows.shape, row_fill(dtype), rows.dtype)
            holes[q.exact_rows] = q.exact
            size += len(zstd.encode(holes)[0]) + CRC_BYTES
        yield round(size)


def _timed(work: Callable[[], Any], chunks: Sequence[Chunk]) -> tuple[Any, float]:
    """What the work returns, and bytes of rows per CPU second: the best of three."""
    best, result = float("inf"), None
    for _ in range(3):
        started = time.thread_time()
        result = work()
        best = min(best, time.thread_time() - started)
    return result, sum(c.rows.nbytes for c in chunks) / max(best, 1e-9)


def _ratio(chunks: Sequence[Chunk], sizes: Sequence[int]) -> float:
    return sum(c.rows.nbytes for c in chunks) / sum(sizes)


def _ratio_of_layer(chunks: Sequence[Chunk], sizes: Sequence[int]) -> dict[int, float]:
    found = {}
    for layer in dict.fromkeys(c.layer for c in chunks):
        mine = [i for i, c in enumerate(chunks) if c.layer == layer]
        found[layer] = _ratio([chunks[i] for i in mine], [sizes[i] for i in mine])
    return found
