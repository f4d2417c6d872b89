"""What storing a byte a number costs: FVU of every layer of a real model, and of made-up rows with massive ones.

    python benchmarks/quantise.py --work /tmp/quantise --out benchmarks/results/quantise.json

The model is SmolLM2-135M-Instruct (Q4_1 weights dequantised, see `actcache demo`), float32, on State of the Union
speeches, `resid_post` of all thirty layers; once without the first position of every sequence, and once with it among
the kept rows, where its massive activations are. Made-up rows are normal, each column with a spread of its own, and
every sequence begins with a row of one number of 20,000. FVU: see `actcache.store.statistics.QuantisationError`.
"""

import argparse
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
from synthetic import make_store

import actcache
from actcache.model import load_model, load_tokenizer
from actcache.producer import samples
from actcache.producer.build import build
from actcache.producer.corpus import open_corpus
from actcache.producer.settings import Settings

BOUND = 5e-4
SPIKE = 20_000.0


def errors_of(path: Path) -> dict[str, dict]:
    """Every layer's error, as it was measured while writing."""
    found = actcache.open(path).quantisation_error(split=None)
    return {str(layer): error._asdict() for layer, error in found.items()}


def real(work: Path, n_tokens: int, exclude_first: int) -> dict[str, dict]:
    """Of the real model."""
    model, corpus = samples.make_model(work / "model"), samples.make_corpus(work / "sotu.jsonl")
    out = work / f"real.{exclude_first}.zarr"
    decoder = load_model(model, dtype="float32")
    settings = Settings(
        out=out,
        layers=tuple(range(decoder.n_layers)),
        codec="uint8",
        n_tokens=n_tokens,
        holdout_frac=0.1,
        exclude_first=exclude_first,
    )
    build(settings, decoder, load_tokenizer(model), open_corpus(corpus), corpus_name="sotu")
    return errors_of(out)


def made_up(work: Path, n_tokens: int) -> dict[str, dict]:
    """Of normal rows with a massive one at the start of every sequence, all of them kept."""
    out = work / "made_up.zarr"
    shutil.rmtree(out, ignore_errors=True)
    make_store(out, n_tokens=n_tokens, n_layers=2, width=576, codec="uint8", spike=SPIKE)
    return errors_of(out)


def worst(errors: dict[str, dict]) -> dict[str, float]:
    """The greatest of each number over the layers."""
    return {
        name: float(np.max([e[name] for e in errors.values()]))
        for name in ("fvu", "worst", "fvu_kept", "worst_kept")
    }


def main() -> None:
    """Measure and print; write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=12_800)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cases = {
        "real, first position excluded": lambda: real(arguments.work, arguments.tokens, 1),
        "real, first position kept": lambda: real(arguments.work, arguments.tokens, 0),
        "made up, spikes of 20000 kept": lambda: made_up(arguments.work, 65_536),
    }
    found: dict = {
        "tokens": arguments.tokens,
        "bound": BOUND,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "cases": {},
    }
    for name, measure in cases.items():
        layers = measure()
        found["cases"][name] = {"greatest": worst(layers), "layers": layers}
        print(name, worst(layers), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
