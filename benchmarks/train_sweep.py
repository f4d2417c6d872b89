"""A sweep of four SAEs against the four trained alone, with a source throttled to be the bottleneck.

    python benchmarks/train_sweep.py --work build/bench --out benchmarks/results/train_sweep.json

Rows come from memory, and every batch is held back until as long has passed as two steps of the largest SAE take, as a
slow disk or link would. Also compared: are the weights the same, bit for bit.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from actcache.flow import Batch
from trainer.config import TrainConfig
from trainer.loop import train_many
from trainer.sweep import make_configs

WIDTH, BATCH_ROWS = 256, 2048
SWEEPS = ["k=16,32", "expansion=4,8"]


class Throttled:
    """Made-up rows of two layers from memory, a batch every `delay_s` at best; a BatchSource."""

    width, layers = WIDTH, (0, 1)

    def __init__(self, n_batches: int, delay_s: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randn(8 * BATCH_ROWS, WIDTH, generator=generator)
        self._n, self._delay_s, self._next, self._waited = n_batches, delay_s, 0, 0.0
        self.fingerprint = hashlib.sha256(f"{n_batches}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Batch]:
        while self._next < self._n:
            time.sleep(self._delay_s)
            self._waited += self._delay_s
            at = self._next % 8 * BATCH_ROWS
            self._next += 1
            rows = self._rows[at : at + BATCH_ROWS].clone()
            yield Batch(rows, torch.arange(BATCH_ROWS) % 2)

    def peek(self, n_rows: int) -> Batch:
        return Batch(self._rows[:n_rows], torch.arange(n_rows) % 2)

    def state_dict(self) -> dict:
        return {"next": self._next}

    def load_state_dict(self, state: dict) -> None:
        self._next = state["next"]

    def waited_s(self) -> float:
        return self._waited

    def close(self) -> None:
        pass


def run(
    configs: dict[str, TrainConfig], out: Path, n_batches: int, delay_s: float
) -> tuple[float, dict[str, str]]:
    """Seconds for all steps after the first, and the SHA-256 of every SAE."""
    shutil.rmtree(out, ignore_errors=True)
    source, times = Throttled(n_batches, delay_s), []
    train_many(source, configs, out, on_step=lambda report: times.append((report.step, time.perf_counter())))
    ends = [max(t for step, t in times if step == at) for at in (1, n_batches)]
    digests = {
        name: hashlib.sha256((out / name / "sae.safetensors").read_bytes()).hexdigest() for name in configs
    }
    return ends[1] - ends[0], digests


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    configs = make_configs({"batch_rows": BATCH_ROWS, "epochs": 1, "log_every_steps": 1000}, SWEEPS)
    largest = max(configs, key=lambda name: configs[name].expansion * 1000 + configs[name].k)
    work = arguments.work / "sweep"
    run({largest: configs[largest]}, work, 4, 0.0)
    step_s = run({largest: configs[largest]}, work, 12, 0.0)[0] / 11
    delay_s = 2 * step_s
    rounds = []
    for _ in range(arguments.rounds):
        together, digests = run(configs, work, arguments.steps, delay_s)
        alone = {
            name: run({name: config}, work, arguments.steps, delay_s) for name, config in configs.items()
        }
        rounds.append(
            {
                "sweep_s": together,
                "alone_s": {name: seconds for name, (seconds, _) in alone.items()},
                "ratio": together / sum(seconds for seconds, _ in alone.values()),
                "bit_equal": all(digests[name] == found[name] for name, (_, found) in alone.items()),
            }
        )
        print(json.dumps(rounds[-1]), flush=True)
    report = {
        "what": "a sweep of four SAEs over the sum of the four alone, source throttled",
        "shape": {"width": WIDTH, "batch_rows": BATCH_ROWS, "sweep": SWEEPS, "steps": arguments.steps},
        "largest_step_s": step_s,
        "delay_s": delay_s,
        "ratio_of_medians": median(r["sweep_s"] for r in rounds)
        / sum(median(r["alone_s"][name] for r in rounds) for name in configs),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": rounds,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"sweep / sum alone: {report['ratio_of_medians']:.2f}")


if __name__ == "__main__":
    main()
