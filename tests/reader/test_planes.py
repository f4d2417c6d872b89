"""Chunks of zstd are put together on their way to the window; those that were made otherwise are decoded first."""

import numpy as np
import pytest

import actcache
from actcache.errors import DamageError
from actcache.loops.planes import plane_loops
from actcache.reader import scatter
from actcache.store import codec as codec_module
from actcache.store.shard import ShardReader
from tests.conftest import check_rows, write_store

pytestmark = pytest.mark.skipif(not plane_loops(), reason="llvmlite is not installed")
KINDS = {"width": 64, "n_sequences": 24, "n_holdout_shards": 0}


def fail(*_given, **_named):
    raise AssertionError("decoded")


@pytest.mark.parametrize("stack", ["data", "feature", "layers"])
@pytest.mark.parametrize("positions", [None, [1, 2, 5]])
@pytest.mark.parametrize("threads", [1, 3])
def test_all_chunks_come_so(tmp_path, monkeypatch, stack, positions, threads):
    truth = write_store(tmp_path / "s.zarr", codec="zstd", **KINDS)
    monkeypatch.setattr(ShardReader, "decode", fail)
    n_rows, options = 0, {"batch_size": 7, "stack": stack, "positions": positions, "threads": threads}
    with actcache.open(truth.root).stream(**options) as stream:
        for batch in stream:
            if stack == "data":
                check_rows(truth, batch)
            n_rows += len(batch)
        assert n_rows == stream.n_rows
        assert stream.counters.decode_s > 0
    monkeypatch.undo()
    monkeypatch.setattr(scatter, "plane_loops", dict)
    with (
        actcache.open(truth.root).stream(**options) as ordinary,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(ShardReader, "planes", fail)
        assert sum(len(batch) for batch in ordinary) == n_rows
        assert ordinary.counters.read_bytes == stream.counters.read_bytes


@pytest.mark.parametrize("made", ["by blosc", "incompressible"])
def test_chunks_made_otherwise_are_decoded(tmp_path, monkeypatch, made):
    with pytest.MonkeyPatch.context() as patch:
        if made == "by blosc":
            patch.setattr(codec_module, "shuffled_zstd", lambda _numbers: None)
        else:  # Blosc stores them as they are
            patch.setattr(codec_module.Codec, "_compress", stored)
        truth = write_store(tmp_path / "s.zarr", codec="zstd", **KINDS)
    decoded, decode = [], ShardReader.decode

    def counting(self, *given):
        decoded.append(given)
        return decode(self, *given)

    monkeypatch.setattr(ShardReader, "decode", counting)
    with actcache.open(truth.root).stream(batch_size=7) as stream:
        assert sum(len(check_rows(truth, batch)) for batch in stream) == stream.n_rows
        n_chunks = stream._filling.chunks.n_rows.size * len(stream._filling.lanes)
    assert len(decoded) == (0 if made == "by blosc" else n_chunks)


def stored(self, flat):
    """Blosc's way to keep what does not get smaller."""
    import numcodecs

    return bytes(
        numcodecs.Blosc("zstd", 0, numcodecs.Blosc.SHUFFLE, flat.nbytes).encode(np.ascontiguousarray(flat))
    )


def test_what_is_wrong_is_said(tmp_path):
    truth = write_store(tmp_path / "s.zarr", codec="zstd", **KINDS)
    path = truth.root / "acts/resid_post/rows/c.0.2.0"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.unlink()
    path.write_bytes(data)
    with (
        actcache.open(truth.root).stream(batch_size=7) as stream,
        pytest.raises(DamageError, match=r"rows/c\.0\.2\.0: chunk \d+ .*crc32c"),
    ):
        list(stream)
