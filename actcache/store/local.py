"""Chunks of a local store, read into a buffer that each thread uses again.

Not mapped into memory: a map saves one copy out of the page cache, but its pages count as this process's memory until
they are given back, which costs more than the copy (see the design log); and a file cut short under a map kills.
"""

import os
import threading
from pathlib import Path


class LocalFiles:
    """Ranges of files under `root`. Holds no file open; safe to share among threads."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)  # joining paths as text: a Path takes longer than the system call it is for
        self._local = threading.local()

    def read(self, key: str, start: int, n_bytes: int) -> memoryview:
        """Bytes [start, start + n_bytes), fewer where the file ends before; valid until this thread reads again.

        Raises:
            FileNotFoundError: there is no such file.
        """
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < n_bytes:
            buffer = self._local.buffer = memoryview(bytearray(n_bytes))
        fd = os.open(f"{self._root}/{key}", os.O_RDONLY)
        try:
            got = os.preadv(fd, [buffer[:n_bytes]], start)
            while 0 < got < n_bytes and (more := os.preadv(fd, [buffer[got:n_bytes]], start + got)):
                got += more
        finally:
            os.close(fd)
        return buffer[:got]

    def will_need(self, key: str, start: int, n_bytes: int) -> None:
        """Start reading a range into the page cache, without waiting. A missing file is left to `read`."""
        if not hasattr(os, "posix_fadvise"):
            return
        try:
            fd = os.open(f"{self._root}/{key}", os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            os.posix_fadvise(fd, start, n_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
