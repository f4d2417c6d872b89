"""What limits reading a store on this machine: ceilings and the stream itself, taken in turn in one run."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from actcache.errors import UsageError
from actcache.reader.stream import Stream
from actcache.store.dtypes import disk_dtype
from actcache.store.objects import LocalObjects
from actcache.store.open import CaptureCatalog

_MEMCPY_BYTES = 256 << 20
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Medians over rounds, in bytes of decoded rows per second unless said otherwise.

    memcpy       one thread copying memory.
    disk         reading shard files from front to back after asking the system to forget them; None where it cannot be
                 asked. In bytes on disk per second.
    decode       one thread reading, checking and decoding chunks that are in memory, to nowhere.
    stream       the stream, chunks in memory.
    stream_cpu   decoded bytes per CPU second of the whole process while streaming.
    ratio        decoded bytes per byte on disk.
    share        of the threads' time: layout, decode, scatter.
    bottleneck   what the stream can gain most from.
    """

    memcpy: float
    disk: float | None
    decode: float
    stream: float
    stream_cpu: float
    ratio: float
    share: dict[str, float]
    bottleneck: str


def bench(
    make_stream: Callable[[], Stream], capture: CaptureCatalog, *, rounds: int, seconds: float
) -> Bench:
    """Measure in `rounds` interleaved rounds, each part for about `seconds`.

    make_stream  a fresh endless stream over the store.

    Raises:
        UsageError: the store has no committed shard.
    """
    shards = capture.committed()
    if not shards:
        raise UsageError(f"{capture.objects.url} has no committed shard to measure")
    source = np.ones(_MEMCPY_BYTES // 8)
    target = np.zeros_like(source)
    found: dict[str, list[float]] = {name: [] for name in ("memcpy", "disk", "decode", "stream", "cpu")}
    counters: dict[str, float] = {}
    for _ in range(rounds):
        started = time.perf_counter()
        np.copyto(target, source)
        found["memcpy"].append(source.nbytes / (time.perf_counter() - started))
        disk = _disk(capture, shards, seconds)
        if disk is not None:
            found["disk"].append(disk)
        found["decode"].append(_decode(capture, shards, seconds))
        with make_stream() as stream:
            speed, cpu = _consume(stream, seconds)
            counters = stream.counters.as_json()
        found["stream"].append(speed)
        found["cpu"].append(cpu)
    threads_s = {name: counters[f"{name}_s"] for name in ("layout", "decode", "scatter")}
    share = {name: value / max(1e-9, sum(threads_s.values())) for name, value in threads_s.items()}
    median = {name: statistics.median(values) for name, values in found.items() if values}
    ratio = _decoded_bytes(capture) * _n_chunks(capture, shards[0]) / _chunk_bytes(capture, shards[0])
    return Bench(
        memcpy=median["memcpy"],
        disk=median.get("disk"),
        decode=median["decode"],
        stream=median["stream"],
        stream_cpu=median["cpu"],
        ratio=ratio,
        share=share,
        bottleneck=_bottleneck(median, ratio, share),
    )


def _bottleneck(median: dict[str, float], ratio: float, share: dict[str, float]) -> str:
    if "disk" in median and median["disk"] * ratio < median["stream"]:
        return "disk: rows not in memory arrive more slowly than they are streamed; a codec with a higher ratio helps"
    largest = max(share, key=lambda name: share[name])
    return {
        "decode": "decode: more threads= help, or a cheaper codec (lz4, none)",
        "scatter": "scatter: memory bandwidth; more threads= help where there are cores",
        "layout": "layout: rows are short; a larger batch of work per row is not to be had, more threads= help",
    }[largest]


def _n_chunks(capture: CaptureCatalog, shard: int) -> int:
    return capture.reader(shard).chunks.length.size


def _chunk_bytes(capture: CaptureCatalog, shard: int) -> int:
    return int(capture.reader(shard).chunks.stored.sum())


def _decoded_bytes(capture: CaptureCatalog) -> int:
    """Bytes of one chunk's rows as they are handed out."""
    return (
        capture.plan.grid.rows_per_chunk * capture.capture.width * disk_dtype(capture.capture.dtype).itemsize
    )


def _disk(capture: CaptureCatalog, shards: list[int], seconds: float) -> float | None:
    if not isinstance(capture.objects, LocalObjects) or not hasattr(os, "posix_fadvise"):
        return None
    n_bytes, spent, buffer = 0, 0.0, bytearray(_READ_BYTES)
    for shard in shards:
        fd = os.open(capture.objects.root / capture.arrays["rows"].key(0, shard, 0), os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while got := os.readv(fd, [buffer]):
                n_bytes += got
            spent += time.perf_counter() - started
        finally:
            os.close(fd)
        if spent > seconds:
            break
    return n_bytes / spent


def _decode(capture: CaptureCatalog, shards: list[int], seconds: float) -> float:
    n_bytes, scratch, started = 0, None, time.perf_counter()
    for shard in shards:
        reader = capture.reader(shard)
        for layer_index, chunk in np.ndindex(reader.chunks.length.shape):
            rows: Any = reader.read(layer_index, chunk, scratch)
            scratch = rows if rows.flags.writeable else None
            n_bytes += _decoded_bytes(capture)
        if time.perf_counter() - started > seconds:
            break
    return n_bytes / (time.perf_counter() - started)


def _consume(stream: Stream, seconds: float) -> tuple[float, float]:
    """Bytes per second, and per CPU second, after the first windows have touched their memory."""
    batches = iter(stream)
    warm = time.perf_counter() + seconds
    while time.perf_counter() < warm:
        next(batches)
    n_bytes, started, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        n_bytes += next(batches).rows.nbytes
    return n_bytes / (time.perf_counter() - started), n_bytes / max(1e-9, time.process_time() - cpu)
