"""Chunks of a local store, read into a buffer that each thread uses again.

Not mapped into memory: a map saves one copy out of the page cache, but its pages count as this process's memory until
they are given back, which costs more than the copy (see the design log); and a file cut short under a map kills.
"""

import os
import threading
from pathlib import Path


class _File:
    """A file open for reading, closed when nobody refers to it: one that is in use outlives its eviction."""

    __slots__ = ("fd",)

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class LocalFiles:
    """Ranges of files under `root`; safe to share among threads.

    most_open  files that are kept open, which is sound because none is ever replaced.
    """

    def __init__(self, root: Path, most_open: int = 0) -> None:
        self.root, self._most_open = root, most_open
        self._text = str(root)  # joining paths as text: a Path takes longer than the system call it is for
        self._open: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def _file(self, key: str) -> _File:
        found = self._open.get(key)
        if found is None:
            found = _File(f"{self._text}/{key}")
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
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < n_bytes:
            buffer = self._local.buffer = memoryview(bytearray(n_bytes))
        file = self._file(key)
        got = os.preadv(file.fd, [buffer[:n_bytes]], start)
        while 0 < got < n_bytes and (more := os.preadv(file.fd, [buffer[got:n_bytes]], start + got)):
            got += more
        return buffer[:got]

    def will_need(self, key: str, start: int, n_bytes: int) -> None:
        """Start reading a range into the page cache, without waiting. A missing file is left to `read`."""
        if not hasattr(os, "posix_fadvise"):
            return
        try:
            file = self._file(key)
        except FileNotFoundError:
            return
        os.posix_fadvise(file.fd, start, n_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close what nobody is reading. Reading again opens again."""
        with self._lock:
            self._open.clear()
