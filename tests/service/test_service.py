"""A store behind a service is the store: the same surface, rows, order, batches and cursors, whoever else asks."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import flight

import actcache
from actcache.errors import (
    CursorError,
    DamageError,
    MemoryBoundError,
    NotFoundError,
    RetiredError,
    UnreachableError,
    UsageError,
)
from actcache.reader import filling as filling_module
from actcache.reader import follow as follow_module
from actcache.service import client as client_module
from actcache.service import followers as followers_module
from actcache.service import link as link_module
from actcache.service import received as received_module
from actcache.service import rows as rows_module
from actcache.service import server as server_module
from actcache.service import wire
from actcache.service.access import Access
from actcache.service.client import open_catalog
from actcache.service.metrics import serve_http
from actcache.service.server import Server
from actcache.service.windows import WindowCache
from actcache.store.live import read_consumers
from actcache.store.objects import LocalObjects
from actcache.store.verify import find_problems
from tests.conftest import all_files, as_bits, check_rows, commit_shards, sorted_rows, write_store
from tests.service.conftest import FAR, N_SHARDS, rows_in, same, say, url_of
from tests.service.test_follow import Arrivals
from tests.store.strategies import store_settings

SMALL = {"batch_size": 50, "window_rows": 700}
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Two captures of two layers."""
    root = tmp_path_factory.mktemp("served") / "s.zarr"
    return write_store(
        root,
        n_sequences=36,
        seq_len=64,
        rows_per_chunk=64,
        width=24,
        hooks=("resid_post", "mlp_out"),
        n_padding=9,
    )


@pytest.fixture(scope="module")
def server(truth):
    with pytest.MonkeyPatch.context():
        found = Server(str(truth.root), Access())
        yield found
        assert found.stop()


@pytest.fixture(params=[{}, FAR], ids=["near", "far"])
def remote(server, request):
    return actcache.open(url_of(server), request.param)


# The same store.


def test_what_a_store_says_is_the_same(truth, remote, server):
    local = actcache.open(truth.root)
    for name in ("plan", "hooks", "layers", "width", "n_tokens", "n_kept", "is_complete"):
        assert getattr(remote, name) == getattr(local, name)
    assert remote.committed() == local.committed()
    assert remote.url == url_of(server)
    for name in ("tokens", "document", "keep"):
        assert np.array_equal(getattr(remote, name), getattr(local, name))
    at = {"layer": 3, "sequences": [7, 1, 30], "positions": slice(2, 9), "hook": "mlp_out"}
    assert np.array_equal(as_bits(remote.read(**at)), as_bits(local.read(**at)))
    for layer, found in remote.stats().items():
        assert np.array_equal(found.mean, local.stats()[layer].mean)
    assert find_problems(open_catalog(url_of(server)), threads=2) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hook": ["mlp_out", "resid_post"]},
        {"stack": "feature"},
        {"stack": "layers", "layers": [3]},
        {"split": "holdout", "epochs": 2},
        {"rank": 1, "world_size": 4},
        {"outlier_norm_ratio": 1.1, "drop_last": True},
        {"positions": slice(3, 50), "exclude_tokens": list(range(100))},
        {"order": "commit", "commit_shards": 3},
        {"run_chunks": 2, "partitions": 5},
        {"dtype": __import__("torch").float32, "memory": 10**9},
    ],
    ids=str,
)
def test_a_stream_is_the_same(truth, remote, options):
    with actcache.open(truth.root).stream(**SMALL, **options) as stream:
        expected = [(*rows_in([b])[0], stream.state_dict()) for b in stream]
        facts = (stream.n_rows, stream.n_dropped, stream.fingerprint, stream.width, stream.layers)
    with remote.stream(**SMALL, **options) as stream:
        found = [(*rows_in([b])[0], stream.state_dict()) for b in stream]
        assert (stream.n_rows, stream.n_dropped, stream.fingerprint, stream.width, stream.layers) == facts
    assert [f[-1] for f in found] == [e[-1] for e in expected]
    assert same([f[:-1] for f in found], [e[:-1] for e in expected])


