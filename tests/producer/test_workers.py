"""Several workers, one store: whoever dies, sleeps or comes late, it is the store that one worker alone would have built."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import UsageError
from actcache.producer import workers
from actcache.producer.build import ensure_planned
from actcache.producer.ray_engine import RayPool, fill_on_ray
from actcache.producer.summary import BuildReporter
from actcache.producer.workers import Rank, Work, local_rank_in, rank_in, wait_for_plan
from actcache.store.claims import Claims
from actcache.store.disk import Disk
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.verify import find_problems
from tests.conftest import ASSETS, Kit, all_files, commit_shards, make_decoder, small_settings, write_store
from tests.soak.processes import start_build

pytestmark = pytest.mark.usefixtures("fast_disk")
ROOT = Path(__file__).parents[2]
RECORDS = "acts/*/ledger/c.*"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(workers, "POLL_S", 0.005)


# Who a process is.


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Rank(2, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, Rank(0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, Rank(3, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}, Rank(2, 4)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "20", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "10", "SLURM_PROCID": "1", "SLURM_NTASKS": "2",
            },
            Rank(5, 6),
        ),
        ({"RANK": "", "WORLD_SIZE": "4"}, None),
    ],
)  # fmt: skip
def test_ranks_are_read_from_torchrun_and_slurm(environment, rank):
    assert rank_in(environment) == rank


def test_what_is_local_is_read_too():
    assert local_rank_in({}) == (0, 1)
    assert local_rank_in({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}) == (3, 4)
    assert local_rank_in({"SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}) == (1, 2)
    assert local_rank_in({"SLURM_LOCALID": "0"}) == (0, 1)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_cannot_be_is_refused(rank, world_size):
    with pytest.raises(UsageError, match="expected 0 to"):
        Rank(rank, world_size)
    with pytest.raises(UsageError):
        rank_in({"RANK": str(rank), "WORLD_SIZE": str(world_size)})


# Claims and work, worker by worker in one process: locks belong to descriptors, so these are as good as others'.


class Worker:
    """One worker, a step at a time. `dies` leaves its workspace behind, with a lock that nobody holds."""

    def __init__(self, truth, rank: Rank, **options) -> None:
        self.truth, self.disk = truth, Disk(truth.root)
        self.disk.__enter__()
        self.catalog = Catalog(LocalObjects(truth.root))
        self.seen: list[int] = []
        captures = list(self.catalog.captures.values())
        self.work = Work(
            self.catalog, captures, Claims(self.disk), rank, on_committed=self.seen.append, **options
        )
        self.shards = iter(self.work)
        self.at: int | None = None

    def begin(self) -> int | None:
        """Take a shard; None when there is none left."""
        self.at = next((shard for shard, _ in self.shards), None)
        return self.at

    def commit(self) -> None:
        commit_shards(self.truth, [self.at])
        self.work.done(self.at)

    def dies(self) -> None:
        os.close(self.disk._lock_fd)
        self.disk._lock_fd = None

    def ends(self) -> None:
        self.disk.__exit__(None, None, None)


@pytest.fixture
def planned(tmp_path):
    """Eight shards of which none is committed."""
    return write_store(tmp_path / "s.zarr", n_sequences=32, per_shard=4, n_holdout_shards=1, commit=[])


def test_everybody_begins_with_a_share_and_takes_what_others_leave(planned):
    first, second = (Worker(planned, Rank(i, 2)) for i in range(2))
    taken: dict[str, list[int]] = {"first": [], "second": []}
    for _ in range(2):  # each in turn
        for name, worker in (("first", first), ("second", second)):
            taken[name].append(worker.begin())
            worker.commit()
    assert taken == {"first": [0, 2], "second": [1, 3]}
    while second.begin() is not None:  # the first sleeps, with nothing claimed
        taken["second"].append(second.at)
        second.commit()
    assert taken["second"] == [1, 3, 5, 7, 4, 6]
    assert first.begin() is None
    assert sorted(first.seen + taken["first"]) == list(range(8))
    for worker in (first, second):
        worker.ends()
    assert not (planned.root / ".partial").exists()


def test_a_claimed_shard_is_left_alone_until_its_worker_dies(planned):
    first, second = (Worker(planned, Rank(0, 1)) for _ in range(2))
    assert first.begin() == 0
    others = []
    while len(others) < 7:
        others.append(second.begin())
        second.commit()
    assert others == [1, 2, 3, 4, 5, 6, 7]
    waiting = threading.Event()
    second.work.check = waiting.set
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(second.begin)
        assert waiting.wait(60)
        assert not last.done()
        first.dies()
        assert last.result(60) == 0
    second.commit()
    assert second.begin() is None
    second.ends()


def test_a_claimed_shard_is_taken_over_when_it_takes_too_long(planned):
    sleeper, other = Worker(planned, Rank(0, 2)), Worker(planned, Rank(1, 2), takeover_s=0.0)
    assert sleeper.begin() == 0
    taken = []
    while other.begin() is not None:
        taken.append(other.at)
        other.commit()
    assert sorted(taken) == list(range(8))
    assert sleeper.begin() is None, "and goes on without it when it wakes"
    assert set(sleeper.seen) == set(range(1, 8))


def test_waiting_ends_with_what_goes_wrong_meanwhile(planned):
    sleeper = Worker(planned, Rank(0, 1))
    assert sleeper.begin() == 0
    waiter = Worker(planned, Rank(0, 1))
    while len(waiter.seen) < 7 and waiter.begin() != 0:
        waiter.commit()
        waiter.seen.append(waiter.at)

    def check() -> None:
        raise OSError("the encoder broke")

    waiter.work.check = check
    with pytest.raises(OSError, match="encoder"):
        waiter.begin()


@settings(max_examples=40, deadline=None)
@given(n_workers=st.integers(1, 4), seed=st.integers(0, 1 << 16))
def test_whatever_happens_when_every_shard_is_committed_once(n_workers, seed):
    """Workers take, commit and die in any order; the living hand out every shard, none twice at a time."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        truth = write_store(
            Path(folder) / "s.zarr", n_sequences=14, seq_len=2, per_shard=2, rows_per_chunk=4, commit=[]
        )
        slept: list[float] = []
        patch.setattr(workers.time, "sleep", slept.append)
        living = [Worker(truth, Rank(i, n_workers)) for i in range(n_workers)]
        busy: dict[int, Worker] = {}
        while living:
            worker = living[int(rng.integers(len(living)))]
            if worker.at is not None:
                del busy[worker.at]
                if len(living) > 1 and rng.random() < 0.3:
                    worker.dies()
                    living.remove(worker)
                else:
                    worker.commit()
                    worker.at = None
                continue
            free = set(range(7)) - set(worker.catalog.capture("resid_post").committed()) - set(busy)
            if not free and busy:
                continue  # it would wait
            if worker.begin() is None:
                worker.ends()
                living.remove(worker)
            else:
                assert len(slept) <= 2, "waits although something is free"
                slept.clear()
                assert worker.at not in busy
                busy[worker.at] = worker
        store = actcache.open(truth.root)
        assert store.is_complete
        assert find_problems(Catalog(LocalObjects(truth.root)), threads=1) == []


