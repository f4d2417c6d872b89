"""Committed objects of a local store, mapped into memory: a chunk is checked and decoded where the page cache has it.

Safe because objects are immutable and because the length is checked each time: a file that was cut short or replaced
after it was mapped is noticed before it is touched. The maps used last are kept; each holds one file handle.
"""

import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path

_MOST_MAPS = 64


class MappedFiles:
    """Memory maps of files under `root`, safe to share among threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._maps: OrderedDict[str, tuple[tuple[int, int, int], mmap.mmap]] = OrderedDict()
        self._lock = threading.Lock()

    def view(self, key: str, start: int, n_bytes: int) -> memoryview:
        """Bytes [start, start + n_bytes) of a file without copying; fewer where it ends before.

        Raises:
            FileNotFoundError: there is no such file.
        """
        found = self._map_of(key)
        return memoryview(b"" if found is None else found)[start : start + n_bytes]

    def will_need(self, key: str, start: int, n_bytes: int) -> None:
        """Start reading a range into the page cache, without waiting. A missing file is left to `view`."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        try:
            found = self._map_of(key)
        except FileNotFoundError:
            return
        if found is not None and start < len(found):
            aligned = start - start % mmap.PAGESIZE
            found.madvise(mmap.MADV_WILLNEED, aligned, min(start + n_bytes, len(found)) - aligned)

    def _map_of(self, key: str) -> mmap.mmap | None:
        """The map of a file as it is now; None where it is empty."""
        path = self._root / key
        found = path.stat()
        identity = (found.st_dev, found.st_ino, found.st_size)
        with self._lock:
            known = self._maps.get(key)
            if known is None or known[0] != identity:
                if found.st_size == 0:
                    return None
                known = (identity, self._map(path))
                self._maps[key] = known
            self._maps.move_to_end(key)
            while len(self._maps) > _MOST_MAPS:
                self._maps.popitem(last=False)  # closed when the last view of it is gone
            return known[1]

    @staticmethod
    def _map(path: Path) -> mmap.mmap:
        fd = os.open(path, os.O_RDONLY)
        try:
            return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of every map; views that are still in use stay valid."""
        with self._lock:
            self._maps.clear()