def test_a_quantised_store_is_served_as_it_reads(serve, tmp_path):
    truth = write_store(tmp_path / "s.zarr", codec="uint8", width=64, seq_len=64, rows_per_chunk=64)
    with actcache.open(truth.root).stream(**SMALL) as stream:
        expected = rows_in(stream)
    with actcache.open(url_of(serve(truth.root))).stream(**SMALL) as stream:
        assert same(rows_in(stream), expected)


@given(given_store=store_settings(), data=st.data())
@settings(max_examples=12)
def test_a_run_may_change_between_disk_and_service_at_any_batch(given_store, data):
    """For any store, window, batch and share of ranks."""
    chosen = {
        "batch_size": data.draw(st.integers(1, 20)),
        "window_rows": data.draw(st.integers(8, 200)),
        "seed": data.draw(st.integers(0, 3)),
        "order": data.draw(st.sampled_from(["global", "commit"])),
        "partitions": 4,
    }
    share = data.draw(st.sampled_from([{}, {"rank": 0, "world_size": 2}, {"rank": 3, "world_size": 4}]))
    with tempfile.TemporaryDirectory() as folder:
        written = write_store(Path(folder) / "s.zarr", **given_store)
        served = Server(str(written.root), Access())
        try:
            places = (str(written.root), url_of(served))
            with actcache.open(places[0]).stream(**chosen, **share) as stream:
                expected = rows_in(stream)
            found, state, places_left = [], None, itertools.cycle(places)
            steps = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
            for n_batches in [*steps, 10**6]:
                with actcache.open(next(places_left)).stream(**chosen, **share) as stream:
                    if state is not None:
                        stream.load_state_dict(state)
                    found += rows_in(itertools.islice(stream, n_batches))
                    state = json.loads(json.dumps(stream.state_dict()))
            assert same(found, expected)
        finally:
            served.stop()


def test_a_rank_without_rows_in_a_window_gets_none(truth, remote):
    """Windows of a chunk of one partition each: seven ranks of eight have nothing there."""
    options = {"batch_size": 5, "window_rows": 1, "world_size": 8, "rank": 3, "partitions": 8}
    with actcache.open(truth.root).stream(**options) as local, remote.stream(**options) as stream:
        assert same(rows_in(stream), rows_in(local))


def test_three_trainers_with_two_ranks_each_get_what_they_would_get_locally(truth, server):
    """At once, from one service; what the ranks of one share is decoded once."""
    before, results, errors = server.status(), {}, []

    def train(seed: int, rank: int) -> None:
        try:
            options = {"seed": seed, "rank": rank, "world_size": 2}
            with actcache.open(url_of(server)).stream(**SMALL, **options) as stream:
                results[seed, rank] = rows_in(stream)
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=train, args=(seed, rank)) for seed in (11, 12, 13) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    n_windows = 0
    for seed, rank in itertools.product((11, 12, 13), (0, 1)):
        with actcache.open(truth.root).stream(**SMALL, seed=seed, rank=rank, world_size=2) as stream:
            n_windows += stream._filling.order(0).n_windows if rank == 0 else 0
            assert same(results[seed, rank], rows_in(stream))
    assert server.status()["windows_decoded"] - before["windows_decoded"] == n_windows


def test_little_memory_makes_it_slower_and_nothing_else(truth, serve):
    """Room for two windows, three orders at once: windows come and go, rows do not change."""
    probe = serve(truth.root)
    with actcache.open(url_of(probe)).stream(**SMALL) as stream:
        next(iter(stream))
    one = probe.cache.used_bytes // probe.cache.n_windows
    small = serve(truth.root, memory_bytes=int(2.5 * one))
    found, errors = {}, []

    def train(seed: int) -> None:
        try:
            with actcache.open(url_of(small)).stream(**SMALL, seed=seed) as stream:
                found[seed] = []
                for batch in stream:
                    found[seed] += rows_in([batch])
                    assert small.cache.used_bytes <= small.cache.limit_bytes
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    for seed in range(3):
        with actcache.open(truth.root).stream(**SMALL, seed=seed) as stream:
            assert same(found[seed], rows_in(stream))
    assert small.status()["windows_evicted"] > 0
    tiny = serve(truth.root, memory_bytes=one)
    with (
        actcache.open(url_of(tiny)).stream(**SMALL) as stream,
        pytest.raises(MemoryBoundError, match="two windows"),
    ):
        next(iter(stream))


