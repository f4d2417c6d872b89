"""Reading objects: a local folder directly, any other URL through fsspec."""

import os
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.core import url_to_fs

from actcache.errors import NotFoundError


class Objects(Protocol):
    """A read-only tree of named byte strings. A missing one is FileNotFoundError."""

    url: str

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        ...

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes:
        """Bytes [start, start + n_bytes); fewer where the object ends before."""
        ...

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        ...

    def names(self, key: str) -> list[str]:
        """Names directly inside the folder `key`, sorted; empty when there is no such folder."""
        ...


class LocalObjects:
    """Objects in a folder of this machine."""

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

    def will_need(self, key: str, start: int, n_bytes: int) -> None:
        """Start reading a range into the page cache, without waiting. A missing object is left to `read_range`."""
        try:
            fd = os.open(self.root / key, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            os.posix_fadvise(fd, start, n_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        return (self.root / key).stat().st_size

    def names(self, key: str) -> list[str]:
        """Names directly inside the folder `key`, sorted."""
        try:
            return sorted(entry.name for entry in (self.root / key).iterdir())
        except FileNotFoundError:
            return []


class RemoteObjects:
    """Objects behind an fsspec URL: s3://, gs://, https://, memory:// and the like."""

    def __init__(self, url: str, fs: fsspec.AbstractFileSystem, root: str) -> None:
        self.url, self._root = url, root.rstrip("/")
        self._fs: Any = fs  # fsspec's own annotations are looser than what it returns

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        return bytes(self._fs.cat_file(self._path(key)))

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes:
        """Bytes [start, start + n_bytes); fewer where the object ends before."""
        return bytes(self._fs.cat_file(self._path(key), start=start, end=start + n_bytes))

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        return int(self._fs.size(self._path(key)))

    def names(self, key: str) -> list[str]:
        """Names directly inside the folder `key`, sorted."""
        try:
            found = self._fs.ls(self._path(key), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)


def open_objects(location: str | os.PathLike[str]) -> Objects:
    """The objects of a local folder or of any fsspec URL; NotFoundError for a local folder that is not there."""
    text = os.fspath(location)
    if "://" not in text or text.startswith("file://"):
        root = Path(text.removeprefix("file://"))
        if not root.is_dir():
            raise NotFoundError(
                f"no store at {root}: there is no such folder. 'actcache build --out {root}' makes one."
            )
        return LocalObjects(root)
    fs, root = url_to_fs(text)
    return RemoteObjects(text, fs, root)