def test_of_two_that_claim_at_once_one_lets_go(planned, monkeypatch):
    """Both look, both see nobody, both claim: the one whose nonce is less keeps it."""
    disks = [Disk(planned.root) for _ in range(2)]
    for disk, nonce in zip(disks, ("a" * 16, "b" * 16), strict=True):
        disk.nonce, disk.workspace = nonce, planned.root / ".partial" / nonce
        disk.__enter__()
    first, second = map(Claims, disks)
    holders, looked = Claims.holders, []

    def blind_at_first(self, shard):
        looked.append(self)
        return [] if looked.count(self) == 1 else holders(self, shard)

    monkeypatch.setattr(Claims, "holders", blind_at_first)
    assert first.take(3)
    assert not second.take(3)
    assert holders(second, 3) == ["a" * 16]
    assert holders(first, 3) == []
    for disk in disks:
        disk.__exit__(None, None, None)


# The plan.


def test_the_others_wait_for_the_one_that_plans(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PLAN_PATIENCE_S", 0.0)
    out = tmp_path / "s.zarr"
    assert not wait_for_plan(out), "nobody is at it"
    planning = Disk(tmp_path / "s.zarr.planning-0123456789abcdef")
    with planning, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_plan, out)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)  # ten times its patience and more: it waits because it sees somebody
        write_store(out)
        assert waiting.result(60)


