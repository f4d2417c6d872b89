"""Cache transformer activations once, verifiably; stream them shuffled for ever after.

    import actcache

    store = actcache.open("acts.zarr")
    for batch in store.stream(batch_size=8192, seed=0):
        batch.rows, batch.layer, batch.sequence, batch.position

Torch is imported when `open` is first used, so tools that only look at a store start fast.
"""

import os
from typing import TYPE_CHECKING

from actcache import errors
from actcache.version import __version__

if TYPE_CHECKING:
    from actcache.reader.access import Store


def open(location: "str | os.PathLike[str]") -> "Store":
    """Open a store for reading: a local folder or any fsspec URL.

    Raises:
        NotFoundError: there is no store. UsageError: it is of another format. DamageError: its plan was altered.
    """
    from actcache.reader.access import open_store

    return open_store(location)


__all__ = ["__version__", "errors", "open"]
