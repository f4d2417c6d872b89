"""A build, trainers and a service as processes that are killed, and started again, while the disk is looked at."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cli
from actcache.errors import ActcacheError
from actcache.service.footprint import bytes_under
from actcache.store.live import read_consumers, read_producers
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from tests.conftest import ASSETS

ROOT = Path(cli.__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ENDS_S = 240.0

BUILD = [
    *("--model", ASSETS / "tiny-neox", "--corpus", ASSETS / "text", "--tokens", 30_000, "--seq-len", 64),
    *("--layers", "all", "--dtype", "float32", "--codec", "none", "--holdout", 0, "--device", "cpu"),
    *("--sequences-per-shard", 8),
]
"""59 shards of a megabyte."""
BUDGET = 12_800_000
SETTINGS = [
    "expansion=2",
    "k=8",
    "batch_rows=1024",
    "first_window_rows=2048",
    "checkpoint_every_steps=1",
    "lr=1e-3",
    "auxk=8",
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cli", *map(str, arguments)]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("ab") as out:
        return subprocess.Popen(arguments, cwd=ROOT, env=ONE_THREAD, stdout=out, stderr=subprocess.STDOUT)


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def watched(root: Path) -> Iterator[Callable[[], int]]:
    """The most that a store's folder took, looked at all the time."""
    peak, stop = [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], bytes_under(root))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield lambda: peak[0]
    finally:
        stop.set()
        looking.join()


def n_committed(root: Path) -> int:
    try:
        return len(Catalog(LocalObjects(root)).capture("resid_post").committed())
    except ActcacheError:
        return 0


def pids(root: Path) -> dict[str, int]:
    """Process numbers of a producer and of consumers, as they say themselves."""
    objects = LocalObjects(root)
    found = {name: state.pid for name, state in read_consumers(objects).items()}
    for state in read_producers(objects):
        found["producer"] = state.pid
    return found


def wait_until(is_so: Callable[[], bool], seconds: float = ENDS_S) -> bool:
    """Look until something is so; False when it never is."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