def test_when_the_planner_is_dead_another_one_plans(kit, make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PLAN_PATIENCE_S", 0.02)
    out = tmp_path / "new" / "s.zarr"
    dead = out.parent / "s.zarr.planning-0123456789abcdef"
    (dead / ".partial/0000").mkdir(parents=True)
    (dead / ".partial/0000/lock").touch()
    kit.build(small_settings(out), rank=Rank(2, 3))
    assert all_files(out) == all_files(make_store(tmp_path))
    assert [p.name for p in out.parent.iterdir()] == ["s.zarr"]


# Whole builds.

MANY = {"n_tokens": 24 * 2 * 16, "sequences_per_shard": 2, "holdout_frac": 0.1}


@pytest.mark.parametrize("step", ["open", "link", "fsync directory", "record"])
def test_a_worker_that_wakes_after_another_committed_its_shard(kit, make_store, tmp_path, step):
    """It sleeps before its rows have a name, between rows and record, or before the record: the store is the same."""
    out, asleep, wake = tmp_path / "s.zarr", threading.Event(), threading.Event()
    key = "acts/resid_post/" + ("ledger/c.0.3" if step == "record" else "rows/c.0.3.0")
    name = "open" if step == "record" else step

    def sleep(operation: str, at: str) -> None:
        if (operation, at) == (name, key) and not asleep.is_set():
            asleep.set()
            assert wake.wait(60)

    with ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(
            kit.build, small_settings(out, **MANY), make_decoder(), rank=Rank(0, 2), on_operation=sleep
        )
        assert asleep.wait(60)
        other = kit.build(small_settings(out, **MANY), make_decoder(), rank=Rank(1, 2), takeover_s=0.0)
        assert actcache.open(out).is_complete
        wake.set()
        woken = sleeper.result(60)
    assert other.n_built + other.n_adopted + woken.n_built + woken.n_adopted == 24, "each is committed once"
    assert all_files(out) == all_files(make_store(tmp_path, **MANY))


def test_workers_share_the_work(kit, make_store, tmp_path):
    """Side by side in one process: together they run every token once."""
    out = tmp_path / "s.zarr"
    ensure_planned(
        small_settings(out, **MANY), make_decoder(), kit.tokenizer, kit.corpus, corpus_name="speeches"
    )
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(kit.build, small_settings(out, **MANY), make_decoder(), rank=Rank(i, 3))
            for i in range(3)
        ]
        done = [job.result(60) for job in jobs]
    assert sum(d.n_built for d in done) == 24
    assert sum(d.n_tokens for d in done) == 24 * 2 * 16
    assert all_files(out) == all_files(make_store(tmp_path, **MANY))


