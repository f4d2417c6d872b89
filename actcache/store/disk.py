"""Durable writing on a local disk: objects appear whole under their name, once, or not at all.

An object is written under a temporary name, synced, then hard-linked to its final name: `link` fails when the name
is taken, so nothing is ever replaced. Temporary files live in a workspace that holds a lock while its process
lives; whoever finds a workspace without a holder removes it. Every step that touches the disk is announced to
`on_operation` first, so that tests can stop the world before any of them.
"""

import errno
import fcntl
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from actcache.errors import DiskFullError, UsageError

WORK_DIR = ".partial"
_LOCK = "lock"
_BIRTH_DEADLINE_S = 30.0


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(path: Path, on_folder: Callable[[], None] = lambda: None) -> None:
    """Create a folder and its parents, durably; `on_folder` is called before each."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    for folder in reversed(missing):
        on_folder()
        try:
            folder.mkdir(exist_ok=True)
            _sync_dir(folder.parent)
        except OSError as error:
            raise _explained(error, folder) from error


def _try_lock(lock: Path) -> int | None:
    """Lock `lock` and return its descriptor; None when a living process holds it or it is gone."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == lock.stat().st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


_WRITE_BYTES = 1 << 20
_MOST_PIECES = 1000
"""Of one call; systems allow 1,024."""


