"""A store behind a service: `actcache.open("grpc://host:port/name")`.

Objects come as they lie on disk and are checked here, against the plan and the ledger, like any others. Windows of a
stream come decoded and shuffled, each message with its crc32c; order, batches and cursors are made here, by the same code
as of a local store, so a run may change from one to the other at any batch.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actcache.errors import NotFoundError
from actcache.reader.access import Store
from actcache.reader.selection import Delivery, Selection
from actcache.reader.stream import Connect
from actcache.service.link import Credentials, Link, parse_address
from actcache.service.received import ServedWindows
from actcache.service.wire import (
    NamesRequest,
    PutRequest,
    ReadRequest,
    SizeRequest,
)
from actcache.store.chunk_cache import CachedObjects, ChunkCache
from actcache.store.objects import CACHE_BYTES, Objects
from actcache.store.open import CaptureCatalog, Catalog
from actcache.store.remote import Range

_FIRST_CONTACT_S = 10.0
_IN_FLIGHT = 8


class ServedObjects:
    """`Objects` of one store of a service."""

    n_in_flight = _IN_FLIGHT

    def __init__(self, link: Link, store: str) -> None:
        self._link, self._store = link, store
        self.url = f"{link.location}/{store}"

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        return b"".join(self._link.call("read", ReadRequest(store=self._store, key=key))[1:])

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes | memoryview:
        """Bytes [start, start + n_bytes); fewer where the object ends before."""
        return self.read_ranges(key, [(start, n_bytes)])[0]

    def read_ranges(
        self,
        key: str,
        ranges: Sequence[Range],
        *,
        fresh: bool = False,  # noqa: ARG002 - nothing is kept here
    ) -> list[bytes | memoryview]:
        """Several ranges of an object, in one call."""
        wanted = tuple((int(start), int(n_bytes)) for start, n_bytes in ranges)
        first, *pieces = self._link.call("read", ReadRequest(store=self._store, key=key, ranges=wanted))
        data, found = memoryview(b"".join(pieces)), []
        for length in json.loads(first)["lengths"]:
            found.append(data[:length])
            data = data[length:]
        return found

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        return self._link.ask("size", SizeRequest(store=self._store, key=key))["size"]

    def names(self, key: str) -> list[str]:
        """Names directly inside a folder, sorted."""
        return self._link.ask("names", NamesRequest(store=self._store, key=key))["names"]

    def live_writer(self) -> "ServedLive":
        """Who writes the state of a consumer."""
        return ServedLive(self._link, self._store)


class ServedLive:
    """`LiveWriter` through a service."""

    def __init__(self, link: Link, store: str) -> None:
        self._link, self._store = link, store

    def put(self, name: str, data: bytes) -> None:
        """Replace the file `name`."""
        self._link.call("put", PutRequest(store=self._store, name=name, text=data.decode()))

    def drop(self, name: str) -> None:
        """Remove the file `name`, if it is there."""
        self._link.call("put", PutRequest(store=self._store, name=name, text=None))


def connect(url: str, storage_options: Mapping[str, Any] | None) -> tuple[Link, str]:
    """A connection to a service, and the name of the store meant by `url`; NotFoundError lists those there are."""
    address = parse_address(url)
    link = Link(address.location, Credentials.of(storage_options or {}))
    names = link.ask("names", NamesRequest(store="", key=""), patience_s=_FIRST_CONTACT_S)["names"]
    if address.store:
        if address.store in names:
            return link, address.store
    elif len(names) == 1:
        return link, names[0]
    raise NotFoundError(
        f"no store {address.store!r} at {address.location}; it serves {', '.join(names) or 'none'}"
    )


def list_stores(url: str, storage_options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The stores of a service: name, model, tokens, hooks with their layers. One that cannot be opened is left out."""
    link = Link(parse_address(url).location, Credentials.of(storage_options or {}))
    return link.ask("list", patience_s=_FIRST_CONTACT_S)["stores"]


def open_objects(
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Objects:
    """The objects of a store behind a service."""
    return _objects(*connect(url, storage_options), cache_dir, cache_bytes)


def _objects(
    link: Link, store: str, cache_dir: str | os.PathLike[str] | None, cache_bytes: int | None
) -> Objects:
    objects = ServedObjects(link, store)
    if cache_dir is None:
        return objects
    digest = hashlib.sha256(objects.url.encode() + b"\n" + objects.read("zarr.json")).hexdigest()
    cache = ChunkCache(Path(cache_dir), CACHE_BYTES if cache_bytes is None else cache_bytes)
    return CachedObjects(objects, cache, digest)


def open_catalog(url: str, storage_options: Mapping[str, Any] | None = None) -> Catalog:
    """A store behind a service, without what reading rows takes."""
    return Catalog(open_objects(url, storage_options))


def open_remote(
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Store:
    """Open a store behind a service.

    Args:
        url: grpc://HOST:PORT/NAME, or grpc+tls:// for TLS; without a name, the only store there is.
        storage_options: `token`; `ca`, `cert`, `key` (PEM, bytes or files); `server_name`.
        cache_dir: a local folder where chunks read one by one are kept.
        cache_bytes: the most that folder may hold.

    Raises:
        RefusedError: the service does not let this client in. UnreachableError: nobody answers there.
        NotFoundError: there is no such store; lists those there are.
    """
    link, name = connect(url, storage_options)
    return Store.of(_objects(link, name, cache_dir, cache_bytes), _connector(link, name))


def _connector(link: Link, name: str) -> Connect:
    def make(captures: list[CaptureCatalog], selection: Selection, delivery: Delivery) -> ServedWindows:
        return ServedWindows(link, name, captures, selection, delivery)

    return make
