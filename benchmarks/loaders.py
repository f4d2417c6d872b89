"""The stream beside other projects' loaders: the same rows, one layer, batches of 8,192; speed, and how well each shuffles.

    make interop                                     # SAELens and what it needs, in .venv/interop
    PYTHONPATH=.venv/interop:SAEV/src python benchmarks/loaders.py --work /tmp/loaders --out benchmarks/results/loaders.json

Rows are float32, width 512, sequences of 128 that come from documents of 8, in the corpus' order; each project's own file
format, uncompressed, in page cache. Every loader mixes 32,768 rows at a time, so all take the same memory; "default window"
is the stream with the window it has unless told otherwise. SAELens is its cached-activations `ActivationsStore`; saev its
`ShuffledDataLoader`, of which SAEV is a checkout (the package on PyPI is older and has none): of it only the loader is
imported, not the vision models beside it. What is not installed is left out, and the result says so.

Each turn is a process of its own that reads one loader, after some batches that touch its memory; rounds are interleaved. CPU
seconds are those of all its processes. Shuffle quality is over one whole epoch, as `stream.quality()` measures it: the
variance of batch means over that of batches drawn at random; distinct sequences in a batch; the share of rows whose
sequence was in the batch before.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing import queues
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

N_SEQUENCES, SEQ_LEN, WIDTH, PER_DOCUMENT = 2048, 128, 512, 8
N_ROWS, BATCH, WINDOW = N_SEQUENCES * SEQ_LEN, 8192, 32_768
HOOK = "blocks.3.hook_resid_post"


# The rows, in everybody's format. Columns 0 and 1 say which row it is.


def make_rows(work: Path) -> Path:
    """acts.npy [sequence, position, width]: what a sequence and its document have in common, and noise."""
    out = work / "acts.npy"
    if not out.exists():
        rng = np.random.default_rng(0)
        mean = np.repeat(
            rng.standard_normal((N_SEQUENCES // PER_DOCUMENT, WIDTH), np.float32), PER_DOCUMENT, 0
        )
        mean += rng.standard_normal((N_SEQUENCES, WIDTH), np.float32)
        rows = np.lib.format.open_memmap(out, "w+", np.float32, (N_SEQUENCES, SEQ_LEN, WIDTH))
        for s in range(N_SEQUENCES):
            rows[s] = 0.5 * mean[s] + rng.standard_normal((SEQ_LEN, WIDTH), np.float32)
            rows[s, :, 0], rows[s, :, 1] = s, np.arange(SEQ_LEN)
        rows.flush()
    return out


def make_store(work: Path) -> None:
    """Ours: uncompressed float32."""
    from actcache.producer.importing import ImportSettings, import_activations, open_source

    settings = ImportSettings(
        out=work / "ours.zarr", layers=None, dtype=None, codec="none", holdout_frac=0.0, exclude_first=0
    )
    source = open_source(work / "acts.npy", layer_of={"acts.npy": 3}, source_format=None, hook=None)
    import_activations(source, settings)


def make_arrow(work: Path) -> None:
    """An Arrow dataset of one column per hook, as SAELens writes."""
    import datasets

    if (work / "arrow" / "dataset_info.json").exists():
        return
    rows = np.load(work / "acts.npy", mmap_mode="r")
    features = datasets.Features({HOOK: datasets.Array2D((SEQ_LEN, WIDTH), "float32")})
    made = datasets.Dataset.from_generator(
        lambda: ({HOOK: one} for one in rows), features=features, cache_dir=str(work / "arrow-cache")
    )
    made.save_to_disk(work / "arrow")


def make_saev(work: Path) -> None:
    """Shards of saev: float32 without a header, [example, layer, token, width]."""
    out = work / "saev" / "shards" / "rows"
    out.mkdir(parents=True, exist_ok=True)
    per_shard = N_SEQUENCES // 8
    rows = np.load(work / "acts.npy", mmap_mode="r")
    names = [f"acts{i:06}.bin" for i in range(8)]
    for i, name in enumerate(names):
        if not (out / name).exists():
            rows[i * per_shard : (i + 1) * per_shard].tofile(out / name)
    meta = {
        "family": "fake-clip",
        "ckpt": "none",
        "layers": [3],
        "content_tokens_per_example": SEQ_LEN,
        "cls_token": False,
        "d_model": WIDTH,
        "n_examples": N_SEQUENCES,
        "max_tokens_per_shard": per_shard * SEQ_LEN,
        "data": "",
        "dataset": "/none",
        "pixel_agg": "majority",
        "dtype": "float32",
        "protocol": "2.1",
    }
    (out / "metadata.json").write_text(json.dumps(meta))
    (out / "shards.json").write_text(json.dumps([{"name": name, "n_examples": per_shard} for name in names]))


# The loaders: each an endless or a one-epoch iterator of rows [b, d].


def ours(work: Path, window_rows: int) -> Iterator[Tensor]:
    """One reading thread."""
    import actcache

    with actcache.open(work / "ours.zarr").stream(
        batch_size=BATCH, window_rows=window_rows, threads=1, epochs=None, drop_last=True
    ) as stream:
        for batch in stream:
            yield batch.rows


def memmap(work: Path) -> Iterator[Tensor]:
    """A true shuffle: rows gathered one by one."""
    rows = np.load(work / "acts.npy", mmap_mode="r").reshape(-1, WIDTH)
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(N_ROWS)
        for start in range(0, N_ROWS, BATCH):
            yield torch.from_numpy(np.take(rows, order[start : start + BATCH], axis=0, mode="clip"))


def saelens(work: Path) -> Iterator[Tensor]:
    """As its trainer makes it of a configuration with cached activations."""
    from sae_lens.training.activations_store import ActivationsStore

    made: Any = ActivationsStore(
        model=None,  # type: ignore[arg-type]  # not asked for anything when activations are cached
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=SEQ_LEN,
        d_in=WIDTH,
        n_batches_in_buffer=WINDOW // SEQ_LEN,
        total_training_tokens=N_ROWS,
        store_batch_size_prompts=32,
        train_batch_size_tokens=BATCH,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(work / "arrow"),
    )
    made._dataloader = None
    yield from made


def saev(work: Path) -> Iterator[Tensor]:
    """A process and one thread; epoch after epoch."""
    loader = _saev_module("shuffled")
    config = loader.Config(
        shards=work / "saev" / "shards" / "rows",
        layer=3,
        batch_size=BATCH,
        buffer_size=WINDOW // BATCH,
        n_threads=1,
    )
    while True:
        made = loader.DataLoader(config)
        for batch in made:
            CHILDREN[:] = [made.manager_proc]
            yield batch["act"]


CHILDREN: list[BaseProcess] = []


def _saev_module(name: str) -> Any:
    """A module of saev.data without the package's __init__, which imports vision models."""
    found = importlib.util.find_spec("saev")
    assert found is not None
    assert found.submodule_search_locations is not None
    if (
        importlib.util.find_spec("torchvision") is None
    ):  # imported for datasets of pictures, of which there are none
        sys.modules["torchvision"] = pictures = types.ModuleType("torchvision")
        sys.modules["torchvision.datasets"] = pictures.datasets = types.ModuleType("torchvision.datasets")
        pictures.datasets.ImageFolder = object
    if not hasattr(queues.Queue, "__class_getitem__"):  # saev is written for Python 3.12
        queues.Queue.__class_getitem__ = classmethod(types.GenericAlias)
    package = types.ModuleType("saev.data")
    package.__path__ = [str(Path(path) / "data") for path in found.submodule_search_locations]
    sys.modules.setdefault("saev.data", package)
    return importlib.import_module(f"saev.data.{name}")


