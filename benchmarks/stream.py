"""The stream against other ways to read the same rows: bytes of decoded rows per second and per CPU second.

    python benchmarks/stream.py --work /tmp/stream --out benchmarks/results/stream.json

Each round takes every method once, in turn; medians over rounds. One reading thread, page cache warm, unless said
otherwise. A store of made-up bfloat16 rows (0.54 GB decoded, 4 layers, width 512, chunks of 256 rows) per codec.

    memcpy            one thread copying the same number of bytes
    ceiling           read each chunk into one buffer, compare its crc32c, decode to nowhere
    ceiling+scatter   the same, and scatter its rows over a window: all that has to be done, in a bare loop
    stream            ours, batches of 8,192 rows (crc32c compared, shuffled, provenance kept)
    stream cold       ours, after the system was asked to forget the files
    disk              the shard files from front to back, forgotten before, 8 MiB at a time
    zarr-python       the same chunks in the same random order, one at a time
    tensorstore       likewise
    memmap            a raw file of the same rows, random rows gathered into batches (a true shuffle, unchecked)
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import crc32c
import numpy as np
import tensorstore
import torch
import zarr
from synthetic import make_store

import actcache
from actcache.store.codec import CRC_BYTES
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog

N_TOKENS, N_LAYERS, WIDTH, ROWS = 131_072, 4, 512, 256
N_BYTES = N_TOKENS * N_LAYERS * WIDTH * 2
WINDOW = 131_072


class Case:
    """One store and everything that is measured on it."""

    def __init__(self, path: Path, raw: Path) -> None:
        self.path = path
        self.store = actcache.open(path)
        self.capture = Catalog(LocalObjects(path)).capture("resid_post")
        self.offsets = {s: self.capture.reader(s).chunks.offset.tolist() for s in self.capture.committed()}
        rng = np.random.default_rng(0)
        shards, chunks = len(self.capture.committed()), 32_768 // ROWS
        every = [(s, layer, c) for s in range(shards) for layer in range(N_LAYERS) for c in range(chunks)]
        self.order = [every[i] for i in rng.permutation(len(every))]
        self.slots = rng.permutation(WINDOW).reshape(-1, ROWS)
        self.window = np.zeros((WINDOW, WIDTH), np.uint16)
        self.zarr = zarr.open_array(str(path / "acts" / "resid_post" / "rows"), mode="r")
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path / "acts" / "resid_post" / "rows")},
        }
        self.tensorstore = tensorstore.open(spec).result()
        self.raw = np.memmap(raw, np.uint16, "r").reshape(-1, WIDTH)
        self.copy = (np.ones(N_BYTES // 8), np.zeros(N_BYTES // 8))
        self.stream = self.store.stream(batch_size=8192, epochs=None, threads=1)
        self.batches = iter(self.stream)
        for _ in range(3 * N_BYTES // (8192 * WIDTH * 2)):  # touch every buffer
            next(self.batches)

    def memcpy(self) -> int:
        np.copyto(self.copy[1], self.copy[0])
        return N_BYTES

    def ceiling(self, *, scatter: bool = False) -> int:
        buffer = memoryview(bytearray(1 << 20))
        out = np.empty((ROWS, WIDTH), np.uint16)
        codec = self.capture.arrays["rows"].codec
        for i, (shard, layer, chunk) in enumerate(self.order):
            reader = self.capture.reader(shard)
            n = int(reader.chunks.length[layer, chunk]) - CRC_BYTES
            fd = os.open(self.path / reader.key, os.O_RDONLY)
            os.preadv(fd, [buffer[:n]], self.offsets[shard][layer][chunk])
            os.close(fd)
            assert crc32c.crc32c(buffer[:n]) == int(reader.chunks.crc[layer, chunk])
            if codec.name == "none":
                rows = np.frombuffer(buffer[:n], np.uint16).reshape(ROWS, WIDTH)
            else:
                codec.decode_into(buffer[:n], out)
                rows = out
            if scatter:
                self.window[self.slots[i % len(self.slots)]] = rows
        return N_BYTES

    def ceiling_scatter(self) -> int:
        return self.ceiling(scatter=True)

    def stream_warm(self) -> int:
        return sum(next(self.batches).rows.nbytes for _ in range(N_BYTES // (8192 * WIDTH * 2)))

    def forget(self) -> None:
        for shard in self.capture.committed():
            fd = os.open(self.path / self.capture.reader(shard).key, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def stream_cold(self) -> int:
        self.forget()
        return self.stream_warm()

    def disk(self) -> int:
        self.forget()
        buffer, total = bytearray(8 << 20), 0
        for shard in self.capture.committed():
            fd = os.open(self.path / self.capture.reader(shard).key, os.O_RDONLY)
            while got := os.readv(fd, [buffer]):
                total += got
            os.close(fd)
        return total

    def zarr_python(self) -> int:
        part = self.order[: len(self.order) // 8]
        for shard, layer, chunk in part:
            start = shard * 32_768 + chunk * ROWS
            self.window[self.slots[0]] = self.zarr[layer, start : start + ROWS]
        return len(part) * ROWS * WIDTH * 2

    def tensorstore_chunks(self) -> int:
        part = self.order[: len(self.order) // 4]
        for shard, layer, chunk in part:
            start = shard * 32_768 + chunk * ROWS
            self.window[self.slots[0]] = self.tensorstore[layer, start : start + ROWS].read().result()
        return len(part) * ROWS * WIDTH * 2

    def memmap(self) -> int:
        rng, total, out = np.random.default_rng(1), 0, np.empty((8192, WIDTH), np.uint16)
        for _ in range(16):
            np.take(self.raw, rng.integers(0, len(self.raw), 8192), axis=0, out=out, mode="clip")
            total += out.nbytes
        return total


def main() -> None:
    """Measure and print; write one JSON file with every single measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    raw = arguments.work / "raw.bin"
    if not raw.exists() or raw.stat().st_size != N_BYTES:
        np.random.default_rng(0).integers(0, 65_536, N_BYTES // 2, dtype=np.uint16).tofile(raw)
    report = {
        "what": "GB of decoded rows per second (wall) and per CPU second (cpu), warm, one reading thread",
        "load_average": os.getloadavg(),
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "versions": {
            name: version(name) for name in ("numpy", "torch", "zarr", "numcodecs", "tensorstore", "crc32c")
        },
        "python": platform.python_version(),
        "codecs": {},
    }
    for codec in ("none", "zstd", "lz4"):
        path = make_store(
            arguments.work / f"{codec}.zarr", n_tokens=N_TOKENS, n_layers=N_LAYERS, width=WIDTH, codec=codec
        )
        case = Case(path, raw)
        methods: dict[str, Callable[[], int]] = {
            "memcpy": case.memcpy,
            "ceiling": case.ceiling,
            "ceiling+scatter": case.ceiling_scatter,
            "stream": case.stream_warm,
            "zarr-python": case.zarr_python,
            "tensorstore": case.tensorstore_chunks,
            "memmap": case.memmap,
            "disk": case.disk,
            "stream cold": case.stream_cold,
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
        for _ in range(arguments.rounds):
            for name, method in methods.items():
                cpu, wall = time.process_time(), time.perf_counter()
                n_bytes = method()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                found[name].append((n_bytes / wall / 1e9, n_bytes / max(cpu, 1e-9) / 1e9))
        case.stream.close()
        median = {
            name: [statistics.median(v[i] for v in values) for i in (0, 1)] for name, values in found.items()
        }
        report["codecs"][codec] = {
            "median_gb_per_s": {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in median.items()},
            "stream_of_memcpy_cpu": median["stream"][1] / median["memcpy"][1],
            "bare_loop_of_memcpy_cpu": median["ceiling+scatter"][1] / median["memcpy"][1],
            "stream_of_bare_loop_cpu": median["stream"][1] / median["ceiling+scatter"][1],
            "stream_of_ceiling_cpu": median["stream"][1] / median["ceiling"][1],
            "stream_over_zarr_python_cpu": median["stream"][1] / median["zarr-python"][1],
            "stream_over_tensorstore_cpu": median["stream"][1] / median["tensorstore"][1],
            "raw": found,
        }
        print(
            codec,
            json.dumps({k: v for k, v in report["codecs"][codec].items() if k != "raw"}, indent=1),
            flush=True,
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
