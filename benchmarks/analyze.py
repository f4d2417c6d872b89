"""What `actcache analyze` takes: seconds per stage on the demo's store, and memory on two stores, one with 8 times the rows.

    make demo; python benchmarks/analyze.py --demo demo --work build/bench --out benchmarks/results/analyze.json

Every analysis runs in a process of its own, whose peak resident memory is read at its end (Linux). The two stores are of made-up
rows, the same shape but for their number of shards, looked at by one SAE trained on the smaller; without a model.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from synthetic import make_store

LAYERS, WIDTH, SHARD_ROWS, N_SHARDS, TIMES = 4, 128, 8192, 4, 8

CHILD = """
import json, sys, time
from pathlib import Path
import actcache
from analysis.models import find_model, load_model_of
from analysis.output import analyse_and_write
from analysis.reporter import Reporter
from analysis.run import Request
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
imported = kib("VmRSS") * 1024
run, store, out, split, wants_model = sys.argv[1:]
opened = actcache.open(store)
stages = []
def begin(name, total, unit):
    stages.append({"stage": name, "total": total, "unit": unit, "done": 0, "began": time.perf_counter()})
def advance(n):
    stages[-1]["done"] += n
begin("load the model", None, "")
model = load_model_of(opened, find_model(opened)) if wants_model == "yes" else None
request = Request(split=split)
summary = analyse_and_write(
    Path(run), opened, Path(out), request, model=model, reporter=Reporter(on_stage=begin, on_advance=advance)
)
end = time.perf_counter()
for stage, after in zip(stages, [s["began"] for s in stages[1:]] + [end], strict=True):
    stage["seconds"] = after - stage.pop("began")
print(json.dumps({"stages": stages, "imported_bytes": imported, "peak_bytes": kib("VmHWM") * 1024, "summary": summary.as_json()}))
"""


def analyse(run: Path, store: Path, out: Path, split: str, *, model: bool) -> dict[str, Any]:
    """One analysis in a process of its own: its stages, seconds from its start to its end, and memory."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(run), str(store), str(out), split, "yes" if model else "no"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {"seconds": time.perf_counter() - started, **json.loads(done.stdout.splitlines()[-1])}


def memory(work: Path) -> dict[str, Any]:
    """Peak memory of analysing a store and one with `TIMES` as many rows."""
    stores = {
        n: make_store(
            work / f"analyze-{n}.zarr",
            n_tokens=n * SHARD_ROWS,
            n_layers=LAYERS,
            width=WIDTH,
            codec="zstd",
            shard_rows=SHARD_ROWS,
        )
        for n in (N_SHARDS, N_SHARDS * TIMES)
    }
    run = work / "analyze-run"
    if not (run / "sae.json").exists():
        options = [
            "--expansion",
            "8",
            "--k",
            "16",
            "--epochs",
            "1",
            "--batch-rows",
            "4096",
            "--device",
            "cpu",
        ]
        subprocess.run(
            [sys.executable, "cli.py", "train", str(stores[N_SHARDS]), "--out", str(run), *options],
            check=True,
        )
    found = {}
    for n, store in stores.items():
        one = analyse(run, store, work / "analyze-out", "train", model=False)
        growth = one["peak_bytes"] - one["imported_bytes"]
        found[n] = {
            "n_rows": n * SHARD_ROWS * LAYERS,
            "seconds": one["seconds"],
            "imported_bytes": one["imported_bytes"],
            "peak_bytes": one["peak_bytes"],
            "growth_bytes": growth,
        }
        print(found[n], flush=True)
    return {
        "shape": {
            "layers": LAYERS,
            "width": WIDTH,
            "shard_rows": SHARD_ROWS,
            "n_latents": 8 * WIDTH,
            "k": 16,
        },
        "stores": list(found.values()),
        "rows_ratio": TIMES,
        "peak_ratio": found[N_SHARDS * TIMES]["peak_bytes"] / found[N_SHARDS]["peak_bytes"],
        "growth_ratio": found[N_SHARDS * TIMES]["growth_bytes"] / found[N_SHARDS]["growth_bytes"],
    }


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    demo = arguments.demo
    report: dict[str, Any] = {
        "what": "actcache analyze: seconds on the demo's store, and memory with 8 times the rows",
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "demo": analyse(
            demo / "run", demo / "acts.zarr", arguments.work / "analyze-demo", "holdout", model=True
        ),
    }
    print(f"demo: {report['demo']['seconds']:.0f} s", flush=True)
    report["memory"] = memory(arguments.work)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"peak with {TIMES} times the rows: {report['memory']['peak_ratio']:.3f} of the smaller's")


if __name__ == "__main__":
    main()
