"""Cache transformer activations once, verifiably; stream them shuffled for ever after.

    import actcache

    store = actcache.open("acts.zarr")
    for batch in store.stream(batch_size=8192, seed=0):
        batch.rows, batch.layer, batch.sequence, batch.position

Torch is imported when `open` is first used, so tools that only look at a store start fast.
"""

import os
from typing import TYPE_CHECKING, Any

from actcache import errors
from actcache.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actcache.reader.access import Store


def open(
    location: "str | os.PathLike[str]",
    storage_options: "Mapping[str, Any] | None" = None,
    *,
    cache_dir: "str | os.PathLike[str] | None" = None,
    cache_bytes: int | None = None,
) -> "Store":
    """Open a store for reading: a local folder, any fsspec URL, or a service.

    Args:
        location: a local folder; s3://, gs://, az://, https://, memory://; grpc://HOST:PORT/NAME or grpc+tls://.
        storage_options: credentials and endpoint of object storage, where the environment does not give them. Of a service:
            `token`, `ca`, `cert`, `key`, `server_name`.
        cache_dir: a local folder where chunks read from a URL are kept.
        cache_bytes: the most that folder may hold; None: 16 GiB.

    Raises:
        NotFoundError: there is no store.
        UsageError: it is of another format, or an argument cannot be used.
        UnreachableError: object storage or the service does not answer.
        RefusedError: the service does not let this client in.
        DamageError: its plan was altered.
    """
    if isinstance(location, str) and location.startswith("grpc"):
        from actcache.service.client import open_remote

        return open_remote(location, storage_options, cache_dir=cache_dir, cache_bytes=cache_bytes)
    from actcache.reader.access import open_store

    return open_store(location, storage_options, cache_dir=cache_dir, cache_bytes=cache_bytes)


__all__ = ["__version__", "errors", "open"]
