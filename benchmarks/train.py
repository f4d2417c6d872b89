"""One training step, ours and others', against the encoder's product alone; and what each has learnt after some rows.

    PYTHONPATH=.venv/interop python benchmarks/train.py --out benchmarks/results/train.json
    ... --only speed        or quality: the other part of the file stays as it is

Speed: every round makes one product and one step of every trainer, with nothing dead and with an eighth of the latents (1,000
at most) counted as dead; medians over rounds. A step is all of it: encode, decode, loss, backward, projection, clipping, Adam,
norms, and what each trainer counts as it goes.

    product             pre = z W_enc^T into memory that is there: the floor in arithmetic
    bytes               what a step cannot but move, at the speed of a copy: every weight read once for the product, every
                        gradient written once, Adam's seven passes, the rows three times
    actcache, ...       see trainers.py; "dense torch" is what one writes first

Quality: from the same standardised rows in the same order, share of variance unexplained on held-out rows, and share of
latents that are active in none of them.

Needs the packages of tests/interop/requirements.txt. On a GPU larger shapes are measured, with our kernels in triton.
"bfloat16": only ours, with products in bfloat16 and everything else in float32.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trainers import TRAINERS, Shape, Trainer

from trainer.transform import standardise

PACKAGES = ("torch", "triton", "sae-lens", "dictionary-learning", "eai-sparsify")
CPU = {
    "small": Shape(d=128, f=2048, k=16, b=2048),
    "main": Shape(d=512, f=8192, k=32, b=4096),
    "main bfloat16": Shape(d=512, f=8192, k=32, b=4096, precision="bfloat16"),
}
GPU = {
    "main": Shape(d=512, f=32_768, k=32, b=8192, device="cuda"),
    "large": Shape(d=2048, f=65_536, k=64, b=8192, device="cuda"),
    "main bfloat16": Shape(d=512, f=32_768, k=32, b=8192, device="cuda", precision="bfloat16"),
}

STEPS_AND_SEEDS = {"small": (100, 3)}
"""Of the comparison of quality; else 60 steps and one seed."""


def make_rows(n: int, d: int, seed: int) -> Tensor:
    """Standardised rows [n, d]: a few of 8 d directions each, whose frequencies fall off, and noise."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(8 * d, d, generator=torch.Generator().manual_seed(0))
    atoms /= atoms.norm(dim=1, keepdim=True)
    share = 1 / torch.arange(1, 8 * d + 1) ** 0.7
    rows = []
    for start in range(0, n, 4096):
        b = min(4096, n - start)
        chosen = torch.multinomial(share.expand(b, -1), 24, generator=generator)
        size = 1 + torch.rand(b, 24, generator=generator)
        x = (atoms[chosen] * size[..., None]).sum(1) + 0.02 * torch.randn(b, d, generator=generator)
        rows.append(standardise(x).z)
    return torch.cat(rows)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def learning_rate(shape: Shape) -> float:
    """The rule of Gao et al. as sparsify and dictionary_learning have it."""
    return 2e-4 * (2**14 / shape.f) ** 0.5


def make_trainers(shape: Shape, first: Tensor, seed: int = 0) -> dict[str, Trainer]:
    """Every trainer, or only ours where products are to be in bfloat16."""
    wanted = TRAINERS if shape.precision == "float32" else {"actcache": TRAINERS["actcache"]}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return {name: make(shape, first, learning_rate(shape), seed) for name, make in wanted.items()}


