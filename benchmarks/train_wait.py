"""How long training waits for data: the demo's shape, from disk, default codec.

    python benchmarks/train_wait.py --work build/bench --out benchmarks/results/train_wait.json

A store like the demo's (six layers of width 576, zstd) of made-up rows, an SAE like the demo's (8 latents per width, k 32,
batches of 4096 rows). Every run reads the store through the stream that `actcache train` uses, at its defaults; before a
cold run the kernel is told to drop the store's pages. `waited_s` is all that was spent waiting for rows, before the first
step too, when nothing has been read ahead (the first window is read once to be measured and once to be trained on).
"""

import argparse
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
from synthetic import make_store

import actcache
from actcache.reader.access import Store
from trainer.config import TrainConfig
from trainer.loop import train

N_LAYERS, WIDTH, BATCH_ROWS = 6, 576, 4096


def drop_pages(root: Path) -> None:
    """Tell the kernel to forget the store's pages."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run(store: Store, out: Path, n_steps: int) -> dict:
    """Train for some steps; what it took and what it waited."""
    shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(expansion=8, k=32, batch_rows=BATCH_ROWS, rows=n_steps * BATCH_ROWS, lr=1e-3)
    waited, times = [], []

    def watch(report: object) -> None:
        waited.append(report.waited_s)
        times.append(time.perf_counter())

    with store.stream(
        batch_size=BATCH_ROWS, outlier_norm_ratio=10, dtype=torch.float32, epochs=None
    ) as source:
        begun = time.perf_counter()
        summary = train(source, config, out, on_step=watch)
        stages = source.counters.as_json()
    return {
        "steps": summary.step,
        "rows": summary.rows,
        "elapsed_s": summary.elapsed_s,
        "steps_s": times[-1] - times[0],
        "before_first_step_s": times[0] - begun,
        "waited_s": summary.waited_s,
        "waited_frac": summary.waited_s / summary.elapsed_s,
        "waited_after_first_step_s": waited[-1] - waited[0],
        "waited_after_first_step_frac": (waited[-1] - waited[0]) / (times[-1] - times[0]),
        "rows_per_s": (summary.rows - BATCH_ROWS) / (times[-1] - times[0]),
        "stream": stages,
    }


def read_alone(store: Store, n_batches: int) -> float:
    """Rows per second of the stream with nobody training."""
    with store.stream(
        batch_size=BATCH_ROWS, outlier_norm_ratio=10, dtype=torch.float32, epochs=None
    ) as source:
        batches = iter(source)
        next(batches)
        started = time.perf_counter()
        for _ in range(n_batches):
            next(batches)
        return n_batches * BATCH_ROWS / (time.perf_counter() - started)


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    root = make_store(
        arguments.work / "demo_shape.zarr", n_tokens=131_072, n_layers=N_LAYERS, width=WIDTH, codec="zstd"
    )
    store = actcache.open(str(root))
    results = []
    for i in range(arguments.rounds):
        for name in ("cold", "warm"):
            if name == "cold":
                drop_pages(root)
            found = run(store, arguments.work / "run", arguments.steps)
            alone = read_alone(store, 64)
            results.append({"round": i, "pages": name, **found, "stream_alone_rows_per_s": alone})
            print(json.dumps(results[-1]), flush=True)
    report = {
        "what": "time that training waits for data, demo shape, from disk, zstd",
        "shape": {
            "layers": N_LAYERS,
            "width": WIDTH,
            "latents": 8 * WIDTH,
            "k": 32,
            "batch_rows": BATCH_ROWS,
        },
        "worst_waited_frac": max(r["waited_frac"] for r in results),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numcodecs": version("numcodecs"),
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"waiting for data: at most {100 * report['worst_waited_frac']:.2f} % of training time")


if __name__ == "__main__":
    main()