# Servers that go, clients that go.


def test_a_server_that_is_restarted_is_not_noticed(truth, serve):
    """Stopped and started again between and during windows: no row twice, none left out."""
    with actcache.open(truth.root).stream(**SMALL) as stream:
        expected = rows_in(stream)
    server = serve(truth.root)
    port, found = server.port, []
    with actcache.open(url_of(server)).stream(**SMALL) as stream:
        for i, batch in enumerate(stream):
            found += rows_in([batch])
            if i % 9 == 4:
                server.stop()
                server = serve(truth.root, port=port)
    assert same(found, expected)


def test_a_server_that_breaks_off_anywhere_is_asked_for_the_rest(truth, serve, monkeypatch):
    """Every few messages the call fails; the client goes on from the row after the last that came whole."""
    monkeypatch.setattr(wire, "MESSAGE_BYTES", 4096)
    monkeypatch.setattr(rows_module, "MESSAGE_BYTES", 4096)
    server, count, cut = serve(truth.root), itertools.count(1), rows_module._cut

    def fails(*args):
        if next(count) % 7 == 0:
            raise UnreachableError("the power is gone")
        return cut(*args)

    monkeypatch.setattr(rows_module, "_cut", fails)
    with actcache.open(truth.root).stream(**SMALL) as stream:
        expected = rows_in(stream)
    with actcache.open(url_of(server), FAR).stream(**SMALL) as stream:
        assert same(rows_in(stream), expected)
    assert next(count) > 40


def test_nobody_there_is_an_error_in_time(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_CONTACT_S", 0.5)
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"does not answer .*Asked \d+ times"):
        actcache.open("grpc://127.0.0.1:1/s.zarr")
    assert time.monotonic() - began < 10


def test_a_server_that_is_gone_for_good_is_an_error_in_time(truth, serve, monkeypatch):
    server = serve(truth.root)
    with actcache.open(url_of(server)).stream(**SMALL) as stream:
        batches = iter(stream)
        next(batches)
        stream._filling._source.link.patience_s = 0.3
        server.stop()
        with pytest.raises(UnreachableError, match="Go on from the last cursor"):
            list(batches)


@pytest.mark.parametrize("options", [{}, FAR], ids=["near", "far"])
def test_closing_while_waiting_for_a_service_ends_at_once(truth, serve, monkeypatch, options):
    server, began = serve(truth.root), threading.Event()
    gate = threading.Event()

    def slow(*args):
        began.set()
        gate.wait(30)
        raise UnreachableError("late")

    monkeypatch.setattr(rows_module, "_cut" if options else "_told", slow)
    stream, errors = actcache.open(url_of(server), options).stream(**SMALL), []

    def read() -> None:
        try:
            next(iter(stream))
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert began.wait(30)
    closing = time.monotonic()
    stream.close()
    thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - closing < 5
    assert "was closed" in str(errors[0])
    gate.set()


CLIENT = """
import sys
from pyarrow import flight
client = flight.FlightClient(sys.argv[1])
reader = client.do_get(flight.Ticket(sys.stdin.buffer.read()))
reader.read_chunk()
print("reading", flush=True)
import time
time.sleep(600)
"""


def raw_ticket(truth, name="s.zarr", **changes) -> dict:
    """What a client sends, as JSON."""
    with actcache.open(truth.root).stream(**SMALL) as stream:
        settings = stream.settings
        found = {
            "version": 1,
            "store": name,
            "plan": settings["plan"],
            "captures": settings["captures"],
            "selection": wire.selection_json(stream.selection),
            "epoch": 0,
            "window": 0,
            "rank": 0,
            "world_size": 1,
            "first": 0,
        }
    return found | changes