def kill_workers(kit: Kit, whole: dict[str, bytes], folder: Path, rounds: int, seed: int) -> None:
    """Four workers, two of which are killed at random moments; the others finish without being asked again."""
    rng = np.random.default_rng(seed)
    for round_ in range(rounds):
        out = folder / str(round_) / "s.zarr"
        out.parent.mkdir()
        ranks = [start_build(out, kit, MANY, rank=(i, 4)) for i in range(4)]
        for victim in rng.permutation(4)[:2]:
            ranks[victim].join(float(rng.uniform(0, 0.4)))
            ranks[victim].kill()
        codes = []
        for process in ranks:
            process.join(120)
            codes.append(process.exitcode)
            process.close()
        assert sum(code == 0 for code in codes) >= 2, codes
        assert set(codes) <= {0, -signal.SIGKILL}
        found = all_files(out)
        for name in [name for name in found if ".partial/" in name]:
            del found[name]  # of the dead, for the next build to sweep
        assert found == whole, f"round {round_}"


def test_two_of_four_workers_are_killed(kit, make_store, tmp_path):
    kill_workers(kit, all_files(make_store(tmp_path, **MANY)), tmp_path, rounds=3, seed=0)


# Launchers.

BUILD = [
    *("build", "--model", str(ASSETS / "tiny-neox"), "--corpus", str(ASSETS / "text"), "--tokens", "24000"),
    *(
        "--seq-len",
        "50",
        "--layers",
        "0,3",
        "--holdout",
        "0.1",
        "--sequences-per-shard",
        "8",
        "--device",
        "cpu",
    ),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one worker builds with one thread."""
    out = tmp_path_factory.mktemp("alone") / "s.zarr"
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cli", *BUILD, "--out", str(out), "--json"]
    subprocess.run(command, check=True, cwd=ROOT, env=one, capture_output=True)
    return out


def planned_like(whole: Path, out: Path) -> Path:
    """The plan of a store, with nothing in it."""
    shutil.copytree(whole, out)
    for folder in (out / "acts/resid_post").iterdir():
        for path in folder.glob("c.*") if folder.is_dir() and folder.name != "layer" else ():
            path.unlink()
    return out


def test_torchrun_starts_workers(alone, tmp_path):
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "-m", "cli", *BUILD]
    subprocess.run(
        [*command, "--out", tmp_path / "s.zarr", "--json"], check=True, cwd=ROOT, capture_output=True
    )
    assert all_files(tmp_path / "s.zarr") == all_files(alone)


def fill_with_ray(alone: Path, folder: Path, *, rounds: int, seed: int) -> None:
    """Four actors fill planned stores. Two are killed when some shards are committed, and Ray starts these again."""
    rng, whole = np.random.default_rng(seed), all_files(alone)
    for round_ in range(rounds):
        out = planned_like(alone, folder / f"{round_}.zarr")
        capture, n_shards = Catalog(LocalObjects(out)).capture("resid_post"), len(list(alone.glob(RECORDS)))
        due = sorted(rng.integers(0, n_shards // 2, 2).tolist())

        def kill(processes: list[int], capture=capture, due=due) -> None:
            for n_committed, victim in zip(due, rng.permutation(processes).tolist(), strict=False):
                while len(capture.committed()) < n_committed:
                    os.sched_yield()
                os.kill(victim, signal.SIGKILL)

        with ThreadPoolExecutor(1) as pool:
            kills = []
            summary = fill_on_ray(
                RayPool(
                    out=out, captures=("resid_post",), model=str(ASSETS / "tiny-neox"), n_workers=4, n_cpus=0
                ),
                BuildReporter(),
                lambda processes, kills=kills, pool=pool: kills.append(pool.submit(kill, processes)),
            )
            assert kills[0].result() is None
        assert summary.n_built + summary.n_adopted <= n_shards, "the dead do not tell what they did"
        found = {name: data for name, data in all_files(out).items() if ".partial/" not in name}
        assert found == whole, f"round {round_}"


@pytest.fixture
def one_thread(monkeypatch):
    """For processes that are started: the number of threads decides last bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("one_thread")
def test_ray_fills_a_store_though_two_actors_are_killed(alone, tmp_path):
    fill_with_ray(alone, tmp_path, rounds=1, seed=0)
