"""A bounded folder of chunks read from object storage, shared by any number of processes.

    DIR/total               8 bytes: what entries and reservations sum up to; also the lock (flock)
    DIR/<sha256>            one entry: magic, crc32c, length, bytes
    DIR/.writing-...        an entry on its way; its writer holds a lock on it, so a dead writer's file shows

Room is reserved under the lock before a byte is written, by a file of the full length, and counted like an entry; only
a whole entry is renamed into place, and it is compared with its crc32c whenever it is read. So a crash at any moment
leaves at worst a reservation that the next eviction sweeps, and a torn entry is a miss. The cache never makes a read
fail: where it cannot write, nothing is kept.
"""

import fcntl
import hashlib
import itertools
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from crc32c import crc32c

from actcache.errors import UsageError

if TYPE_CHECKING:
    from actcache.store.objects import Objects
    from actcache.store.remote import Range

_HEADER = struct.Struct("<4sIQ")
_MAGIC = b"acc1"
_TOTAL = struct.Struct("<Q")
_WRITING = ".writing-"
_BLOCK = 4096
_KEPT_SHARE = 0.9
_LOCK_S = 1.0
_POLL_S = 0.002

_log = logging.getLogger("actcache")


class _File(NamedTuple):
    used_ns: int
    n_bytes: int
    path: Path


