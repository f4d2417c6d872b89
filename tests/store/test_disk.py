"""Objects appear whole, once, or not at all; workspaces of the dead go, those of the living stay."""

import errno
import os
import threading

import pytest

from actcache.errors import DiskFullError, NonFiniteError, UsageError
from actcache.store import disk as disk_module
from actcache.store.create import staging, sweep_staged
from actcache.store.disk import WORK_DIR, Disk, free_bytes, publish
from actcache.store.objects import LocalObjects
from tests.conftest import commit_shards, write_store
from tests.soak.processes import PROCESSES


def test_an_object_is_never_replaced(tmp_path):
    with Disk(tmp_path) as disk:
        assert disk.create("a", b"first")
        assert not disk.create("a", b"second")
        assert (tmp_path / "a").read_bytes() == b"first"
        assert list(disk.workspace.iterdir()) == [disk.workspace / "lock"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_of_many_that_create_at_once_one_does(tmp_path):
    barrier, won = threading.Barrier(8), []

    def create(i):
        with Disk(tmp_path) as disk:
            barrier.wait()
            if disk.create("a", [[bytes([i]) * 1000], [b"", b"!"]]):
                won.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = won
    assert (tmp_path / "a").read_bytes() == bytes([winner]) * 1000 + b"!"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_object_whose_maker_fails_does_not_appear(tmp_path):
    def parts():
        yield [b"half"]
        raise RuntimeError("the encoder broke")

    with Disk(tmp_path) as disk:
        with pytest.raises(RuntimeError, match="broke"):
            disk.create("a", parts())
        assert list(disk.workspace.iterdir()) == [disk.workspace / "lock"]
    assert list(tmp_path.iterdir()) == []


def test_the_dead_are_swept_and_the_living_are_not(tmp_path):
    dead = tmp_path / WORK_DIR / "0123456789abcdef"
    dead.mkdir(parents=True)
    (dead / "lock").touch()
    (dead / "half.partial").write_bytes(b"half")
    (tmp_path / WORK_DIR / "no lock yet").mkdir()
    with Disk(tmp_path) as living, Disk(tmp_path) as disk:
        assert disk.sweep() == 2
        assert sorted(p.name for p in (tmp_path / WORK_DIR).iterdir()) == sorted([living.nonce, disk.nonce])
        assert living.create("a", b"still works")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_sweeping_while_others_begin_harms_nobody(tmp_path):
    """Workspaces are made and swept by eight threads at once: every one of them can write."""
    errors, barrier = [], threading.Barrier(8)

    def work(i):
        barrier.wait()
        try:
            for n in range(40):
                with Disk(tmp_path) as disk:
                    disk.sweep()
                    assert disk.create(f"{i}.{n}", b"x")
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(list(tmp_path.iterdir())) == 8 * 40


def test_planning_beside_others_that_plan_harms_nobody(tmp_path):
    """Of eight that stage the same store at once, sweeping as they begin, one has it; nothing else is left."""
    final, outcomes, barrier = tmp_path / "s.zarr", [], threading.Barrier(8)

    def work(n):
        barrier.wait()
        try:
            sweep_staged(final)
            with staging(final, None) as disk:
                disk.makedirs("deep/folder")
                disk.create("deep/folder/a", b"x" * 100)
            outcomes.append("made")
        except FileExistsError:
            outcomes.append("taken")
        except BaseException as error:  # noqa: BLE001 - seen below
            outcomes.append(repr(error))

    for _ in range(10):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["made"] + ["taken"] * 7
        assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]
        outcomes.clear()
        final.rename(tmp_path / "done")
        disk_module.shutil.rmtree(tmp_path / "done")


def test_what_was_being_planned_is_swept_only_when_abandoned(tmp_path):
    final = tmp_path / "s[1].zarr"  # a name that means something to a glob
    names = [f"s[1].zarr.planning-{c * 16}" for c in "abcde"]
    folders = [tmp_path / name for name in names]
    (folders[0] / "tokens").mkdir(parents=True)  # interrupted: its workspace is gone, its content is not
    (folders[1] / WORK_DIR / "x").mkdir(parents=True)  # killed: a workspace nobody holds
    folders[2].mkdir()  # killed at once
    (folders[3] / WORK_DIR).mkdir(parents=True)
    notes = tmp_path / "s[1].zarr.planning-notes"
    notes.mkdir()
    with Disk(folders[4]) as living:
        (folders[4] / "tokens").mkdir()
        sweep_staged(final)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([names[4], notes.name])
        assert living.create("tokens/a", b"x")
    sweep_staged(final)
    assert [p.name for p in tmp_path.iterdir()] == [notes.name]


def test_publishing_takes_no_name_that_is_taken(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "mine").touch()
    with Disk(tmp_path / "staged") as disk:
        with pytest.raises(FileExistsError):
            publish(disk, tmp_path / "final")
        assert [p.name for p in (tmp_path / "final").iterdir()] == ["mine"]
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError):
            publish(disk, tmp_path / "file")
        publish(disk, tmp_path / "free")
        assert disk.create("a", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "final", "free"]
    assert [p.name for p in (tmp_path / "free").iterdir()] == ["a"]


