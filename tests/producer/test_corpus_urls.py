"""Corpora at URLs: any file system of fsspec, the hub's among them, and one that fails."""

import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from actcache.errors import CorpusError, NotFoundError, UnreachableError, UsageError
from actcache.producer.corpus import Fields, files, open_corpus, open_source
from tests.producer.test_corpus import TEXTS, as_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture
def memory(monkeypatch):
    """An empty memory:// file system; puts objects, and forgets them."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    fs = fsspec.filesystem("memory")

    def put(path, data):
        fs.pipe_file(f"/{path}", data)

    return put


def parquet_bytes(texts):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def filled(memory):
    memory("bucket/text/b.jsonl", as_jsonl(TEXTS))
    memory("bucket/text/a.jsonl.gz", gzip.compress(as_jsonl(["gz"])))
    memory("bucket/text/deep/c.jsonl.zst", zstandard.compress(as_jsonl(["zst"])))
    memory("bucket/text/deep/d.parquet", parquet_bytes(TEXTS))
    memory("bucket/text/deep/e.txt", b"plain")
    memory("bucket/text/README.md", b"no document")
    memory("bucket/ids/x.bin", np.arange(6, dtype=np.uint16).tobytes())


ALL = ["gz", *TEXTS, "zst", *TEXTS, "plain"]


@pytest.mark.parametrize("url", ["memory://bucket/text", "memory://bucket/text/", "memory://bucket/text/**"])
def test_a_folder_or_glob_of_every_format(filled, url):
    source = open_source(url)
    assert list(source.documents()) == ALL
    assert list(source.documents()) == ALL
    assert [file.name for file in source.files] == [
        "a.jsonl.gz",
        "b.jsonl",
        "deep/c.jsonl.zst",
        "deep/d.parquet",
        "deep/e.txt",
    ]
    assert source.files[4].n_bytes == 5
    assert source.ignored == ("README.md",)


def test_one_file_a_pattern_and_ids(filled):
    source = open_source("memory://bucket/text/b.jsonl")
    assert (source.name, [file.name for file in source.files]) == ("b.jsonl", ["b.jsonl"])
    assert list(source.documents()) == TEXTS
    assert list(open_source("memory://bucket/text/deep/*.parquet").documents()) == TEXTS
    ids = open_source("memory://bucket/ids", Fields(document_tokens=3)).documents()
    assert [d.tolist() for d in ids] == [[0, 1, 2], [3, 4, 5]]
    corpus = open_corpus(["memory://bucket/text/b.jsonl:0.75", "memory://bucket/text/deep/*.parquet:0.25"])
    assert corpus.weights == (0.75, 0.25)


def test_small_requests_give_the_same(filled, monkeypatch):
    monkeypatch.setattr(files, "READ_BYTES", 7)
    assert list(open_source("memory://bucket/text").documents()) == ALL


def test_nothing_there(filled):
    with pytest.raises(NotFoundError, match=r"corpus memory://bucket/nowhere: nothing is there"):
        open_source("memory://bucket/nowhere")
    with pytest.raises(CorpusError, match="no file ends in"):
        open_source("memory://bucket/text/*.pdf")


def test_a_url_that_nothing_here_reads():
    with pytest.raises(UsageError, match=r"corpus nose://x: .*nose.*Install what reads such URLs"):
        open_source("nose://x")


def test_a_password_is_not_shown(filled):
    assert files._shown("ftp://me:secret@host/x") == "ftp://host/x"
    assert files._shown("s3://bucket/x") == "s3://bucket/x"


class Shaky:
    """Fails a number of times at each call of a method, then works."""

    def __init__(self, n_failures, error):
        self.n_failures, self.error, self.n_calls = n_failures, error, 0

    def __call__(self, whole):
        def call(*args, **kwargs):
            self.n_calls += 1
            if self.n_calls <= self.n_failures:
                raise self.error
            return whole(*args, **kwargs)

        return call


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(files, "_FIRST_PAUSE_S", 0.0)


@pytest.mark.parametrize("method", ["find", "cat_file"])
@pytest.mark.parametrize("error", [OSError("reset"), RuntimeError("of its own kind"), TimeoutError()])
def test_failures_are_asked_again_a_few_times_then_named(filled, quick, monkeypatch, method, error):
    whole = getattr(MemoryFileSystem, method)
    shaky = Shaky(3, error)
    monkeypatch.setattr(MemoryFileSystem, method, shaky(whole))
    assert list(open_source("memory://bucket/text").documents()) == ALL
    monkeypatch.setattr(MemoryFileSystem, method, Shaky(4, error)(whole))
    with pytest.raises(UnreachableError, match=rf"asked 4 times, and failed with {type(error).__name__}"):
        list(open_source("memory://bucket/text").documents())


def test_what_asking_again_does_not_help_is_not_asked_again(filled, quick, monkeypatch):
    whole = MemoryFileSystem.cat_file
    for error, expected, message in (
        (FileNotFoundError("gone"), NotFoundError, "not there"),
        (PermissionError("no"), UnreachableError, "access is refused.*Check credentials"),
    ):
        shaky = Shaky(1, error)
        monkeypatch.setattr(MemoryFileSystem, "cat_file", shaky(whole))
        with pytest.raises(expected, match=message):
            list(open_source("memory://bucket/text").documents())
        assert shaky.n_calls == 1


def test_a_short_answer_is_never_taken_for_the_end(filled, quick, monkeypatch):
    whole = MemoryFileSystem.cat_file
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **k: whole(self, path, **k)[:-1])
    with pytest.raises(UnreachableError, match=r"bytes came where \d+ were asked for"):
        list(open_source("memory://bucket/text/b.jsonl").documents())


def test_a_server_that_does_not_say_how_long_a_file_is(filled, monkeypatch):
    whole = MemoryFileSystem.info

    def info(self, path, **kwargs):
        return whole(self, path, **kwargs) | {"size": None}

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    with pytest.raises(UsageError, match=r"does not say how long b\.jsonl is"):
        open_source("memory://bucket/text/b.jsonl")


# The hub.


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its own file system asks for: one data set in one revision."""

    files: ClassVar[dict[str, bytes]] = {}
    commit = "0123456789abcdef0123456789abcdef01234567"
    requests: ClassVar[list[str]] = []

    def log_message(self, *_args):
        pass

    def _send(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "X-Repo-Commit": self.commit,
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status=200):
        self._send(json.dumps(value).encode(), status, **{"Content-Type": "application/json"})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        type(self).requests.append(path)
        head = "/api/datasets/org/name"
        if path.startswith(f"{head}/tree/"):
            folder = "/".join(path.removeprefix(f"{head}/tree/").split("/")[1:])
            self._json(self._tree(folder, recursive="true" in str(query.get("recursive", "")).lower()))
        elif path.startswith(head):
            self._json({"id": "org/name", "sha": self.commit, "siblings": []})
        elif path.startswith("/datasets/org/name/resolve/"):
            name = "/".join(path.removeprefix("/datasets/org/name/resolve/").split("/")[1:])
            data, asked = self.files[name], self.headers.get("range")
            if asked is None:
                return self._send(data)
            start, end = (int(x) for x in asked.removeprefix("bytes=").split("-"))
            part = data[start : end + 1]
            self._send(part, 206, **{"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"})
        else:
            self._json({"error": "not found"}, 404)
        return None

    def _tree(self, folder, *, recursive):
        found, seen = [], set()
        for name, data in sorted(self.files.items()):
            if folder and not name.startswith(f"{folder}/"):
                continue
            rest = name.removeprefix(f"{folder}/" if folder else "")
            if "/" in rest:
                inner = f"{folder}/{rest.partition('/')[0]}".lstrip("/")
                if inner not in seen:
                    seen.add(inner)
                    found.append({"type": "directory", "path": inner, "oid": "0" * 40, "size": 0})
                if not recursive:
                    continue
            found.append({"type": "file", "path": name, "oid": "1" * 40, "size": len(data)})
        return found


