"""What a power cut would leave, by an oracle that watches the system calls and believes only what was synced.

The bytes of a file last when it was synced after its last write, a name when its folder was synced after it was given,
and a folder's name likewise. Everything else may last or not. So whatever a name covers must last *before* that name is
given, and the name itself before anybody is told.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actcache.producer.repair import repair
from actcache.producer.summary import BuildReporter
from actcache.store.arrays import side_arrays, side_key
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from tests.conftest import make_decoder, small_settings

HOOKS = ("resid_post", "mlp_out")


class Oracle:
    """Watches one folder. Paths are absolute; files are told apart by their inodes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.is_synced: dict[int, bool] = {}
        self.names: dict[Path, int] = {}
        self.lasting: dict[Path, int] = {}
        self.linked: list[Path] = []
        self.problems: list[str] = []

    def lasts(self, path: Path) -> bool:
        """Whether a name, all folders above it and, of a file, its bytes would be there after a power cut."""
        while path != self.root:
            if path not in self.lasting or self.lasting[path] != self.names[path]:
                return False
            if not self.is_synced.get(self.names[path], True):
                return False
            path = path.parent
        return True

    def expect(self, path: Path, because: str) -> None:
        if not self.lasts(path):
            self.problems.append(f"{path.relative_to(self.root)} would not last, and {because}")

    def expect_all(self, folder: Path, because: str) -> None:
        for path in [p for p in self.names if folder in (p, *p.parents) and ".partial" not in p.parts]:
            self.expect(path, because)

    def saw(self, path: Path) -> None:
        if self.root in path.parents:
            self.names[path] = path.stat().st_ino

    # The system calls that count.

    def open(self, path, flags, *args, **kwargs):
        is_new = flags & os.O_CREAT and not Path(path).exists()
        fd = REAL["open"](path, flags, *args, **kwargs)
        if is_new:
            self.saw(Path(path))
        return fd

    def writev(self, fd, parts):
        self.is_synced[os.fstat(fd).st_ino] = False
        return REAL["writev"](fd, parts)

    def fsync(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if not path.is_dir():
            self.is_synced[os.fstat(fd).st_ino] = True
            return
        self.lasting = {n: i for n, i in self.lasting.items() if n.parent != path or n in self.names}
        self.lasting |= {name: inode for name, inode in self.names.items() if name.parent == path}

    def mkdir(self, path, *args, **kwargs):
        REAL["mkdir"](path, *args, **kwargs)
        self.saw(Path(path))

    def unlink(self, path, *args, **kwargs):
        REAL["unlink"](path, *args, **kwargs)
        if not kwargs:
            self.names.pop(Path(path), None)

    def link(self, old, new):
        for path in covered_by(Path(new)):
            self.expect(path, f"{Path(new).relative_to(self.root)} says that it is there")
        if not self.is_synced.get(Path(old).stat().st_ino, True):
            self.problems.append(f"{new} is given to bytes that were not synced")
        REAL["link"](old, new)
        self.saw(Path(new))
        self.linked.append(Path(new))

    def rename(self, old, new):
        """What lies in a folder moves along; its own new name does not last yet."""
        old, new = Path(old), Path(new)
        self.lasting[old] = self.names[old]  # which of its names it has is no matter here
        for path in [p for p in self.names if old in p.parents and ".partial" not in p.parts]:
            self.expect(path, "its folder gets its name")
        del self.lasting[old]
        REAL["rename"](old, new)
        for known in (self.names, self.lasting):
            for path in [path for path in known if old in path.parents]:
                known[new / path.relative_to(old)] = known.pop(path)
        del self.names[old]
        self.saw(new)

    def replace(self, old, new):
        REAL["replace"](old, new)
        self.names.pop(Path(old), None)
        self.saw(Path(new))

    @contextmanager
    def watching(self) -> Iterator[None]:
        lock = threading.RLock()

        def one_at_a_time(call: Callable) -> Callable:
            def locked(*args, **kwargs):
                with lock:
                    return call(*args, **kwargs)

            return locked

        with pytest.MonkeyPatch.context() as patch:
            for name in (*REAL, "fsync"):
                patch.setattr(os, name, one_at_a_time(getattr(self, name)))
            yield


CALLS = ("open", "writev", "link", "rename", "replace", "mkdir", "unlink")
REAL: dict[str, Callable] = {name: getattr(os, name) for name in CALLS}


@pytest.fixture
def oracle(tmp_path) -> Oracle:
    return Oracle(tmp_path)


def covered_by(path: Path) -> Iterator[Path]:
    """Of a ledger record: the objects it commits."""
    if path.parent.name != "ledger" or not path.name.startswith("c."):
        return
    root = path.parents[3]
    generation, shard = (int(number) for number in path.name.split(".")[1:])
    capture = Catalog(LocalObjects(root)).captures[path.parts[-3]]
    for name in ("rows", *side_arrays(capture.capture)):
        yield root / side_key(capture.arrays[name], shard, generation)


@pytest.mark.parametrize("codec", ["zstd", "uint8"])
def test_a_power_cut_loses_nothing_that_is_committed(kit, tmp_path, oracle, codec):
    out, told = tmp_path / "new" / "folders" / "s.zarr", []

    def on_shard(shard: int) -> None:
        told.append(shard)
        for hook in HOOKS:
            oracle.expect(out / f"acts/{hook}/ledger/c.0.{shard}", "its shard was said to be committed")

    with oracle.watching():
        kit.build(
            small_settings(out, hooks=HOOKS, codec=codec),
            make_decoder(),
            reporter=BuildReporter(on_shard=on_shard),
        )
    oracle.expect_all(tmp_path / "new", "the build has said that it is done")
    assert oracle.problems == []
    assert told == [0, 1, 2]
    assert len([path for path in oracle.linked if list(covered_by(path))]) == 6


@pytest.mark.parametrize("codec", ["zstd", "uint8"])
def test_nor_one_in_the_middle_of_a_repair(make_store, tmp_path, oracle, codec):
    out = make_store(tmp_path, codec=codec)
    for path in [out, *out.rglob("*")]:
        oracle.saw(path)
    oracle.lasting |= oracle.names
    (out / "acts/resid_post/rows/c.0.1.0").write_bytes(b"")
    with oracle.watching():
        assert repair(str(out), lambda _catalog: make_decoder()).left == []
    oracle.expect_all(out, "the repair has said that it is done")
    assert oracle.problems == []
    assert [p.name for p in oracle.linked if p.parent.name == "ledger"] == ["c.1.1"]


def test_the_oracle_notices_what_is_not_synced(kit, tmp_path, oracle, monkeypatch):
    monkeypatch.setattr(oracle, "fsync", lambda _fd: None)
    with oracle.watching():
        kit.build(small_settings(tmp_path / "s.zarr"), make_decoder())
    for said in ("says that it is there", "bytes that were not synced", "its folder gets its name"):
        assert any(said in problem for problem in oracle.problems)