def _has_saev() -> bool:
    found = importlib.util.find_spec("saev")
    places = found.submodule_search_locations if found is not None else None
    return any((Path(path) / "data" / "shuffled.py").exists() for path in places or [])


LOADERS: dict[str, tuple[Callable[[Path], Iterator[Tensor]], int, int]] = {
    "stream": (lambda work: ours(work, WINDOW), 16, 64),
    "stream, default window": (lambda work: ours(work, 131_072), 64, 64),
    "memmap": (memmap, 4, 64),
    "SAELens": (saelens, 8, 32),
    "saev": (saev, 4, 8),
}
"""Name -> the loader, batches that warm it up, and batches that are timed."""


def timed(rows: Iterator[Tensor], n_warm: int, n_batches: int) -> dict[str, float]:
    """Rows per second, and CPU seconds of all processes per GB of rows."""
    for _ in range(n_warm):
        next(rows)
    cpu, wall, n = _cpu_s(), time.perf_counter(), 0
    for _ in range(n_batches):
        n += len(next(rows))
    wall, cpu = time.perf_counter() - wall, _cpu_s() - cpu
    return {"rows_per_s": n / wall, "cpu_s_per_gb": cpu / (n * WIDTH * 4 / 1e9)}


def _cpu_s() -> float:
    own, ticks = time.process_time(), os.sysconf("SC_CLK_TCK")
    for child in CHILDREN:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        own += (int(fields[11]) + int(fields[12])) / ticks
    return own


