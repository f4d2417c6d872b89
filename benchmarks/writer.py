"""Part "writer" of build.py: one shard after the other by the shard writer and by others, into the page cache."""

import argparse
import importlib.util
import json
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import tensorstore
import zarr
from synthetic import made_up_rows, make_plan

from actcache.store.codec import CRC_BYTES, trailer
from actcache.store.disk import Disk, Writer
from actcache.store.ledger import ShardCommitter
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.shard import Chunks

WIDTH, N_LAYERS = 512, 6
LAYERS = tuple(range(N_LAYERS))
ZARRS = "zarrs.ZarrsCodecPipeline"


class Writing:
    """The methods of part "writer": the same made-up rows, a shard after the other, into the page cache."""

    def __init__(self, work: Path, n_shards: int, shard_rows: int) -> None:
        self.work, self.n_shards, self.shard_rows = work / "writer", n_shards, shard_rows
        self.rows = made_up_rows(np.random.default_rng(0), (N_LAYERS, shard_rows, WIDTH))
        self.n_bytes = n_shards * self.rows.nbytes
        self._left = ExitStack()

    def _fresh(self) -> Path:
        """An empty folder. What was written before is removed here, outside what is timed, as that of the others is."""
        self.clear()
        self.work.mkdir(parents=True)
        return self.work

    def clear(self) -> None:
        """Remove everything."""
        self._left.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def raw(self) -> Callable[[], None]:
        """A chunk at a time, as the shard writer does."""
        folder, chunks = self._fresh(), self.rows.reshape(-1, 256 * WIDTH)

        def write() -> None:
            for shard in range(self.n_shards):
                with (folder / str(shard)).open("wb", buffering=0) as file:
                    for chunk in chunks:
                        file.write(chunk.data)

        return write

    def memmap(self) -> Callable[[], None]:
        """numpy.memmap, a file a shard."""
        folder = self._fresh()

        def write() -> None:
            for shard in range(self.n_shards):
                shape, dtype = self.rows.shape, self.rows.dtype
                np.memmap(folder / str(shard), dtype=dtype, mode="w+", shape=shape)[:] = self.rows

        return write

    def _planned(self, codec: str) -> Catalog:
        out = self._fresh() / "s.zarr"
        make_plan(
            out,
            n_tokens=self.n_shards * self.shard_rows,
            layers=LAYERS,
            width=WIDTH,
            codec=codec,
            shard_rows=self.shard_rows,
        )
        return Catalog(LocalObjects(out))

    def writer(self, codec: str) -> Callable[[], None]:
        """The shard writer of a build, with statistics, on one encoding thread; not committed."""
        catalog = self._planned(codec)
        found = catalog.capture("resid_post")

        def write() -> None:
            disk = self._left.enter_context(Disk(self.work / "s.zarr"))
            with ThreadPoolExecutor(1) as pool:
                where = lambda _s, _r: ""  # noqa: E731
                committer = ShardCommitter(
                    disk, catalog.objects, found.capture, found.arrays, pool, "", where
                )
                for shard, planned in enumerate(catalog.shards.records):
                    self._left.enter_context(committer.write(shard, planned, self.rows).writer)

        return write

    def bare(self, codec: str) -> Callable[[], None]:
        """The same without statistics: encode, append, index."""
        catalog = self._planned(codec)
        spec = catalog.capture("resid_post").arrays["rows"]
        chunks = self.rows.reshape(-1, 256, WIDTH)

        def write() -> None:
            disk = self._left.enter_context(Disk(self.work / "s.zarr"))
            for shard in range(self.n_shards):
                writer, lengths, crcs = Writer(disk, spec.key(0, shard, 0)), [], []
                self._left.enter_context(writer)
                for chunk in chunks:
                    data, crc = spec.codec.encode(chunk)
                    writer.write(data, trailer(crc))
                    lengths.append(len(data) + CRC_BYTES)
                    crcs.append(crc)
                shape = (N_LAYERS, -1)
                table = Chunks(*(np.array(values, np.uint32).reshape(shape) for values in (lengths, crcs)))
                writer.write(table.index_bytes(self.shard_rows // 256))
                writer.flush()

        return write

    def _metadata(self, codec: str, *, is_sharded: bool = True) -> Path:
        folder = self._planned(codec).objects.url
        document = json.loads((Path(folder) / "acts/resid_post/rows/zarr.json").read_text())
        if not is_sharded:
            sharding = document["codecs"][0]["configuration"]
            document["codecs"] = sharding["codecs"]
            document["chunk_grid"]["configuration"]["chunk_shape"] = sharding["chunk_shape"]
        array = self._fresh() / "rows"
        array.mkdir()
        (array / "zarr.json").write_text(json.dumps(document))
        return array

    def zarr_python(self, codec: str, pipeline: str | None = None) -> Callable[[], None]:
        """zarr-python, a shard per assignment; with the pipeline of zarrs where named."""
        path = self._metadata(codec)
        with zarr.config.set({} if pipeline is None else {"codec_pipeline.path": pipeline}):
            array = zarr.open_array(path, mode="r+")

        def write() -> None:
            for shard in range(self.n_shards):
                array[:, shard * self.shard_rows : (shard + 1) * self.shard_rows] = self.rows

        return write

    def tensorstore(self, codec: str) -> Callable[[], None]:
        """tensorstore, a shard per assignment."""
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self._metadata(codec)}/"}}
        array = tensorstore.open(spec, open=True, write=True).result()

        def write() -> None:
            for shard in range(self.n_shards):
                at = slice(shard * self.shard_rows, (shard + 1) * self.shard_rows)
                array[:, at].write(self.rows).result()

        return write


def measure_writer(arguments: argparse.Namespace) -> dict:
    """Part "writer": CPU seconds per GB, every method once a round."""
    writing = Writing(arguments.work, 2, 16_384)
    methods: dict[str, Callable[[], Callable[[], None]]] = {
        "raw": writing.raw,
        "memmap": writing.memmap,
    }
    for codec in ("none", "lz4", "zstd", "uint8"):
        if codec != "uint8":
            methods[f"bare {codec}"] = lambda codec=codec: writing.bare(codec)
        methods[f"writer {codec}"] = lambda codec=codec: writing.writer(codec)
    for codec in ("none", "zstd"):
        methods[f"zarr-python {codec}"] = lambda codec=codec: writing.zarr_python(codec)
        methods[f"tensorstore {codec}"] = lambda codec=codec: writing.tensorstore(codec)
        if importlib.util.find_spec("zarrs") is not None:
            methods[f"zarrs {codec}"] = lambda codec=codec: writing.zarr_python(codec, ZARRS)
    found: dict[str, list[dict]] = {name: [] for name in methods}
    for round_ in range(arguments.rounds + 1):
        for name, prepare in methods.items():
            write = prepare()
            started, before = time.perf_counter(), time.process_time()
            write()
            cpu, spent = time.process_time() - before, time.perf_counter() - started
            if round_:  # the first touches memory
                gb = writing.n_bytes / 1e9
                found[name].append({"cpu_s_per_gb": cpu / gb, "s_per_gb": spent / gb})
    writing.clear()
    median = {name: statistics.median(r["cpu_s_per_gb"] for r in runs) for name, runs in found.items()}
    over_raw = {
        name: statistics.median(
            r["cpu_s_per_gb"] / raw["cpu_s_per_gb"] for r, raw in zip(runs, found["raw"], strict=True)
        )
        for name, runs in found.items()
    }
    for name in methods:
        print(f"{name:18} {median[name]:6.2f} CPU s/GB  {over_raw[name]:6.2f} of raw")
    return {"median_cpu_s_per_gb": median, "median_over_raw": over_raw, "runs": found}
