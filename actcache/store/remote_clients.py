"""Clients of object storage: obstore for s3://, gs:// and az:// where it is installed, fsspec for everything else.

Neither is imported before a URL needs it. Both are told to make one attempt only: retries are RemoteObjects' business.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from actcache.errors import UsageError
from actcache.store.remote import Client, RefusedError

CLIENTS = ("obstore", "fsspec")
_OBSTORE_SCHEMES = ("s3", "s3a", "gs", "az")
_CONNECT_S = 5.0
_CONNECTIONS = 64
_OPTION_OF_OBSTORE = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "endpoint_url": "endpoint",
    "region": "region",
    "anon": "skip_signature",
}
_OPTION_OF_CLIENT_KWARGS = {"region_name": "region", "endpoint_url": "endpoint_url"}
_OWN_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN")
_CONTAINER_CREDENTIALS = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
_STATUS = re.compile(r"status code: (\d{3})")
_WORTH_RETRYING = (408, 425, 429)
_NO_SUCH_RANGE = 416

T = TypeVar("T")


def make_client(url: str, options: Mapping[str, Any], attempt_s: float, chosen: str | None = None) -> Client:
    """The client for a URL with a scheme.

    Args:
        url: for instance s3://bucket/prefix.
        options: `key`, `secret`, `token`, `anon`, `endpoint_url`, `region` for s3; any others are fsspec's own.
        attempt_s: deadline of one attempt.
        chosen: "obstore" or "fsspec"; None takes obstore where it is installed and understands the options.
    """
    scheme = url.partition("://")[0]
    if chosen not in (None, *CLIENTS):
        raise UsageError(f"client {chosen!r}: expected one of {list(CLIENTS)}")
    if chosen == "obstore" and scheme not in _OBSTORE_SCHEMES:
        raise UsageError(f"obstore does not read {scheme}:// here; leave the choice of the client out")
    if chosen == "obstore" or (
        chosen is None and scheme in _OBSTORE_SCHEMES and _suits_obstore(scheme, options)
    ):
        return ObstoreClient(url, options, attempt_s)
    return FsspecClient(url, options, attempt_s)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _suits_obstore(scheme: str, options: Mapping[str, Any]) -> bool:
    """Whether obstore is installed and would find what it needs: it reads no credentials from ~/.aws."""
    if not _is_installed("obstore"):
        return False
    if not scheme.startswith("s3"):
        return not options
    if _untranslatable(options):
        return False
    has_own = options.get("key") or options.get("anon") or any(os.environ.get(n) for n in _OWN_CREDENTIALS)
    return bool(has_own) or not _has_profile() or not _is_installed("s3fs")


def _has_profile() -> bool:
    folder = Path("~/.aws").expanduser()
    files = [
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", folder / "credentials"),
        os.environ.get("AWS_CONFIG_FILE", folder / "config"),
    ]
    in_container = any(os.environ.get(name) for name in _CONTAINER_CREDENTIALS)
    return bool(os.environ.get("AWS_PROFILE")) or (not in_container and any(Path(f).is_file() for f in files))


def _untranslatable(options: Mapping[str, Any]) -> list[str]:
    nested = set(options.get("client_kwargs", {})) - set(_OPTION_OF_CLIENT_KWARGS)
    return sorted((set(options) - set(_OPTION_OF_OBSTORE) - {"client_kwargs"}) | nested)


def _s3_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their short names, the endpoint also from the environment."""
    flat = {_OPTION_OF_CLIENT_KWARGS[k]: v for k, v in options.get("client_kwargs", {}).items()}
    flat |= {name: value for name, value in options.items() if name != "client_kwargs" and value is not None}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return ({"endpoint_url": endpoint} if endpoint else {}) | flat


