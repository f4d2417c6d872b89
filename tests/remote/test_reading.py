"""A store in object storage is the store it was copied from: same metadata, rows, batches, cursors and verdicts."""

import functools
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import torch

from actcache.errors import DamageError, NotFoundError, UsageError
from actcache.reader.access import Store
from actcache.store.objects import LocalObjects, open_objects
from actcache.store.open import Catalog
from actcache.store.remote import merge_ranges
from actcache.store.verify import find_problems
from tests.conftest import as_bits, write_store

CHOSEN = {"batch_size": 16, "window_rows": 48, "seed": 3}


def all_batches(store, **changes):
    found = []
    with store.stream(**CHOSEN | changes) as stream:
        for batch in stream:
            numbers = tuple(
                getattr(batch, name).numpy().copy() for name in ("layer", "sequence", "position", "token")
            )
            found.append((as_bits(batch.rows.clone()), *numbers, stream.state_dict()))
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one[:-1], other[:-1], strict=True))
        assert one[-1] == other[-1]


@pytest.fixture
def truth(tmp_path):
    return write_store(tmp_path / "local", n_sequences=16, hooks=("resid_post", "mlp_out"))


@pytest.mark.parametrize(("client", "threads"), [("obstore", 1), ("obstore", 3), ("fsspec", 3)])
def test_streams_are_those_of_the_local_copy(truth, upload, client, threads):
    local, remote = Store(truth.root), Store(f"{client}+{upload(truth.root)}")
    assert remote.plan == local.plan
    assert remote.hooks == local.hooks
    assert remote.is_complete
    assert remote.url.startswith("s3://")
    assert np.array_equal(remote.tokens, local.tokens)
    chosen = {"threads": threads, "epochs": 2}
    assert_same(all_batches(remote, **chosen), all_batches(local, **chosen))
    assert torch.equal(
        remote.read(layer=3, sequences=[1, 9]).view(torch.int16),
        local.read(layer=3, sequences=[1, 9]).view(torch.int16),
    )
    assert remote.stats()[3].n_rows == local.stats()[3].n_rows


def test_a_cursor_of_the_local_copy_goes_on_remotely(truth, upload):
    with Store(truth.root).stream(**CHOSEN) as stream:
        batches = iter(stream)
        next(batches)
        state = stream.state_dict()
        expected = [as_bits(batch.rows.clone()) for batch in batches]
    with Store(upload(truth.root)).stream(**CHOSEN) as stream:
        stream.load_state_dict(state)
        found = [as_bits(batch.rows.clone()) for batch in stream]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_obstore_reads_s3_unless_its_options_are_those_of_s3fs(truth, upload):
    url = upload(truth.root)
    assert open_objects(url).client.name == "obstore"
    assert open_objects(url, {"use_ssl": False}).client.name == "fsspec"
    assert open_objects(url, {"client": "fsspec"}).client.name == "fsspec"
    assert open_objects(f"fsspec+{url}").client.name == "fsspec"
    for bad in (
        {"client": "curl"},
        {"client": "obstore", "use_ssl": False},
        {"client": "obstore", "client_kwargs": {"x": 1}},
    ):
        with pytest.raises(UsageError):
            open_objects(url, bad)
    with pytest.raises(UsageError, match="obstore"):
        open_objects("obstore+memory://x")


def test_a_profile_is_left_to_s3fs(truth, upload, monkeypatch, tmp_path):
    url = upload(truth.root)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = testing\naws_secret_access_key = testing\n", encoding="utf-8"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert open_objects(url).client.name == "fsspec"
    assert open_objects(url, {"key": "a", "secret": "b"}).client.name == "obstore"


def test_storage_options_instead_of_the_environment(truth, upload, client, monkeypatch, proxy, s3, bucket):
    url = upload(truth.root)
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    ):
        monkeypatch.delenv(name)
    options = {"key": "a", "secret": "b", "endpoint_url": proxy.url, "region": "us-east-1", "client": client}
    assert Catalog(open_objects(url, options)).plan == Catalog(LocalObjects(truth.root)).plan
    s3.put_object_acl(Bucket=bucket, Key="some/store.zarr/zarr.json", ACL="public-read")
    options = {
        "anon": True,
        "client_kwargs": {"endpoint_url": proxy.url, "region_name": "us-east-1"},
        "client": client,
    }
    assert open_objects(url, options).size("zarr.json") == (truth.root / "zarr.json").stat().st_size


def test_memory(truth):
    fs = fsspec.filesystem("memory")
    fs.put(str(truth.root), "/actcache-store", recursive=True)
    assert_same(all_batches(Store("memory://actcache-store")), all_batches(Store(truth.root)))
    with pytest.raises(NotFoundError, match="nothing is there"):
        Store("memory://actcache-nothing")


def test_a_web_server_that_knows_no_ranges(truth):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=truth.root.parent))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/local"
        assert_same(all_batches(Store(url)), all_batches(Store(truth.root)))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_unknown_scheme():
    with pytest.raises(UsageError, match="nosuch"):
        open_objects("nosuch://somewhere")


# What is not there, or not what it was.


def test_no_bucket_no_prefix_no_store(truth, upload, bucket, open_url):
    upload(truth.root)
    with pytest.raises(NotFoundError, match=r"there is no such bucket|Check bucket"):
        open_url("s3://no-such-bucket-here/store")
    with pytest.raises(NotFoundError, match="nothing is there"):
        open_url(f"s3://{bucket}/elsewhere")
    with pytest.raises(NotFoundError, match=r"no zarr.json, only store.zarr"):
        open_url(f"s3://{bucket}/some")


