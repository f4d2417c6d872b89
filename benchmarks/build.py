"""What a build costs beside the model alone, and what the shard writer costs beside a raw file.

    python benchmarks/build.py --work /tmp/build --out benchmarks/results/build.json

Part "build": a model of Pythia-70m's shape with random weights, float32, all six layers captured as bfloat16. Every
method runs between two forward passes over the same tokens. A shared machine is not the same from one minute to the next,
and such a ratio may be off by a tenth; so a build is also compared with the forward passes inside it ("own"), which is off by
half a hundredth. What these lose to hooks is in `null`. glibc is told to keep freed memory: what a pass faults in anew differs
by chance from none to 0.7 GB, up to a fifth of its time.

    forward     the blocks alone: no hook, no head
    null        forward, and every vector at its row of a shard buffer, then nothing
    CODEC       a whole build: encoded, written, synced, committed
    encode      CODEC's encoding and statistics alone, on the build's threads, written nowhere
    disk        the bytes of a build with codec none, written and synced alone

Part "writer": one shard after the other of made-up rows, not synced, CPU seconds (user and system) per GB of rows:

    raw, memmap    the same bytes to a plain file
    writer CODEC   the shard writer with statistics; bare CODEC: without
    zarr-python, tensorstore, zarrs CODEC   the same array, chunks and codec, a shard at a time
"""

import argparse
import ctypes
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from synthetic import make_plan
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from writer import measure_writer

from actcache.model import Decoder
from actcache.producer.build import default_encode_threads, fill_captures
from actcache.producer.clock import Clock
from actcache.producer.forward import Forward, ShardBuffers, make_transfer
from actcache.producer.staging import Filling
from actcache.producer.summary import BuildReporter
from actcache.store.encode import EncodedShard, RunEncoder
from actcache.store.gathered import Gathered
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog

WIDTH, N_LAYERS, VOCAB = 512, 6, 50_304
LAYERS = tuple(range(N_LAYERS))


