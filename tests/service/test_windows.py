"""How long a window is kept: for all who follow its order and live, within memory, and nobody waits for ever."""

import itertools
import threading
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pytest

import actcache
from actcache.service import followers as followers_module
from actcache.service import memory as memory_module
from actcache.service.memory import PAGE, Memory
from actcache.service.shelf import Served, Shelf
from actcache.service.windows import Order, WindowCache
from tests.service.conftest import Time
from tests.service.test_service import eventually

_STEP_S = 0.1


class Following:
    """A client that takes a part of a window every so many steps, and the next one after its last part.

    steps  it goes on at every so many.    ends  None: it goes on as long as the test does.
    """

    def __init__(
        self, order: Order, windows: Iterable[int], *, every: int = 1, parts: int = 2, name=""
    ) -> None:
        self.order, self.every, self.name = order, every, name or str(id(self))
        self._left = itertools.product(windows, range(parts))
        self.parts, self.at, self.had = parts, next(self._left), []

    @property
    def is_done(self) -> bool:
        return self.at is None

    def step(self, cache: WindowCache) -> bool:
        """Whether it got on."""
        assert self.at is not None
        epoch, (number, part) = 0, self.at
        with cache.use(self.order, epoch, number, self.name, lambda: False, -1.0) as entry:
            if entry is None:
                return False
            assert entry.layout is not None
            self.had.append((number, part, int(np.asarray(entry.rows[0][:8]).sum())))
            cache.had(self.name, entry, part, self.parts)
        cache.prepare(self.order, epoch, number + 1)
        self.at = next(self._left, None)
        return True


def test_memory_of_messages_is_used_again_once_nothing_refers_to_it():
    memory = Memory()
    first = memory.take(5000)
    sent = pa.py_buffer(first).slice(100, 50)
    address = first.ctypes.data
    assert address % PAGE == 0
    del first
    other = memory.take(5000)
    assert other.ctypes.data != address, "a message still refers to it"
    del sent
    assert memory.take(4000).ctypes.data == address
    many = [memory.take(10) for _ in range(memory_module._MOST_FREE + 3)]
    del many
    assert len(memory._free) == memory_module._MOST_FREE


@pytest.fixture
def served(whole) -> Served:
    return Shelf(str(whole.root)).open("s.zarr")


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def make_order(whole, served):
    """Orders with windows of one size, by seed."""

    def made(cache: WindowCache, seed: int = 0) -> Order:
        with actcache.open(whole.root).stream(batch_size=50, window_rows=256, seed=seed) as stream:
            return cache.order(served, stream.selection)

    return made


@pytest.fixture
def cache(time, make_order):
    probe = WindowCache(1 << 40, 1, time)
    one = make_order(probe).n_bytes
    probe.close()
    made = WindowCache(int(3.5 * one), 1, time)
    yield made
    made.close()


def run(cache: WindowCache, time: Time, clients: list[Following], most_steps: int = 20_000) -> None:
    """Until all have had everything; none may wait longer than a stalled one is waited for."""
    got_on = {id(client): 0.0 for client in clients}
    for step in range(most_steps):
        for client in clients:
            if not client.is_done and step % client.every == 0 and client.step(cache):
                got_on[id(client)] = time.now
            assert cache.used_bytes <= cache.limit_bytes
        left = [client for client in clients if not client.is_done]
        if not left:
            return
        assert all(entry.fill.is_done_within(30) for entry in cache._entries.values())
        time.now += _STEP_S
        for client in left:
            waited_s = time.now - got_on[id(client)]
            assert waited_s <= 3 * (followers_module.IDLE_S + client.every * _STEP_S), "it waits for ever"
    raise AssertionError("it never ends")


@pytest.fixture
def n_windows(cache, make_order):
    n = make_order(cache).filling.order(0).n_windows
    assert n >= 4 * 3, "more than fit memory, several times"
    return n


def test_clients_of_different_speeds_have_each_window_decoded_once(cache, time, make_order, n_windows):
    """The fast ones wait for room: none of what a slower one still needs is thrown out."""
    order = make_order(cache)
    clients = [Following(order, range(n_windows), every=every) for every in (1, 2, 3, 7)]
    run(cache, time, clients)
    assert cache.tally.decoded == n_windows
    assert len({tuple(client.had) for client in clients}) == 1


def test_a_client_that_stalls_is_not_waited_for(cache, time, make_order, n_windows):
    """It loses its place, no more: when it comes again it has all windows from there on."""
    order = make_order(cache)
    fast, stalled = (Following(order, range(n_windows)) for _ in range(2))
    for _ in range(3):
        assert eventually(lambda: stalled.step(cache), 30)
    run(cache, time, [fast])
    assert time.now > followers_module.IDLE_S
    run(cache, time, [stalled])
    assert stalled.had == fast.had


