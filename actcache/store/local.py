"""Chunks of a local store: read into a buffer that each thread uses again, or where they are in the page cache."""

import ctypes
import mmap
import os
import threading
from pathlib import Path

_LINE = 64
NOT_MAPPED = (0, 0)
_FAILED = ctypes.c_void_p(-1).value
_system = ctypes.CDLL(None)
_system.mmap.restype = ctypes.c_void_p
_system.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_system.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
CAN_ASK = hasattr(_system, "mincore")
if CAN_ASK:
    _system.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class _File:
    """A file open for reading, closed when nobody refers to it: one that is in use outlives its eviction."""

    __slots__ = ("_lock", "_mapped", "fd")

    def __init__(self, path: str, *, is_random: bool, flags: int = 0) -> None:
        self.fd, self._lock = -1, threading.Lock()
        self._mapped: tuple[int, int] | None = None
        self.fd = os.open(path, os.O_RDONLY | flags)
        if is_random and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def mapped(self) -> tuple[int, int]:
        """Addresses in memory of the file's first byte, and of the one behind its last; `NOT_MAPPED` where it can't be mapped.

        A page of a map that the system can't bring (the file was cut short, the disk is dead) kills whoever touches it, and
        pages that were touched count as this process's memory. So let the system bring a chunk's pages first, which may fail
        without harm, read the chunk, and give them back: `bring` in loops_x86.ll. What is left is a file that is cut short in
        the 50 us between.
        """
        if self._mapped is None:
            with self._lock:
                if self._mapped is None:
                    self._mapped = _map(self.fd)
        return self._mapped

    def __del__(self) -> None:
        if self._mapped is not None and self._mapped != NOT_MAPPED:
            begin, end = self._mapped
            _system.munmap(begin, end - begin)
        if self.fd >= 0:
            os.close(self.fd)


def _map(fd: int) -> tuple[int, int]:
    """Of a whole file. Python's own `mmap` keeps another descriptor for each."""
    n_bytes = os.fstat(fd).st_size
    if not n_bytes:
        return NOT_MAPPED
    begin = _system.mmap(None, n_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    return NOT_MAPPED if begin in (None, _FAILED) else (begin, begin + n_bytes)


class Memory:
    """Memory that chunks are read into, one after the other: it begins at a page, and bytes at `lead` of it."""

    def __init__(self, n_bytes: int) -> None:
        pages = mmap.mmap(-1, n_bytes + mmap.PAGESIZE)
        self.n_bytes, self.view = n_bytes, memoryview(pages)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(pages))


def lead(start: int) -> int:
    """Where in a thread's memory to put bytes that begin at `start` of a file: at a cache line.

    In a page that is one to two lines behind where they lie in the page they are copied from. Processors copy as much as
    five times slower to less than half a line behind (measured on AMD's, see the design log).
    """
    return (-(-start // _LINE) + 1) * _LINE % mmap.PAGESIZE


class LocalFiles:
    """Ranges of files under `root`; safe to share among threads.

    most_open  files that are kept open, which is sound because none is ever replaced.
    is_random  ranges come in no order: the system is not to read what lies behind them too.
    is_direct  files are opened to be read around the page cache, by whoever asks for `file`.
    """

    def __init__(
        self, root: Path, most_open: int = 0, *, is_random: bool = False, is_direct: bool = False
    ) -> None:
        self.root, self._most_open, self._is_random = root, most_open, is_random
        self._flags = os.O_DIRECT if is_direct else 0
        self.seem_warm = False
        """Whether what was asked for last was in the page cache already. Whoever asks finds out, and keeps it here."""
        self._text = str(root)  # joining paths as text: a Path takes longer than the system call it is for
        self._open: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def file(self, key: str) -> _File:
        """A file, open as long as somebody refers to what this returns.

        Raises:
            FileNotFoundError: there is no such file.
        """
        found = self._open.get(key)
        if found is None:
            found = _File(f"{self._text}/{key}", is_random=self._is_random, flags=self._flags)
            with self._lock:
                self._open[key] = found
                while len(self._open) > self._most_open:
                    del self._open[next(iter(self._open))]
        return found

    def read(self, key: str, start: int, n_bytes: int, *, fresh: bool = False) -> memoryview:
        """Bytes [start, start + n_bytes), fewer where the file ends before; valid until this thread reads again.

        fresh  opens the file again: somebody may have put a good copy in the place of a bad one.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if fresh:
            self._open.pop(key, None)
        memory, at = self.memory(n_bytes), lead(start)
        buffer, file = memory.view[at : at + n_bytes], self.file(key)
        got = os.preadv(file.fd, [buffer], start)
        while 0 < got < n_bytes and (more := os.preadv(file.fd, [buffer[got:]], start + got)):
            got += more
        return buffer[:got]

    def memory(self, n_bytes: int) -> "Memory":
        """Of this thread, with room for so many bytes wherever they begin in a file; the same at the next call."""
        found = getattr(self._local, "memory", None)
        if found is None or found.n_bytes < n_bytes:
            found = self._local.memory = Memory(n_bytes)
        return found

    def will_need(self, key: str, start: int, n_bytes: int) -> None:
        """Start reading a range into the page cache, without waiting. A missing file is left to `read`."""
        if not hasattr(os, "posix_fadvise"):
            return
        try:
            file = self.file(key)
        except FileNotFoundError:
            return
        os.posix_fadvise(file.fd, start, n_bytes, os.POSIX_FADV_WILLNEED)

    def is_cached(self, key: str, at: int) -> bool:
        """Whether a byte of a file is in the page cache; also True where there is no telling, or no such byte.

        The system tells the owner of a file, or who may write to it; others it tells that everything is.
        """
        try:
            file = self.file(key)
        except FileNotFoundError:
            return True
        begin, end = file.mapped()
        if not CAN_ASK or begin + at >= end:
            return True
        page, found = (begin + at) & -mmap.PAGESIZE, ctypes.c_ubyte()
        if _system.mincore(page, mmap.PAGESIZE, ctypes.addressof(found)) != 0:
            return True
        return bool(found.value & 1)

    def close(self) -> None:
        """Close what nobody is reading. Reading again opens again."""
        with self._lock:
            self._open.clear()