class Writer:
    """One object being written under its temporary name. `commit` gives it its final name."""

    def __init__(self, disk: "Disk", key: str) -> None:
        self._disk, self._key = disk, key
        self._temporary = disk.workspace / f"{secrets.token_hex(8)}.partial"
        disk.announce("open", key)
        try:
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise _explained(error, disk.root / key) from error
        self.n_bytes = 0
        self._pending: list[memoryview] = []
        self._n_pending = 0

    def write(self, *parts: bytes | memoryview) -> None:
        """Append bytes, which must stay what they are until `flush`; DiskFullError when there is no room.

        They are handed to the system a megabyte or so at a time: each piece that does not end with a page costs it a third more.
        """
        for part in parts:
            if len(part):
                self._pending.append(memoryview(part).cast("B"))
                self._n_pending += len(self._pending[-1])
        if self._n_pending >= _WRITE_BYTES or len(self._pending) >= _MOST_PIECES:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the system."""
        left, self._pending, self._n_pending = self._pending, [], 0
        if not left:
            return
        self._disk.announce("write", self._key)
        with self._disk.timed("write"):
            while left:
                try:
                    n_written = os.writev(self._fd, left[:_MOST_PIECES])
                except OSError as error:
                    raise _explained(error, self._disk.root / self._key) from error
                self.n_bytes += n_written
                n_whole = 0
                while n_whole < len(left) and n_written >= len(left[n_whole]):
                    n_written -= len(left[n_whole])
                    n_whole += 1
                left = left[n_whole:]
                if n_written:
                    left[0] = left[0][n_written:]

    def commit(self) -> bool:
        """Sync and link to the final name; False when that name is taken (nothing is replaced)."""
        self.flush()
        final = self._disk.root / self._key
        try:
            self._disk.announce("fsync", self._key)
            with self._disk.timed("sync"):
                os.fsync(self._fd)
            self._disk.announce("link", self._key)
            os.link(self._temporary, final)
            is_new = True
        except FileExistsError:
            is_new = False
        except OSError as error:
            raise _explained(error, final) from error
        self._disk.settle(self._key)  # even of another's object: it may have died before it could
        return is_new

    def close(self) -> None:
        """Remove the temporary name. Called whatever happened."""
        os.close(self._fd)
        self._disk.announce("unlink", self._key)
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _explained(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"no room left on the disk while writing {path}: nothing committed is lost and nothing half-written is "
            f"visible. Make room, then run the same command again: it continues."
        )
    if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
        return UsageError(
            f"the file system of {path} cannot create hard links ({error.strerror}), which exclusive, atomic "
            f"commits need. Put the store on a local disk (ext4, xfs, btrfs, apfs) or an NFS mount that has them."
        )
    return error


class Disk:
    """The only thing that changes a store. Hold it in a `with` block: its workspace is locked meanwhile.

    on_operation(name, key) is called before every step that changes the disk.
    spent_s                 seconds in writing and in syncing so far.
    """

    def __init__(self, root: Path, on_operation: Callable[[str, str], None] | None = None) -> None:
        self.root = root
        self._on_operation = on_operation
        self.nonce = secrets.token_hex(8)
        self.workspace = root / WORK_DIR / self.nonce
        self._lock_fd: int | None = None
        self.spent_s = {"write": 0.0, "sync": 0.0}
        self._timing = threading.Lock()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of a `with` block to `spent_s`; of several threads at once, each counts."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._timing:
                self.spent_s[what] += time.perf_counter() - started

    def announce(self, operation: str, key: str) -> None:
        """Called before each step that changes the disk."""
        if self._on_operation is not None:
            self._on_operation(operation, key)

    def __enter__(self) -> Self:
        self.announce("mkdir", WORK_DIR)
        deadline = time.monotonic() + _BIRTH_DEADLINE_S
        while True:  # another process may remove or hold any of the folders between the steps
            try:
                self.workspace.mkdir(parents=True, exist_ok=True)
                self._lock_fd = _try_lock(self.workspace / _LOCK)
            except (FileNotFoundError, FileExistsError):
                if time.monotonic() > deadline:
                    raise
            except OSError as error:
                for folder in (self.workspace, self.workspace.parent):
                    _remove_if_empty(folder)
                raise _explained(error, self.workspace) from error
            if self._lock_fd is not None:
                return self
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{self.workspace} could not be locked for {_BIRTH_DEADLINE_S:g} s. The file system must have "
                    f"working file locks (flock): put the store on another disk."
                )
            time.sleep(0.001)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._lock_fd is not None
        os.close(self._lock_fd)
        self._lock_fd = None
        self.announce("remove workspace", WORK_DIR)
        shutil.rmtree(self.workspace, ignore_errors=True)
        _remove_if_empty(self.root / WORK_DIR)

    def sweep(self) -> int:
        """Remove the workspaces of dead processes; returns how many. Those of living ones are left alone."""
        n_swept = 0
        for name in sorted(_names(self.root / WORK_DIR)):
            other = self.root / WORK_DIR / name
            if other != self.workspace and (fd := _try_lock(other / _LOCK)) is not None:
                try:
                    self.announce("sweep", other.name)
                    shutil.rmtree(other, ignore_errors=True)
                finally:
                    os.close(fd)
                n_swept += 1
        return n_swept

    def makedirs(self, key: str) -> None:
        """Create the folder `key` and its parents, durably."""
        make_folders(self.root / key, lambda: self.announce("mkdir", key))

    def create(self, key: str, data: bytes | Iterable[Sequence[bytes | memoryview]]) -> bool:
        """Create one object exclusively and durably; False when it is there already."""
        with Writer(self, key) as writer:
            for parts in [[data]] if isinstance(data, bytes) else data:
                writer.write(*parts)
            return writer.commit()

    def rename(self, source: str, key: str) -> None:
        """Give the object `source` the name `key` too, whatever had it: for what no record covers any more."""
        temporary = self.workspace / f"{secrets.token_hex(8)}.partial"
        try:
            self.announce("link", key)
            os.link(self.root / source, temporary)
            self.announce("replace", key)
            temporary.replace(self.root / key)
            temporary.unlink(missing_ok=True)  # both names were one object's before: then nothing was renamed
        except OSError as error:
            raise _explained(error, self.root / key) from error
        self.settle(key)

    def note(self, name: str) -> None:
        """Leave an empty file in the workspace, for others to see while this process lives."""
        self.announce("claim", name)
        try:
            (self.workspace / name).touch()
        except OSError as error:
            raise _explained(error, self.workspace / name) from error

    def settle(self, key: str) -> None:
        """Make the name of an object durable."""
        self.announce("fsync directory", key)
        try:
            with self.timed("sync"):
                _sync_dir((self.root / key).parent)
        except OSError as error:
            raise _explained(error, self.root / key) from error

    def remove(self, key: str, *, missing_ok: bool = False) -> None:
        """Remove an object that no commit covers, or that is retired."""
        self.announce("remove", key)
        (self.root / key).unlink(missing_ok=missing_ok)
        _sync_dir((self.root / key).parent)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def remove_abandoned(root: Path) -> None:
    """Remove a folder that was being staged, unless a living process holds a workspace in it.

    The locks are held meanwhile: a process that is just making its workspace waits, and then makes it again.
    """
    held: list[int] = []
    has_content = any(
        name != WORK_DIR for name in _names(root)
    )  # looked at first: content comes after its lock
    try:
        for name in _names(root / WORK_DIR):
            fd = _try_lock(root / WORK_DIR / name / _LOCK)
            if fd is None:
                return
            held.append(fd)
        if held or has_content:
            shutil.rmtree(root, ignore_errors=True)
        else:  # empty: either abandoned at birth or just being born, so nothing may go that has something in it
            for folder in (root / WORK_DIR, root):
                _remove_if_empty(folder)
    finally:
        for fd in held:
            os.close(fd)


def workspaces(root: Path) -> list[Path]:
    """The workspaces of a store or of a folder that is being staged, of living and of dead producers."""
    return [root / WORK_DIR / name for name in _names(root / WORK_DIR)]


def is_held(workspace: Path) -> bool:
    """Whether the process that made a workspace lives."""
    try:
        fd = os.open(workspace / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _names(folder: Path) -> list[str]:
    """What is in a folder; nothing where another process has just removed it (a glob would raise)."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def publish(staged: Disk, final: Path) -> None:
    """Give a staged folder its final name in one step; FileExistsError when the name is taken.

    The workspace inside moves along and stays locked, so nobody takes the folder for abandoned meanwhile.
    """
    staged.announce("rename", final.name)
    try:
        staged.root.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(final) from error
        raise _explained(error, final) from error
    staged.root, staged.workspace = final, final / WORK_DIR / staged.nonce
    staged.announce("fsync directory", final.name)
    try:
        _sync_dir(final.parent)
    except OSError as error:
        raise _explained(error, final) from error


def publish_folder(disk: Disk, staged: Path, key: str) -> None:
    """Give a folder in the workspace the name `key` in one step; FileExistsError when the name is taken."""
    final = disk.root / key
    disk.announce("rename", key)
    try:
        staged.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(final) from error
        raise _explained(error, final) from error
    disk.settle(key)


def free_bytes(path: Path) -> int:
    """Bytes a user may still write to the disk that holds `path` (which need not exist yet)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
