"""A bounded disk: nothing goes that a saved checkpoint needs, nothing exceeds the budget, nobody waits in silence."""

import json
import shutil
import threading
from contextlib import contextmanager

import numpy as np
import pytest

import actcache
from actcache.errors import DamageError, ExpiredError, RetiredError, UsageError
from actcache.service.footprint import Footprint, bytes_under
from actcache.service.retention import DiskBudget, Retention
from actcache.store.disk import Disk
from actcache.store.live import read_budget, read_expiry, shards_needed
from actcache.store.objects import LocalObjects
from actcache.store.verify import find_problems
from tests.conftest import check_rows, commit_shards, write_store
from tests.service.conftest import N_HOLDOUT, N_SHARDS, Time, catalog_of, say


@pytest.fixture
def truth(planned):
    return planned


def budget_for(truth, n_training: int, consumers=("a",), **more) -> DiskBudget:
    """Just enough for this many training shards beside the holdout, were none of them compressed."""
    catalog = catalog_of(truth)
    footprint = Footprint(catalog, truth.root, len(consumers))
    room = int(footprint.most[:N_HOLDOUT].sum() + n_training * footprint.most[N_HOLDOUT:].max())
    return DiskBudget(max_bytes=footprint.fixed_bytes + room, consumers=consumers, **more)


class Producer:
    """Asks until it is admitted, as a build does."""

    def __init__(self, guard: Retention, time: Time) -> None:
        self.guard, self.time = guard, time

    def admit(self, shard: int) -> bool:
        while not self.guard.admits(shard):
            if self.guard.is_enough:
                return False
            self.time.sleep(0.2)
        return True


@contextmanager
def retention(truth, budget, time=None, on_blocked=lambda _why: None, on_operation=None):
    time = time or Time()
    with Disk(truth.root, on_operation) as disk:
        yield Producer(Retention(catalog_of(truth), disk, budget, on_blocked=on_blocked, clock=time), time)


def problems(truth):
    return find_problems(catalog_of(truth), threads=1)


def test_nothing_goes_before_room_is_needed_and_then_only_what_nobody_needs(truth):
    """Two consumers at different places: the slower one decides, and the blocked producer says so."""
    budget, said = budget_for(truth, 4, ("a", "b")), []

    def move() -> None:
        """The slow consumer saves a checkpoint that is one shard further on."""
        assert said[-1] is not None
        assert said[-1].waiting_for == ("b",)
        assert "waiting for b to save a checkpoint past shard" in said[-1].reason
        needs["b"] += 1
        say(truth, "b", needs["b"])

    needs = {"a": 9, "b": N_HOLDOUT}
    say(truth, "a", needs["a"])
    say(truth, "b", needs["b"])
    with retention(truth, budget, Time(move), said.append) as guard:
        for shard in range(N_SHARDS):
            assert guard.admit(shard)
            retired = catalog_of(truth).capture("resid_post").retired()
            assert all(s < needs["b"] for s in retired)
            if shard <= N_HOLDOUT + 3:
                assert retired == []
            commit_shards(truth, [shard])
    assert said[-1] is None
    found = catalog_of(truth).capture("resid_post")
    assert found.committed() == list(range(N_SHARDS))
    assert found.retired() == list(range(N_HOLDOUT, needs["b"])), "no more than was necessary"
    assert 0 in found.live(), "holdout stays"
    assert problems(truth) == []


def test_disk_never_exceeds_the_budget(truth):
    """Looked at before every step that changes the disk, temporary files and folders included."""
    budget, peak = budget_for(truth, 4), 0
    say(truth, "a", N_HOLDOUT)

    def look(_name: str, _key: str) -> None:
        nonlocal peak
        peak = max(peak, bytes_under(truth.root))

    def move() -> None:
        state["at"] += 1
        say(truth, "a", state["at"])

    state = {"at": N_HOLDOUT}
    with retention(truth, budget, Time(move), on_operation=look) as guard:
        for shard in range(N_SHARDS):
            guard.admit(shard)
            commit_shards(truth, [shard], look)
            assert (
                bytes_under(truth.root)
                <= guard.guard.used_bytes + Footprint(guard.guard.catalog, truth.root, 1).most[shard]
            )
    assert 0 < peak <= budget.max_bytes
    assert peak > 0.5 * budget.max_bytes, "the budget is used, not just kept"


def test_footprint_counts_what_is_there_and_bounds_what_is_not(truth):
    footprint = Footprint(catalog_of(truth), truth.root, 1)
    before = bytes_under(truth.root)
    assert before <= footprint.fixed_bytes
    for shard in range(N_SHARDS):
        assert footprint.actual(shard) == 0
        commit_shards(truth, [shard])
        assert 0 < footprint.actual(shard) <= footprint.most[shard]
    after = bytes_under(truth.root)
    assert after <= footprint.fixed_bytes + sum(footprint.actual(s) for s in range(N_SHARDS))
    assert Footprint(catalog_of(truth), truth.root, 1).fixed_bytes <= footprint.fixed_bytes


