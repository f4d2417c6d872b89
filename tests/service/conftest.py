"""Stores that are planned, being written, or written already; consumers that a test makes up."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from actcache.service.access import Access
from actcache.service.server import Server
from actcache.store.live import ConsumerState, LocalLive, consumer_file, encode, whereabouts
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from tests.conftest import Truth, as_bits, write_store

N_SHARDS, N_HOLDOUT = 12, 1
STORE = {
    "n_sequences": N_SHARDS * 4,
    "per_shard": 4,
    "seq_len": 64,
    "rows_per_chunk": 64,
    "width": 256,
    "codec": "none",
    "n_holdout_shards": N_HOLDOUT,
}


@pytest.fixture(autouse=True)
def _fast(fast_disk):
    """No test here cuts the power."""


def copied(truth: Truth, folder) -> Truth:
    root = folder / "s.zarr"
    shutil.copytree(truth.root, root)
    return replace(truth, root=root)


@pytest.fixture(scope="session")
def _planned(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("planned") / "s.zarr", **STORE, commit=[])


@pytest.fixture(scope="session")
def _whole(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("whole") / "s.zarr", **STORE)


@pytest.fixture
def planned(_planned, tmp_path):
    """Twelve shards, the first held out, none of them committed."""
    return copied(_planned, tmp_path / "planned")


@pytest.fixture
def whole(_whole, tmp_path):
    """The same store, all committed."""
    return copied(_whole, tmp_path / "whole")


def catalog_of(truth) -> Catalog:
    return Catalog(LocalObjects(truth.root))


def say(truth, name: str, needs: int, *, at: int | None = None, phase="working", beat=0, keeps=1, interval=0):
    """What a consumer would write."""
    state = ConsumerState(
        name=name,
        needs_shard=needs,
        at_shard=needs if at is None else at,
        phase=phase,
        beat=beat,
        keeps_shards=keeps,
        interval_shards=interval,
        **whereabouts(),
    )
    LocalLive(truth.root).put(consumer_file(name), encode(state))


class Time:
    """A clock that a test moves; sleeping moves it and lets `then` happen."""

    def __init__(self, then=lambda: None) -> None:
        self.now, self.then = 0.0, then

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


# Services, on real sockets of this machine.

FAR = {"shared_memory": False}
"""Options of a client that is to be sent its rows, though it is on the server's machine."""


@pytest.fixture
def serve():
    """`serve(location, access, **options)`: a running service; stopped at the end."""
    running = []

    def start(location, access=None, **options) -> Server:
        running.append(Server(str(location), access or Access(), **options))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def url_of(server: Server, name: str = "s.zarr", scheme: str = "grpc") -> str:
    return f"{scheme}://127.0.0.1:{server.port}/{name}"


def rows_in(stream) -> list[tuple[np.ndarray, ...]]:
    """Everything that a batch is, for comparing."""
    return [
        (
            *(as_bits(rows) for rows in b.hooks.values()),
            b.layer.numpy(),
            b.sequence.numpy(),
            b.position.numpy(),
        )
        for b in stream
    ]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        len(p) == len(q) and all(np.array_equal(x, y) for x, y in zip(p, q, strict=True))
        for p, q in zip(a, b, strict=True)
    )
