"""Following a build: the rows, order and batches of a finished store, whenever its shards come, and never another byte."""

import itertools
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import (
    ActcacheError,
    ExpiredError,
    RetiredError,
    StalledError,
    UncommittedError,
    UsageError,
)
from actcache.producer import workers as workers_module
from actcache.producer.presence import Presence
from actcache.reader import follow as follow_module
from actcache.service.footprint import Footprint, bytes_under
from actcache.service.retention import DiskBudget, bounded_by
from actcache.store.disk import Disk
from actcache.store.live import (
    Budget,
    Expiry,
    LocalLive,
    encode,
    expired_file,
    now,
    read_consumers,
    read_producers,
)
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from tests.conftest import (
    Kit,
    as_bits,
    check_rows,
    commit_shards,
    make_decoder,
    read_texts,
    small_settings,
    sorted_rows,
    write_corpus,
    write_store,
)
from tests.reader.test_stream import wait_until
from tests.service.conftest import N_HOLDOUT, N_SHARDS, Time, catalog_of, rows_in, same, say
from tests.store.strategies import store_settings

SMALL = {"batch_size": 50, "window_rows": 256, "commit_shards": 3, "seed": 5}


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch):
    """What is waited for comes at a poll, so there is nothing to wait for between two."""
    monkeypatch.setattr(follow_module, "_FIRST_POLL_S", 0.0)
    monkeypatch.setattr(follow_module, "_LAST_POLL_S", 0.001)


class Arrivals:
    """Commits the next of some shards whenever the follower looks and finds nothing, `skip` looks later."""

    def __init__(self, truth, shards, skip=0) -> None:
        self.truth, self.left, self.skip, self.n_looks = truth, list(shards), skip, 0

    def __call__(self, waiting) -> None:
        self.n_looks += waiting is not None
        if waiting is not None and self.left and self.n_looks % (self.skip + 1) == 0:
            commit_shards(self.truth, [self.left.pop(0)])


@given(
    given_store=store_settings(),
    commit_shards_=st.integers(1, 5),
    window_rows=st.integers(8, 200),
    order=st.randoms(use_true_random=False),
    skip=st.integers(0, 2),
    data=st.data(),
)
@settings(max_examples=12)
def test_a_follower_gets_what_a_finished_store_gives(
    given_store, commit_shards_, window_rows, order, skip, data
):
    """Whatever order shards arrive in, and a cursor taken on the way goes on from a finished store, and back."""
    chosen = {"batch_size": 7, "window_rows": window_rows, "commit_shards": commit_shards_, "seed": 3}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow_module, "_FIRST_POLL_S", 0.0)
        patch.setattr(follow_module, "_LAST_POLL_S", 0.0)
        whole = write_store(Path(folder) / "whole.zarr", **given_store)
        following = write_store(Path(folder) / "part.zarr", **given_store, commit=[])
        with actcache.open(whole.root).stream(**chosen, order="commit") as stream:
            expected = rows_in(stream)
        shards = list(range(whole.grid.n_shards))
        order.shuffle(shards)
        with actcache.open(following.root).stream(**chosen, follow=True) as stream:
            stream.follower.on_wait = Arrivals(following, shards, skip)
            found, states = [], []
            for batch in stream:
                found += rows_in([batch])
                states.append(stream.state_dict())
            length = len(stream)
        assert same(found, expected)
        assert length == len(expected)
        at = data.draw(st.integers(0, len(states) - 1))
        for root, more in ((whole.root, {"order": "commit"}), (following.root, {"follow": True})):
            with actcache.open(root).stream(**chosen, **more) as stream:
                stream.load_state_dict(states[at])
                assert same(rows_in(stream), expected[at + 1 :])


