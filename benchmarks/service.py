"""Rows a second over Arrow Flight on this machine, against the stream read from disk and against Flight itself.

    python benchmarks/service.py --work build/bench --out benchmarks/results/service.json

The server is a process of its own. In every round, one after the other and each for some seconds, for every codec:

    local              `Store.stream` in the client process, from disk
    flight             a window's messages, ready in memory, received and put where a window would have them: what Flight
                       does alone, in one stream and in two at once; the better of the two is the ceiling ratios are of
    flight, one        likewise one message again and again, which never leaves the processor's cache
    shared             windows that are decoded already, read where they are in the server's memory, as a client on its machine
                       does: what a second trainer or rank on the same order gets
    served             likewise windows decoded for this client alone
    served x 2, x 4    as many clients at once on one order, each in a process of its own: all their rows together

and shared and served once more with rows sent over the connection, as from another machine ("sent"), and flight, shared and
served over TLS ("TLS"). `cpu_s_per_gb` counts both processes. On a machine with few cores the
server's decoding and the two ends of Flight share them; `served` cannot then reach `local`, which has them for itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

import actcache
from actcache.service import wire
from actcache.service.access import Access
from actcache.service.link import _OPTIONS
from actcache.service.server import Server

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.synthetic import make_store

BATCH, WINDOW, WIDTH, LAYERS = 8192, 131_072, 768, 4
MEMORY = 1100 << 20  # five windows: memory is used again after the first seconds, as in any long run
ROW_BYTES = 2 * WIDTH
BEGUN_S = 5.0  # a client runs so long before it is measured: until then its windows are in memory that nobody had yet


# The server's process.


class Alone(flight.FlightServerBase):
    """Flight and nothing else: the messages of a window, or the first of them, sent again and again."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        n = wire.MESSAGE_BYTES // ROW_BYTES
        rows = np.random.default_rng(0).integers(0, 1 << 16, (WINDOW // n, n, WIDTH), dtype=np.uint16)
        self._schema = wire.schema_of([("resid_post", ROW_BYTES, "bfloat16")])
        numbers = np.arange(n)
        about = [numbers.astype(np.uint32), numbers.astype(np.int32), numbers]
        self._batches = [wire.message(self._schema, about, [pa.py_buffer(some)]) for some in rows]

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.FlightDataStream:  # noqa: ARG002
        """Messages numbered from one to another, as the ticket says; only the first of the window, where it says so."""
        start, stop, differ = map(int, ticket.ticket.split())
        batches = (self._batches[i % len(self._batches) if differ else 0] for i in range(start, stop))
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(self._schema, batches))


def serve(root: str) -> None:
    """Serve the folder and Flight alone, each without and with TLS, until standard input ends."""
    from tests.service.certificates import Signer

    signer = Signer()
    pair = signer.sign("benchmark")
    servers: list[Any] = [Server(root, Access(), memory_bytes=MEMORY)]
    servers.append(Server(root, Access(cert=pair.cert, key=pair.key), memory_bytes=MEMORY))
    servers.append(Alone(location="grpc://127.0.0.1:0"))
    servers.append(Alone(location="grpc+tls://127.0.0.1:0", tls_certificates=[pair]))
    print(json.dumps({"ports": [s.port for s in servers], "ca": signer.pem.decode()}), flush=True)
    sys.stdin.read()
    os._exit(0)


# The clients.


def consume(stream: Any, seconds: float) -> int:
    """Rows handed out in so many seconds."""
    n_rows, ends = 0, time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for batch in stream:
            n_rows += len(batch)
            if time.perf_counter() > ends:
                break
        else:
            stream.set_epoch(0)  # one that has an end begins again
    return n_rows


def receive(
    location: str, ca: bytes | None, seconds: float, windows: list[np.ndarray], *, differ: bool
) -> int:
    """Rows of Flight alone, in as many streams of one connection as there are windows to put them in."""
    options = {} if ca is None else {"tls_root_certs": ca}
    client = flight.FlightClient(location, generic_options=list(_OPTIONS.items()), **options)
    with ThreadPoolExecutor(len(windows)) as pool:
        return sum(pool.map(lambda window: _receive(client, seconds, window, differ=differ), windows))


def _receive(client: flight.FlightClient, seconds: float, window: np.ndarray, *, differ: bool) -> int:
    """Rows of one stream, copied to where a window would have them."""
    n_rows, at, n_calls = 0, 0, 0
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        start = n_calls * wire.MESSAGES_PER_CALL
        asked = f"{start} {start + wire.MESSAGES_PER_CALL} {int(differ)}"
        reader, n_calls = client.do_get(flight.Ticket(asked.encode())), n_calls + 1
        while True:
            try:
                batch = reader.read_chunk().data
            except StopIteration:
                break
            rows = wire.rows_of(batch.column(3), np.dtype(np.uint16))
            if at + len(rows) > WINDOW:
                at = 0
            window[at : at + len(rows)] = rows
            at, n_rows = at + len(rows), n_rows + len(rows)
    return n_rows


def measure(work: Callable[[], int], pid: int) -> dict[str, float]:
    """Rows a second, and CPU seconds per GB of rows of this process and the server."""
    began, before = time.perf_counter(), _cpu_s(pid) + time.process_time()
    n_rows = work()
    elapsed, cpu_s = time.perf_counter() - began, _cpu_s(pid) + time.process_time() - before
    return _speed(n_rows, elapsed, cpu_s)


def _speed(n_rows: int, elapsed_s: float, cpu_s: float) -> dict[str, float]:
    n_gb = n_rows * ROW_BYTES / 1e9
    return {"rows_per_s": n_rows / elapsed_s, "gb_per_s": n_gb / elapsed_s, "cpu_s_per_gb": cpu_s / n_gb}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def several(n: int, url: str, seconds: float, pid: int) -> dict[str, float]:
    """Several clients at once on one order, each a process of its own, measured when all are under way.

    As many times longer as there are of them: a window takes its time, and a part of one counts for nothing.
    """
    command = [sys.executable, __file__, "--client", url, "--seconds", str(n * seconds)]
    clients = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(n)
    ]
    pipes = [(c.stdin, c.stdout) for c in clients if c.stdin is not None and c.stdout is not None]
    for _to, back in pipes:
        back.readline()
    began, before = time.perf_counter(), _cpu_s(pid)
    for to, _back in pipes:
        to.write("go\n")
        to.flush()
    said = [json.loads(back.readline()) for _to, back in pipes]
    elapsed, served_s = time.perf_counter() - began, _cpu_s(pid) - before
    for client in clients:
        client.communicate()
    return _speed(sum(s["rows"] for s in said), elapsed, served_s + sum(s["cpu_s"] for s in said))


