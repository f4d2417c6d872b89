"""Where a stream's time goes: seconds per stage, summed over threads, and bytes."""

import threading
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Sums since the stream was opened.

    layout_s     deciding what goes where, on the stream's threads.
    read_s       waiting for bytes of a local disk, or of the page cache, on the stream's threads.
    fetch_s      waiting for bytes of object storage, or of a disk that is read around the page cache, on threads that do nothing else.
    decode_s     comparing with the ledger and decompressing, on the stream's threads.
    scatter_s    copying rows to their shuffled place (or, towards a GPU, into its queue), on the stream's threads; of
                 chunks that are stored as they are and lie in memory, comparing too, which is done on the way.
    copy_s       converting batches to the dtype asked for, or starting their copy to a device, on the consumer's.
    waited_s     the consumer waiting for a window.
    consumer_s   the consumer doing something else between batches.
    read_bytes   bytes of chunks read.     row_bytes  bytes of rows they became, after filters.
    n_requests   to object storage, for chunks.
    """

    layout_s: float = 0.0
    read_s: float = 0.0
    fetch_s: float = 0.0
    decode_s: float = 0.0
    scatter_s: float = 0.0
    copy_s: float = 0.0
    waited_s: float = 0.0
    consumer_s: float = 0.0
    read_bytes: int = 0
    row_bytes: int = 0
    n_requests: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **amounts: float) -> None:
        """Add to some of the sums; safe among threads."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def as_json(self) -> dict[str, float]:
        """The sums by name."""
        with self._lock:
            return {
                name: getattr(self, name) for name in self.__dataclass_fields__ if not name.startswith("_")
            }
