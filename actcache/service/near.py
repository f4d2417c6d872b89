"""Windows in memory that other processes of the same user on the same machine may read: no rows cross a connection.

The memory is a file without a name (Linux), which is gone when nobody has it open, however its processes end. Another
process opens it as /proc/PID/fd/N, which the system allows to the same user only. A number in its first page is another
one whenever the memory is about to be used again: who read rows and finds the same number behind them has read what
it was told of.
"""

import mmap
import os
import secrets
import sys
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.reader.scatter import aligned_empty

_FIRST = mmap.PAGESIZE
"""Byte of the memory that rows begin at."""


class Where(NamedTuple):
    """What another process needs to find some memory: whose it is, which file, and what it is used for just now."""

    pid: int
    fd: int
    device: int
    inode: int
    use: int


class Shareable:
    """Memory [n_bytes], `bytes`, that begins at a cache line; in other systems than Linux nobody else can read it."""

    def __init__(self, n_bytes: int) -> None:
        self._fd, self.nbytes = -1, n_bytes
        self._use = np.zeros(1, np.int64)
        if not hasattr(os, "memfd_create"):
            self.bytes: NDArray[np.uint8] = aligned_empty((1, n_bytes), np.dtype(np.uint8))[0]
            return
        self._fd = os.memfd_create("actcache-window", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, _FIRST + n_bytes)
        memory = mmap.mmap(self._fd, _FIRST + n_bytes)
        self._use = np.frombuffer(memory, np.int64, 1)
        self._use[0] = secrets.randbits(62)  # of another file it is another one
        self.bytes = np.frombuffer(memory, np.uint8, n_bytes, _FIRST)

    def use_again(self) -> None:
        """Before anything else is put there: who still reads will know."""
        self._use[0] += 1

    def where(self) -> Where | None:
        """For other processes; None where there is no way."""
        if self._fd < 0:
            return None
        found = os.fstat(self._fd)
        return Where(os.getpid(), self._fd, found.st_dev, found.st_ino, int(self._use[0]))

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class OthersMemory:
    """Memory of another process, for reading. Use as a context manager.

    Raises:
        OSError: it cannot be read from here, or is not there any more.
    """

    def __init__(self, where: Where) -> None:
        self._where = where
        self._fd = os.open(f"/proc/{where.pid}/fd/{where.fd}", os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self._fd)
        if (found.st_dev, found.st_ino) != (where.device, where.inode):
            os.close(self._fd)
            raise FileNotFoundError(f"process {where.pid} is another one here, or has other memory there now")

    def read(self, start: int, into: NDArray[np.uint8]) -> None:
        """Bytes from `start` on."""
        if (
            os.preadv(self._fd, [into.data], _FIRST + start) != into.nbytes
        ):  # a memory file comes whole, or is too short
            raise OSError("the memory ends before the rows that should be there")

    @property
    def is_as_told(self) -> bool:
        """Whether what was read until now is what it was said to be."""
        return int.from_bytes(os.pread(self._fd, 8, 0), sys.byteorder) == self._where.use

    def __enter__(self) -> "OthersMemory":
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._fd)
