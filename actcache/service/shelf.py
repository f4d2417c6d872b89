"""The stores that a service shows: one, or those in a folder. Nothing outside of it has a name."""

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from actcache.errors import NotFoundError, UsageError
from actcache.reader.provenance import Provenance
from actcache.store.live import LocalLive
from actcache.store.objects import LocalObjects, Objects, open_objects
from actcache.store.open import Catalog

_DEEPEST = 4
_PART = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.+=@ -]*")


class Served(NamedTuple):
    """A store that is open. Its url is its name: messages to clients hold no path of this machine."""

    name: str
    objects: Objects
    catalog: Catalog
    provenance: Provenance


def check_key(key: str) -> str:
    """A relative path without ways out of it; UsageError otherwise."""
    parts = key.split("/") if key else []
    if len(key) > 4096 or not all(_PART.fullmatch(part) and part.strip(".") for part in parts):
        raise UsageError(f"{key[:200]!r} is not the name of anything here")
    return key


class Shelf:
    """Stores under `location`: a store itself (a folder or a URL), or a folder with stores in it."""

    def __init__(self, location: str) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[object, Served]] = {}
        self._remote: Served | None = None
        self.root: Path | None = None
        if "://" in location and not location.startswith("file://"):
            objects = open_objects(location)
            name = location.rstrip("/").rpartition("/")[2]
            self._remote = _served(name, objects)
            return
        self.root = Path(location.removeprefix("file://"))
        if not self.root.is_dir():
            raise NotFoundError(f"nothing to serve at {self.root}: there is no such folder")
        self._is_store = (self.root / "zarr.json").exists()
        if self._is_store:
            self.open(next(self.names()))
        elif not any(True for _name in self.names()):
            raise NotFoundError(
                f"nothing to serve: there is no store in {self.root} (no folder with a zarr.json)"
            )

    def names(self) -> Iterator[str]:
        """The stores there are now."""
        if self._remote is not None:
            yield self._remote.name
        elif self._is_store:
            assert self.root is not None
            yield self.root.resolve().name
        else:
            assert self.root is not None
            yield from _stores_in(self.root, "", _DEEPEST)

    def open(self, name: str) -> Served:
        """A store by its name; NotFoundError where there is none. One that was replaced on disk is opened anew."""
        if self._remote is not None:
            if name != self._remote.name:
                raise _no_store(name)
            return self._remote
        root = self._folder(name)
        identity = _identity(root / "zarr.json"), _identity(root / "acts")  # another store; a capture more
        if identity[0] is None:
            raise _no_store(name)
        with self._lock:
            known = self._open.get(name)
            if known is None or known[0] != identity:
                objects = LocalObjects(root)
                objects.url = name
                self._open[name] = known = (identity, _served(name, objects))
            return known[1]

    def _folder(self, name: str) -> Path:
        assert self.root is not None
        if not name:
            raise _no_store(name)
        check_key(name)
        if self._is_store:
            if name != self.root.resolve().name:
                raise _no_store(name)
            return self.root
        folder = self.root / name
        if not folder.resolve().is_relative_to(self.root.resolve()):  # a link that leads out
            raise _no_store(name)
        return folder

    def object_key(self, served: Served, key: str) -> str:
        """A key that is inside its store; UsageError where it leads out of it."""
        check_key(key)
        if isinstance(served.objects, LocalObjects):
            root = served.objects.root.resolve()
            if not (root / key).resolve().is_relative_to(root):
                raise UsageError(f"{key[:200]!r} is not the name of anything here")
        return key

    def live(self, served: Served) -> LocalLive:
        """Where consumers' states are written; UsageError where they cannot be."""
        if not isinstance(served.objects, LocalObjects):
            raise UsageError(
                f"{served.name} is served from object storage: consumers cannot be registered with it"
            )
        return LocalLive(served.objects.root)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _served(name: str, objects: Objects) -> Served:
    catalog = Catalog(objects)
    return Served(name, objects, catalog, Provenance(catalog))


def _no_store(name: str) -> NotFoundError:
    return NotFoundError(f"there is no store {name[:200]!r} here; listing the service names those there are")


def _stores_in(folder: Path, prefix: str, deepest: int) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (PermissionError, FileNotFoundError):
        return
    for entry in entries:
        if (
            entry.name.startswith(".")
            or ".planning-" in entry.name
            or not entry.is_dir(follow_symlinks=False)
        ):
            continue
        if (Path(entry.path) / "zarr.json").exists():
            yield f"{prefix}{entry.name}"
        elif deepest > 1:
            yield from _stores_in(Path(entry.path), f"{prefix}{entry.name}/", deepest - 1)