def test_objects(put, open_url):
    url = put("zarr.json", b"{}")
    put("a/b", bytes(range(200)))
    put("a/c/d", b"")
    objects = open_url(url)
    assert objects.names("a") == ["b", "c"]
    assert objects.names("") == ["a", "zarr.json"]
    assert objects.names("nothing") == []
    assert objects.read("a/c/d") == b""
    assert (objects.size("a/b"), objects.size("a/c/d")) == (200, 0)
    assert bytes(objects.read_range("a/b", 190, 20)) == bytes(range(190, 200))
    assert bytes(objects.read_range("a/b", 500, 20)) == b""
    found = objects.read_ranges("a/b", [(100, 3), (0, 2), (90, 0), (195, 10), (101, 1)])
    assert [bytes(data) for data in found] == [
        bytes([100, 101, 102]), bytes([0, 1]), b"", bytes(range(195, 200)), bytes([101]),
    ]  # fmt: skip
    for call in (objects.read, objects.size, lambda key: objects.read_range(key, 0, 1)):
        with pytest.raises(FileNotFoundError):
            call("a/nothing")


def test_a_large_object_is_read_in_parts(put, open_url, proxy, monkeypatch):
    monkeypatch.setattr("actcache.store.remote.REQUEST_BYTES", 1000)
    body = np.random.default_rng(0).bytes(10_500)
    url = put("zarr.json", b"{}")
    put("large", body)
    assert open_url(url).read("large") == body
    assert sum(bool(seen.range) and seen.n_bytes <= 1000 for seen in proxy.seen) >= 11


def test_verify(truth, upload, s3, bucket):
    url = upload(truth.root)
    assert find_problems(Catalog(open_objects(url)), threads=2) == []
    key = next((truth.root / "acts/resid_post/rows").glob("c.*"))
    name = key.relative_to(truth.root).as_posix()
    data = bytearray(key.read_bytes())
    data[5] ^= 1
    s3.put_object(Bucket=bucket, Key=f"some/store.zarr/{name}", Body=bytes(data))
    s3.delete_object(Bucket=bucket, Key="some/store.zarr/tokens/c.1.0")
    problems = {found.object for found in find_problems(Catalog(open_objects(url)), threads=2)}
    assert problems == {name, "tokens/c.1.0"}


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "empty", "swapped"])
def test_damage_is_an_error(truth, upload, s3, bucket, damage):
    url = upload(truth.root)
    keys = sorted(
        p.relative_to(truth.root).as_posix() for p in (truth.root / "acts/resid_post/rows").glob("c.*")
    )
    at, data = f"some/store.zarr/{keys[-1]}", (truth.root / keys[-1]).read_bytes()
    if damage == "missing":
        s3.delete_object(Bucket=bucket, Key=at)
    else:
        changed = {
            "flipped": bytes([data[0] ^ 1]) + data[1:],
            "cut": data[:10],
            "empty": b"",
            "swapped": (truth.root / keys[-2]).read_bytes(),
        }[damage]
        s3.put_object(Bucket=bucket, Key=at, Body=changed)
    with pytest.raises(DamageError):
        all_batches(Store(url))


# How much is read.


def test_one_layer_reads_its_share_of_the_bytes(tmp_path, upload, proxy):
    layers = tuple(range(5))
    truth = write_store(
        tmp_path / "wide", n_sequences=32, per_shard=16, layers=layers, width=64, n_holdout_shards=0
    )
    store = Store(upload(truth.root))
    n_rows_bytes = sum(path.stat().st_size for path in (truth.root / "acts/resid_post/rows").glob("c.*"))
    for window_rows in (16, 1 << 20):  # few chunks of each shard at a time, and all of them
        proxy.seen.clear()
        all_batches(store, layers=[2], window_rows=window_rows)
        assert 0 < proxy.n_bytes("/rows/") <= 1.05 / len(layers) * n_rows_bytes
        n_chunks = sum(len(store._capture(None).reader(s).chunks.length[2]) for s in range(2))
        assert proxy.count("/rows/") <= n_chunks


def test_opening_takes_few_requests(truth, upload, proxy):
    store = Store(upload(truth.root))
    assert store.hooks
    assert proxy.count() <= 6  # zarr.json twice, a listing, a document per capture


def test_ranges_side_by_side_are_one_request():
    chunks = [(i * 104, 100) for i in range(50)]
    assert [len(found.parts) for found in merge_ranges(chunks)] == [50]
    assert [found.parts for found in merge_ranges(chunks[::-1])] == [list(range(49, -1, -1))]
    assert len(merge_ranges(chunks, request_bytes=520)) == 10
    assert len(merge_ranges(chunks[::10])) == 5  # gaps small, but most of it would be waste
    assert len(merge_ranges([(0, 10**7), (10**7 + 200_000, 10**7)], request_bytes=10**9)) == 1
    assert len(merge_ranges([(0, 10**7), (10**7 + 300_000, 10**7)], request_bytes=10**9)) == 2
    assert merge_ranges([]) == []


def test_importing_needs_no_client():
    code = (
        "import sys, actcache.store.objects\n"
        "found = {'torch', 's3fs', 'obstore', 'aiohttp', 'botocore', 'fsspec'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
