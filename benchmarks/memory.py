"""Memory that streaming takes: growth of a process over one that only imports, beside the bound it was given.

    python benchmarks/memory.py --work /tmp/memory --out benchmarks/results/memory.json

Streams a 10 GB store of made-up rows (codec none) once per bound, each in a process of its own: the smallest bound that is
accepted, and a roomy one; through the page cache, and around it, files forgotten before. Linux only.
"""

import argparse
import json
import os
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
is_cached = sys.argv[3] == "cache"
with store.stream(batch_size=8192, memory=int(sys.argv[2]), threads=2, page_cache=is_cached) as stream:
    for batch in stream:
        n += len(batch)
assert n == stream.n_rows
print(before, kib("VmHWM"))
"""


def least(path: Path, *, page_cache: bool) -> int:
    """The smallest bound that the stream accepts."""
    try:
        actcache.open(path).stream(batch_size=8192, memory=1, threads=2, page_cache=page_cache)
    except MemoryBoundError as error:
        return int(re.search(r"take ([\d,]+) bytes", str(error))[1].replace(",", ""))
    raise AssertionError("a bound of one byte was accepted")


def forget(path: Path) -> None:
    """Nothing of the rows is in the page cache."""
    for file in path.rglob("rows/c.*"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


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
    for way in ("cache", "around"):
        for bound in (least(path, page_cache=way == "cache"), 512 << 20):
            forget(path)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(path), str(bound), way],
                capture_output=True,
                text=True,
                check=True,
            )
            before, peak = (int(text) * 1024 for text in done.stdout.split())
            growth = peak - before
            one = {"page_cache": way, "bound": bound, "growth": growth, "growth_of_bound": growth / bound}
            results.append(one)
            print(one, flush=True)
    if arguments.out:
        store = {"bytes": arguments.tokens * 4 * 512 * 2, "window_rows": 131_072, "threads": 2}
        arguments.out.write_text(json.dumps({"store": store, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