def _on_disk(n_bytes: int) -> int:
    return -(-n_bytes // _BLOCK) * _BLOCK


class ChunkCache:
    """Byte strings by name, at most `limit` bytes of them, counted in blocks of 4 KiB. Least recently used go first.

    Eviction goes down to nine tenths of the limit, so that the folder is listed seldom.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 1:
            raise UsageError(f"cache_bytes={limit}: expected at least 1")
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as fd:
                if fd is not None:
                    self._recount(fd, make_room=0)
        except OSError as error:
            raise UsageError(f"cache_dir={str(folder)!r} cannot be used: {error}") from error
        self._count = itertools.count()
        self._has_warned = False

    def get(self, name: str) -> bytes | None:
        """The bytes kept under a name, or None. One that is not what was put is removed."""
        path = self.folder / name
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError:
            return None
        try:
            data = self._checked(fd, name)
            if data is None:
                path.unlink(missing_ok=True)  # `total` stays too high until the next count, never too low
            else:
                now = time.time_ns()
                os.utime(fd, ns=(now, now))
        except OSError:
            return None
        finally:
            os.close(fd)
        return data

    @staticmethod
    def _checked(fd: int, name: str) -> bytes | None:
        with os.fdopen(os.dup(fd), "rb", buffering=0) as file:
            whole = file.readall()
        if len(whole) < _HEADER.size:
            return None
        magic, crc, n_bytes = _HEADER.unpack_from(whole)
        data = whole[_HEADER.size :]
        return data if (magic, n_bytes) == (_MAGIC, len(data)) and crc == _crc_of(name, data) else None

    def put(self, name: str, data: bytes | memoryview) -> bool:
        """Keep bytes under a name; False where there was no room, no lock or no way to write."""
        reserved = None
        try:
            reserved = self._reserve(_HEADER.size + len(data))
            if reserved is None:
                return False
            fd, path = reserved
            with os.fdopen(os.dup(fd), "wb", buffering=0) as file:
                _write_all(file.fileno(), _HEADER.pack(_MAGIC, _crc_of(name, data), len(data)))
                _write_all(file.fileno(), data)
            return self._publish(path, self.folder / name)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                _log.warning("chunks are not kept in %s: %s", self.folder, error)
            return False
        finally:
            if reserved is not None:
                reserved[1].unlink(missing_ok=True)
                os.close(reserved[0])

    def _reserve(self, n_bytes: int) -> tuple[int, Path] | None:
        """A file of the full length, locked by us and counted; None where it does not fit or the lock is busy."""
        n_on_disk = _on_disk(n_bytes)
        if n_on_disk > self.limit:
            return None
        path = self.folder / f"{_WRITING}{os.getpid()}-{threading.get_ident()}-{next(self._count)}"
        with self._locked() as lock:
            if lock is None:
                return None
            total = self._total(lock)
            if total is None or total + n_on_disk > self.limit:
                total = self._recount(lock, make_room=n_on_disk)
            if total + n_on_disk > self.limit:
                return None  # other writers hold the rest
            os.pwrite(lock, _TOTAL.pack(total + n_on_disk), 0)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(fd, n_bytes)
            except OSError:
                path.unlink(missing_ok=True)
                os.close(fd)
                raise
        return fd, path

    def _publish(self, path: Path, final: Path) -> bool:
        with self._locked() as lock:
            if lock is None:
                return False
            try:
                replaced = _on_disk(final.stat().st_size)
            except FileNotFoundError:
                replaced = 0
            path.rename(final)
            total = self._total(lock)
            if total is not None and replaced:
                os.pwrite(lock, _TOTAL.pack(max(0, total - replaced)), 0)
            return True

    @staticmethod
    def _total(lock: int) -> int | None:
        data = os.pread(lock, _TOTAL.size, 0)
        return _TOTAL.unpack(data)[0] if len(data) == _TOTAL.size else None

    def _recount(self, lock: int, make_room: int) -> int:
        """Sum up what is there, evicting and sweeping where that plus `make_room` is too much; under the lock."""
        files, total = [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name == "total" or not entry.is_file(follow_symlinks=False):
                    continue
                path = Path(entry.path)
                if entry.name.startswith(_WRITING) and _is_abandoned(path):
                    path.unlink(missing_ok=True)
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                n_bytes = _on_disk(found.st_size)
                total += n_bytes
                if not entry.name.startswith(_WRITING):
                    files.append(_File(found.st_mtime_ns, n_bytes, path))
        if total + make_room > self.limit:
            for file in sorted(files):
                if total + make_room <= self.limit * _KEPT_SHARE:
                    break
                file.path.unlink(missing_ok=True)
                total -= file.n_bytes
        os.pwrite(lock, _TOTAL.pack(total), 0)
        return total

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The lock of the folder as a file descriptor, or None where another process keeps it too long."""
        fd = os.open(self.folder / "total", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield fd if _lock_within(fd, _LOCK_S) else None
        finally:
            os.close(fd)


def _lock_within(fd: int, seconds: float) -> bool:
    deadline = time.perf_counter() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.perf_counter() > deadline:
                return False
            time.sleep(_POLL_S)
        else:
            return True


def _is_abandoned(path: Path) -> bool:
    """Whether no process holds the lock that the writer of a file keeps until it is done."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _write_all(fd: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _crc_of(name: str, data: bytes | memoryview) -> int:
    return crc32c(data, crc32c(name.encode()))


class CachedObjects:
    """Objects whose ranges are kept in a `ChunkCache`. Whole objects are not: they are small, or read once."""

    def __init__(self, objects: "Objects", cache: ChunkCache, digest: str) -> None:
        self.objects, self.cache, self._digest = objects, cache, digest
        self.url, self.n_in_flight = objects.url, objects.n_in_flight

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        return self.objects.read(key)

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes | memoryview:
        """Bytes [start, start + n_bytes); fewer where the object ends before."""
        return self.read_ranges(key, [(start, n_bytes)])[0]

    def read_ranges(
        self, key: str, ranges: "Sequence[Range]", *, fresh: bool = False
    ) -> list[bytes | memoryview]:
        """Several ranges; those that are not kept, or all where `fresh`, are read and kept."""
        names = [self._name(key, *one) for one in ranges]
        kept = [None if fresh else self.cache.get(name) for name in names]
        missing = [i for i, data in enumerate(kept) if data is None]
        found: list[bytes | memoryview] = [b"" if data is None else data for data in kept]
        if missing:
            read = self.objects.read_ranges(key, [ranges[i] for i in missing], fresh=fresh)
            for i, data in zip(missing, read, strict=True):
                found[i] = data
                if len(data) == ranges[i][1]:
                    self.cache.put(names[i], data)
        return found

    def _name(self, key: str, start: int, n_bytes: int) -> str:
        return hashlib.sha256(f"{self._digest}\n{key}\n{start}\n{n_bytes}".encode()).hexdigest()

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        return self.objects.size(key)

    def names(self, key: str) -> list[str]:
        """Names directly inside the folder `key`, sorted."""
        return self.objects.names(key)