def test_one_that_breaks_off_is_not_waited_for_at_all(cache, time, make_order, n_windows):
    order = make_order(cache)
    gone = Following(order, range(n_windows), name="gone")
    assert eventually(lambda: gone.step(cache), 30)
    with pytest.raises(GeneratorExit), cache.call("gone"):
        raise GeneratorExit
    run(cache, time, [Following(order, range(n_windows))])
    assert time.now <= (2 * n_windows + 1) * _STEP_S < followers_module.IDLE_S
    assert cache.tally.decoded == n_windows


def test_clients_further_apart_than_memory_holds_stop_nobody(cache, time, make_order, n_windows):
    """One begins when the others are far on, and one goes back to the first window: nobody waits for them."""
    order = make_order(cache)
    early = [Following(order, range(n_windows)) for _ in range(2)]
    for _ in range(4 * n_windows):
        for client in early:
            if client.at is not None and client.at[0] < n_windows // 2:
                client.step(cache)
        time.now += _STEP_S / 10
    late = Following(order, range(n_windows))
    again = Following(order, [*range(5), *range(n_windows)])
    run(cache, time, [*early, late, again])
    assert cache.tally.decoded <= 3 * n_windows


@pytest.mark.parametrize("n_orders", [2, 4])
def test_orders_that_share_memory_all_get_on(cache, time, make_order, n_windows, n_orders):
    """Ranks at different places of several orders, in memory for three windows."""
    clients = [
        Following(make_order(cache, seed), range(n_windows), every=every)
        for seed in range(n_orders)
        for every in (1, 3)
    ]
    run(cache, time, clients)
    for quick, slow in zip(clients[::2], clients[1::2], strict=True):
        assert quick.had == slow.had


def test_nothing_is_prepared_in_the_room_that_somebody_waits_for(cache, make_order):
    """And who waited first has it first, though others that need less would fit before."""
    mine, other, third = (make_order(cache, seed) for seed in range(3))
    for number in range(3):
        with cache.use(mine, 0, number, number, lambda: False, 1e9) as entry:
            assert entry is not None
    got: list[int] = []

    def wait(order: Order) -> None:
        with cache.use(order, 0, 0, str(order.key), lambda: False, 1e9) as entry:
            got.append(order.selection.seed if entry else -1)

    threads = []
    for order in (other, third):
        threads.append(threading.Thread(target=wait, args=(order,), daemon=True))
        threads[-1].start()
        assert eventually(lambda: len(cache._waiting) == len(threads), 30)
    third.n_bytes = 1
    assert not eventually(lambda: got != [], 0.2)
    cache.had(0, cache._entries[mine.key, 0, 0], 0, 1)
    cache.prepare(mine, 0, 7)
    for thread in threads:
        thread.join(30)
    assert set(got) == {1, 2}, "which of them is decoded first is another matter"
    assert [key for key, *_ in cache._entries][-2:] == [other.key, third.key]
    assert cache.tally.decoded == 3 + 2


def test_a_client_without_a_name_gets_all_windows_too(cache, time, make_order, n_windows):
    order = make_order(cache)
    nameless = Following(order, range(n_windows), parts=1)
    while not nameless.is_done:
        with cache.call(None) as nameless.name:
            nameless.step(cache)
        time.now += _STEP_S
    assert [number for number, *_ in nameless.had] == list(range(n_windows))


def test_a_window_that_is_read_where_it_is_stays_for_a_while(cache, time, make_order, n_windows):
    """Until its client is done, or for as long as a stalled one is waited for: then others have its room."""
    order = make_order(cache)
    for number in range(2):
        with cache.use(order, 0, number, "near", lambda: False, 30) as entry:
            assert entry is not None
            until = cache.keep("near", entry)
    assert until == time.now + followers_module.IDLE_S
    cache.had("near", entry, 0, 1)
    kept = entry
    before, told = kept.rows[0].copy(), [memory.where() for memory in kept.memory]
    clients = [Following(order, range(n_windows)) for _ in range(2)]
    while time.now < until:
        for client in clients:
            client.step(cache)
        assert kept.key in cache._entries
        assert cache.used_bytes <= cache.limit_bytes
        time.now += _STEP_S
    assert np.array_equal(kept.rows[0], before)
    assert [memory.where() for memory in kept.memory] == told
    run(cache, time, clients)
    assert kept.key not in cache._entries
    assert clients[0].had == clients[1].had
    assert all(
        where is None or where.use != m.where().use for where, m in zip(told, kept.memory, strict=True)
    )


def test_one_that_has_read_gives_its_window_back_at_once(cache, time, make_order, n_windows):
    order = make_order(cache)
    for number in range(n_windows):
        assert eventually(lambda number=number: _read(cache, order, number), 30)
    assert time.now == 0


def _read(cache: WindowCache, order: Order, number: int) -> bool:
    with cache.use(order, 0, number, "near", lambda: False, -1.0) as entry:
        if entry is None:
            return False
        cache.keep("near", entry)
    cache.had("near", entry, 0, 1)
    cache.done_with("near", entry)
    return True