def pythia_70m(device: str, dtype: torch.dtype) -> Decoder:
    """A GPT-NeoX of Pythia-70m's shape, with random weights."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=8,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        decoder = Decoder(GPTNeoXForCausalLM(config).to(device, dtype), name="pythia-70m-shaped")
    decoder.cut(N_LAYERS - 1)
    return decoder


class Bench:
    """The methods of part "build"; each returns seconds."""

    def __init__(self, work: Path, decoder: Decoder, n_tokens: int, shard_rows: int, batch_size: int) -> None:
        self.work, self.decoder, self.n_tokens = work, decoder, n_tokens
        self.shard_rows, self.batch_size = shard_rows, batch_size
        self.threads = default_encode_threads(decoder.device.type)
        self.stages: dict[str, list[dict]] = {}
        self.catalog = self._planned("none", "plan")
        self.buffers = ShardBuffers()

    def _planned(self, codec: str, name: str | None = None) -> Catalog:
        out = self.work / f"{name or codec}.zarr"
        shutil.rmtree(out, ignore_errors=True)
        make_plan(
            out,
            n_tokens=self.n_tokens,
            layers=LAYERS,
            width=WIDTH,
            codec=codec,
            shard_rows=self.shard_rows,
            batch_size=self.batch_size,
        )
        return Catalog(LocalObjects(out))

    def forward(self) -> float:
        """The blocks alone."""
        started = time.perf_counter()
        with torch.inference_mode():
            for shard in range(self.catalog.grid.n_shards):
                tokens = self.catalog.plan_object("tokens", shard)
                for start in range(0, len(tokens), self.batch_size):
                    ids = torch.from_numpy(tokens[start : start + self.batch_size].astype(np.int64))
                    self.decoder.base(input_ids=ids.to(self.decoder.device), use_cache=False)
        self._synchronize()
        return time.perf_counter() - started

    def null(self) -> float:
        """Every vector at its row, then nothing."""
        clock, captures = Clock(), list(self.catalog.captures.values())
        transfer = make_transfer(self.decoder, self.catalog, captures, clock)
        forward = Forward(self.catalog, self.decoder, transfer, clock, lambda _n: None)
        started = time.perf_counter()
        for shard in range(self.catalog.grid.n_shards):
            filling = Filling()
            forward.run(shard, captures, self.buffers, filling)
            filling.wait()
        spent = time.perf_counter() - started
        transfer.close()
        return spent

    def _synchronize(self) -> None:
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize()

    def build(self, codec: str) -> float:
        """A whole build, without its planning."""
        catalog = self._planned(codec)
        started = time.perf_counter()
        summary = fill_captures(catalog, ["resid_post"], self.decoder, reporter=BuildReporter())
        spent = time.perf_counter() - started
        self.stages.setdefault(codec, []).append(summary.as_json() | {"store": summary.store.name})
        shutil.rmtree(self.work / f"{codec}.zarr")
        return spent

    def encode(self, codec: str) -> float:
        """Encoding and statistics alone, of what the last null run left in the buffer, for every shard."""
        catalog = self._planned(codec)
        found = catalog.capture("resid_post")
        rows, spec = self.buffers.on_disk_dtype("resid_post"), found.arrays["rows"]
        encoder = RunEncoder(found.capture, spec)
        started = time.perf_counter()
        with ThreadPoolExecutor(self.threads) as pool:
            for shard in range(catalog.grid.n_shards):
                planned = catalog.shards.records[shard]
                gathered = Gathered(found.capture, spec, planned, lambda *_: None)
                for _ in EncodedShard(rows[:, : planned.stored], encoder, gathered, pool, self.threads + 2):
                    pass
        spent = time.perf_counter() - started
        shutil.rmtree(self.work / f"{codec}.zarr")
        return spent

    def disk(self) -> float:
        """The bytes of codec none, written in chunks and synced, a file a shard."""
        rows = self.buffers.on_disk_dtype("resid_post").reshape(-1, 256 * WIDTH)
        started = time.perf_counter()
        for shard in range(self.catalog.grid.n_shards):
            path = self.work / f"raw.{shard}"
            with path.open("wb", buffering=0) as file:
                for chunk in rows:
                    file.write(chunk.data)
                os.fsync(file.fileno())
        spent = time.perf_counter() - started
        for shard in range(self.catalog.grid.n_shards):
            (self.work / f"raw.{shard}").unlink()
        return spent


def measure_build(arguments: argparse.Namespace) -> dict:
    """Part "build": each method between two forward passes, `rounds` times over."""
    decoder = pythia_70m(arguments.device, getattr(torch, arguments.dtype))
    bench = Bench(arguments.work, decoder, arguments.tokens, arguments.shard_rows, arguments.batch_size)
    bench.forward()
    bench.null()
    found = {}
    for name in arguments.methods.split(","):
        method = bench.null if name == "null" else lambda name=name: bench.build(name)
        method()
        bench.stages.clear()
        runs: list[dict] = []
        before = timed(bench.forward)
        for _ in range(arguments.rounds):
            run, alone = timed(method), {}
            after = timed(bench.forward)
            if name != "null":
                own = bench.stages[name][-1]["stage_s"]["forward"]
                alone = {"own": own, "encode": bench.encode(name), "disk": bench.disk()}
            forward = {key: (before[key] + after[key]) / 2 for key in before}
            before = after
            runs.append({"build": run, "forward": forward, **alone})
            ratio = {key: run[key] / forward[key] for key in run}
            if alone:
                ratio["own"] = run["s"] / alone["own"]
            print(f"{name:6} {run['s']:6.2f} s; of forward: {ratio}", flush=True)
        found[name] = summarised(runs) | {"stages": bench.stages.get(name)}
        print(json.dumps({k: v for k, v in found[name].items() if k.startswith("median")}), flush=True)
    return {
        **{n: getattr(arguments, n) for n in ("tokens", "shard_rows", "batch_size", "device", "dtype")},
        "encode_threads": bench.threads,
        "torch_threads": torch.get_num_threads(),
        "methods": found,
    }


def timed(method: Callable[[], float]) -> dict[str, float]:
    """Seconds, and CPU seconds of all threads."""
    cpu = time.process_time()
    seconds = method()
    return {"s": seconds, "cpu_s": time.process_time() - cpu}


def summarised(runs: list[dict]) -> dict:
    """Medians of ratios within a round, and every number they come from."""
    found: dict = {
        f"median_{key}_over_forward": statistics.median(r["build"][key] / r["forward"][key] for r in runs)
        for key in ("s", "cpu_s")
    }
    if "disk" in runs[0]:
        found["median_s_over_own_forward"] = statistics.median(r["build"]["s"] / r["own"] for r in runs)
        slowest = [max(r["own"], r["encode"], r["disk"]) / r["build"]["s"] for r in runs]
        found["median_slowest_over_build"] = statistics.median(slowest)
    return found | {"runs": runs}


def keep_freed_memory() -> None:
    """Where the allocator is glibc's: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, a GiB each."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (-1, -3):
            mallopt(parameter, 1 << 30)


def processor() -> str:
    """The processor's name."""
    with Path("/proc/cpuinfo").open() as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    """Measure and print; write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="build,writer")
    parser.add_argument("--rounds", type=int, default=5, help="of each method")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--shard-rows", type=int, default=4_096)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", default="null,none,lz4,zstd,uint8", help='of part "build"')
    keep_freed_memory()
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    found: dict = {}
    if arguments.out and arguments.out.exists():  # the parts may be measured one after the other
        found = json.loads(arguments.out.read_text())
    found["machine"] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    packages = ("torch", "transformers", "numpy", "numcodecs", "zarr", "crc32c")
    found["versions"] = {name: version(name) for name in packages}
    for part in arguments.parts.split(","):
        measured = {"build": measure_build, "writer": measure_writer}[part](arguments)
        measured["load"] = os.getloadavg()
        if part == "build":
            measured["methods"] = found.get(part, {}).get("methods", {}) | measured["methods"]
        found[part] = measured
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
