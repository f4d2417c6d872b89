"""A client on the service's machine reads windows where they are: the same rows, none of which crosses the connection."""

import os

import numpy as np
import pytest

import actcache
from actcache.errors import DamageError
from actcache.service import received as received_module
from actcache.service import rows as rows_module
from actcache.service import server as server_module
from actcache.service.near import OthersMemory, Shareable
from tests.service.conftest import rows_in, same, url_of

SMALL = {"batch_size": 100, "window_rows": 2048, "seed": 3, "epochs": 2}
pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="memory that others can open is Linux's"
)


@pytest.fixture
def url(serve, whole):
    return url_of(serve(whole.root.parent))


@pytest.fixture
def no_messages(monkeypatch):
    """Rows may not come any other way."""

    def messages(*_args):
        raise AssertionError("rows were asked for over the connection")

    monkeypatch.setattr(server_module, "messages", messages)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stack": "feature"},
        {"stack": "layers"},
        {"rank": 1, "world_size": 2},
        {"rank": 3, "world_size": 4},
        {"layers": [3], "positions": slice(3, 60)},
        {"window_rows": 100, "batch_size": 7},
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_messages")
def test_rows_are_those_of_the_local_stream(url, whole, more):
    options = SMALL | more
    with actcache.open(whole.root).stream(**options) as local, actcache.open(url).stream(**options) as near:
        assert same(rows_in(near), rows_in(local))
        assert near.counters.row_bytes >= local.counters.row_bytes


@pytest.mark.usefixtures("no_messages")
def test_what_was_told_in_several_messages(url, whole, monkeypatch):
    monkeypatch.setattr(rows_module, "MESSAGE_BYTES", 300 * rows_module.NEAR_ROW_BYTES)
    with actcache.open(whole.root).stream(**SMALL) as local, actcache.open(url).stream(**SMALL) as near:
        assert same(rows_in(near), rows_in(local))


def test_memory_that_cannot_be_opened_is_not_asked_for_again(url, whole, monkeypatch):
    """The service is in another container, or runs as another user."""
    opened = []

    def refuse(where):
        opened.append(where)
        raise PermissionError(13, "of another user")

    monkeypatch.setattr(received_module, "OthersMemory", refuse)
    with actcache.open(whole.root).stream(**SMALL) as local, actcache.open(url).stream(**SMALL) as far:
        assert same(rows_in(far), rows_in(local))
    assert 1 <= len(opened) <= 2, "two windows are under way at once"


def test_memory_that_has_gone_once_is_asked_for_again(url, whole, monkeypatch):
    """The service was restarted: its next windows are found."""
    opened, n_sent, messages = [], [0], server_module.messages

    def gone_once(where):
        opened.append(where)
        if len(opened) == 3:
            raise FileNotFoundError(2, "no such process")
        return OthersMemory(where)

    def counted(*args):
        n_sent[0] += 1
        return messages(*args)

    monkeypatch.setattr(received_module, "OthersMemory", gone_once)
    monkeypatch.setattr(server_module, "messages", counted)
    with actcache.open(whole.root).stream(**SMALL) as local, actcache.open(url).stream(**SMALL) as near:
        assert same(rows_in(near), rows_in(local))
    assert len(opened) > 4
    assert n_sent[0] == 1


def test_it_can_be_switched_off(url, whole, monkeypatch):
    monkeypatch.setattr(server_module, "places", None)
    with (
        actcache.open(whole.root).stream(**SMALL) as local,
        actcache.open(url, {"shared_memory": False}).stream(**SMALL) as far,
    ):
        assert same(rows_in(far), rows_in(local))


def test_memory_used_for_something_else_meanwhile_is_noticed(serve, whole, monkeypatch):
    """The client was slower than the service waits: its window comes again, over the connection, and the next one as before."""
    server, n_read, n_sent = serve(whole.root.parent), [0], [0]
    read, messages = OthersMemory.read, server_module.messages

    def too_late(self, start, into):
        n_read[0] += 1
        if n_read[0] == 5:
            for entry in server.cache._entries.values():
                for memory in entry.memory:
                    if memory.where() == self._where:
                        memory.use_again()
                        into[...] = 0xEE
                        return
        read(self, start, into)

    def counted(*args):
        n_sent[0] += 1
        return messages(*args)

    monkeypatch.setattr(OthersMemory, "read", too_late)
    monkeypatch.setattr(server_module, "messages", counted)
    with (
        actcache.open(whole.root).stream(**SMALL) as local,
        actcache.open(url_of(server)).stream(**SMALL) as near,
    ):
        assert same(rows_in(near), rows_in(local))
    assert n_read[0] > 20
    assert n_sent[0] == 1


def test_places_altered_on_the_way_are_noticed(url, monkeypatch):
    message = rows_module.message

    def altered(schema, about, rows):
        about = [about[0], about[1], about[2].copy()]
        about[2][-1] ^= 1
        return message(schema, about, rows)

    monkeypatch.setattr(rows_module, "message", altered)
    with actcache.open(url).stream(**SMALL) as stream, pytest.raises(DamageError, match="altered"):
        next(iter(stream))


# The memory itself.


def test_others_read_what_is_there_and_notice_when_it_changes():
    mine, there = Shareable(100_000), np.empty(3000, np.uint8)
    mine.bytes[:] = np.arange(100_000) % 251
    assert mine.bytes.ctypes.data % 64 == 0
    where = mine.where()
    assert where is not None
    with OthersMemory(where) as memory:
        memory.read(97_000, there)
        assert np.array_equal(there, mine.bytes[97_000:])
        assert memory.is_as_told
        mine.use_again()
        assert not memory.is_as_told
        with pytest.raises(OSError, match="ends before"):
            memory.read(97_001, there)
    assert mine.where() == where._replace(use=where.use + 1)


def test_memory_that_has_gone_is_not_found():
    mine = Shareable(1000)
    where = mine.where()
    assert where is not None
    with pytest.raises(FileNotFoundError, match="another"):
        OthersMemory(where._replace(inode=where.inode + 1))
    del mine
    with pytest.raises(FileNotFoundError):
        OthersMemory(where)


def test_other_systems_have_none(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    mine = Shareable(1000)
    mine.bytes[:] = 1
    mine.use_again()
    assert mine.where() is None
    assert mine.bytes.nbytes == mine.nbytes == 1000


def test_there_rows_come_over_the_connection(url, whole, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with actcache.open(whole.root).stream(**SMALL) as local, actcache.open(url).stream(**SMALL) as far:
        assert same(rows_in(far), rows_in(local))
