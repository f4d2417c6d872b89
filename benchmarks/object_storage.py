"""obstore against s3fs: CPU and wall seconds of the clients actcache reads with, on an S3 server of this machine.

    pip install 'actcache[s3]' s3fs 'moto[server]'
    python benchmarks/object_storage.py --out benchmarks/results/object_storage.json

Both clients do the same requests, in turn, several rounds; the server is a process of its own. CPU seconds are those
of this process alone, so they hardly depend on the server; wall seconds do (moto is slower than any real one).
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import numpy as np

from actcache.store.remote import Client
from actcache.store.remote_clients import make_client

MIB = 2**20
WHOLE_MIB = (1, 4, 12)
RANGE_BYTES = (192 * 1024, 3 * MIB // 2)
BUCKET = "actcache-benchmark"
CREDENTIALS = {"key": "testing", "secret": "testing", "region": "us-east-1"}


class Server:
    """A moto server in a process of its own; it says its port on stderr."""

    def __enter__(self) -> str:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                self._drain = ThreadPoolExecutor(1)
                self._drain.submit(self._process.stderr.read)
                return found[0]
        raise RuntimeError("the moto server did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._drain.shutdown()


def put_objects(endpoint: str, n_objects: int) -> None:
    """`n_objects` objects of each size, of random bytes."""
    s3 = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=CREDENTIALS["key"],
        aws_secret_access_key=CREDENTIALS["secret"],
        region_name=CREDENTIALS["region"],
    )
    s3.create_bucket(Bucket=BUCKET)
    for mib in WHOLE_MIB:
        body = np.random.default_rng(mib).bytes(mib * MIB)
        for i in range(n_objects):
            s3.put_object(Bucket=BUCKET, Key=f"whole/{mib}/{i}", Body=body)


def workloads(n_objects: int, megabytes: int) -> dict[str, tuple[int, list[Callable[[Client], Any]]]]:
    """Name -> (bytes, requests), each about `megabytes`."""
    found: dict[str, tuple[int, list[Callable[[Client], Any]]]] = {}
    for mib in WHOLE_MIB:
        n = max(1, megabytes // mib)
        keys = [f"whole/{mib}/{i % n_objects}" for i in range(n)]
        found[f"whole objects of {mib} MiB"] = (
            n * mib * MIB,
            [lambda client, key=key: client.get_whole(key, 64 * MIB) for key in keys],
        )
    largest = WHOLE_MIB[-1]
    for size in RANGE_BYTES:
        per_object = largest * MIB // size
        n = megabytes * MIB // size
        at = [(f"whole/{largest}/{i // per_object % n_objects}", i % per_object * size) for i in range(n)]
        found[f"ranges of {size // 1024} KiB"] = (
            n * size,
            [
                lambda client, key=key, start=start, size=size: client.get(key, start, size)
                for key, start in at
            ],
        )
    return found


def measure(client: Client, requests: list[Callable[[Client], Any]], in_flight: int) -> dict[str, float]:
    """CPU (user + system, of this process) and wall seconds of all requests, `in_flight` at a time."""

    def run(request: Callable[[Client], Any]) -> int:
        return len(request(client))

    with ThreadPoolExecutor(in_flight) as pool:
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        n_bytes = sum(pool.map(run, requests))
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"cpu_s": cpu, "wall_s": wall, "bytes": n_bytes}


def main() -> None:
    """Measure, print a table, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=96, help="of each workload and round")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    n_objects = 4
    rows: list[dict[str, Any]] = []
    with Server() as endpoint:
        put_objects(endpoint, n_objects)
        options = {**CREDENTIALS, "endpoint_url": endpoint}
        clients = {
            name: make_client(f"s3://{BUCKET}", options, 60.0, client)
            for name, client in {"obstore": "obstore", "s3fs": "fsspec"}.items()
        }
        for name, (n_bytes, requests) in workloads(n_objects, chosen.megabytes).items():
            measured: dict[str, list[dict[str, float]]] = {client: [] for client in clients}
            for turn in range(chosen.rounds + 1):
                for client in list(clients) if turn % 2 else list(clients)[::-1]:
                    found = measure(clients[client], requests, chosen.in_flight)
                    assert found["bytes"] == n_bytes
                    if turn:  # the first round warms up
                        measured[client].append(found)
            medians = {
                client: {
                    key: statistics.median(one[key] for one in all_rounds) / (n_bytes / 1e9)
                    for key in ("cpu_s", "wall_s")
                }
                for client, all_rounds in measured.items()
            }
            row = {
                "workload": name,
                "requests": len(requests),
                "megabytes": round(n_bytes / 1e6, 1),
                **{
                    f"{client}_{key}_per_gb": round(value, 3)
                    for client, pair in medians.items()
                    for key, value in pair.items()
                },
                "cpu_ratio": round(medians["s3fs"]["cpu_s"] / medians["obstore"]["cpu_s"], 2),
                "wall_ratio": round(medians["s3fs"]["wall_s"] / medians["obstore"]["wall_s"], 2),
            }
            rows.append(row)
            print(json.dumps(row))
    result = {
        "what": "client seconds per GB, medians; ratios are s3fs over obstore",
        "in_flight": chosen.in_flight,
        "rounds": chosen.rounds,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
        "versions": {name: version(name) for name in ("obstore", "s3fs", "aiobotocore", "moto")},
        "rows": rows,
    }
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
