"""The stream against other ways to read the same rows: bytes of decoded rows per second and per CPU second.

    python benchmarks/stream.py --work /tmp/stream --out benchmarks/results/stream.json

Each round takes every method once, in turn, after a run of it that does not count; medians over rounds. One reading thread, page
cache warm (each round begins with the files read from front to back), unless said otherwise. A store of made-up bfloat16 rows (0.54 GB decoded,
4 layers, width 512, chunks of 256 rows) per codec; `--codec` measures one and leaves the others in the result as they are,
`--width` another width (fewer rows, as many bytes), kept beside them. Other projects' loaders: benchmarks/loaders.py.

    memcpy            one thread copying the same number of bytes
    ceiling           read each chunk into one buffer, compare its crc32c, decode to nowhere
    ceiling+scatter   the same, and scatter its rows over a window: all that has to be done, in a bare loop
    compiled loop     codec none: the same by one compiled call over chunks, files and slots worked out before; what the
                      processor needs for a checked read of shuffled rows, without order, windows or a consumer
    stream            ours, batches of 8,192 rows (crc32c compared, shuffled, provenance kept)
    disk              the shard files from front to back, forgotten before, 8 MiB at a time; measured before and after
                      `stream around`
    stream around     ours, with as many threads as it takes by default, forgotten before, read around the page cache: what
                      a store larger than memory gets
    stream cold       the same through the page cache: what a smaller one gets, in its first epoch
    pieces cold       the same chunks in random order through the page cache, by two threads that do nothing else and ask
                      for them as far ahead as the stream does: what that way can give
    one layer cold    ours, one layer of four, forgotten before; after all rounds, so that no other stream reads meanwhile
    zarr-python       the same chunks in the same random order, one at a time
    zarrs             the same, through its codec pipeline (zarr-python asks, zarrs reads and decodes)
    tensorstore       likewise
    raw file          the same chunks of a file without a format, read and scattered: no checks, no codec
    memmap            a raw file of the same rows, random rows gathered into batches (a true shuffle, unchecked)
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import tensorstore
import torch
import zarr
from synthetic import make_store

import actcache
from actcache.loops.compiled import compiled
from actcache.reader.bench import device_read_bytes
from actcache.reader.scatter import aligned_empty
from actcache.reader.stream import Stream
from actcache.store.codec import CRC_BYTES
from actcache.store.local import LocalFiles, Memory
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog

N_TOKENS, N_LAYERS, WIDTH, ROWS = 131_072, 4, 512, 256
CODECS = ("none", "zstd", "lz4", "uint8")
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
        self.window = aligned_empty((WINDOW, WIDTH), np.dtype(np.uint16))
        self.window[:] = 0
        self.prepare_loop()
        rows = str(path / "acts" / "resid_post" / "rows")
        self.zarr = zarr.open_array(rows, mode="r")
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            self.zarrs = zarr.open_array(rows, mode="r")
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": rows},
        }
        self.tensorstore = tensorstore.open(spec).result()
        self.raw_path = raw
        self.raw = np.memmap(raw, np.uint16, "r").reshape(-1, WIDTH)
        self.shares: dict[str, list[float]] = {"asked": [], "from disk": []}
        self.copy = (np.ones(N_BYTES // 8), np.zeros(N_BYTES // 8))
        self.cold = self.store.stream(batch_size=8192, epochs=1)
        self.around = self.store.stream(batch_size=8192, epochs=1, page_cache=False)
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

    def compiled_loop(self) -> int:
        """What `stream` calls for its chunks, in one call for all."""
        direct, memory, cycles = self.direct, Memory(2 * ROWS * WIDTH * 2), np.zeros(3, np.int64)
        assert direct is not None
        n = direct.bring(
            *(self.work.ctypes.data, len(self.work), memory.address),
            *(self.window.ctypes.data, self.window.strides[0], WIDTH * 2),
            *(direct.shift.ctypes.data, cycles.ctypes.data),
        )
        assert n == len(self.work)
        return N_BYTES

    def prepare_loop(self) -> None:
        """Descriptors, first bytes, checksums and slots of all chunks."""
        loops = compiled()
        self.direct = None if loops is None else loops.direct
        files = LocalFiles(self.path, len(self.order), is_random=True)
        self.files = {s: files.file(self.capture.reader(s).key) for s in self.capture.committed()}
        work = []
        for i, (shard, layer, chunk) in enumerate(self.order):
            start, n_bytes, crc = self.capture.reader(shard).as_is(layer, chunk) or (0, 0, 0)
            file, slots = self.files[shard], self.slots[i % len(self.slots)]
            work.append((file.fd, start, n_bytes, crc, slots.ctypes.data, 0, ROWS, *file.mapped()))
        self.work = np.array(work)

    def stream_warm(self) -> int:
        n_bytes = sum(next(self.batches).rows.nbytes for _ in range(N_BYTES // (8192 * WIDTH * 2)))
        self.settle()
        return n_bytes

    def settle(self) -> None:
        """Wait for what the stream reads ahead: as many windows as were there at the beginning, and nobody else's work."""
        for fill in list(self.stream._filling._fills.values()):
            fill.wait()

    def forget(self) -> None:
        for shard in self.capture.committed():
            fd = os.open(self.path / self.capture.reader(shard).key, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def stream_cold(self) -> int:
        """A whole epoch of which nothing is in memory; the other stream has read as far ahead as it will."""
        return self.epoch_of(self.cold)

    def stream_around(self) -> int:
        """The same, around the page cache."""
        return self.epoch_of(self.around)

    def epoch_of(self, stream: Stream) -> int:
        """All of it, forgotten before."""
        stream.set_epoch(0)
        self.forget()
        return sum(batch.rows.nbytes for batch in stream)

    def pieces_cold(self) -> int:
        """By two threads, each its half."""
        self.forget()
        with ThreadPoolExecutor(2) as pool:
            return sum(pool.map(self.read_pieces, (self.order[::2], self.order[1::2])))

    def read_pieces(self, order: list[tuple[int, int, int]]) -> int:
        """Ask for what is 48 chunks further, and read."""
        ranges = [(self.files[s].fd, *self.capture.reader(s).range_of(layer, c)) for s, layer, c in order]
        buffer = memoryview(bytearray(1 << 20))
        for one in ranges[:48]:
            os.posix_fadvise(*one, os.POSIX_FADV_WILLNEED)
        for i, (fd, start, n_bytes) in enumerate(ranges):
            if i + 48 < len(ranges):
                os.posix_fadvise(*ranges[i + 48], os.POSIX_FADV_WILLNEED)
            os.preadv(fd, [buffer[:n_bytes]], start)
        return len(order) * ROWS * WIDTH * 2

    def disk(self, *, is_cold: bool = True) -> int:
        if is_cold:
            self.forget()
        buffer, total = bytearray(8 << 20), 0
        for shard in self.capture.committed():
            fd = os.open(self.path / self.capture.reader(shard).key, os.O_RDONLY)
            while got := os.readv(fd, [buffer]):
                total += got
            os.close(fd)
        return total

    def one_layer_cold(self) -> int:
        """Also keeps, as shares of all layers' bytes, what was asked for and what came from the disk."""
        self.forget()
        before, n_bytes = device_read_bytes(), 0
        with self.store.stream(batch_size=8192, threads=1, layers=[2]) as stream:
            for batch in stream:
                n_bytes += batch.rows.nbytes
            asked = stream.counters.read_bytes
        after = device_read_bytes()
        total = sum(int(self.capture.reader(s).chunks.stored.sum()) for s in self.capture.committed())
        self.shares["asked"].append(asked / total)
        if before is not None and after is not None:
            self.shares["from disk"].append((after - before) / total)
        return n_bytes

    def zarr_python(self) -> int:
        return self.read_array(self.zarr, len(self.order) // 8)

    def zarrs_pipeline(self) -> int:
        with zarr.config.set({"threading.max_workers": 1, "codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            return self.read_array(self.zarrs, len(self.order) // 8)

    def read_array(self, array: Any, n_chunks: int) -> int:
        for i, (shard, layer, chunk) in enumerate(self.order[:n_chunks]):
            start = shard * 32_768 + chunk * ROWS
            self.window[self.slots[i % len(self.slots)]] = array[layer, start : start + ROWS]
        return n_chunks * ROWS * WIDTH * 2

    def raw_file(self) -> int:
        buffer, chunk_bytes = bytearray(ROWS * WIDTH * 2), ROWS * WIDTH * 2
        rows = np.frombuffer(buffer, np.uint16).reshape(ROWS, WIDTH)
        fd = os.open(self.raw_path, os.O_RDONLY)
        per_shard = len(self.order) // len(self.offsets)
        for i, (shard, layer, chunk) in enumerate(self.order):
            at = shard * per_shard + layer * (per_shard // N_LAYERS) + chunk
            os.preadv(fd, [buffer], at * chunk_bytes)
            self.window[self.slots[i % len(self.slots)]] = rows
        os.close(fd)
        return N_BYTES

    def tensorstore_chunks(self) -> int:
        part = self.order[: len(self.order) // 4]
        for shard, layer, chunk in part:
            start = shard * 32_768 + chunk * ROWS
            self.window[self.slots[chunk % len(self.slots)]] = (
                self.tensorstore[layer, start : start + ROWS].read().result()
            )
        return len(part) * ROWS * WIDTH * 2

    def memmap(self) -> int:
        rng, total, out = np.random.default_rng(1), 0, np.empty((8192, WIDTH), np.uint16)
        for _ in range(16):
            np.take(self.raw, rng.integers(0, len(self.raw), 8192), axis=0, out=out, mode="clip")
            total += out.nbytes
        return total


NOT_BEGUN = {"zarr-python", "zarrs", "tensorstore"}
"""All others are run once for nothing before each time they are measured: what another method has written last is still in
the caches, and to be brought to memory by whoever comes next; a disk that has rested is faster for a moment; and pages that
were forgotten in another order are slower to get again."""


def timed(method: Callable[[], int]) -> tuple[float, float]:
    """GB a second, and a CPU second."""
    cpu, wall = time.process_time(), time.perf_counter()
    n_bytes = method()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return n_bytes / wall / 1e9, n_bytes / max(cpu, 1e-9) / 1e9


def measure(case: Case, codec: str, rounds: int) -> dict[str, Any]:
    """Medians of interleaved rounds, their ratios, and every single measurement."""
    methods: dict[str, Callable[[], int]] = {
        "memcpy": case.memcpy,
        "ceiling": case.ceiling,
        "ceiling+scatter": case.ceiling_scatter,
        "stream": case.stream_warm,
        "zarr-python": case.zarr_python,
        "zarrs": case.zarrs_pipeline,
        "tensorstore": case.tensorstore_chunks,
        "raw file": case.raw_file,
        "memmap": case.memmap,
        "compiled loop": case.compiled_loop,
        "disk": case.disk,
        "stream around": case.stream_around,
        "disk after": case.disk,
        "stream cold": case.stream_cold,
        "pieces cold": case.pieces_cold,
    }
    if codec != "none" or case.direct is None:
        del methods["compiled loop"]
    if codec == "uint8":  # others read codes
        methods = {n: m for n, m in methods.items() if n not in ("zarr-python", "zarrs", "tensorstore")}
        methods = {n: m for n, m in methods.items() if not n.startswith("ceiling")}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for method in methods.values():  # the first time touches memory
        method()
    for _ in range(rounds):
        case.disk()
        for name, method in methods.items():
            if name not in NOT_BEGUN:
                method()
            found[name].append(timed(method))
    case.stream.close()
    case.cold.close()
    case.around.close()
    found["one layer cold"] = [timed(case.one_layer_cold) for _ in range(rounds)]
    median = {
        n: tuple(statistics.median(v[i] for v in values) for i in (0, 1)) for n, values in found.items()
    }

    def cpu_ratio(over: str) -> float | None:
        """Of the rounds' own ratios: what slows a whole round down does not count."""
        if over not in found:
            return None
        return statistics.median(a[1] / b[1] for a, b in zip(found["stream"], found[over], strict=True))

    def of_disk(name: str) -> float:
        rounds = zip(found[name], found["disk"], found["disk after"], strict=True)
        return statistics.median(2 * one[0] / (before[0] + after[0]) for one, before, after in rounds)

    return {
        "load_average": os.getloadavg(),
        "gb_per_s": {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in median.items()},
        "cpu_s_per_gb": {name: 1 / cpu for name, (_wall, cpu) in median.items()},
        "rows_per_s": {name: wall * 1e9 / (WIDTH * 2) for name, (wall, _cpu) in median.items()},
        "stream_over": {name: cpu_ratio(name) for name in found if name != "stream"},
        "of_disk_wall": {name: of_disk(name) for name in ("stream around", "stream cold", "pieces cold")},
        "one_layer_of_bytes": {n: statistics.median(v) for n, v in case.shares.items() if v},
        "raw": found,
    }


def main() -> None:
    """Measure and print; write one JSON file with every single measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--codec", action="append", choices=CODECS)
    parser.add_argument("--width", type=int, default=WIDTH, choices=(512, 1024, 2048))
    arguments = parser.parse_args()
    of_width = "" if arguments.width == WIDTH else f" of width {arguments.width}"
    globals().update(WIDTH=arguments.width, N_TOKENS=N_TOKENS * WIDTH // arguments.width)
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    raw = arguments.work / "raw.bin"
    if not raw.exists() or raw.stat().st_size != N_BYTES:
        np.random.default_rng(0).integers(0, 65_536, N_BYTES // 2, dtype=np.uint16).tofile(raw)
    report: dict[str, Any] = {
        "what": "GB of decoded rows per second (wall) and per CPU second (cpu), warm, one reading thread; ratios of CPU",
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "scatter": "numpy" if compiled() is None else "compiled",
        "versions": {
            name: version(name)
            for name in ("numpy", "torch", "zarr", "zarrs", "numcodecs", "tensorstore", "crc32c")
        },
        "python": platform.python_version(),
        "codecs": {},
    }
    if arguments.out and arguments.out.exists():
        report["codecs"] = json.loads(arguments.out.read_text()).get("codecs", {})
    for codec in arguments.codec or CODECS:
        path = make_store(
            arguments.work / f"{codec}{of_width.replace(' ', '-')}.zarr",
            n_tokens=N_TOKENS,
            n_layers=N_LAYERS,
            width=WIDTH,
            codec=codec,
        )
        case = Case(path, raw)
        found = measure(case, codec, arguments.rounds)
        report["codecs"][codec + of_width] = found
        print(codec, json.dumps({k: v for k, v in found.items() if k != "raw"}, indent=1), flush=True)
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