def test_ranks_follow_alike(whole, planned):
    with actcache.open(whole.root).stream(**SMALL, order="commit") as stream:
        expected = [len(b) for b in stream]
    arrivals = Arrivals(planned, range(N_SHARDS))
    found = []
    for rank in range(2):
        with actcache.open(planned.root).stream(**SMALL, follow=True, rank=rank, world_size=2) as stream:
            stream.follower.on_wait = arrivals
            found.append([len(b) for b in stream])
    assert [sum(pair) for pair in zip(*found, strict=True)] == expected


@pytest.mark.parametrize("options", [{"outlier_norm_ratio": 1.2}, {"positions": slice(1, 40)}])
def test_filters_follow_alike(planned, whole, options):
    """Relative norm limits come from the first shard, which is waited for: a finished store gives the same numbers."""
    with actcache.open(whole.root).stream(**SMALL, **options, order="commit") as stream:
        limits, expected, n_rows = stream.selection.rules.norm_limits, rows_in(stream), stream.n_rows
    commit_shards(planned, [0])
    with actcache.open(planned.root).stream(**SMALL, **options, follow=True) as stream:
        stream.follower.on_wait = Arrivals(planned, range(1, N_SHARDS))
        assert stream.selection.rules.norm_limits == limits
        assert stream.n_rows == n_rows >= sum(len(b[1]) for b in expected)
        assert same(rows_in(stream), expected)
        assert (
            stream.settings == actcache.open(whole.root).stream(**SMALL, **options, order="commit").settings
        )


def test_reading_ahead_waits_for_nobody(planned):
    """A window whose shards are not there is not begun, so batches that can be had are handed out."""
    commit_shards(planned, range(3))
    with actcache.open(planned.root).stream(**SMALL, follow=True) as stream:
        stream.follower.on_wait = Arrivals(planned, [])
        stream.follower._patience_s = 0.0
        had = []
        with pytest.raises(StalledError, match="shard 3 "):
            had.extend(len(check_rows(planned, batch)) for batch in stream)
    assert sum(had) >= 300


# What is said while it waits, and when it gives up.


@contextmanager
def follower_of(truth, time: Time, **options):
    found = follow_module.Follower([catalog_of(truth).capture("resid_post")], clock=time, **options)
    found._closed.wait = lambda seconds: time.sleep(seconds + 1.0)
    yield found


def test_without_a_producer_it_gives_up_and_says_so(planned):
    said = []
    with (
        follower_of(planned, Time(), patience_s=30, on_wait=said.append) as follower,
        pytest.raises(StalledError) as error,
    ):
        follower.wait_for([1, 2])
    assert "shard 1 of" in str(error.value)
    assert "no producer is running" in str(error.value)
    assert "actcache build" in str(error.value)
    assert said[0].shard == 1
    assert said[0].waited_s > 0


def test_a_producer_that_lives_is_waited_for_however_long(planned):
    """Blocked, working, silent: each is said as what it is; patience counts from when it was last heard of."""
    said = []
    with Disk(planned.root) as disk, Presence(disk, N_SHARDS, dict) as presence:

        def live() -> None:
            if time.now < 500:
                presence.starts(4)
                presence._write()
            elif time.now < 1000:
                presence.blocked("no room for shard 4", ("b",))
                presence._write()

        with follower_of(
            planned, time := Time(live), patience_s=100, on_wait=said.append, consumer="a"
        ) as follower:
            follower.on_starved = lambda: pytest.fail("it is not this one that is waited for")
            presence._is_closing = True  # no beats of its own
            presence._news.set()
            presence._thread.join()
            with pytest.raises(StalledError, match=r"has been silent for 10\d s"):
                follower.wait_for([1])
        assert 1090 < time.now < 1110
    texts = [str(waiting) for waiting in said if waiting is not None]
    assert any("is working on shard 4" in text for text in texts)
    assert any("is blocked: no room for shard 4" in text for text in texts)
    assert any("has been silent for" in text and "it was working on shard 4" in text for text in texts)
    assert read_producers(LocalObjects(planned.root)) == [], "a producer that ended well leaves nothing"