def be_a_client(url: str, seconds: float) -> None:
    """One of `several`; goes on while it waits for the others, which would leave it behind."""
    with _stream(url, None, seed=0) as stream, ThreadPoolExecutor(1) as pool:
        consume(stream, BEGUN_S)
        print("ready", flush=True)
        told = pool.submit(sys.stdin.readline)
        while not told.done():
            consume(stream, 0.1)
        before = time.process_time()
        n_rows = consume(stream, seconds)
        print(json.dumps({"rows": n_rows, "cpu_s": time.process_time() - before}), flush=True)


def _stream(url: str, options: dict[str, Any] | None, seed: int = 0, epochs: int | None = None) -> Any:
    store = actcache.open(url, options)
    return store.stream(batch_size=BATCH, window_rows=WINDOW, epochs=epochs, seed=seed, threads=2)


@contextmanager
def server(root: Path) -> Iterator[tuple[subprocess.Popen, dict[str, Any]]]:
    """The server's process and where it listens."""
    command = [sys.executable, __file__, "--serve", str(root)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


class Bench:
    """All ways to get rows, measured against one server process."""

    def __init__(self, args: argparse.Namespace, root: Path, process: subprocess.Popen, said: dict) -> None:
        self.args, self.root, self.pid = args, root, process.pid
        self.found: dict[str, list[dict[str, float]]] = {}
        self._seeds = iter(range(1, 10**6))
        plain, secure, alone, alone_secure = said["ports"]
        ca = said["ca"].encode()
        self.ways = _ways(plain, secure, ca)
        self._bare = {
            "": (f"grpc://127.0.0.1:{alone}", None),
            " TLS": (f"grpc+tls://127.0.0.1:{alone_secure}", ca),
        }
        self._windows = list(np.ones((2, WINDOW, WIDTH), np.uint16))  # touched before

    def _note(self, name: str, work: Callable[[], int]) -> None:
        self._keep(name, measure(work, self.pid))

    def _keep(self, name: str, one: dict[str, float]) -> None:
        self.found.setdefault(name, []).append(one)
        print(f"{name:24s} {one}", file=sys.stderr, flush=True)

    def warm_up(self) -> None:
        """Memory that a process uses for the first time is slow to come by."""
        for location, options in self.ways.values():
            url = f"{location}/{self.args.codecs[0]}.zarr"
            with _stream(url, options, seed=next(self._seeds)) as stream:
                consume(stream, self.args.warm_up)

    def round(self) -> None:
        """Everything once, one after the other."""
        for tls in self._bare:
            for n in (1, 2):
                for differ, name in ((True, f"flight{tls} x {n}"), (False, f"flight{tls}, one x {n}")):
                    self._note(name, partial(self._receive, tls, n, differ=differ))
        for codec in self.args.codecs:
            self._local(codec)
            for measure_one in (self._shared, self._served):
                for way in self.ways:
                    measure_one(codec, way)
            for n in (2, 4):
                url = f"{self.ways[''][0]}/{codec}.zarr"
                self._keep(f"{codec} served x {n}", several(n, url, self.args.seconds, self.pid))

    def _receive(self, tls: str, n: int, *, differ: bool) -> int:
        return receive(*self._bare[tls], self.args.seconds, self._windows[:n], differ=differ)

    def _local(self, codec: str) -> None:
        with _stream(str(self.root / f"{codec}.zarr"), None) as stream:
            consume(stream, BEGUN_S)
            self._note(f"{codec} local", lambda: consume(stream, self.args.seconds))

    def _served(self, codec: str, way: str) -> None:
        location, options = self.ways[way]
        with _stream(f"{location}/{codec}.zarr", options, seed=next(self._seeds)) as stream:
            consume(stream, BEGUN_S)
            self._note(f"{codec} served{way}", lambda: consume(stream, self.args.seconds))

    def _shared(self, codec: str, way: str) -> None:
        location, options = self.ways[way]
        with _stream(f"{location}/{codec}.zarr", options, epochs=1) as stream:
            for _again in range(
                2
            ):  # fits the server's memory, once it keeps no window for clients that have gone
                for _batch in stream:
                    pass
                stream.set_epoch(0)
            self._note(f"{codec} shared{way}", lambda: consume(stream, self.args.seconds))


def _ways(plain: int, secure: int, ca: bytes) -> dict[str, tuple[str, dict[str, Any]]]:
    """Where the service is, and options: rows read where they are, sent, and sent over TLS."""
    sent = {"shared_memory": False}
    return {
        "": (f"grpc://127.0.0.1:{plain}", {}),
        " sent": (f"grpc://127.0.0.1:{plain}", sent),
        " TLS": (f"grpc+tls://127.0.0.1:{secure}", sent | {"ca": ca}),
    }


def ratios(codecs: list[str], medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """Rows a second of what is served, over those of the local stream and of Flight alone."""
    found = {}
    for codec in codecs:
        for way in ("", " sent", " TLS"):
            tls = way if way == " TLS" else ""
            ceiling = max(medians[f"flight{tls} x {n}"]["rows_per_s"] for n in (1, 2))
            for what in ("shared", "served"):
                mine = medians[f"{codec} {what}{way}"]["rows_per_s"]
                found[f"{codec} {what}{way} / local"] = mine / medians[f"{codec} local"]["rows_per_s"]
                found[f"{codec} {what}{way} / flight{tls}"] = mine / ceiling
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds; medians and raw numbers."""
    root = args.work / "served"
    for codec in args.codecs:
        make_store(root / f"{codec}.zarr", n_tokens=args.tokens, n_layers=LAYERS, width=WIDTH, codec=codec)
    with server(root) as (process, said):
        bench = Bench(args, root, process, said)
        bench.warm_up()
        for _ in range(args.rounds):
            bench.round()
    medians = {
        name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for name, rounds in bench.found.items()
    }
    return {
        "shape": {"batch": BATCH, "window": WINDOW, "width": WIDTH, "layers": LAYERS, "tokens": args.tokens},
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()},
        "versions": {"pyarrow": pa.__version__, "numpy": np.__version__, "actcache": actcache.__version__},
        "medians": medians,
        "ratios": ratios(args.codecs, medians),
        "rounds": bench.found,
    }


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--warm-up", type=float, default=12.0)
    parser.add_argument("--codecs", nargs="+", default=["none", "zstd"])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
    elif args.client:
        be_a_client(args.client, args.seconds)
    else:
        result = run(args)
        print(json.dumps({"medians": result["medians"], "ratios": result["ratios"]}, indent=2))
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