CALLS = {"open": "open", "write": "writev", "fsync": "fsync", "link": "link"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_explained_wherever_it_happens(tmp_path, monkeypatch, call, code):
    with Disk(tmp_path) as disk:
        real = getattr(os, CALLS[call])
        begun = []

        def full(*args, **kwargs):
            if begun and (call != "open" or args[1] & os.O_EXCL):
                raise OSError(code, "full")
            return real(*args, **kwargs)

        monkeypatch.setattr(disk_module.os, CALLS[call], full)
        begun.append(1)
        with pytest.raises(DiskFullError, match="nothing committed is lost"):
            disk.create("a", b"x" * 100)
        begun.clear()
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_a_folder_is_explained(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "full")

    with Disk(tmp_path / "a") as disk:
        monkeypatch.setattr(disk_module.Path, "mkdir", full)
        with pytest.raises(DiskFullError):
            disk.makedirs("tokens")
        with pytest.raises(DiskFullError):
            Disk(tmp_path / "b").__enter__()
        monkeypatch.undo()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_explained(tmp_path, monkeypatch, code):
    def no_link(*args):
        raise OSError(code, "no links here")

    monkeypatch.setattr(disk_module.os, "link", no_link)
    with Disk(tmp_path) as disk, pytest.raises(UsageError, match="hard links"):
        disk.create("a", b"x")


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, "the disk is dying")

    monkeypatch.setattr(disk_module.os, "writev", broken)
    with Disk(tmp_path) as disk, pytest.raises(OSError, match="dying") as raised:
        disk.create("a", b"x")
    assert type(raised.value) is OSError


def test_a_write_that_takes_only_part_goes_on(tmp_path, monkeypatch):
    def some(fd, parts):
        """Three bytes at a time, which may be the end of one part and the beginning of the next."""
        return os.write(fd, b"".join(parts)[:3])

    monkeypatch.setattr(disk_module.os, "writev", some)
    whole = bytes(range(100))
    with Disk(tmp_path) as disk:
        disk.create("a", [[whole[:1], whole[1:2], b"", whole[2:40]], [], [whole[40:]]])
    assert (tmp_path / "a").read_bytes() == whole


def _hold(folder, ready, leave):
    with Disk(folder):
        ready.set()
        leave.wait(30)


def test_another_process_holds_its_workspace_until_it_dies(tmp_path):
    ready, leave = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=_hold, args=(tmp_path, ready, leave))
    process.start()
    assert ready.wait(60)
    with Disk(tmp_path) as disk:
        assert disk.sweep() == 0
        process.kill()
        process.join()
        assert disk.sweep() == 1


def test_free_bytes_of_what_is_not_there_yet(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)


# Committing.


def test_committing_again_adopts_what_is_there(tmp_path):
    truth = write_store(tmp_path / "s.zarr")
    before = {p: p.stat().st_ino for p in truth.root.rglob("c.*")}
    truth.acts["resid_post"][:] = 0  # another worker that came to other numbers
    commit_shards(truth, range(truth.grid.n_shards))
    assert {p: p.stat().st_ino for p in truth.root.rglob("c.*")} == before


def test_rows_on_disk_decide_what_is_recorded(tmp_path):
    """Rows of one worker, record and statistics of another that came to other numbers: the record fits the rows."""
    from actcache.store.open import Catalog
    from actcache.store.verify import find_problems

    truth = write_store(tmp_path / "s.zarr")
    for name in ("ledger/c.0.1", "norm/c.0.1", "moments/c.1.0.0.0", "totals/c.1.0.0"):
        (truth.root / "acts/resid_post" / name).unlink()
    expected = truth.acts["resid_post"].copy()
    truth.acts["resid_post"][:] = 0
    commit_shards(truth, [1])
    catalog = Catalog(LocalObjects(truth.root))
    assert find_problems(catalog, threads=2) == []
    norm = catalog.capture("resid_post").side("norm", 1)
    assert (norm[:, : int(catalog.shards.stored[1])] > 0).all()
    truth.acts["resid_post"][:] = expected


@pytest.mark.parametrize(("bits", "name"), [(0x7FC0, "NaN"), (0x7F80, "infinity"), (0xFF80, "infinity")])
def test_what_is_no_number_is_not_committed(tmp_path, bits, name):
    truth = write_store(tmp_path / "s.zarr", commit=[0, 2])
    truth.acts["resid_post"][1, 6, 3, 2] = bits
    with pytest.raises(NonFiniteError, match=rf"{name} in resid_post, layer 3, shard 1, row \d+"):
        commit_shards(truth, [1])
    assert not (truth.root / "acts/resid_post/ledger/c.0.1").exists()
    assert not (truth.root / "acts/resid_post/rows/c.0.1.0").exists()
