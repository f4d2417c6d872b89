"""Where the files of a corpus are: a folder of this machine, or any URL that fsspec knows (hf://, s3://, gs://, https://)."""

import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from actcache.errors import NotFoundError, UnreachableError, UsageError

READ_BYTES = 4 << 20
"""What one request to a URL asks for."""

_MAGIC = frozenset("*?[")
_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file: its name relative to the corpus (POSIX, no absolute path) and its size."""

    name: str
    n_bytes: int


class Files(Protocol):
    """The files of a corpus. `root` is for messages; nothing is open between calls."""

    root: str

    def list_files(self) -> list[CorpusFile]:
        """All files, sorted by name."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; NotFoundError where it has gone."""
        ...


def find_files(location: str | Path) -> Files:
    """The files of a corpus.

    Args:
        location: a file, a folder (searched recursively) or a glob such as `texts/**/*.jsonl.zst`, here or at a URL.

    Raises:
        NotFoundError: no such file or folder. UsageError: a URL nobody here can read. UnreachableError: no answer.
    """
    text = str(location)
    if "://" in text and not text.startswith("file://"):
        return RemoteFiles(text)
    return LocalFiles(Path(text.removeprefix("file://")).expanduser())


class LocalFiles:
    """Files of this machine."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            self._root, found = path, path.rglob("*")
        elif path.exists():
            self._root, found = path.parent, iter([path])
        elif _MAGIC & set(str(path)):
            parts = path.parts
            n_fixed = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
            self._root = Path(*parts[:n_fixed])
            found = self._root.glob(str(Path(*parts[n_fixed:])))
        else:
            raise NotFoundError(f"corpus {path}: no such file or folder; expected a file, a folder or a glob")
        self.root = str(self._root)
        names = {file.relative_to(self._root).as_posix(): file for file in found if file.is_file()}
        self._files = [CorpusFile(name, names[name].stat().st_size) for name in sorted(names)]

    def list_files(self) -> list[CorpusFile]:
        """All files, sorted by name."""
        return self._files

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        try:
            return (self._root / name).open("rb")
        except FileNotFoundError as error:
            raise NotFoundError(f"{name}: gone from {self.root} since the corpus was opened") from error


class RemoteFiles:
    """Files at a URL, read a few MiB at a time. A request that fails is made again, a few times."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.root = _shown(url)
        try:
            fs, path = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"corpus {self.root}: {str(error) or type(error).__name__}. Install what reads such URLs (s3fs for s3://, "
                f"gcsfs for gs://, huggingface_hub for hf://), or copy the files here"
            ) from error
        self._fs: Any = fs
        self._root, found = _persist(lambda: self._find(path.rstrip("/")), self.root)
        sizes = {_relative(name, self._root): info.get("size") for name, info in found.items()}
        unknown = [name for name, size in sizes.items() if size is None]
        if unknown:
            raise UsageError(
                f"corpus {self.root}: the server does not say how long {unknown[0]} is, so it cannot be read in parts; "
                f"copy it here"
            )
        self._files = [CorpusFile(name, int(sizes[name])) for name in sorted(sizes)]

    def _find(self, path: str) -> tuple[str, dict[str, Any]]:
        if _MAGIC & set(path):
            found = {
                name: info
                for name, info in self._fs.glob(path, detail=True).items()
                if info["type"] == "file"
            }
            return _folder_before_magic(path), found
        if self._fs.isfile(path):
            return path.rpartition("/")[0], {path: self._fs.info(path)}
        found = self._fs.find(path, detail=True)
        if not found:
            raise NotFoundError(f"corpus {self.root}: nothing is there; expected a file, a folder or a glob")
        return path, found

    def list_files(self) -> list[CorpusFile]:
        """All files, sorted by name."""
        return self._files

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        size = next(file.n_bytes for file in self._files if file.name == name)
        path = f"{self._root}/{name}" if self._root else name
        return io.BufferedReader(_Ranges(self._fs, path, size, f"{name} of {self.root}"), READ_BYTES)


class _Ranges(io.RawIOBase):
    """A remote file as a stream: every read is one request."""

    def __init__(self, fs: Any, path: str, size: int, shown: str) -> None:
        super().__init__()
        self._fs, self._path, self._size, self._shown, self._at = fs, path, size, shown, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        n = min(len(buffer), self._size - self._at)
        if n <= 0:
            return 0
        start = self._at
        data = _persist(lambda: self._read(start, n), self._shown)
        buffer[:n] = data
        self._at += n
        return n

    def _read(self, start: int, n: int) -> bytes:
        data = self._fs.cat_file(self._path, start=start, end=start + n)
        if len(data) != n:
            raise OSError(f"{len(data)} bytes came where {n} were asked for, from byte {start}")
        return data


def _persist(call: Callable[[], T], shown: str) -> T:
    """Make a request until it succeeds, a few times; what is not there or not allowed is not asked for again."""
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except NotFoundError:
            raise
        except FileNotFoundError as error:
            raise NotFoundError(f"{shown}: not there ({_one_line(error)})") from error
        except PermissionError as error:
            raise UnreachableError(
                f"{shown}: access is refused ({_one_line(error)}). Check credentials"
            ) from error
        except Exception as error:  # every file system has exceptions of its own
            if attempt == _ATTEMPTS - 1:
                raise UnreachableError(
                    f"{shown}: asked {_ATTEMPTS} times, and failed with {type(error).__name__}: {_one_line(error)}. "
                    f"Nothing is lost: run the same command again"
                ) from error
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
    raise AssertionError


def _folder_before_magic(path: str) -> str:
    parts = path.split("/")
    n_fixed = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
    return "/".join(parts[:n_fixed])


def _relative(name: str, root: str) -> str:
    return name.lstrip("/").removeprefix(root.lstrip("/")).lstrip("/")


def _shown(url: str) -> str:
    """The URL without a password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.password else url


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def names_with(files: Iterable[CorpusFile], suffixes: tuple[str, ...]) -> list[CorpusFile]:
    """Those whose names end so, in any case."""
    return [file for file in files if file.name.lower().endswith(suffixes)]
