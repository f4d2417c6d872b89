"""Time to a trained SAE, and a build within a small disk budget, on the demo's model and text.

    python benchmarks/live.py --inputs demo --work build/bench --out benchmarks/results/live.json [--part ways|bounded]

`--inputs` is a folder that `actcache demo` made: a model and text of packages. Every way runs in processes of its own, so
start-up and loading the model count. On one layer, since that is what SAELens trains on:

    build, train   a store, then an SAE from it; a second one takes a second reading
    run            `actcache run`: the trainer follows the build
    sweep          five SAEs from one reading of the store
    SAELens        its runner: the model runs anew for each SAE (with `--part ways`, where PYTHONPATH has it)

The bounded run is of all layers in float32: about five times the budget. The store's folder is measured ten times a second.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from actcache.service.footprint import bytes_under

LAYER, EXPANSION, K, BATCH, SEQ_LEN = 2, 8, 32, 4096, 128
SAE = [f"expansion={EXPANSION}", f"k={K}", f"batch_rows={BATCH}", "lr=1e-3", "auxk=0"]
BUDGET, BOUNDED_TOKENS = 200_000_000, 15_000


def timed(command: list[str]) -> float:
    """Seconds that a command takes; it has to end well."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def actcache(*arguments: str | Path) -> list[str]:
    """A command line of ours."""
    return [sys.executable, "-m", "cli", *map(str, arguments)]


def given(option: str, values: list[str]) -> list[str]:
    """An option for each value."""
    return [text for value in values for text in (option, value)]


def ways(inputs: Path, work: Path, n_tokens: int) -> dict[str, Any]:
    """Seconds of each process, twice where it is what a second SAE costs."""
    text = ["--model", inputs / "SmolLM2-135M-Instruct", "--corpus", inputs / "sotu.jsonl"]
    text += ["--tokens", str(n_tokens), "--seq-len", str(SEQ_LEN), "--layers", str(LAYER), "--device", "cpu"]
    text += ["--holdout", "0"]
    store, sae = work / "acts.zarr", given("--set", SAE)
    found: dict[str, Any] = {"build_s": timed(actcache("build", *text, "--out", store))}
    found["train_s"] = [
        timed(actcache("train", store, "--out", work / f"run-{i}", *sae, "--device", "cpu")) for i in range(2)
    ]
    found["run_s"] = timed(
        actcache("run", *text, "--out", work / "live", "--max-disk", "1GB", *given("--sae", SAE))
    )
    sweep = ["--sweep", "seed=0,1,2,3,4"]
    found["sweep_of_5_s"] = timed(
        actcache("train", store, "--out", work / "sweep", *sae, *sweep, "--device", "cpu")
    )
    peer = [sys.executable, __file__, "--inputs", str(inputs), "--work", str(work), "--peer"]
    found["saelens_s"] = [timed(peer) for _ in range(2)]
    once = sum(found["train_s"]) / 2
    peer_s = sum(found["saelens_s"]) / 2
    found["to_n_saes_s"] = {
        n: {
            "build, train": found["build_s"] + n * once,
            "run, train": found["run_s"] + (n - 1) * once,
            "SAELens": n * peer_s,
        }
        for n in (1, 2, 5)
    }
    found["to_n_saes_s"][5]["build, sweep"] = found["build_s"] + found["sweep_of_5_s"]
    return found


def peer(inputs: Path, work: Path) -> None:
    """SAELens' runner on the tokens of the store that was built before, at the same layer: rows are made as they are used."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports] - in .venv/interop
    from sae_lens import (  # pyright: ignore[reportMissingImports]
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    import actcache as ours

    tokens = ours.open(work / "acts.zarr").tokens
    model = str(inputs / "SmolLM2-135M-Instruct")
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=576, d_sae=EXPANSION * 576, k=K, aux_loss_coefficient=0.0, normalize_activations="none"
        ),
        model_name=model,
        model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{LAYER}",
        dataset_path="",
        is_dataset_tokenized=True,
        streaming=False,
        prepend_bos=False,
        context_size=SEQ_LEN,
        training_tokens=tokens.size,
        train_batch_size_tokens=BATCH,
        n_batches_in_buffer=32,
        store_batch_size_prompts=16,
        lr=1e-3,
        device="cpu",
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(work / "saelens"),
        logger=LoggingConfig(log_to_wandb=False),
    )
    dataset = Dataset.from_dict({"input_ids": tokens.astype("int64").tolist()})
    LanguageModelSAETrainingRunner(config, override_dataset=dataset).run()


def bounded(inputs: Path, work: Path) -> dict[str, Any]:
    """A whole run within a budget that holds a fifth of its data; what the store's folder took meanwhile."""
    out = work / "bounded"
    shutil.rmtree(out, ignore_errors=True)
    command = actcache(
        *("run", "--model", inputs / "SmolLM2-135M-Instruct", "--corpus", inputs / "sotu.jsonl"),
        *("--tokens", str(BOUNDED_TOKENS), "--seq-len", "64", "--layers", "all", "--dtype", "float32"),
        *("--codec", "none", "--holdout", "0", "--device", "cpu", "--max-disk", str(BUDGET), "--out", out),
        *given("--sae", ["expansion=4", f"k={K}", f"batch_rows={BATCH}", "keep_newest=1"]),
    )
    started, samples = time.perf_counter(), list[int]()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            samples.append(bytes_under(out / "acts.zarr"))
            time.sleep(0.1)
    info = json.loads(subprocess.check_output(actcache("info", out / "acts.zarr", "--json")))
    found = json.loads((out / "run/sae.json").read_text(encoding="utf-8"))
    layers = info["captures"]["resid_post"]["layers"]
    return {
        "status": process.returncode,
        "elapsed_s": time.perf_counter() - started,
        "budget_bytes": BUDGET,
        "data_bytes": info["tokens"] * len(layers) * 576 * 4,
        "peak_bytes": max(samples),
        "samples": len(samples),
        "shards": info["shards"],
        "retired_shards": info["retired_shards"],
        "rows_trained_on": found["rows"],
        "rows_there_are": info["kept_tokens"] * len(layers),
    }


def main() -> None:
    """Measure, and write what was found; the other part of a file that is there stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("ways", "bounded"), default=None)
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    if args.peer:
        peer(args.inputs, args.work)
        return
    work = args.work / "live"
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "actcache": version("actcache"),
        "sae_lens": _version("sae_lens"),
    }
    if args.part in (None, "ways"):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        found["ways"] = {"tokens": args.tokens, **ways(args.inputs, work, args.tokens)}
    if args.part in (None, "bounded"):
        found["bounded"] = bounded(args.inputs, args.work)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def _version(module: str) -> str | None:
    """None where it is not installed: only `ways` needs it."""
    return __import__(module).__version__ if importlib.util.find_spec(module) else None


if __name__ == "__main__":
    main()
