"""zarr-python, tensorstore and xarray judge: every number of a store is what they say it is."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from hypothesis import given, settings

from actcache.store.arrays import MOMENTS, NO_DOCUMENT, TOTALS
from actcache.store.dtypes import as_float32
from tests.conftest import Truth, as_bits, dequantised_by_zarr, write_store
from tests.store.strategies import store_settings

HOLE = {"bfloat16": 0x7FC1, "float16": np.float16(np.nan), "float32": np.float32(np.nan)}


def read_tensorstore(root: Path, path: str) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / path) + "/"}}
    return tensorstore.open(spec, open=True, read=True).result().read().result()


def both(root: Path, path: str) -> np.ndarray:
    """One array as zarr-python reads it, after tensorstore agreed to the bit."""
    ours = np.asarray(zarr.open_array(root / path, mode="r")[...])
    theirs = read_tensorstore(root, path)
    assert theirs.dtype == ours.dtype
    assert theirs.shape == ours.shape
    assert theirs.tobytes() == ours.tobytes(), path
    return ours


def check_plan(truth: Truth) -> None:
    for name in ("tokens", "document", "keep"):
        assert np.array_equal(both(truth.root, name), getattr(truth, name))


def check_capture(truth: Truth, hook: str) -> None:
    """Rows through the stored row numbers; holes where there are none; side arrays against plain numpy."""
    grid, path = truth.grid, f"acts/{hook}"
    q, t = both(truth.root, "row_sequence"), both(truth.root, "row_position")
    stored = np.flatnonzero(q != NO_DOCUMENT)
    assert np.array_equal(stored, np.flatnonzero(t != NO_DOCUMENT))
    assert both(truth.root, f"{path}/layer").tolist() == list(truth.layers)
    rows = both(truth.root, f"{path}/rows")
    if rows.dtype == np.uint8:
        rows = check_codes(truth, hook, stored)
    acts = truth.acts[hook]
    expected = np.full_like(rows, HOLE[truth.dtype])
    expected[:, stored] = acts[:, q[stored], t[stored]]
    assert as_bits(rows).tobytes() == as_bits(expected).tobytes()

    floats = truth.floats(hook)[:, q[stored], t[stored]]
    norm = both(truth.root, f"{path}/norm")
    assert np.isnan(np.delete(norm, stored, 1)).all()
    np.testing.assert_allclose(norm[:, stored], np.linalg.norm(floats, axis=2), rtol=1e-6)

    moments, totals = both(truth.root, f"{path}/moments"), both(truth.root, f"{path}/totals")
    for shard in range(grid.n_shards):
        sequences = grid.sequences_of(shard)
        kept = truth.floats(hook)[:, sequences.start : sequences.stop][:, truth.keep[sequences]]
        check_moments(kept, moments[shard], totals[shard])


def check_codes(truth: Truth, hook: str, stored: np.ndarray) -> np.ndarray:
    """The arrays beside the codes; returns the rows in the dtype on disk, which `truth` holds by the same rule."""
    path = f"acts/{hook}"
    codes, exact = both(truth.root, f"{path}/rows"), both(truth.root, f"{path}/exact")
    scale, offset = both(truth.root, f"{path}/scale"), both(truth.root, f"{path}/offset")
    error = both(truth.root, f"{path}/error")
    is_exact = (codes == 255).all(2)
    assert np.array_equal(is_exact, (codes == 255).any(2)), "a row is in codes or exact, whole"
    assert np.delete(is_exact, stored, 1).all()
    hole = np.full_like(exact, HOLE[truth.dtype])
    assert as_bits(exact)[~is_exact].tobytes() == as_bits(hole)[~is_exact].tobytes()
    rows = dequantised_by_zarr(truth.root / path)
    q, t = (
        np.asarray(zarr.open_array(truth.root / "row_sequence")),
        zarr.open_array(truth.root / "row_position"),
    )
    q, t = q[stored], np.asarray(t)[stored]
    given, said = truth.given[hook][:, q, t], rows[:, stored]
    assert as_bits(given)[is_exact[:, stored]].tobytes() == as_bits(said)[is_exact[:, stored]].tobytes()
    n_chunks = -(-int(stored.max(initial=-1) + 1) // truth.grid.rows_per_chunk)
    assert np.isfinite(scale[:, :n_chunks]).any() or not len(stored)
    assert np.isnan(scale[:, n_chunks:]).all()
    assert np.isnan(offset[:, n_chunks:]).all()
    for shard in range(truth.grid.n_shards):
        at = (stored // truth.grid.rows_per_shard == shard) & truth.keep[q, t]
        for layer_i in range(len(truth.layers)):
            ordinary = at & ~is_exact[layer_i, stored]
            x, y = (_float64(a[layer_i, ordinary], truth.dtype) for a in (given, said))
            n, mean, deviations, errors = error[shard, layer_i]
            assert (n == ordinary.sum()).all()
            if len(x):
                assert (np.abs(mean - y.mean(0)) <= 1e-6 * (np.abs(y.mean(0)) + y.std(0))).all()
                np.testing.assert_allclose(deviations, ((y - y.mean(0)) ** 2).sum(0), rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(errors, ((x - y) ** 2).sum(0), rtol=1e-5, atol=1e-30)
    return rows


def _float64(rows: np.ndarray, dtype: str) -> np.ndarray:
    return as_float32(rows, dtype).astype(np.float64)


def check_moments(kept: np.ndarray, moments: np.ndarray, totals: np.ndarray) -> None:
    assert (totals[:, TOTALS.index("n_rows")] == kept.shape[1]).all()
    if not kept.shape[1]:
        assert np.isnan(moments[:, MOMENTS.index("min")]).all()
        return
    named = {name: moments[:, i] for i, name in enumerate(MOMENTS)}
    error = np.abs(
        named["mean"] - kept.mean(1)
    )  # a mean near 0 has no relative error: the scale is the spread
    assert (error <= 1e-6 * (np.abs(kept.mean(1)) + kept.std(1))).all()
    deviations = ((kept - kept.mean(1, keepdims=True)) ** 2).sum(1)
    np.testing.assert_allclose(named["sum_squared_deviations"], deviations, rtol=1e-6, atol=1e-6)
    assert np.array_equal(named["min"], kept.min(1))
    assert np.array_equal(named["max"], kept.max(1))
    norms = np.linalg.norm(kept, axis=2)
    expected = np.stack([norms.sum(1), (norms**2).sum(1), norms.max(1)], 1)
    np.testing.assert_allclose(totals[:, 1:4], expected, rtol=1e-6)
    assert (totals[:, TOTALS.index("n_non_finite")] == 0).all()


@settings(max_examples=30, deadline=None)
@given(chosen=store_settings(hooks=(("resid_post",), ("mlp_in", "resid_pre"))))
def test_every_array_is_what_was_written(chosen):
    with tempfile.TemporaryDirectory() as folder:
        truth = write_store(Path(folder) / "s.zarr", **chosen)
        check_plan(truth)
        for hook in chosen["hooks"]:
            check_capture(truth, hook)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none", "uint8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_codec_and_dtype(tmp_path, codec, dtype):
    truth = write_store(
        tmp_path / "s.zarr", codec=codec, dtype=dtype, n_padding=5, width=33, rows_per_chunk=12
    )
    check_plan(truth)
    check_capture(truth, "resid_post")
    names = [c["name"] for c in _codecs(truth.root / "acts/resid_post/rows")]
    assert names == (["bytes", "crc32c"] if codec in ("none", "uint8") else ["bytes", "blosc", "crc32c"])


def _codecs(array: Path) -> list[dict]:
    (sharding,) = json.loads((array / "zarr.json").read_bytes())["codecs"]
    return sharding["configuration"]["codecs"]


def test_blosc_sees_numbers_not_bytes(tmp_path):
    """A block is the whole chunk and the item size is the number's: both cost a tenth of the ratio when lost."""
    truth = write_store(tmp_path / "s.zarr", rows_per_chunk=16, width=8)
    configuration = _codecs(truth.root / "acts/resid_post/rows")[1]["configuration"]
    assert configuration["typesize"] == 2
    assert configuration["blocksize"] == 16 * 8 * 2
    data = (truth.root / "acts/resid_post/rows/c.0.0.0").read_bytes()
    assert data[3] == 2, "typesize in the header of the first chunk"
    assert int.from_bytes(data[8:12], "little") == 16 * 8 * 2, "blocksize in the header of the first chunk"