def eventually(is_so, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_window_that_takes_long_is_told_from_a_server_that_is_gone(truth, serve, monkeypatch):
    """While it is decoded the client hears so, longer than its patience; then it has all rows."""
    monkeypatch.setattr(rows_module, "_SIGN_S", 0.02)
    server, gate, heard = serve(truth.root), threading.Event(), threading.Event()
    lay_out = filling_module.Filling._lay_out

    def slow(self, *at):
        gate.wait(30)
        return lay_out(self, *at)

    take = received_module.ServedFill._take

    def counting(self, part, batch, said):
        signs.append(said)
        if sum(wire.WAITING in one for one in signs) > 50:
            heard.set()
        return take(self, part, batch, said)

    signs: list[dict] = []
    monkeypatch.setattr(filling_module.Filling, "_lay_out", slow)
    monkeypatch.setattr(received_module.ServedFill, "_take", counting)
    threading.Thread(target=lambda: (heard.wait(30), gate.set())).start()
    with actcache.open(url_of(server)).stream(**SMALL) as stream:
        stream._filling._source.link.patience_s = 0.1
        found = rows_in(stream)
    assert heard.is_set()
    with actcache.open(truth.root).stream(**SMALL) as stream:
        assert same(found, rows_in(stream))


def test_a_shard_put_right_again_is_read_by_a_server_that_saw_it_wrong(serve, tmp_path):
    truth = write_store(tmp_path / "s.zarr", codec="none")
    store, path = actcache.open(url_of(serve(tmp_path))), truth.root / "acts/resid_post/rows/c.0.1.0"
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with store.stream(batch_size=8) as stream, pytest.raises(DamageError, match="crc32c"):
        list(stream)
    path.unlink()
    path.write_bytes(good)
    with store.stream(batch_size=8) as stream:
        assert sum(len(batch) for batch in stream) == len(truth.kept())


def test_files_of_shards_left_behind_are_closed(whole, serve):
    """A deleted file takes room on disk as long as somebody has it open."""
    server = serve(whole.root)
    with actcache.open(url_of(server)).stream(
        batch_size=50, window_rows=256, order="commit", commit_shards=2
    ) as stream:
        for _batch in stream:
            pass
    (order,) = server.cache._orders.values()
    assert order.filling._files is not None
    opened = {key.rpartition("c.")[2].split(".")[1] for key in order.filling._files._open}
    assert len(opened) <= 3, opened


@pytest.mark.parametrize("near", [False, True])
def test_a_client_that_is_killed_leaves_nothing_behind(truth, serve, monkeypatch, near):
    monkeypatch.setattr(rows_module, "MESSAGE_BYTES", 1 << 12)
    server = serve(truth.root)
    command = [sys.executable, "-c", textwrap.dedent(CLIENT), f"grpc://127.0.0.1:{server.port}"]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(json.dumps(raw_ticket(truth) | {"near": near}).encode())
    client.stdin.close()
    assert client.stdout.readline() == b"reading\n"
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    client.stdout.close()
    assert eventually(lambda: server.status()["active_calls"] == 0, 5)
    assert not any(entry.kept or entry.n_users for entry in server.cache._entries.values())


def test_a_client_that_stalls_keeps_little_and_stops_nobody(serve, tmp_path, monkeypatch):
    """It is sent a few messages and no more; its window makes room for others' when they need it."""
    monkeypatch.setattr(followers_module, "IDLE_S", 1.0)
    truth = write_store(
        tmp_path / "s.zarr",
        n_sequences=80,
        seq_len=128,
        per_shard=8,
        rows_per_chunk=128,
        width=256,
        codec="none",
    )
    options = {"batch_size": 512, "window_rows": 8192}
    server = serve(truth.root)
    client = flight.FlightClient(
        f"grpc://127.0.0.1:{server.port}", generic_options=[("grpc.http2.bdp_probe", 0)]
    )
    readers = []
    for seed in range(4):
        with actcache.open(truth.root).stream(**options, seed=seed) as stream:
            ticket = raw_ticket(truth, selection=wire.selection_json(stream.selection))
        readers.append(client.do_get(flight.Ticket(json.dumps(ticket).encode())))
        readers[-1].read_chunk()
        if seed == 0:
            server.cache.limit_bytes = 3 * (server.cache.used_bytes // server.cache.n_windows)
    sent = server.status()["row_bytes"]
    with actcache.open(url_of(server)).stream(**options, seed=9) as stream:
        n_rows = 0
        for batch in stream:
            n_rows += len(check_rows(truth, batch))
    assert n_rows == len(truth.kept())
    assert server.cache.used_bytes <= server.cache.limit_bytes
    assert sent <= 4 * 4 * wire.MESSAGE_BYTES, "at most a few messages each are on their way"
    for reader in readers:
        reader.cancel()
    assert eventually(lambda: server.status()["active_calls"] == 0, 5)


# Errors come as themselves.


def test_damage_is_named_without_a_path_of_the_server(serve, tmp_path):
    truth = write_store(tmp_path / "s.zarr", codec="none")
    server = serve(tmp_path)
    store = actcache.open(url_of(server))
    path = truth.root / "acts/resid_post/rows/c.0.1.0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with (
        store.stream(batch_size=8) as stream,
        pytest.raises(DamageError, match=r"rows/c\.0\.1\.0.*crc32c") as caught,
    ):
        list(stream)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(DamageError, match="crc32c"):
        store.read(layer=0, sequences=[4, 5, 6, 7])
    path.unlink()
    with (
        store.stream(batch_size=8) as stream,
        pytest.raises(DamageError, match="committed but missing") as caught,
    ):
        list(stream)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("what", ["slot", "layer", "row", "first number", "last number"])
def test_a_message_altered_on_the_way_is_noticed(server, monkeypatch, what):
    def altered(schema, about, rows):
        columns = dict(zip(("slot", "layer", "row"), about, strict=True))
        if what in columns:
            columns[what] = columns[what].copy()  # the service keeps what it is given
            columns[what][-1] ^= 1
        else:
            data = bytearray(rows[0])
            data[0 if what == "first number" else -1] ^= 1
            rows = [pa.py_buffer(data)]
        return wire.message(schema, list(columns.values()), rows)

    monkeypatch.setattr(rows_module, "message", altered)
    far = actcache.open(url_of(server), FAR)
    with far.stream(**SMALL) as stream, pytest.raises(DamageError, match="altered on the way"):
        next(iter(stream))


def test_a_store_that_was_replaced_is_another(serve, tmp_path):
    write_store(tmp_path / "s.zarr")
    write_store(tmp_path / ".new", seed=1)
    server = serve(tmp_path)
    with actcache.open(url_of(server)).stream(batch_size=4, window_rows=16) as stream:
        batches = iter(stream)
        next(batches)
        windows = [*stream._filling._fills.values(), *(e.fill for e in server.cache._entries.values())]
        assert eventually(lambda: all(window.is_done for window in windows), 30)  # nobody reads the old one
        (tmp_path / "s.zarr").rename(tmp_path / ".old")
        (tmp_path / ".new").rename(tmp_path / "s.zarr")
        with pytest.raises(CursorError, match="it was replaced"):
            list(batches)


def test_names_that_are_not_there_are_told_with_those_that_are(truth, serve, tmp_path):
    for name in ("a.zarr", "b/c.zarr"):
        write_store(tmp_path / name)
    server = serve(tmp_path)
    with pytest.raises(NotFoundError, match=r"no store 'x' at .*it serves a\.zarr, b/c\.zarr"):
        actcache.open(url_of(server, "x"))
    with pytest.raises(NotFoundError, match=r"a\.zarr, b/c\.zarr"):
        actcache.open(url_of(server, ""))
    assert actcache.open(url_of(server, "b/c.zarr")).n_kept > 0
    assert actcache.open(url_of(serve(truth.root), "")).n_kept == actcache.open(truth.root).n_kept
    with pytest.raises(NotFoundError, match="there is no store in"):
        serve(ROOT / "docs")
    with pytest.raises(DamageError, match="does not describe an actcache store"):
        serve(tmp_path / "a.zarr" / "tokens")
    with pytest.raises(NotFoundError, match="no such folder"):
        serve(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "url", ["grpc://host", "grpc://host:port/x", "grpc://u:p@h:1/x", "grpcs://h:1/x", "grpc://:1/x"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UsageError, match=r"expected grpc://HOST:PORT/NAME|Port could not"):
        actcache.open(url)


def test_options_that_are_not_known(server):
    with pytest.raises(UsageError, match="storage_options"):
        actcache.open(url_of(server), {"tokn": "x"})


# Following and consuming through a service.


def test_following_through_a_service(whole, planned, serve, monkeypatch):
    monkeypatch.setattr(follow_module, "_FIRST_POLL_S", 0.0)
    monkeypatch.setattr(follow_module, "_LAST_POLL_S", 0.001)
    options = {"batch_size": 50, "window_rows": 256, "commit_shards": 3, "seed": 5}
    with actcache.open(whole.root).stream(**options, order="commit") as stream:
        expected = rows_in(stream)
    store = actcache.open(url_of(serve(planned.root)))
    with store.stream(**options, follow=True) as stream, store.register("a", stream) as consumer:
        stream.follower._last_poll_s = 0.01
        stream.follower.on_wait = Arrivals(planned, range(N_SHARDS))
        found = []
        for batch in stream:
            found += rows_in([batch])
            consumer.saved(stream.state_dict())
        consumer.finished()
    assert same(found, expected)
    said = read_consumers(LocalObjects(planned.root))["a"]
    assert (said.phase, said.needs_shard) == ("finished", N_SHARDS)


def test_retired_shards_say_so_through_a_service(whole, serve):
    from actcache.producer.presence import Presence
    from actcache.service.footprint import Footprint
    from actcache.service.retention import DiskBudget, bounded_by
    from actcache.store.disk import Disk
    from tests.service.conftest import catalog_of

    store = actcache.open(url_of(serve(whole.root)))
    say(whole, "a", 9)
    footprint = Footprint(catalog_of(whole), whole.root, 1)
    budget = DiskBudget(max_bytes=int(footprint.fixed_bytes + footprint.most[:7].sum()), consumers=("a",))
    with Disk(whole.root) as disk, Presence(disk, N_SHARDS, dict) as presence:
        bounded_by(budget)(catalog_of(whole), disk, presence).admits(11)
    assert store.retired() == actcache.open(whole.root).retired() != []
    with pytest.raises(RetiredError, match="shard 1 of"):
        store.stream(**SMALL)
    with (
        store.stream(**SMALL, follow=True, consumer="a") as stream,
        pytest.raises(RetiredError, match="shard 1 of"),
    ):
        next(iter(stream))


# Listing, health, numbers; and clients that are not ours.


def test_another_flight_client_finds_and_reads_rows(truth, server):
    """Nothing but pyarrow: list, ask for the tickets of an epoch, read them all."""
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    (info,) = client.list_flights()
    assert info.descriptor.path == [b"s.zarr"]
    facts = json.loads(info.schema.metadata[b"actcache"])
    assert facts["hooks"] == {"mlp_out": [0, 3], "resid_post": [0, 3]}
    assert client.get_flight_info(info.descriptor).total_records == info.total_records
    with actcache.open(truth.root).stream(**SMALL) as stream:
        asked = {"store": "s.zarr", "selection": wire.selection_json(stream.selection)}
    found = client.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(asked)))
    ids, n_rows = [], 0
    for endpoint in found.endpoints:
        table = client.do_get(endpoint.ticket).read_all()
        n_rows += len(table)
        row = table["row"].to_numpy()
        rows = np.frombuffer(b"".join(table["resid_post"].to_pylist()), np.uint16).reshape(len(table), -1)
        store = actcache.open(truth.root)
        sequence, position = (store._provenance.look_up(name, row) for name in ("sequence", "position"))
        layer = table["layer"].to_numpy()
        assert np.array_equal(rows, truth.bits(layer, sequence, position))
        ids.append(np.stack([layer, sequence, position], 1))
    assert np.array_equal(sorted_rows(np.concatenate(ids)), sorted_rows(truth.kept()))


