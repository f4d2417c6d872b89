"""Codecs tried on a store's own rows: sizes are those of a store, errors those that a store measures, the advice follows."""

import ml_dtypes
import numpy as np
import pytest

import actcache
from actcache.errors import UncommittedError, UsageError
from actcache.store.codec_sample import LOSSLESS, CodecResult, compare_codecs, recommend, sample_chunks
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.statistics import QuantisationError
from tests.conftest import write_store

SHAPE = {
    "n_sequences": 32,
    "seq_len": 32,
    "per_shard": 16,
    "rows_per_chunk": 128,
    "width": 64,
    "layers": (0, 3),
}


def made_up(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 32, 32, 64)).astype(np.float32) * np.exp(rng.normal(0, 0.5, 64)).astype(
        np.float32
    )
    x[1, :, 0] *= 100
    return x.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == "bfloat16" else x


def open_capture(root):
    catalog = Catalog(LocalObjects(root))
    return catalog.capture("resid_post"), catalog.shards.kept


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_said_of_a_codec_is_what_a_store_of_it_takes(tmp_path, dtype):
    """All rows sampled, all kept: bytes and errors are those of a real store, its index and statistics apart."""
    acts = made_up(dtype)
    for codec in (*LOSSLESS, "uint8"):
        write_store(
            tmp_path / f"{codec}.zarr",
            acts=acts,
            dtype=dtype,
            codec=codec,
            drop=0.0,
            n_holdout_shards=0,
            **SHAPE,
        )
    report = compare_codecs(sample_chunks(*open_capture(tmp_path / "none.zarr"), 1 << 30), dtype)
    assert report.n_rows == 2 * 32 * 32
    assert report.row_bytes == 64 * acts.itemsize
    for codec, found in report.codecs.items():
        root = tmp_path / f"{codec}.zarr" / "acts/resid_post"
        kinds = ("rows", "scale", "offset", "exact") if codec == "uint8" else ("rows",)
        size = sum(p.stat().st_size for kind in kinds for p in root.glob(f"{kind}/c.*"))
        index = 2 * (4 + 2 * 4 * 16) * (2 if codec == "uint8" else 1)
        assert acts.nbytes / found.ratio == pytest.approx(size - index, rel=0.02), codec
        assert found.encode > 0
        assert found.decode > 0
    assert all(report.codecs[codec].error is None for codec in LOSSLESS)
    store = actcache.open(tmp_path / "uint8.zarr")
    error = report.codecs["uint8"].error
    assert error is not None
    for layer, measured in store.quantisation_error(split=None).items():
        assert measured.n_exact == error[layer].n_exact == (32 if layer == 3 else 0)
        for name in ("n_rows", "fvu", "worst", "fvu_kept", "worst_kept"):
            assert getattr(error[layer], name) == pytest.approx(getattr(measured, name), rel=1e-4), name


def test_a_sample_is_spread_and_bounded(tmp_path):
    truth = write_store(tmp_path / "s.zarr", drop=0.3, **SHAPE)
    capture, kept = open_capture(truth.root)
    chunk_bytes = 128 * 64 * 2
    everything = sample_chunks(capture, kept, 1 << 30)
    assert len(everything) == 2 * int((kept // 128).sum())
    for most in (1, chunk_bytes * 2, chunk_bytes * 5):
        chunks = sample_chunks(capture, kept, most)
        assert {c.layer for c in chunks} == {0, 3}
        assert len(chunks) in (2, max(2, most // chunk_bytes // 2 * 2))
    assert [c.layer for c in sample_chunks(capture, kept, 1, layers=[3])] == [3]


def test_rows_that_cannot_be_tried_are_refused(tmp_path):
    quantised = write_store(tmp_path / "q.zarr", codec="uint8", **SHAPE)
    with pytest.raises(UsageError, match="quantised already"):
        sample_chunks(*open_capture(quantised.root), 1 << 20)
    empty = write_store(tmp_path / "e.zarr", commit=[], **SHAPE)
    with pytest.raises(UncommittedError, match="no committed chunk of 128 kept rows"):
        sample_chunks(*open_capture(empty.root), 1 << 20)


def results(zstd, lz4, decode_zstd=0.8e9, decode_lz4=1.2e9) -> dict[str, CodecResult]:
    error = {0: QuantisationError(9, 0, 1e-4, 2e-4, 5, 1e-4, 2e-4)}
    return {
        "zstd": CodecResult(zstd, 1.0, decode_zstd, {}),
        "lz4": CodecResult(lz4, 1.0, decode_lz4, {}),
        "none": CodecResult(1.0, 1.0, 9e9, {}),
        "uint8": CodecResult(1.9, 1.0, 2e9, {}, error),
    }


@pytest.mark.parametrize(
    ("found", "codec", "why"),
    [
        (results(1.41, 1.17), "zstd", "smallest that loses nothing (1.41x)"),
        (results(1.30, 1.29), "lz4", "nearly the smallest (1.29x; zstd 1.30x) and decodes faster"),
        (results(1.30, 1.29, decode_lz4=0.9e9), "zstd", "smallest"),
        (results(1.02, 1.03), "none", "bfloat16 rows hardly compress (lz4: 1.03x)"),
    ],
)
def test_the_advice_and_its_reason(found, codec, why):
    chosen, reason = recommend(found, "bfloat16")
    assert chosen == codec
    assert why in reason
    assert "FVU of 1.0e-04" in reason
    assert "worst dimension 2.0e-04" in reason