def test_a_retired_shard_is_an_error_that_says_so_to_every_reader(truth):
    commit_shards(truth, range(N_SHARDS))
    store = actcache.open(truth.root)
    stale = catalog_of(truth).capture("resid_post")
    reader = stale.reader(3)
    budget = budget_for(truth, 4)
    say(truth, "a", 9)
    with retention(truth, budget) as guard:
        guard.admit(N_SHARDS - 1)
    retired = store.retired()
    assert 3 in retired
    assert 0 not in retired
    at = [truth.grid.sequences_of(3).start]
    for read in (
        lambda: store.read(layer=0, sequences=at),
        lambda: stale.side("norm", 3),
        lambda: reader.read(0, 0),
        lambda: store.stream(batch_size=8),
        lambda: catalog_of(truth).capture("resid_post").check_not_retired(3),
    ):
        with pytest.raises(RetiredError, match=r"shard \d+ of .* was retired"):
            read()
    with store.stream(batch_size=8, split="holdout") as stream:
        for batch in stream:
            check_rows(truth, batch)
    live = [s for s in range(N_HOLDOUT, N_SHARDS) if s not in retired]
    kept = truth.kept(layers=[0])
    in_live = sum(s // 4 in live for s in kept[:, 1])
    assert store.stats()[0].n_rows == in_live
    assert problems(truth) == []


def test_lost_is_not_retired(truth):
    commit_shards(truth, range(N_SHARDS))
    (truth.root / "acts/resid_post/rows/c.0.3.0").unlink()
    with pytest.raises(DamageError, match="missing"):
        actcache.open(truth.root).read(layer=0, sequences=[12])


def test_an_altered_retirement_is_damage(truth):
    commit_shards(truth, range(N_SHARDS))
    say(truth, "a", 9)
    with retention(truth, budget_for(truth, 4)) as guard:
        guard.admit(N_SHARDS - 1)
    path = truth.root / "retired/c.3"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shard":3', b'"shard":4'))
    assert any(p.object == "retired/c.3" for p in problems(truth))
    with pytest.raises(DamageError, match=r"retired/c\.3"):
        actcache.open(truth.root).read(layer=0, sequences=[12])
    path.write_bytes((truth.root / "retired/c.2").read_bytes())
    with pytest.raises(DamageError, match="that of shard 2"):
        actcache.open(truth.root).read(layer=0, sequences=[12])


def test_dying_while_making_room_loses_nothing_and_is_mended(truth):
    """At every step: either the shard is whole, or it is retired; the next producer deletes what is left of it."""
    commit_shards(truth, range(N_SHARDS))
    say(truth, "a", 9)
    budget, whole = budget_for(truth, 9), truth.root.with_name("whole")
    shutil.copytree(truth.root, whole)
    operations: list[tuple[str, str]] = []
    with retention(truth, budget, on_operation=lambda *op: operations.append(op)) as guard:
        guard.admit(N_SHARDS - 1)
    n_seen = 0
    for dies_at in range(len(operations)):
        shutil.rmtree(truth.root)
        shutil.copytree(whole, truth.root)
        count = iter(range(10**6))

        def die(_name, _key, count=count, dies_at=dies_at):
            if next(count) >= dies_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), retention(truth, budget, on_operation=die) as guard:
            guard.admit(N_SHARDS - 1)
        found = catalog_of(truth).capture("resid_post")
        for problem in problems(truth):
            assert "running it again mends this" in problem.what, problem
            n_seen += 1
        for shard in found.live():
            found.reader(shard).read(0, 0)
        with retention(truth, budget) as guard:
            guard.admit(N_SHARDS - 1)
        assert problems(truth) == []
    assert n_seen >= 5


def test_a_lost_consumer_expires_loudly_and_the_others_go_on(truth, caplog):
    budget = budget_for(truth, 4, ("a", "b"), expire_s=60)
    commit_shards(truth, range(5))
    say(truth, "a", 9)
    say(truth, "b", N_HOLDOUT, beat=7)
    time = Time()
    with retention(truth, budget, time) as guard:
        assert guard.admit(5)
    assert time.now == pytest.approx(60, abs=1)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "consumer b has not been heard of for 60 s" in said
    assert "is given up" in said
    gone = read_expiry(LocalObjects(truth.root), "b")
    assert gone is not None
    assert gone.needs_shard == N_HOLDOUT


def test_a_consumer_that_lives_does_not_expire(truth):
    """However long it takes: its beat goes on."""
    beats = iter(range(10**6))

    def live() -> None:
        say(truth, "a", 4 if time.now > 500 else N_HOLDOUT, beat=next(beats))

    commit_shards(truth, range(5))
    time, budget = Time(live), budget_for(truth, 4, expire_s=60)
    live()
    with retention(truth, budget, time) as guard:
        assert guard.admit(5)
    assert time.now > 500


def test_without_any_consumer_left_the_build_stops(truth):
    commit_shards(truth, range(5))
    with (
        retention(truth, budget_for(truth, 4, ("a", "b"), expire_s=5), Time()) as guard,
        pytest.raises(ExpiredError, match="no consumer is left: a, b"),
    ):
        guard.admit(5)
    assert catalog_of(truth).capture("resid_post").retired() == []


