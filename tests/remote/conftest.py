"""An S3 server on loopback for the session, a bucket and a fault proxy per test, a store in that bucket."""

import itertools
import logging
from pathlib import Path

import pytest

from actcache.store.objects import open_objects
from actcache.store.remote import Patience
from tests.remote.limits import QUICK
from tests.remote.proxy import Proxy

boto3 = pytest.importorskip("boto3")
pytest.importorskip("moto.server")
pytest.importorskip("obstore")
pytest.importorskip("s3fs")

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server():
    """(host, port) of moto, which keeps objects in memory."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(scope="session")
def s3(s3_server):
    client = boto3.client(
        "s3",
        endpoint_url="http://{}:{}".format(*s3_server),
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        region_name="us-east-1",
    )
    yield client
    client.close()


@pytest.fixture
def proxy(s3_server):
    made = Proxy(s3_server)
    yield made
    made.close()


@pytest.fixture
def bucket(s3):
    name = f"bucket-{next(_numbers)}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture(autouse=True)
def _fast(fast_disk):
    """No test here cuts the power."""


@pytest.fixture(autouse=True)
def _credentials(monkeypatch, proxy):
    """The usual environment variables point at the proxy, and at nothing of this machine."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@pytest.fixture
def upload(s3, bucket):
    """Copy a folder to the bucket, under a prefix; returns its URL."""

    def copy(root: Path, prefix: str = "some/store.zarr") -> str:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(root).as_posix()}"
                s3.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
        return f"s3://{bucket}/{prefix}"

    return copy


@pytest.fixture(params=["obstore", "fsspec"])
def client(request) -> str:
    return request.param


@pytest.fixture
def put(s3, bucket):
    """Put one object; returns the URL of its folder."""

    def one(key: str, body: bytes) -> str:
        s3.put_object(Bucket=bucket, Key=f"folder/{key}", Body=body)
        return f"s3://{bucket}/folder"

    return one


@pytest.fixture
def open_url(client):
    """`open_objects` with one client and little patience."""

    def open_one(url: str, patience: Patience = QUICK, **arguments):
        return open_objects(f"{client}+{url}", patience=patience, **arguments)

    return open_one
