"""Reading objects: a local folder directly, any other URL through a client of object storage."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from actcache.errors import NotFoundError, UsageError
from actcache.store.chunk_cache import CachedObjects, ChunkCache
from actcache.store.remote import Patience, Range, RemoteObjects

CACHE_BYTES = 16 * 2**30
_NAMES_SHOWN = 5


class Objects(Protocol):
    """A read-only tree of named byte strings. A missing one is FileNotFoundError."""

    url: str
    n_in_flight: int
    """Requests worth having under way at once; 0 where reading is quick enough to be done by whoever decodes."""

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        ...

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes | memoryview:
        """Bytes [start, start + n_bytes); fewer where the object ends before."""
        ...

    def read_ranges(
        self, key: str, ranges: Sequence[Range], *, fresh: bool = False
    ) -> list[bytes | memoryview]:
        """Several ranges (first byte, number of bytes) of an object, in as few requests as make sense.

        fresh  takes nothing from a local copy: for what turned out to be wrong when it was read the first time.
        """
        ...

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        ...

    def names(self, key: str) -> list[str]:
        """Names directly inside the folder `key`, sorted; empty when there is no such folder."""
        ...


class LocalObjects:
    """Objects in a folder of this machine."""

    n_in_flight = 0

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        return (self.root / key).read_bytes()

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes:
        """Bytes [start, start + n_bytes); fewer where the object ends before."""
        fd = os.open(self.root / key, os.O_RDONLY)
        try:
            data = os.pread(fd, n_bytes, start)
            while len(data) < n_bytes:
                more = os.pread(fd, n_bytes - len(data), start + len(data))
                if not more:
                    break
                data += more
            return data
        finally:
            os.close(fd)

    def read_ranges(
        self,
        key: str,
        ranges: Sequence[Range],
        *,
        fresh: bool = False,  # noqa: ARG002 - the page cache is not ours
    ) -> list[bytes | memoryview]:
        """Several ranges of an object, one after the other."""
        return [self.read_range(key, start, n_bytes) for start, n_bytes in ranges]

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        return (self.root / key).stat().st_size

    def names(self, key: str) -> list[str]:
        """Names directly inside the folder `key`, sorted."""
        try:
            return sorted(entry.name for entry in (self.root / key).iterdir())
        except FileNotFoundError:
            return []


def open_objects(
    location: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    patience: Patience | None = None,
) -> Objects:
    """The objects of a local folder or of a URL.

    Args:
        location: a folder, or any URL fsspec knows: s3://, gs://, az://, https://, memory://. `obstore+s3://` and
            `fsspec+s3://` choose who reads; otherwise obstore does where it is installed.
        storage_options: for s3 `key`, `secret`, `token`, `anon`, `endpoint_url`, `region`, in place of the usual
            environment variables; `client` ("obstore" or "fsspec"); others are passed to fsspec.
        cache_dir: a folder of this machine where chunks read from a URL are kept.
        cache_bytes: the most that folder may hold; None: 16 GiB.
        patience: attempts and deadlines of requests.

    Raises:
        NotFoundError: there is no store.
        UsageError: the URL or an option cannot be used.
        UnreachableError: object storage does not answer.
    """
    text = os.fspath(location)
    if "://" not in text or text.startswith("file://"):
        root = Path(text.removeprefix("file://"))
        if not root.is_dir():
            raise NotFoundError(
                f"no store at {root}: there is no such folder. 'actcache build --out {root}' makes one."
            )
        return LocalObjects(root)
    objects = _open_remote(text.rstrip("/"), dict(storage_options or {}), patience or Patience())
    document = _root_document(objects)
    if cache_dir is None:
        return objects
    digest = hashlib.sha256(objects.url.encode() + b"\n" + document).hexdigest()
    return CachedObjects(
        objects, ChunkCache(Path(cache_dir), CACHE_BYTES if cache_bytes is None else cache_bytes), digest
    )


def _open_remote(url: str, options: dict[str, Any], patience: Patience) -> RemoteObjects:
    from actcache.store.remote_clients import CLIENTS, make_client

    chosen = options.pop("client", None)
    for client in CLIENTS:
        if url.startswith(f"{client}+"):
            if chosen not in (None, client):
                raise UsageError(f"{url} asks for {client}, storage_options for {chosen}")
            chosen, url = client, url.removeprefix(f"{client}+")
    return RemoteObjects(_shown(url), make_client(url, options, patience.attempt_s, chosen), patience)


def _shown(url: str) -> str:
    """The URL without a password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _root_document(objects: RemoteObjects) -> bytes:
    """The store's zarr.json; NotFoundError says what is there instead."""
    try:
        return objects.read("zarr.json")
    except FileNotFoundError as error:
        names = objects.names("")
        if "NoSuchBucket" in str(error):
            why = (
                "there is no such bucket. Check its name and the endpoint (AWS_ENDPOINT_URL or endpoint_url)."
            )
        elif names:
            shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
            why = (
                f"there is no zarr.json, only {shown}. Give the folder that holds zarr.json; if the store is being "
                f"copied there, wait until that is done."
            )
        else:
            why = "nothing is there. Check bucket, prefix and endpoint (AWS_ENDPOINT_URL or endpoint_url)."
        raise NotFoundError(f"no store at {objects.url}: {why}") from error