def test_a_producer_that_failed_is_named_with_its_error(planned):
    with suppress(RuntimeError), Disk(planned.root) as disk, Presence(disk, N_SHARDS, dict) as presence:
        presence.starts(3)
        raise RuntimeError("the GPU is on fire")
    with follower_of(planned, Time(), patience_s=30) as follower, pytest.raises(StalledError) as error:
        follower.wait_for([1])
    assert "failed on shard 3" in str(error.value)
    assert "RuntimeError: the GPU is on fire" in str(error.value)
    with Disk(planned.root) as disk, Presence(disk, N_SHARDS, dict):
        assert [state.phase for state in read_producers(LocalObjects(planned.root))] == ["working"]
    assert not (planned.root / ".live").exists()


def test_starving_asks_once_for_a_checkpoint(planned):
    asked = []
    with Disk(planned.root) as disk, Presence(disk, N_SHARDS, dict) as presence:
        presence.blocked("no room for shard 4", ("b", "a"))
        wait_until(lambda: [s.phase for s in read_producers(LocalObjects(planned.root))] == ["blocked"])
        beats = itertools.count()

        def live() -> None:
            if next(beats) == 20:
                presence.blocked(None)
            if next(beats) > 60:
                commit_shards(planned, [1])

        with follower_of(planned, Time(live), consumer="a") as follower:
            follower.on_starved = lambda: asked.append(follower.waiting)
            follower.wait_for([1])
    assert len(asked) == 1
    assert asked[0].is_starved


def test_closing_wakes_who_waits(planned):
    stream = actcache.open(planned.root).stream(**SMALL, follow=True)
    waits, errors = threading.Event(), []
    stream.follower.on_wait = lambda _waiting: waits.set()

    def read() -> None:
        try:
            next(iter(stream))
        except ActcacheError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert waits.wait(30)
    stream.close()
    thread.join(30)
    assert not thread.is_alive()
    assert "was closed while it was waiting for shard" in str(errors[0])


