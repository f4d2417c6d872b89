"""Memory of messages that are on their way, used again once they were sent.

Fresh memory of such sizes comes from the system page by page, each cleared first: 20,000 page faults for every GB sent.
"""

import mmap
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
_MOST_FREE = 16
"""As many messages as are usually under way at once; what more was needed for a while is let go of."""


class Memory:
    """Pieces of at least some size, each beginning at a page; free again when nothing refers to them."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lock = threading.RLock()  # the collector may give a piece back in the middle of `take`

    def take(self, n_bytes: int) -> NDArray[np.uint8]:
        """[n_bytes]. Whoever keeps a part of it has to keep this array itself."""
        with self._lock:
            fitting = next((i for i, raw in enumerate(self._free) if len(raw) >= n_bytes), None)
            raw = mmap.mmap(-1, max(n_bytes, 1)) if fitting is None else self._free.pop(fitting)
        view = np.frombuffer(raw, np.uint8, n_bytes)
        weakref.finalize(view, self._give_back, raw).atexit = False
        return view

    def _give_back(self, raw: mmap.mmap) -> None:
        with self._lock:
            self._free.append(raw)
            del self._free[:-_MOST_FREE]