class ObstoreClient:
    """obstore: object_store, in Rust. Its calls let other Python threads run."""

    name: ClassVar[str] = "obstore"

    def __init__(self, url: str, options: Mapping[str, Any], attempt_s: float) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError as error:
            raise UsageError(f"reading {url} this way needs obstore: pip install 'actcache[s3]'") from error
        self._obstore: Any = obstore
        config: dict[str, Any] = {}
        http: dict[str, Any] = {
            "timeout": timedelta(seconds=attempt_s),
            "connect_timeout": timedelta(seconds=min(_CONNECT_S, attempt_s)),
        }
        if url.startswith("s3"):
            unknown = _untranslatable(options)
            if unknown:
                raise UsageError(
                    f"storage_options {unknown} are s3fs's own: use fsspec+{url}, or leave them out"
                )
            given = _s3_options(options)
            http["allow_http"] = str(given.get("endpoint_url", "")).startswith("http://")
            config = {_OPTION_OF_OBSTORE[name]: value for name, value in given.items()}
        elif options:
            raise UsageError(f"storage_options {sorted(options)} are fsspec's own: use fsspec+{url}")
        make: Any = from_url  # annotated per kind of store
        try:
            self._store = make(
                url, config=config or None, client_options=http, retry_config={"max_retries": 0}
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise UsageError(f"{url} cannot be opened: {' '.join(str(error).split())[:300]}") from error

    def get_whole(self, key: str, most: int) -> bytes | int:
        """All bytes of an object, or its length where that is more than `most`: one request."""

        def get() -> bytes | int:
            answer = self._obstore.get(self._store, key)
            size = int(answer.meta["size"])
            return size if size > most else bytes(answer.bytes())

        return self._ask(get)

    def get(self, key: str, start: int, n_bytes: int) -> bytes | memoryview:
        """Bytes [start, start + n_bytes); fewer where the object ends before."""
        return self._ask(
            lambda: memoryview(self._obstore.get_range(self._store, key, start=start, length=n_bytes)),
            past_end=b"",
        )

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        return self._ask(lambda: int(self._obstore.head(self._store, key)["size"]))

    def names(self, key: str) -> list[str]:
        """Names directly inside a folder."""
        found = self._ask(lambda: self._obstore.list_with_delimiter(self._store, key or None))
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return _names_in(paths, key)

    def _ask(self, call: Callable[[], T], past_end: T | None = None) -> T:
        try:
            return call()
        except (
            self._obstore.exceptions.PermissionDeniedError,
            self._obstore.exceptions.UnauthenticatedError,
        ) as error:
            raise RefusedError(_one_line(error)) from error
        except self._obstore.exceptions.BaseError as error:
            text = str(error)
            found = _STATUS.search(text)
            status = int(found[1]) if found else 0
            if status == _NO_SUCH_RANGE and past_end is not None:
                return past_end
            if status == 404:
                raise FileNotFoundError(_one_line(error)) from error
            if (400 <= status < 500 and status not in _WORTH_RETRYING) or "redirect" in text:
                raise RefusedError(_one_line(error)) from error
            raise


class FsspecClient:
    """Any filesystem of fsspec. One whose calls are not asynchronous keeps the deadlines it has of its own."""

    name: ClassVar[str] = "fsspec"

    def __init__(self, url: str, options: Mapping[str, Any], attempt_s: float) -> None:
        from fsspec.core import url_to_fs

        self._attempt_s = attempt_s
        chosen = dict(options)
        if url.startswith("s3"):
            chosen = _options_of_s3fs(options, attempt_s)
        try:
            fs, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **chosen)
        except ImportError as error:
            raise UsageError(
                f"{url} cannot be opened: {error}. For s3://, pip install 'actcache[s3]' is enough."
            ) from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"{url} cannot be opened: {error}") from error
        self._fs: Any = fs
        self._root = root.rstrip("/")
        if hasattr(fs, "retries"):
            self._fs.retries = 1

    def get_whole(self, key: str, most: int) -> bytes | int:
        """All bytes of an object, or its length where that is more than `most`: two requests."""
        path = self._path(key)
        size = self._ask(lambda: self._call("info", path)).get("size")
        if size is None:  # some HTTP servers do not say
            return bytes(self._ask(lambda: self._call("cat_file", path)))
        if size == 0 or size > most:
            return int(size) if size else b""
        body = bytes(self._ask(lambda: self._call("cat_file", path, start=0, end=size)))
        if len(body) != size:
            raise OSError(f"the body ends after {len(body)} of {size} bytes")
        return body

    def get(self, key: str, start: int, n_bytes: int) -> bytes | memoryview:
        """Bytes [start, start + n_bytes); fewer where the object ends before."""
        body = self._ask(
            lambda: self._call("cat_file", self._path(key), start=start, end=start + n_bytes), past_end=b""
        )
        if len(body) > n_bytes:  # a server that does not know ranges sends everything
            return memoryview(body)[start : start + n_bytes]
        return bytes(body)

    def size(self, key: str) -> int:
        """Length of an object in bytes."""
        return int(self._ask(lambda: self._call("info", self._path(key)))["size"])

    def names(self, key: str) -> list[str]:
        """Names directly inside a folder."""
        self._fs.invalidate_cache()
        path = self._path(key)
        return _names_in(self._ask(lambda: self._call("ls", path, detail=False)), path)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        if self._fs.async_impl:
            from fsspec.asyn import sync

            return sync(
                self._fs.loop, getattr(self._fs, f"_{method}"), path, timeout=self._attempt_s, **arguments
            )
        return getattr(self._fs, method)(path, **arguments)

    def _ask(self, call: Callable[[], T], past_end: T | None = None) -> T:
        try:
            return call()
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise RefusedError(_one_line(error)) from error
        except Exception as error:
            status = _status_of(error)
            if status == _NO_SUCH_RANGE and past_end is not None:
                return past_end
            if status == 404:
                raise FileNotFoundError(_one_line(error)) from error
            if 400 <= status < 500 and status not in _WORTH_RETRYING:
                raise RefusedError(_one_line(error)) from error
            if type(error).__name__ in (
                "NoCredentialsError",
                "PartialCredentialsError",
                "ParamValidationError",
            ):
                raise RefusedError(_one_line(error)) from error
            raise


def _options_of_s3fs(options: Mapping[str, Any], attempt_s: float) -> dict[str, Any]:
    """One attempt with our deadline, enough connections, and the short names of options that s3fs calls otherwise."""
    chosen = dict(options)
    config = {
        "connect_timeout": min(_CONNECT_S, attempt_s),
        "read_timeout": attempt_s,
        "max_pool_connections": _CONNECTIONS,
        "retries": {"total_max_attempts": 1},
    }
    chosen["config_kwargs"] = config | dict(chosen.get("config_kwargs", {}))
    region = chosen.pop("region", None)
    if region:
        chosen["client_kwargs"] = {"region_name": region} | dict(chosen.get("client_kwargs", {}))
    return chosen


def _status_of(error: BaseException) -> int:
    """The HTTP status behind an exception of aiohttp or botocore, or of one made from it; 0 where there is none."""
    for found in (error, error.__cause__):
        status = getattr(found, "status", None)
        if isinstance(status, int):
            return status
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def _names_in(paths: list[str], folder: str) -> list[str]:
    """The last part of each path, without the folder's own marker."""
    own = folder.strip("/")
    return [path.strip("/").rpartition("/")[2] for path in paths if path.strip("/") != own]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("Debug source")[0].split())[:300]