def floors(shape: Shape, rows: Tensor) -> dict[str, Callable[[], Any]]:
    """What no step can do without: arithmetic and memory traffic."""
    weights = torch.randn(shape.f, shape.d, device=rows.device)
    dtype = torch.bfloat16 if shape.precision == "bfloat16" else torch.float32
    left, right = rows.to(dtype), weights.to(dtype).T
    out = torch.empty(shape.b, shape.f, dtype=dtype, device=rows.device)
    n_values = 9 * 2 * shape.d * shape.f + 3 * shape.b * shape.d
    source = torch.ones(n_values // 2, device=rows.device)  # a copy moves every value twice
    target = torch.zeros_like(source).fill_(2)
    return {"product": lambda: torch.mm(left, right, out=out), "bytes": lambda: target.copy_(source)}


def measure_speed(shape: Shape, n_rounds: int) -> dict[str, Any]:
    """Interleaved rounds; medians, and ratios of medians."""
    n_dead = min(1000, shape.f // 8)
    rows = make_rows(shape.b, shape.d, seed=1).to(shape.device)
    jobs: dict[str, Callable[[], Any]] = floors(shape, rows)
    for name, trainer in make_trainers(shape, rows).items():
        jobs[name] = lambda trainer=trainer: trainer.step(rows, 0)
        jobs[f"{name}, {n_dead} dead"] = lambda trainer=trainer: trainer.step(rows, n_dead)
    raw: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(n_rounds + 1):
        for name, job in jobs.items():
            seconds = timed(job, shape.device)
            if i:  # the first round warms up
                raw[name].append(seconds)
    median = {name: statistics.median(values) for name, values in raw.items()}
    ours = {0: median["actcache"], n_dead: median[f"actcache, {n_dead} dead"]}
    return {
        "shape": shape._asdict(),
        "n_dead": n_dead,
        "median_s": median,
        "over_product": {name: value / median["product"] for name, value in median.items()},
        "rows_per_s": {
            name: shape.b / value for name, value in median.items() if name not in ("product", "bytes")
        },
        "others_over_ours": {
            name: value / ours[n_dead if name.endswith("dead") else 0]
            for name, value in median.items()
            if name not in ("product", "bytes") and not name.startswith("actcache")
        },
        "step_over_both_floors": {
            count: value / (median["product"] + median["bytes"]) for count, value in ours.items()
        },
        "raw_s": raw,
    }


@torch.no_grad()
def score(trainer: Trainer, rows: Tensor) -> dict[str, float]:
    """Share of variance unexplained, about each dimension's mean; share of latents never active."""
    error, active = 0.0, None
    for part in rows.split(2048):
        error += float((trainer.reconstruct(part) - part).double().square().sum())
        found = trainer.active(part)
        active = found if active is None else active | found
    assert active is not None
    total = float((rows - rows.mean(0)).double().square().sum())
    return {"fvu": error / total, "never_active": float((~active).float().mean())}


def measure_quality(shape: Shape, n_steps: int, n_seeds: int) -> dict[str, Any]:
    """Every trainer from every seed on the same rows; scores on held-out ones."""
    held_out = make_rows(8192, shape.d, seed=2).to(shape.device)
    train = make_rows(n_steps * shape.b, shape.d, seed=3)
    found: dict[str, Any] = {"shape": shape._asdict(), "n_rows": len(train), "held_out_rows": len(held_out)}
    scores: dict[str, list[dict[str, float]]] = {}
    for seed in range(n_seeds):
        for name, trainer in make_trainers(shape, train[: 4 * shape.b].to(shape.device), seed).items():
            for rows in train.split(shape.b):
                trainer.step(rows.to(shape.device).clone(), 0)
            scores.setdefault(name, []).append(score(trainer, held_out))
            print(f"  seed {seed} {name:22} {scores[name][-1]}", flush=True)
    found["fvu"] = {name: statistics.fmean(one["fvu"] for one in each) for name, each in scores.items()}
    return {**found, "scores": scores}


def main() -> None:
    """Measure and print; write one JSON file with every single measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("speed", "quality"))
    parser.add_argument("--shape", action="append", help="one of the shapes, by name; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(2 if not torch.cuda.is_available() else torch.get_num_threads())
    shapes = GPU if torch.cuda.is_available() else CPU
    shapes = {name: shape for name, shape in shapes.items() if name in (arguments.shape or shapes)}
    report = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    for part, measure in (
        ("speed", lambda _, shape: measure_speed(shape, arguments.rounds)),
        ("quality", lambda name, shape: measure_quality(shape, *STEPS_AND_SEEDS.get(name, (60, 1)))),
    ):
        if arguments.only in (None, part):
            section = report.setdefault(part, {})
            section |= {"machine": machine()}
            for name, shape in shapes.items():
                print(part, name, shape, flush=True)
                section[name] = measure(name, shape)
                shown = {
                    k: v for k, v in section[name].items() if k in ("over_product", "others_over_ours", "fvu")
                }
                print(json.dumps(shown, indent=1), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
