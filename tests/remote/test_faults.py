"""Networks fail: each failure ends in the right bytes after retries, or in a clear error within its deadline."""

import os
import socket
import time
from dataclasses import replace

import numpy as np
import pytest

from actcache.errors import DamageError, UnreachableError, UsageError
from actcache.reader import access
from actcache.reader.access import Store
from actcache.store.objects import open_objects
from actcache.store.open import Catalog
from actcache.store.remote import Patience, RefusedError, RemoteObjects
from actcache.store.remote_clients import make_client
from actcache.store.verify import find_problems
from tests.conftest import as_bits, write_store
from tests.remote.limits import QUICK, SHORT
from tests.remote.proxy import always, first

PASSING = ("500", "503", "429", "reset", "truncate", "lie", "stall", "silent")
BODY = bytes(range(256)) * 8


def within(patience: Patience) -> float:
    """Seconds a request may take at most, with room for a busy machine."""
    return patience.attempts * (patience.attempt_s + patience.most_wait_s) + 5.0


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(put, open_url, proxy, fault):
    url = put("zarr.json", b"{}")
    put("rows", BODY)
    waits = fault in ("stall", "silent")  # until the deadline of the attempt
    objects = open_url(url, replace(QUICK, attempt_s=1.0) if waits else QUICK)
    proxy.fault = first(1 if waits or fault == "lie" else 2, fault, "rows")
    assert bytes(objects.read_range("rows", 100, 1000)) == BODY[100:1100]
    if not waits and fault != "lie":  # how long an object is nobody knows until the ledger says so
        proxy.fault = first(1, fault, "rows")
        assert objects.read("rows") == BODY


@pytest.mark.parametrize("fault", ["503", "reset", "truncate", "stall", "silent"])
def test_what_does_not_pass_is_a_clear_error_in_time(put, client, proxy, fault):
    url = put("rows", BODY)
    objects = RemoteObjects(url, make_client(url, {}, SHORT.attempt_s, client), SHORT)
    proxy.fault = always(fault, "rows")
    for call in (lambda: objects.read("rows"), lambda: objects.read_range("rows", 0, 1000)):
        started = time.perf_counter()
        with pytest.raises(
            UnreachableError, match=rf"{url}/rows: 2 attempts in .* the last with \w+"
        ) as caught:
            call()
        assert time.perf_counter() - started < within(SHORT)
        assert isinstance(caught.value, OSError)
        assert not isinstance(caught.value, FileNotFoundError)
        assert caught.value.__cause__ is not None


def test_refusals_are_not_tried_again(put, open_url, proxy):
    url = put("zarr.json", b"{}")
    put("rows", BODY)
    objects = open_url(url)
    proxy.fault = always("403", "rows")
    proxy.seen.clear()
    for call in (lambda: objects.read_range("rows", 0, 1000), lambda: objects.size("rows")):
        with pytest.raises(UnreachableError, match=r"refused .*credentials"):
            call()
    assert len(proxy.seen) <= 3  # s3fs may look whether it is a folder


