"""Memory that streaming takes: growth of a process over one that only imports, beside the bound it was given.

    python benchmarks/memory.py --work /tmp/memory --out benchmarks/results/memory.json

Streams a 10 GB store of made-up rows (codec none) once per bound, each in a process of its own: the smallest bound that is
accepted, and a roomy one. Linux only.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from synthetic import make_store

import actcache
from actcache.errors import MemoryBoundError

CHILD = """
import sys, torch, actcache
from actcache.reader import access
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = kib("VmRSS")
store = actcache.open(sys.argv[1])
n = 0
with store.stream(batch_size=8192, memory=int(sys.argv[2]), threads=2) as stream:
    for batch in stream:
        n += len(batch)
assert n == stream.n_rows
print(before, kib("VmHWM"))
"""


def least(path: Path) -> int:
    """The smallest bound that the stream accepts."""
    try:
        actcache.open(path).stream(batch_size=8192, memory=1, threads=2)
    except MemoryBoundError as error:
        return int(re.search(r"take ([\d,]+) bytes", str(error))[1].replace(",", ""))
    raise AssertionError("a bound of one byte was accepted")


def main() -> None:
    """Measure and print; write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=2_457_600)
    arguments = parser.parse_args()
    path = make_store(
        arguments.work / "ten.zarr", n_tokens=arguments.tokens, n_layers=4, width=512, codec="none"
    )
    results = []
    for bound in (least(path), 512 << 20):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(path), str(bound)], capture_output=True, text=True, check=True
        )
        before, peak = (int(text) * 1024 for text in done.stdout.split())
        results.append({"bound": bound, "growth": peak - before, "growth_of_bound": (peak - before) / bound})
        print(results[-1], flush=True)
    if arguments.out:
        store = {"bytes": arguments.tokens * 4 * 512 * 2, "window_rows": 131_072, "threads": 2}
        arguments.out.write_text(json.dumps({"store": store, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