def test_uncommitted_shards_read_as_holes(tmp_path):
    truth = write_store(tmp_path / "s.zarr", commit=[1])
    rows = both(truth.root, "acts/resid_post/rows")
    per_shard = truth.grid.rows_per_shard
    assert (np.delete(rows, np.s_[per_shard : 2 * per_shard], 1) == 0x7FC1).all()
    assert (rows[:, per_shard : 2 * per_shard] != 0x7FC1).all()
    assert [bool(text) for text in zarr.open_array(truth.root / "acts/resid_post/ledger", mode="r")[0]] == [
        False,
        True,
        False,
    ]


def test_records_are_json_in_string_arrays(tmp_path):
    truth = write_store(tmp_path / "s.zarr")
    group = zarr.open_group(truth.root, mode="r")
    planned = [json.loads(text) for text in group["shards"][...]]
    assert [set(p) for p in planned] == [{"kept", "stored", "objects"}] * 3
    ledger = group["acts/resid_post/ledger"][...]
    assert ledger.shape == (16, 3)
    assert [json.loads(text)["shard"] for text in ledger[0]] == [0, 1, 2]
    assert set(ledger[1:].reshape(-1)) == {""}


def test_zarr_lists_the_whole_tree(tmp_path):
    """Nothing in the folders that zarr-python does not know: it warns about loose files, and warnings are errors here."""
    truth = write_store(tmp_path / "s.zarr", hooks=("resid_post", "mlp_out"))
    group = zarr.open_group(truth.root, mode="r")
    arrays = {name for name, found in group.members(max_depth=None) if isinstance(found, zarr.Array)}
    plan = {"tokens", "document", "keep", "row_sequence", "row_position", "shards", "retired"}
    capture = {"rows", "norm", "moments", "totals", "layer", "ledger"}
    assert arrays == plan | {f"acts/{hook}/{name}" for hook in ("resid_post", "mlp_out") for name in capture}
    on_disk = {p.parent.relative_to(truth.root).as_posix() for p in truth.root.rglob("c.*")}
    assert on_disk == arrays - {"retired"}, "nothing is retired"


def test_xarray_opens_it(tmp_path):
    truth = write_store(tmp_path / "s.zarr", dtype="float32", n_padding=3)
    with xarray.open_zarr(truth.root, consolidated=False) as plan:
        assert plan["tokens"].dims == ("sequence", "position")
        assert np.array_equal(plan["tokens"].values, truth.tokens)
        q, t = plan["row_sequence"].values, plan["row_position"].values
    with xarray.open_zarr(truth.root / "acts/resid_post", consolidated=False) as capture:
        rows = capture["rows"]
        assert rows.dims == ("layer", "row", "width")
        assert capture["norm"].dims == ("layer", "row")
        assert capture["layer"].values.tolist() == list(truth.layers)
        row = int(np.flatnonzero(q != NO_DOCUMENT)[-1])
        at = (
            rows.sel(layer=truth.layers[-1]).isel(row=row).values
            if "layer" in rows.coords
            else rows[-1, row].values
        )
    assert np.array_equal(at, truth.acts["resid_post"][-1, int(q[row]), int(t[row])])