def test_a_server_that_is_not_there(open_url, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    started = time.perf_counter()
    with pytest.raises(UnreachableError, match="2 attempts"):
        open_url("s3://bucket/store", SHORT)
    assert time.perf_counter() - started < within(SHORT)


def test_a_server_that_accepts_and_says_nothing(open_url, monkeypatch):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        started = time.perf_counter()
        with pytest.raises(UnreachableError, match="2 attempts"):
            open_url("s3://bucket/store", SHORT)
        assert time.perf_counter() - started < within(SHORT)


def test_listing_survives_too(put, open_url, proxy):
    url = put("zarr.json", b"{}")
    put("a/b", BODY)
    objects = open_url(url)
    proxy.fault = first(2, "503", "list-type")
    assert objects.names("a") == ["b"]


# A whole store behind a bad network.


@pytest.fixture
def open_store(open_url, monkeypatch):
    def open_one(url: str, patience: Patience = QUICK, **arguments) -> Store:
        objects = open_url(url, patience, **arguments)
        monkeypatch.setattr(access, "open_objects", lambda *_args, **_options: objects)
        return Store(url)

    return open_one


def all_rows(store: Store, **changes) -> list[np.ndarray]:
    with store.stream(batch_size=16, window_rows=48, **changes) as stream:
        return [as_bits(batch.rows.clone()) for batch in stream]


def test_a_stream_through_bad_weather(tmp_path, upload, open_store, proxy):
    truth = write_store(tmp_path / "local", n_sequences=16)
    url = upload(truth.root)
    expected = all_rows(Store(truth.root))
    turn = iter(["503", None, "reset", None, "truncate", None, "lie", None] * 500)
    proxy.fault = lambda path: next(turn) if "/rows/" in path else None
    found = all_rows(open_store(url), threads=1, io_threads=1)  # of many, one could meet every fault
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("client", ["obstore"])
def test_when_the_network_dies_the_consumer_hears_of_it_and_goes_on_later(
    tmp_path, upload, open_store, proxy
):
    truth = write_store(tmp_path / "local", n_sequences=16)
    expected = all_rows(Store(truth.root))
    store = open_store(upload(truth.root))
    found = []
    with store.stream(batch_size=16, window_rows=48) as stream:
        batches = iter(stream)
        found.append(as_bits(next(batches).rows.clone()))
        proxy.fault = always("503")
        with pytest.raises(UnreachableError):
            found.extend(as_bits(batch.rows.clone()) for batch in batches)
        proxy.fault = lambda _path: None
        found += [as_bits(batch.rows.clone()) for batch in stream]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("client", ["obstore"])
def test_being_unreachable_is_not_damage(tmp_path, upload, open_url, proxy):
    truth = write_store(tmp_path / "local")
    catalog = Catalog(open_url(upload(truth.root)))
    proxy.fault = always("503", "/rows/")
    with pytest.raises(UnreachableError) as caught:
        find_problems(catalog, threads=1)
    assert not isinstance(caught.value, DamageError)


# Waiting.


class Failing:
    name = "failing"

    def __init__(self, error: Exception) -> None:
        self.error, self.n_calls = error, 0

    def size(self, key: str) -> int:
        self.n_calls += 1
        raise self.error


def test_waits_double_up_to_a_bound_and_are_spread():
    patience = Patience(first_wait_s=1.0, most_wait_s=8.0)
    for attempt in range(1, 10):
        longest = min(8.0, 2.0 ** (attempt - 1))
        waits = [patience.wait_s(f"read {i}", attempt) for i in range(50)]
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert max(waits) - min(waits) > longest / 4
        assert waits == [patience.wait_s(f"read {i}", attempt) for i in range(50)]


def test_no_attempt_begins_that_could_end_too_late():
    client = Failing(ConnectionError("gone"))
    objects = RemoteObjects("x://y", client, Patience(attempts=50, attempt_s=10.0, total_s=5.0))
    with pytest.raises(UnreachableError, match="1 attempts"):
        objects.size("a")
    assert client.n_calls == 1


@pytest.mark.parametrize(
    ("error", "n_calls", "raised"),
    [
        (FileNotFoundError("a"), 1, FileNotFoundError),
        (RefusedError("no"), 1, UnreachableError),
        (UsageError("no"), 1, UsageError),
        (TimeoutError(), 4, UnreachableError),
        (RuntimeError("whatever"), 4, UnreachableError),
    ],
)
def test_what_is_tried_again(error, n_calls, raised):
    client = Failing(error)
    with pytest.raises(raised):
        RemoteObjects("x://y", client, QUICK).size("a")
    assert client.n_calls == n_calls


def test_after_a_fork_it_says_so_instead_of_hanging(monkeypatch):
    objects = RemoteObjects("x://y", Failing(TimeoutError()), QUICK)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UsageError, match="another process"):
        objects.size("a")


def test_messages_hold_no_password():
    with pytest.raises(UnreachableError) as caught:
        open_objects("http://me:secret@127.0.0.1:9/store", patience=SHORT)
    assert "secret" not in str(caught.value)
