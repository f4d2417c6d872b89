"""A build may die at any instant: whatever is left behind is whole or invisible, and the same command goes on.

A `Mortal` is the hook that `build` calls before every step that changes the disk. It dies at the i-th, and a dead
process does nothing more: every later call dies too, on any thread.
"""

import os
import shutil
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.errors import NotFoundError, UncommittedError
from actcache.store import disk as disk_module
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.verify import find_problems
from tests.conftest import all_files, as_bits, make_decoder, no_sync, small_settings
from tests.soak.processes import PROCESSES, start_build

HOOKS = ("resid_post", "mlp_out")
SETTINGS = {"hooks": HOOKS, "rows_per_chunk": 64}
KILLS_PER_ROUND = 3


class Died(BaseException):
    """The process is gone. Not an Exception: nothing may catch it and clean up."""


class Mortal:
    """Dies at the `dies_at`-th operation, or the first of that name and key; in a `torn` write after half of its bytes."""

    def __init__(self, dies_at: int | tuple[str, str] | None = None, *, torn: bool = False) -> None:
        self.dies_at, self.torn = dies_at, torn
        self.operations: list[tuple[str, str]] = []
        self.is_tearing = False
        self._lock = threading.Lock()

    def __call__(self, name: str, key: str) -> None:
        with self._lock:
            self.operations.append((name, key))
            n = len(self.operations) - 1
            if self.dies_at == (name, key):
                self.dies_at = n
            if not isinstance(self.dies_at, int) or n < self.dies_at:
                return
            if self.torn and n == self.dies_at and name == "write":
                self.is_tearing = True
                return
        raise Died

    def write(self, fd: int, parts: list[memoryview]) -> int:
        if self.is_tearing:
            data = b"".join(parts)
            os.pwrite(fd, data[: len(data) // 2], os.lseek(fd, 0, os.SEEK_CUR))
            raise Died
        return _WRITE(fd, parts)


_WRITE = os.writev


class Bench:
    """An undisturbed store, and builds of the same one that are disturbed."""

    def __init__(self, kit, folder: Path) -> None:
        self.kit, self.folder, self.decoder = kit, folder, make_decoder()
        self.whole = folder / "whole" / "s.zarr"
        witness = Mortal()
        self.build(self.whole, witness)
        self.operations = witness.operations
        begun = [i for i, found in enumerate(self.operations) if found == ("mkdir", disk_module.WORK_DIR)]
        assert len(begun) == 2, "one workspace for the plan, one for the shards"
        self.n_planning = begun[1]
        self.files = all_files(self.whole)
        self.rows = _rows_by_shard(self.whole)
        self.n_shards = actcache.open(self.whole).plan.grid.n_shards
        self.planned = folder / "planned" / "s.zarr"
        with pytest.raises(Died):
            self.build(self.planned, Mortal(self.n_planning))
        self._n = 0

    def build(self, out: Path, mortal: Mortal | None = None):
        with no_sync(), pytest.MonkeyPatch.context() as patch:
            if mortal is not None and mortal.torn:
                patch.setattr(disk_module.os, "writev", mortal.write)
            return self.kit.build(small_settings(out, **SETTINGS), self.decoder, on_operation=mortal)

    def fresh(self, *, planned: bool = False) -> Path:
        """Where the next store goes; with its plan already there if asked."""
        self._n += 1
        out = self.folder / str(self._n) / "s.zarr"
        out.parent.mkdir()
        if planned:
            shutil.copytree(self.planned, out)
        return out

    def die(self, out: Path, dies_at: int | tuple[str, str], *, torn: bool = False) -> None:
        mortal = Mortal(dies_at, torn=torn)
        with pytest.raises(Died):
            self.build(out, mortal)
        self.check_what_is_left(out)

    def die_at(self, operation: int, *, torn: bool = False) -> Path:
        """Die at one operation of the undisturbed build; returns where."""
        planned = operation >= self.n_planning
        out = self.fresh(planned=planned)
        self.die(out, operation - (self.n_planning if planned else 0), torn=torn)
        return out

    def die_on(self, name: str, key: str) -> Path:
        """Die at one step of filling, whatever other threads are at; returns where."""
        out = self.fresh(planned=True)
        self.die(out, (name, key))
        return out

    def check_what_is_left(self, out: Path) -> None:
        """Committed shards are whole and right, all others say that they are not there, and nothing else is wrong."""
        if not (out / "zarr.json").exists():
            assert not out.exists()
            with pytest.raises(NotFoundError):
                actcache.open(out)
            return
        committed = self.observe(out)
        for hook in HOOKS:
            assert committed[hook] == actcache.open(out).committed(hook)
        for problem in find_problems(Catalog(LocalObjects(out)), threads=1):
            assert "/ledger/" in problem.object, problem
            assert "a build was stopped at this shard" in problem.what, problem

    def observe(self, out: Path) -> dict[str, list[int]]:
        """Read every shard of a store that may be changing: each is right, or raises. Returns which are there."""
        store, there = actcache.open(out), {}
        for hook in HOOKS:
            there[hook] = []
            for shard in range(self.n_shards):
                with suppress(UncommittedError):
                    found = _read_shard(store, hook, shard)
                    assert all(
                        np.array_equal(a, b) for a, b in zip(found, self.rows[hook, shard], strict=True)
                    )
                    there[hook].append(shard)
        return there

    def finish(self, out: Path) -> None:
        """Run the same command again; the store is as if nothing had happened, and nothing is left lying about."""
        self.build(out)
        self.check_whole(out)

    def check_whole(self, out: Path) -> None:
        found = all_files(out)
        assert set(found) == set(self.files)
        for name, data in found.items():
            assert data == self.files[name], name
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        shutil.rmtree(out.parent)


def _read_shard(store, hook: str, shard: int) -> list[np.ndarray]:
    sequences = store.plan.grid.sequences_of(shard)
    chosen = slice(sequences.start, sequences.stop)
    return [as_bits(store.read(hook=hook, layer=layer, sequences=chosen)) for layer in store.layers_of(hook)]


def _rows_by_shard(root: Path) -> dict[tuple[str, int], list[np.ndarray]]:
    store = actcache.open(root)
    return {(h, s): _read_shard(store, h, s) for h in HOOKS for s in range(store.plan.grid.n_shards)}


@pytest.fixture(scope="session")
def bench(kit, tmp_path_factory) -> Bench:
    return Bench(kit, tmp_path_factory.mktemp("crash"))


def test_the_build_takes_the_steps_it_is_thought_to(bench):
    steps = Counter(name for name, _ in bench.operations)
    n_objects = sum(p.is_file() for p in bench.whole.rglob("*"))
    assert steps["open"] == steps["fsync"] == steps["link"] == steps["unlink"] == n_objects
    assert bench.n_planning > 150
    assert len(bench.operations) - bench.n_planning > 150
    assert steps["rename"] == 1


def test_nothing_is_committed_before_all_it_covers_is_durable(bench):
    """Bytes synced, then linked, then the folder synced; a record last of its shard, the plan's document last of all."""
    at = {step: i for i, step in reversed(list(enumerate(bench.operations)))}
    last = {step: i for i, step in enumerate(bench.operations)}
    objects = [key for name, key in bench.operations if name == "open"]
    for key in objects:
        assert last["write", key] < at["fsync", key] < at["link", key] < at["fsync directory", key], key
    for hook in HOOKS:
        for shard in range(bench.n_shards):
            covered = [
                key
                for key in objects
                if key in (f"acts/{hook}/rows/c.0.{shard}.0", f"acts/{hook}/norm/c.0.{shard}")
                or key.startswith((f"acts/{hook}/moments/c.{shard}.", f"acts/{hook}/totals/c.{shard}."))
            ]
            assert len(covered) == 4
            record = at["open", f"acts/{hook}/ledger/c.0.{shard}"]
            assert all(at["fsync directory", key] < record for key in covered)
    planned = [i for i, (name, _) in enumerate(bench.operations[: bench.n_planning]) if name == "link"]
    assert bench.operations[planned[-1]] == ("link", "zarr.json")
    assert planned[-1] < at["rename", "s.zarr"] < at["fsync directory", "s.zarr"] < bench.n_planning


def test_adopted_rows_are_made_durable_before_their_record(bench, monkeypatch):
    """Whoever died after the link and before the sync of the folder has left a name that a power cut may take."""
    key = f"acts/{HOOKS[0]}/rows/c.0.1.0"
    out = bench.die_on("fsync directory", key)
    events, sync = [], disk_module._sync_dir
    monkeypatch.setattr(disk_module, "_sync_dir", lambda path: (events.append(("sync", path)), sync(path)))
    mortal = Mortal()
    mortal_call = lambda name, k: events.append((name, k)) or mortal(name, k)  # noqa: E731
    with no_sync():
        summary = bench.kit.build(small_settings(out, **SETTINGS), bench.decoder, on_operation=mortal_call)
    assert summary.n_adopted == 1
    record = events.index(("link", f"acts/{HOOKS[0]}/ledger/c.0.1"))
    assert ("sync", (out / key).parent) in events[:record]


def die_everywhere(bench: Bench, operations, *, torn: bool = False) -> int:
    for i in operations:
        try:
            bench.finish(bench.die_at(i, torn=torn))
        except Exception as error:
            error.add_note(f"after dying at operation {i}: {bench.operations[i]}")
            raise
    return len(operations)


def writes(bench: Bench) -> list[int]:
    return [i for i, (name, _) in enumerate(bench.operations) if name == "write"]


def test_dying_at_any_step_of_committing(bench):
    assert die_everywhere(bench, range(bench.n_planning, len(bench.operations))) > 150


def test_dying_at_steps_of_planning(bench):
    """Every eleventh, and each of those around the plan's appearance; `make soak` dies at them all."""
    around = range(bench.operations.index(("rename", "s.zarr")) - 3, bench.n_planning)
    die_everywhere(bench, sorted({*range(0, bench.n_planning, 11), *around}))


def test_dying_in_the_middle_of_a_write(bench):
    at = writes(bench)
    n = die_everywhere(bench, [i for i in at if i >= bench.n_planning][::2] + at[::17], torn=True)
    assert n > 15


def die_again_and_again(bench: Bench, rounds: int, seed: int) -> None:
    """Several deaths of one store, at random steps each."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        out = bench.fresh()
        for _ in range(KILLS_PER_ROUND):
            with suppress(pytest.fail.Exception):  # the build may be through before its time comes
                bench.die(out, int(rng.integers(0, len(bench.operations))), torn=bool(rng.random() < 0.5))
        bench.finish(out)


def test_dying_more_than_once(bench):
    die_again_and_again(bench, rounds=8, seed=0)


def test_a_dead_builds_lock_does_not_stop_the_next(bench):
    """The lock goes with the descriptor: it is closed even where removing the workspace was prevented."""
    out = bench.die_at(len(bench.operations) - 30)
    left = list((out / disk_module.WORK_DIR).iterdir())
    assert len(left) == 1
    assert (left[0] / "lock").exists()
    bench.finish(out)


def test_a_living_builds_workspace_is_left_alone(bench):
    out = bench.fresh(planned=True)
    with disk_module.Disk(out) as other:
        bench.build(out)
        assert (other.workspace / "lock").exists()
    bench.finish(out)


@pytest.mark.parametrize("is_planned", [False, True])
def test_what_a_rival_left_of_planning_is_swept(bench, is_planned):
    """One build dies planning while another one plans, or has planned already: either way the next removes it."""
    out = bench.fresh()
    with pytest.raises(Died):
        bench.build(out, Mortal(60))
    (left,) = out.parent.iterdir()
    if is_planned:
        shutil.copytree(bench.planned, out)
    assert left.name.startswith("s.zarr.planning-")
    bystander = out.parent / "s.zarr.planning-notes"
    bystander.mkdir()
    (bystander / "mine.txt").write_text("not yours")
    bench.build(out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["s.zarr", "s.zarr.planning-notes"]
    assert (bystander / "mine.txt").read_text() == "not yours"


# Real processes, really killed.


class Watcher:
    """A reader that polls a store from another thread while it is written."""

    def __init__(self, bench: Bench, out: Path) -> None:
        self._bench, self._out = bench, out
        self._stop = threading.Event()
        self.errors: list[BaseException] = []
        self.n_rows_seen = 0
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.is_set() and not self.errors:
            try:
                self.n_rows_seen += sum(map(len, self._bench.observe(self._out).values()))
            except NotFoundError:
                continue
            except BaseException as error:  # noqa: BLE001 - the test raises it
                self.errors.append(error)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.errors:
            raise self.errors[0]


def kill_builds(bench: Bench, rounds: int, seed: int) -> None:
    """Kill at random moments, a few times each, while a reader watches; then let one build finish."""
    rng = np.random.default_rng(seed)
    for round_ in range(rounds):
        out = bench.fresh()
        with Watcher(bench, out) as watcher:
            for _ in range(KILLS_PER_ROUND):
                process = start_build(out, bench.kit, SETTINGS)
                process.join(float(rng.uniform(0, 0.5)))
                process.kill()
                process.join()
                process.close()
            if round_ % 2:
                bench.build(out)  # the reader watches this one to its end
        if out.exists():
            bench.observe(out)
        bench.finish(out)
        assert watcher.n_rows_seen or not round_ % 2


def build_at_once(bench: Bench, rounds: int, *, kill_one: bool) -> None:
    """Two processes build the same store from the same moment on."""
    for i in range(rounds):
        out = bench.fresh()
        barrier = None if kill_one else PROCESSES.Barrier(2)  # the dead come to no barrier
        with Watcher(bench, out):
            both = [start_build(out, bench.kit, SETTINGS, barrier) for _ in range(2)]
            if kill_one:
                both[0].join(0.02 * i)
                both[0].kill()
            for process in both:
                process.join()
        assert both[1].exitcode == 0
        assert kill_one or both[0].exitcode == 0
        bench.finish(out)


def test_killing_the_process(bench):
    kill_builds(bench, rounds=3, seed=0)


def test_two_builds_at_once(bench):
    build_at_once(bench, rounds=2, kill_one=False)
