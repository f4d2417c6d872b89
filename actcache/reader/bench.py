"""What limits reading a store on this machine: ceilings and the stream itself, taken in turn in one run."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import UsageError
from actcache.loops.compiled import compiled
from actcache.reader.stream import Stream
from actcache.store.dtypes import disk_dtype
from actcache.store.objects import LocalObjects
from actcache.store.open import CaptureCatalog

_MEMCPY_BYTES = 256 << 20
_READ_BYTES = 8 << 20
_CHUNKS_IN_MEMORY = 64
_MOSTLY = 0.5

_STAGES = ("layout", "read", "decode", "scatter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Medians over rounds, in bytes of decoded rows per second unless said otherwise.

    memcpy       one thread copying memory.
    disk         reading shard files from front to back after asking the system to forget them; None where it cannot be
                 asked. In bytes on disk per second.
    decode       one thread reading (from a local store), checking and decoding chunks that are in memory, to nowhere.
    stream       the stream, chunks in memory where they fit.
    stream_cpu   decoded bytes per CPU second of the whole process while streaming.
    ratio        decoded bytes per byte on disk.
    share        of the stream's threads' time: layout, read, decode, scatter (from object storage others read).
    busy         of the time its threads had, how much they worked.
    from_disk    bytes that came from the disk itself over bytes of chunks read; None where the system does not say.
    request_bytes  of chunks, per request to object storage; None for a local store.
    scatter      "compiled", or "numpy" where llvmlite is not installed.
    bottleneck   what the stream can gain most from.
    """

    memcpy: float
    disk: float | None
    decode: float
    stream: float
    stream_cpu: float
    ratio: float
    share: dict[str, float]
    busy: float
    from_disk: float | None
    request_bytes: float | None
    scatter: str
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
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        started = time.perf_counter()
        np.copyto(target, source)
        one: dict[str, float | None] = {"memcpy": source.nbytes / (time.perf_counter() - started)}
        one["disk"] = _disk(capture, shards, seconds)
        one["decode"] = _decode(capture, shards, seconds)
        with make_stream() as stream:
            one |= _consume(stream, seconds)
        for name, value in one.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    median = {name: statistics.median(values) for name, values in found.items()}
    reader = capture.reader(shards[0])
    ratio = _decoded_bytes(capture) * reader.chunks.length.size / int(reader.chunks.stored.sum())
    share = {name: median[f"share_{name}"] for name in _STAGES}
    return Bench(
        memcpy=median["memcpy"],
        disk=median.get("disk"),
        decode=median["decode"],
        stream=median["stream"],
        stream_cpu=median["stream_cpu"],
        ratio=ratio,
        share=share,
        busy=median["busy"],
        from_disk=median.get("from_disk"),
        request_bytes=median.get("request_bytes"),
        scatter="numpy" if compiled() is None else "compiled",
        bottleneck=_bottleneck(median, ratio, share),
    )


def _bottleneck(median: dict[str, float], ratio: float, share: dict[str, float]) -> str:
    if "request_bytes" in median and median["busy"] < _MOSTLY:
        kib = median["request_bytes"] / 1024
        return f"object storage: {kib:,.0f} KiB a request; run_chunks= makes fewer and larger ones, io_threads= more at once"
    if median.get("around") and median["busy"] < _MOSTLY:
        return "disk: it is read around the page cache, as fast as it answers; io_threads= more at once, or a codec with a higher ratio"
    if "disk" in median and median["disk"] * ratio < median["stream"]:
        return "disk: rows not in memory arrive more slowly than they are streamed; a codec with a higher ratio helps"
    if median["busy"] < _MOSTLY and "request_bytes" not in median:
        return "the consumer: the stream's threads wait for it; they need nothing"
    largest = max(share, key=lambda name: share[name])
    return {
        "read": "read: copying from the page cache; more threads= help where there are cores",
        "decode": "decode: more threads= help, or a cheaper codec (lz4, none)",
        "scatter": "scatter: memory bandwidth; more threads= help where there are cores"
        + ("" if compiled() else ", and so does pip install 'actcache[fast]'"),
        "layout": "layout: rows are short; a larger batch of work per row is not to be had, more threads= help",
    }[largest]


def _decoded_bytes(capture: CaptureCatalog) -> int:
    """Bytes of one chunk's rows as they are handed out."""
    return (
        capture.plan.grid.rows_per_chunk * capture.capture.width * disk_dtype(capture.capture.dtype).itemsize
    )


def device_read_bytes() -> int | None:
    """Bytes this process had read from disks so far, page cache not counted; None where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _disk(capture: CaptureCatalog, shards: list[int], seconds: float) -> float | None:
    if not isinstance(capture.objects, LocalObjects) or not hasattr(os, "posix_fadvise"):
        return None
    n_bytes, spent, buffer = 0, 0.0, bytearray(_READ_BYTES)
    for shard in shards:
        fd = os.open(capture.objects.root / capture.reader(shard).key, os.O_RDONLY)
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
    at = [(s, i, c) for s in shards for i, c in np.ndindex(capture.reader(s).chunks.length.shape)]
    is_local = isinstance(capture.objects, LocalObjects)
    at = at if is_local else at[:_CHUNKS_IN_MEMORY]
    bodies = {} if is_local else {(s, i, c): capture.reader(s).load(i, c) for s, i, c in at}
    n_bytes, scratch, started = 0, None, time.perf_counter()
    while True:
        for s, i, c in at:
            reader = capture.reader(s)
            body = reader.load(i, c) if is_local else bodies[s, i, c]
            rows: Any = reader.decode(i, c, body, scratch)
            scratch = rows if rows.flags.writeable else None
            n_bytes += _decoded_bytes(capture)
            if time.perf_counter() - started > seconds:
                return n_bytes / (time.perf_counter() - started)


def _consume(stream: Stream, seconds: float) -> dict[str, float | None]:
    """Speed and where the time went, after the first windows have touched their memory."""
    batches = iter(stream)
    warm = time.perf_counter() + seconds
    while time.perf_counter() < warm:
        next(batches)
    before, disk_before = stream.counters.as_json(), device_read_bytes()
    n_bytes, started, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        n_bytes += next(batches).rows.nbytes
    wall, cpu, disk = time.perf_counter() - started, time.process_time() - cpu, device_read_bytes()
    spent = {name: value - before[name] for name, value in stream.counters.as_json().items()}
    is_remote = spent["n_requests"] > 0
    stages = {name: spent[f"{name}_s"] for name in _STAGES}
    total = max(1e-9, sum(stages.values()))
    from_disk = None
    if disk is not None and disk_before is not None and not is_remote and spent["read_bytes"]:
        from_disk = (disk - disk_before) / spent["read_bytes"]
    return {
        "stream": n_bytes / wall,
        "stream_cpu": n_bytes / max(1e-9, cpu),
        "busy": min(1.0, total / (wall * stream.delivery.threads)),
        "from_disk": from_disk,
        "request_bytes": spent["read_bytes"] / spent["n_requests"] if is_remote else None,
        "around": spent["fetch_s"] if not is_remote else None,
        **{f"share_{name}": value / total for name, value in stages.items()},
    }