READ_THE_HUB = """
import json, logging
from actcache.producer.corpus import open_source

logging.disable()
found = {}
for revision in ("", "@v1"):
    url = f"hf://datasets/org/name{revision}"
    source = open_source(url)
    found[revision] = {
        "files": [file.name for file in source.files],
        "ignored": source.ignored,
        "all": list(source.documents()),
        "parquet": list(open_source(f"{url}/data/*.parquet").documents()),
        "one": list(open_source(f"{url}/extra/x.jsonl").documents()),
    }
print(json.dumps(found))
"""

READ_ONE = """
from actcache.producer.corpus import open_source

print(next(open_source("hf://datasets/org/name/data").documents()))
"""


@pytest.fixture
def hub(monkeypatch):
    """A function that runs a program, in a process of its own, for which a server here is the hub."""
    monkeypatch.setattr(Hub, "requests", [])
    monkeypatch.setattr(
        Hub,
        "files",
        {
            "README.md": b"a card",
            "data/train-00000.parquet": parquet_bytes(TEXTS),
            "data/train-00001.parquet": parquet_bytes(["more"]),
            "extra/x.jsonl": as_jsonl(["lines"]),
        },
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "PYTHONWARNINGS": "ignore",
    }

    def run(program):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    server.shutdown()
    server.server_close()
    thread.join()


def test_data_sets_of_the_hub(hub):
    """Through huggingface_hub itself."""
    for revision, found in json.loads(hub(READ_THE_HUB)).items():
        assert found == {
            "files": ["data/train-00000.parquet", "data/train-00001.parquet", "extra/x.jsonl"],
            "ignored": ["README.md"],
            "all": [*TEXTS, "more", "lines"],
            "parquet": [*TEXTS, "more"],
            "one": ["lines"],
        }, revision


def test_reading_of_a_data_set_stops_when_enough_was_seen(hub):
    assert hub(READ_ONE).strip() == TEXTS[0].strip()
    fetched = [path for path in Hub.requests if "/resolve/" in path]
    assert any(path.endswith("train-00000.parquet") for path in fetched)
    assert not any(path.endswith("train-00001.parquet") for path in fetched)