def test_a_retired_shard_is_not_waited_for(whole):
    say(whole, "a", 9)
    footprint = Footprint(catalog_of(whole), whole.root, 1)
    room = int(footprint.fixed_bytes + footprint.most[:7].sum())
    with Disk(whole.root) as disk, Presence(disk, N_SHARDS, dict) as presence:
        bounded_by(DiskBudget(max_bytes=room, consumers=("a",)))(catalog_of(whole), disk, presence).admits(11)
    with (
        actcache.open(whole.root).stream(**SMALL, follow=True, consumer="a") as stream,
        pytest.raises(RetiredError, match="shard 1 of"),
    ):
        next(iter(stream))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": "global"}, "only order='commit'"),
        ({"partial": True}, "give one of the two"),
        ({"epochs": 2, "consumer": "a"}, "epochs=1"),
        ({"epochs": None, "consumer": "a"}, "epochs=1"),
        ({}, "this consumer is not named"),
        ({"consumer": "c"}, "keeps shards for a, b only; this consumer is c"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(planned, options, match):
    budget = Budget(max_disk_bytes=1, slots=9, in_flight=2, consumers=("a", "b"), expire_s=60, set_at=now())
    LocalLive(planned.root).put("budget.json", encode(budget))
    with pytest.raises(UsageError, match=match):
        actcache.open(planned.root).stream(**SMALL, follow=True, **options)


def test_not_following_an_unfinished_store_says_that_one_could(planned):
    with pytest.raises(UncommittedError, match="--follow"):
        actcache.open(planned.root).stream(**SMALL)


# Consumers.


def test_a_consumer_says_what_its_saved_checkpoint_needs(whole):
    with (
        actcache.open(whole.root).stream(**SMALL, follow=True) as stream,
        actcache.open(whole.root).register("a", stream, checkpoint_rows=700) as consumer,
    ):
        states = []
        for batch in stream:
            states.append(stream.state_dict())
            check_rows(whole, batch)
            said = read_consumers(LocalObjects(whole.root))["a"]
            assert said.needs_shard == N_HOLDOUT, "nothing was saved yet"
        assert (said.keeps_shards, said.interval_shards) == (3, 2)
        needs = []
        for state in states:
            consumer.saved(state)
            needs.append(read_consumers(LocalObjects(whole.root))["a"].needs_shard)
        assert needs == sorted(needs)
        assert needs[0] == N_HOLDOUT
        assert set(needs) == set(range(N_HOLDOUT, N_SHARDS)) or needs[-1] == N_SHARDS
        for state, first in zip(states[::7], needs[::7], strict=True):
            with actcache.open(whole.root).stream(**SMALL, order="commit") as again:
                again.load_state_dict(state)
                rest = [check_rows(whole, b) for b in again]
                assert not rest or np.concatenate(rest)[:, 1].min() // 4 >= first
        consumer.update(rows=12, loss=0.5)
        consumer.finished()
    said = read_consumers(LocalObjects(whole.root))["a"]
    assert (said.phase, said.rows, said.facts) == ("finished", 12, {"loss": 0.5})


def test_a_consumer_too_large_for_the_budget_is_refused_with_the_least(whole):
    budget = Budget(max_disk_bytes=1, slots=6, in_flight=2, consumers=("a",), expire_s=60, set_at=now())
    LocalLive(whole.root).put("budget.json", encode(budget))
    store = actcache.open(whole.root)
    with store.stream(**SMALL, follow=True, consumer="a") as stream:
        with pytest.raises(
            UsageError,
            match=r"holds 6 training\s+shards; this consumer needs 7: 2 in work, 3 that a window mixes and 2 between",
        ):
            store.register("a", stream, checkpoint_rows=700)
        with pytest.raises(UsageError, match="not among those the build waits for: a"):
            store.register("b", stream)
        store.register("a", stream, checkpoint_rows=300).close()


def test_an_expired_consumer_is_told_unless_nothing_was_lost(whole):
    gone = Expiry(name="a", expired_at=now(), silent_s=61.0, needs_shard=1)
    store = actcache.open(whole.root)
    with store.stream(**SMALL, follow=True) as stream, store.register("a", stream) as consumer:
        next(iter(stream))
        LocalLive(whole.root).put(expired_file("a"), encode(gone))
        with pytest.raises(ExpiredError, match=r"was given up at .*, after 61 s of silence"):
            consumer.saved(stream.state_dict())
    with store.stream(**SMALL, follow=True) as stream:
        store.register("a", stream).close()  # every shard is still there
    LocalLive(whole.root).put(expired_file("a"), encode(gone))
    say(whole, "b", 9)
    footprint = Footprint(catalog_of(whole), whole.root, 1)
    room = int(footprint.fixed_bytes + footprint.most[:7].sum())
    with Disk(whole.root) as disk, Presence(disk, N_SHARDS, dict) as presence:
        bounded_by(DiskBudget(max_bytes=room, consumers=("b",)))(catalog_of(whole), disk, presence).admits(11)
    (whole.root / ".live/budget.json").unlink()
    with (
        store.stream(**SMALL, follow=True) as stream,
        pytest.raises(ExpiredError, match=r"shards it\s+needs from shard 1 on are gone"),
    ):
        store.register("a", stream)


# All together: a model, a budget, a consumer.


def test_building_within_a_budget_while_it_is_read(kit, tmp_path, monkeypatch):
    """A real build that needs four times its budget; each row once, the disk never over, the same rows as without."""
    monkeypatch.setattr(follow_module, "_FIRST_POLL_S", 0.01)
    monkeypatch.setattr(workers_module, "POLL_S", 0.02)
    chosen = {
        "n_tokens": 24 * 8 * 16,
        "holdout_frac": 0.05,
        "rows_per_chunk": 32,
        "dtype": "float32",
        "codec": "none",
    }
    chosen |= {"hooks": ("resid_post", "mlp_out")}
    big = Kit(kit.tokenizer, write_corpus(tmp_path / "text", read_texts(60, 800)))
    whole = tmp_path / "whole.zarr"
    big.build(small_settings(whole, **chosen))
    stream_args = {
        "batch_size": 60,
        "window_rows": 256,
        "commit_shards": 2,
        "hook": ["resid_post", "mlp_out"],
    }
    with actcache.open(whole).stream(**stream_args, order="commit") as stream:
        expected = rows_in(stream)
    out = tmp_path / "s.zarr"
    catalog = Catalog(LocalObjects(whole))
    footprint = Footprint(catalog, whole, 1)
    held = catalog.grid.n_holdout_shards
    budget = int(footprint.fixed_bytes + footprint.most[:held].sum() + 5 * footprint.most.max())
    assert bytes_under(whole) > budget
    peak, errors = [0], []

    def look(operation: str, _key: str) -> None:
        if operation in ("fsync", "unlink", "remove") and (out / "zarr.json").exists():
            peak[0] = max(peak[0], bytes_under(out))

    def produce() -> None:
        try:
            admission = bounded_by(DiskBudget(max_bytes=budget, consumers=("a",)))
            big.build(small_settings(out, **chosen), make_decoder(), admission=admission, on_operation=look)
        except ActcacheError as error:
            errors.append(error)

    producer = threading.Thread(target=produce)
    producer.start()
    while not (out / ".live/budget.json").exists():
        assert producer.is_alive(), errors
    store, n_saved = actcache.open(out), 0
    with (
        store.stream(**stream_args, follow=True, consumer="a") as stream,
        store.register("a", stream) as consumer,
    ):

        def save() -> None:
            nonlocal n_saved
            consumer.saved(stream.state_dict())
            n_saved += 1

        stream.follower.on_starved = save
        found = rows_in(stream)
        consumer.finished()
    producer.join(60)
    assert not producer.is_alive()
    assert errors == []
    assert same(found, expected)
    assert n_saved > 3
    assert 0 < peak[0] <= budget
    assert len(store.retired()) > 10


def poll_while_writing(root: Path, n_polls: int, seed: int) -> int:
    """Read a committed shard at every poll, while another thread commits; returns how many were read."""
    truth = write_store(
        root, n_sequences=400, seq_len=16, per_shard=4, rows_per_chunk=16, width=8, commit=[], seed=seed
    )
    rng, n_read, stop = np.random.default_rng(seed), 0, threading.Event()

    def write() -> None:
        for shard in range(truth.grid.n_shards):
            commit_shards(truth, [shard])
            if stop.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(n_polls):
            store = actcache.open(root)
            there = store.committed()
            newest = there[-3:] if there else []
            for shard in {int(rng.choice(there)), *newest} if there else ():
                sequences = truth.grid.sequences_of(shard)
                rows = store.read(layer=3, sequences=slice(sequences.start, sequences.stop))
                assert np.array_equal(
                    as_bits(rows), as_bits(truth.acts["resid_post"][1, sequences.start : sequences.stop])
                )
                n_read += 1
    finally:
        stop.set()
        writer.join()
    return n_read


def test_polls_never_see_what_is_not_committed(tmp_path):
    assert poll_while_writing(tmp_path / "s.zarr", 200, seed=0) > 200


@pytest.mark.soak
def test_ten_thousand_polls_see_only_what_is_committed(tmp_path):
    assert sum(poll_while_writing(tmp_path / f"{i}.zarr", 1000, seed=i) for i in range(10)) > 10_000


def test_rows_of_a_follower_are_every_kept_row(planned):
    with actcache.open(planned.root).stream(**SMALL, follow=True, dtype=torch.float32) as stream:
        stream.follower.on_wait = Arrivals(planned, range(N_SHARDS))
        ids = [np.stack([b.layer, b.sequence, b.position], 1) for b in stream]
    assert np.array_equal(sorted_rows(np.concatenate(ids)), sorted_rows(planned.kept()))