def quality(rows: Iterator[Tensor]) -> dict[str, float]:
    """Over as many batches as make an epoch."""
    from actcache.flow import Batch
    from actcache.reader.quality import QualityMeter

    meter = QualityMeter(N_ROWS)
    for _ in range(N_ROWS // BATCH):
        batch = next(rows)
        sequence, position = batch[:, 0].long(), batch[:, 1].long()
        document = sequence // PER_DOCUMENT
        lookup = {"document": document}.__getitem__
        meter.update(Batch(batch[:, 2:], position, sequence, position, lookup=lookup))
    found = meter.means()
    return {
        "variance_ratio": meter.variance_ratio(),
        "sequences": found["sequences"],
        "previous_sequence": found["previous"],
    }


def versions() -> dict[str, str]:
    """Of the loaders and what they rest on."""
    found = {name: version(name) for name in ("numpy", "torch")}
    for name in ("sae-lens", "datasets"):
        if importlib.util.find_spec(name.replace("-", "_")):
            found[name] = version(name)
    if _has_saev():
        place = importlib.util.find_spec("saev")
        assert place is not None
        found["saev"] = f"a checkout at {os.environ.get('SAEV_COMMIT', 'an unnamed commit')}"
    return found


def main() -> None:
    """Measure and print; write one JSON file with every single measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", choices=LOADERS, help="one turn of one loader, printed as JSON")
    parser.add_argument("--quality", action="store_true", help="with --run: shuffle quality instead of speed")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.run:
        make, n_warm, n_batches = LOADERS[chosen.run]
        rows = make(chosen.work)
        found = quality(rows) if chosen.quality else timed(rows, n_warm, n_batches)
        print(json.dumps(found), flush=True)
        for child in CHILDREN:  # saev's other process would wait for somebody to take what it has read
            child.kill()
        os._exit(0)
    missing = {"SAELens": not importlib.util.find_spec("sae_lens"), "saev": not _has_saev()}
    present = [name for name in LOADERS if not missing.get(name)]
    chosen.work.mkdir(parents=True, exist_ok=True)
    make_rows(chosen.work)
    make_store(chosen.work)
    if "SAELens" in present:
        make_arrow(chosen.work)
    if "saev" in present:
        make_saev(chosen.work)
    speed: dict[str, list[dict[str, float]]] = {name: [] for name in present}
    for turn in range(chosen.rounds):
        for name in present[:: 1 if turn % 2 else -1]:
            speed[name].append(_turn(chosen.work, name))
    table = {}
    for name in present:
        median = {key: statistics.median(one[key] for one in speed[name]) for key in speed[name][0]}
        table[name] = {**median, **_turn(chosen.work, name, "--quality"), "raw": speed[name]}
        print(name, json.dumps({k: v for k, v in table[name].items() if k != "raw"}), flush=True)
    report = {
        "what": __doc__.split("\n\n")[0],
        "rows": N_ROWS,
        "width": WIDTH,
        "batch": BATCH,
        "window": WINDOW,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
        "not installed": [name for name, is_missing in missing.items() if is_missing],
        "loaders": table,
    }
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=1) + "\n")


def _turn(work: Path, name: str, *more: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", str(work), "--run", name, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