def test_health_status_and_metrics(truth, serve):
    server = serve(truth.root)
    with actcache.open(url_of(server)).stream(**SMALL) as stream:
        n_rows = sum(len(b) for b in stream)
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    assert {action.type for action in client.list_actions()} == set(server_module.ACTIONS)

    def ask(action: str) -> bytes:
        return b"".join(found.body.to_pybytes() for found in client.do_action(flight.Action(action, b"")))

    assert json.loads(ask("health"))["status"] == "ok"
    status = json.loads(ask("status"))
    assert status["rows"] == n_rows
    assert status["stores"] == ["s.zarr"]
    text = ask("metrics").decode()
    assert f"actcache_rows_total {float(n_rows)}" in text
    assert 'actcache_calls_total{method="do_get"}' in text
    port, http = serve_http(server, "127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert f"actcache_rows_total {float(n_rows)}" in answer.read().decode()
    http.shutdown()
    http.server_close()


def test_serving_changes_nothing(truth, serve):
    before = all_files(truth.root)
    server = serve(truth.root)
    with actcache.open(url_of(server)).stream(**SMALL) as stream:
        list(stream)
    assert all_files(truth.root) == before


def test_patience_is_for_the_server_to_be_heard_of(monkeypatch):
    """A call that brings something now and then goes on for ever; one that brings nothing does not."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(link_module.time, "monotonic", lambda: float(next(clock)))
    link = link_module.Link("grpc://127.0.0.1:1", link_module.Credentials(), patience_s=100)
    monkeypatch.setattr(link._closed, "wait", lambda _s: False)
    tries = itertools.count()

    def attempt(_client):
        if next(tries) < 50:
            link._heard += 1
        raise flight.FlightUnavailableError("gone")

    with pytest.raises(UnreachableError):
        link._until(attempt, "do_get", None)
    assert next(tries) > 50


@pytest.mark.parametrize("options", [{}, FAR], ids=["near", "far"])
def test_clients_of_one_order_have_each_window_decoded_once(truth, serve, monkeypatch, options):
    """Four at once, each slower than the one before, in memory for a few windows of many; every message takes its time."""
    monkeypatch.setattr(rows_module, "MESSAGE_BYTES", 1 << 13)
    for module in ("followers", "windows"):  # a machine that stands still for seconds is another matter
        monkeypatch.setattr(f"actcache.service.{module}.IDLE_S", 60.0)
    probe = serve(truth.root)
    with actcache.open(url_of(probe)).stream(**SMALL) as stream:
        next(iter(stream))
        n_windows = stream._filling.order(0).n_windows
    server = serve(truth.root, memory_bytes=int(2.5 * probe.cache.used_bytes / probe.cache.n_windows))
    assert n_windows > 4
    found: dict[int, list] = {}
    streams = [actcache.open(url_of(server), options).stream(**SMALL) for _ in range(4)]
    wait, are_there = WindowCache._wait, threading.Event()

    def wait_for_all(cache, entry, is_over, until):
        """Nobody gets the first window before all have asked for it: of others the service cannot know."""
        if cache is server.cache and not are_there.is_set():
            assert eventually(lambda: are_there.is_set() or len(cache._followers._known) == 4, 30)
            are_there.set()
        return wait(cache, entry, is_over, until)

    monkeypatch.setattr(WindowCache, "_wait", wait_for_all)

    def train(i: int) -> None:
        with streams[i] as stream:
            for batch in stream:
                found.setdefault(i, []).extend(rows_in([batch]))
                time.sleep(i * 0.002)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    with actcache.open(truth.root).stream(**SMALL) as stream:
        expected = rows_in(stream)
    assert all(same(found[i], expected) for i in range(4))
    assert server.status()["windows_decoded"] == n_windows


def test_a_commit_made_while_served_is_seen(planned, serve):
    store = actcache.open(url_of(serve(planned.root)))
    assert store.committed() == []
    commit_shards(planned, [0, 1])
    assert store.committed() == [0, 1]
