"""A server that is killed again and again, and memory on both sides: servers and clients in processes of their own."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pyarrow import flight

import actcache
from actcache.service import wire
from tests.conftest import sorted_rows, write_store
from tests.service.conftest import FAR, rows_in, same
from tests.service.test_service import eventually, raw_ticket
from trainer.config import TrainConfig
from trainer.loop import train

SMALL = {"batch_size": 50, "window_rows": 700}
ROOT = Path(__file__).parent.parent.parent
SERVER = """
import sys
from actcache.service.access import Access
from actcache.service.server import Server
server = Server(sys.argv[1], Access(), port=int(sys.argv[2]), memory_bytes=int(sys.argv[3]))
print(server.port, flush=True)
sys.stdin.read()
"""


@contextmanager
def server_process(root, port: int = 0, memory_bytes: int = 1 << 30):
    """A server in a process of its own, and its port; killed at the end."""
    command = [sys.executable, "-c", SERVER, str(root), str(port), str(memory_bytes)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_servers(folder: Path, rounds: int, seed: int) -> None:
    """Kill the server under a trainer, `rounds` times, anywhere: same rows, same order, and the SAE of the local run."""
    chance, port = random.Random(seed), free_port()
    truth = write_store(folder / "s.zarr", n_sequences=36, seq_len=64, rows_per_chunk=64, width=24)
    n_rows = len(truth.kept())
    config = TrainConfig(
        n_latents=48, k=4, auxk=8, batch_rows=50, epochs=1, lr=3e-3, dead_after_tokens=500, warmup_steps=4
    )
    with actcache.open(truth.root).stream(**SMALL, dtype=torch_float32()) as stream:
        train(stream, config, folder / "local")
    with actcache.open(truth.root).stream(**SMALL) as stream:
        expected = rows_in(stream)
    n_batches = len(expected)
    kills_left, found = rounds, []

    with server_process(truth.root, port) as (process, _port):
        running = process

        def on_step(report) -> None:
            nonlocal kills_left
            if kills_left and chance.random() < 1.5 * rounds / n_batches:
                os.kill(running.pid, signal.SIGKILL)
                kills_left -= 1
                restart()

        def restart() -> None:
            nonlocal running
            running.wait()
            command = [sys.executable, "-c", SERVER, str(truth.root), str(port), str(1 << 30)]
            running = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT
            )
            started.append(running)

        started: list[subprocess.Popen] = []
        try:
            url = f"grpc://127.0.0.1:{port}/s.zarr"
            with actcache.open(url).stream(**SMALL) as stream:
                for batch in stream:
                    found += rows_in([batch])
                    if kills_left:
                        on_step(None)
            assert kills_left < rounds
            with actcache.open(url, FAR).stream(**SMALL, dtype=torch_float32()) as stream:
                train(stream, config, folder / "served", on_step=on_step)
        finally:
            for one in started:
                one.kill()
                one.wait()
                assert one.stdin is not None
                one.stdin.close()
    assert kills_left == 0
    assert same(found, expected)
    ids = np.concatenate([np.stack(batch[-3:], 1) for batch in found])
    assert len(ids) == n_rows
    assert np.array_equal(sorted_rows(ids), sorted_rows(truth.kept())), "each row exactly once"
    assert weights(folder / "served") == weights(folder / "local")


def torch_float32():
    import torch

    return torch.float32


def weights(run: Path) -> bytes:
    return (run / "sae.safetensors").read_bytes()


def test_a_server_killed_under_a_trainer(tmp_path):
    kill_servers(tmp_path, rounds=3, seed=1)


def test_a_run_changes_between_disk_and_service(tmp_path, serve):
    """Begun through a service, gone on from disk, finished through another: the weights of the run that never moved."""
    truth = write_store(tmp_path / "s.zarr", n_sequences=36, seq_len=64, rows_per_chunk=64, width=24)
    config = TrainConfig(n_latents=48, k=4, auxk=8, batch_rows=50, epochs=1, lr=3e-3, dead_after_tokens=500)
    places = [f"grpc://127.0.0.1:{serve(truth.root).port}/s.zarr", str(truth.root)]
    with actcache.open(truth.root).stream(**SMALL, dtype=torch_float32()) as stream:
        train(stream, config, tmp_path / "straight")
    out, outcomes = tmp_path / "moving", []
    for place, steps in ((0, 7), (1, 9), (0, 5), (1, None)):
        count = iter(range(10**6))
        with actcache.open(places[place]).stream(**SMALL, dtype=torch_float32()) as stream:
            stop = (lambda: False) if steps is None else (lambda c=count, n=steps: next(c) >= n)
            outcomes.append(train(stream, config, out, resume=bool(outcomes), stop=stop).outcome)
    assert outcomes[:3] == ["stopped"] * 3
    assert weights(out) == weights(tmp_path / "straight")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


MANY = {"batch_size": 512, "window_rows": 8192}


def test_memory_of_a_server_whose_clients_stall(tmp_path):
    """Stated bound: its windows, and per stalled call 8 MiB (message, its copy for the wire, what gRPC holds)."""
    truth = write_store(
        tmp_path / "s.zarr",
        n_sequences=160,
        seq_len=128,
        per_shard=16,
        rows_per_chunk=128,
        width=512,
        codec="none",
    )
    limit, n_stalled = 96 << 20, 12
    with server_process(truth.root, memory_bytes=limit) as (process, port):
        url = f"grpc://127.0.0.1:{port}/s.zarr"
        with actcache.open(url).stream(**SMALL) as stream:  # what it needs to serve at all
            next(iter(stream))
        before = resident_bytes(process.pid)
        client = flight.FlightClient(f"grpc://127.0.0.1:{port}")
        readers = []
        for seed in range(n_stalled):
            with actcache.open(truth.root).stream(**MANY, seed=seed) as stream:
                ticket = raw_ticket(truth, selection=wire.selection_json(stream.selection))
            ticket["near"] = seed % 3 == 0  # was told where its window is, and says nothing more
            readers.append(client.do_get(flight.Ticket(json.dumps(ticket).encode())))
            readers[-1].read_chunk()
        with actcache.open(url, FAR).stream(
            **MANY, seed=99
        ) as stream:  # another one gets on, and turns windows over
            n_rows = sum(len(batch) for batch in stream)
        assert n_rows == len(truth.kept())
        grown = resident_bytes(process.pid) - before
        assert grown <= limit + n_stalled * (8 << 20) + (32 << 20), f"{grown:,}"
        for reader in readers:
            reader.cancel()


CLIENT = """
import os, sys
import actcache
stream = actcache.open(sys.argv[1]).stream(batch_size=512, window_rows=8192)
batches = iter(stream)
first = next(batches)
size = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
held, most = sum(p.n_allocated for p in stream._filling.windows.pools), size()
print(most, sum(s.n_bytes for s in stream._filling.shapes), flush=True)
sys.stdin.readline()
print(size(), flush=True)
os._exit(0)
"""


def test_memory_of_a_client_that_does_not_take_its_batches(tmp_path, serve):
    """Stated bound: its windows (three) and 16 MiB of messages, however long its consumer sleeps."""
    truth = write_store(
        tmp_path / "s.zarr",
        n_sequences=160,
        seq_len=128,
        per_shard=16,
        rows_per_chunk=128,
        width=512,
        codec="none",
    )
    server = serve(truth.root)
    command = [sys.executable, "-c", CLIENT, f"grpc://127.0.0.1:{server.port}/s.zarr"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
    )
    assert process.stdin is not None
    assert process.stdout is not None
    begun, window = map(int, process.stdout.readline().split())
    assert eventually(lambda: server.status()["active_calls"] == 0, 30), "what it reads ahead has an end"
    sent = server.status()["row_bytes"]
    process.stdin.write("go\n")
    process.stdin.flush()
    stalled = int(process.stdout.readline())
    process.wait(30)
    process.stdin.close()
    process.stdout.close()
    assert sent <= 3 * window
    assert stalled - begun <= 2 * window + (16 << 20)