def test_consumers_that_are_finished_need_no_more_shards(truth):
    commit_shards(truth, range(5))
    say(truth, "a", 5, phase="finished")
    with retention(truth, budget_for(truth, 4)) as guard:
        assert guard.admit(5), "there is room once what they have read is gone"
        commit_shards(truth, [5])
    assert catalog_of(truth).capture("resid_post").retired() != []


def test_too_small_a_budget_is_refused_with_the_least_that_does(truth):
    say(truth, "a", N_HOLDOUT, keeps=3, interval=2)
    needed = shards_needed(3, 2, in_flight=2)
    with (
        pytest.raises(UsageError, match=r"--max-disk .* is too little\. The least is") as caught,
        retention(truth, budget_for(truth, needed - 1)),
    ):
        pass
    least = int(str(caught.value).partition("The least is ")[2].partition(":")[0].replace(",", ""))
    assert least == budget_for(truth, needed).max_bytes
    with retention(truth, budget_for(truth, needed)):
        pass
    said = read_budget(LocalObjects(truth.root))
    assert said is not None
    assert (said.slots, said.in_flight, said.consumers) == (needed, 2, ("a",))


@pytest.mark.parametrize("consumers", [(), ("a", "a"), ("../a",), ("",), ("a/b",)])
def test_consumers_are_named(consumers):
    with pytest.raises(UsageError, match="consumer"):
        DiskBudget(max_bytes=1, consumers=consumers)


def test_starving_for_ever_is_an_error(truth):
    """Everybody has saved and waits; the shard still does not fit."""
    commit_shards(truth, range(5))
    say(truth, "a", N_HOLDOUT, keeps=1)
    budget = budget_for(truth, 4)
    small = DiskBudget(max_bytes=budget.max_bytes, consumers=("a",))
    with retention(truth, small, time := Time()) as guard:
        commit_shards(truth, [5])
        say(truth, "a", N_HOLDOUT, phase="waiting", keeps=5)
        with pytest.raises(UsageError, match="all consumers have saved and wait for shard 5"):
            guard.admit(5)
    assert time.now >= 10


def test_several_producers_share_the_budget(truth):
    """Four threads fill strided shares at once; a consumer follows. The disk is looked at all the time."""
    budget, n_workers = budget_for(truth, 10, n_workers=4), 4
    say(truth, "a", N_HOLDOUT)
    over, stop, errors = [], threading.Event(), []

    def look(*_op) -> None:
        taken = bytes_under(truth.root)
        if taken > budget.max_bytes:
            over.append(taken)

    def produce(rank: int) -> None:
        try:
            with Disk(truth.root, look) as disk:
                guard = Retention(catalog_of(truth), disk, budget)
                for shard in range(rank, N_SHARDS, n_workers):
                    while not guard.admits(shard):
                        stop.wait(0.01)
                    commit_shards(truth, [shard], look)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    def follow() -> None:
        while not stop.wait(0.01):
            found = catalog_of(truth).capture("resid_post")
            committed = set(found.committed())
            at = next((s for s in range(N_SHARDS) if s not in committed), N_SHARDS)
            say(truth, "a", max(N_HOLDOUT, at))

    threads = [threading.Thread(target=produce, args=(rank,)) for rank in range(n_workers)]
    follower = threading.Thread(target=follow)
    for thread in (*threads, follower):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    follower.join()
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert over == []
    assert catalog_of(truth).capture("resid_post").committed() == list(range(N_SHARDS))
    assert problems(truth) == []


def test_states_are_plain_json(truth):
    say(truth, "a", 3)
    found = json.loads((truth.root / ".live/consumer-a.json").read_bytes())
    assert found["needs_shard"] == 3
    assert np.isfinite(found["rows"])


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none", "uint8"])
@pytest.mark.parametrize(
    "shape", [{"rows_per_chunk": 16, "width": 48}, {"rows_per_chunk": 64, "width": 8, "seq_len": 9}]
)
def test_no_codec_takes_more_than_was_reckoned_with(tmp_path, codec, shape):
    """Noise compresses least; for uint8 every other row is an outlier."""
    rng = np.random.default_rng(0)
    n_sequences, seq_len = 10, shape.get("seq_len", 32)
    bits = rng.integers(0, 1 << 16, (2, n_sequences, seq_len, shape["width"]), dtype=np.uint16)
    bits &= 0xBFFF  # finite, and of any size
    truth = write_store(
        tmp_path / "s.zarr",
        **{**shape, "seq_len": seq_len},
        n_sequences=n_sequences,
        codec=codec,
        acts=bits,
        commit=[],
    )
    footprint = Footprint(catalog_of(truth), truth.root, 1)
    for shard in range(truth.grid.n_shards):
        commit_shards(truth, [shard])
        assert 0 < footprint.actual(shard) <= footprint.most[shard]
        record = truth.root / f"acts/resid_post/ledger/c.0.{shard}"
        assert record.stat().st_size < footprint.fixed_bytes / truth.grid.n_shards
