"""Rows in codes: what is lost is bounded row by row, what does not fit is exact to the bit, and any device finds the same."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.store.dtypes import as_float32, disk_dtype
from actcache.store.quantise import EXACT, OUTLIER_NORM_RATIO, dequantise, parse
from actcache.store.quantise import quantise as quantise_run
from tests.conftest import as_bits, write_store
from tests.store.test_shard import ODD

DTYPES = ["bfloat16", "float16", "float32"]


def to_disk(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            return values.astype(ml_dtypes.bfloat16).view(np.uint16)
        return values.astype(disk_dtype(dtype))


def quantise(rows: np.ndarray, dtype: str, kept: int):
    """One chunk."""
    run = quantise_run(rows, 1, dtype, kept)
    assert np.array_equal(run.exact_rows, run.chunks[0].exact_rows)
    return run.chunks[0], run.said.copy(), as_float32(rows, dtype)


def float64(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        return x.astype(np.float64)


def half_spacing(values: np.ndarray, dtype: str) -> np.ndarray:
    """The most that rounding to the logical dtype changes a number."""
    bits = {"bfloat16": 8, "float16": 11, "float32": 24}[dtype]
    least = {"bfloat16": -133, "float16": -24, "float32": -149}[dtype]
    exponent = np.frexp(np.abs(values))[1] - bits - 1
    return np.exp2(np.maximum(exponent, least - 1).astype(np.float64))


@st.composite
def chunks(draw):
    """(rows on disk, dtype, kept): plain ones, with spikes, with columns of one value, with everything odd."""
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    r, d = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    x = rng.standard_normal((r, d)) * np.exp(rng.normal(0, draw(st.sampled_from([0, 1, 3])), d))
    x += rng.standard_normal(d) * draw(st.sampled_from([0, 1, 50]))
    if draw(st.booleans()):
        x[:, rng.random(d) < 0.3] = draw(st.sampled_from([0.0, -0.0, 1.5]))
    if draw(st.booleans()):
        x[rng.random(r) < 0.2] *= 300
    rows = to_disk(x.astype(np.float32), dtype)
    if draw(st.booleans()):
        is_odd = rng.random(rows.shape) < 0.05
        rows[is_odd] = rng.choice(ODD[dtype], int(is_odd.sum()))
    return rows, dtype, draw(st.integers(0, r))


@settings(max_examples=300)
@given(chunks())
def test_every_row_is_exact_or_within_half_a_step(chunk):
    rows, dtype, kept = chunk
    q, said, x = quantise(rows, dtype, kept)
    x = float64(x)
    assert np.array_equal(float64(as_float32(rows, dtype)), x, equal_nan=True)
    is_exact = np.zeros(len(rows), bool)
    is_exact[q.exact_rows] = True
    assert (q.codes[is_exact] == EXACT).all()
    assert (q.codes[~is_exact] < EXACT).all()
    assert as_bits(said[is_exact]).tobytes() == as_bits(rows[is_exact]).tobytes()
    error = np.abs(as_float32(said[~is_exact], dtype).astype(np.float64) - x[~is_exact])
    allowed = 0.501 * q.scale.astype(np.float64) + half_spacing(np.abs(x[~is_exact]) + q.scale, dtype)
    assert (error <= allowed).all()
    constant = q.scale == 0
    assert np.array_equal(as_float32(said[~is_exact], dtype)[:, constant], x[~is_exact][:, constant])


@settings(max_examples=100)
@given(chunks())
def test_outliers_and_what_is_not_finite_are_exact_and_scales_come_from_the_others(chunk):
    rows, dtype, kept = chunk
    q, _, x = quantise(rows, dtype, kept)
    x = float64(x)
    norm = np.linalg.norm(x[:kept], axis=1)
    norm[norm < 1e-30] = 0  # as of float32 numbers, the squares of which are then 0
    usable = norm < 2.0**125
    limit = OUTLIER_NORM_RATIO * np.median(norm[usable]) if usable.any() else 0
    exact = set(q.exact_rows.tolist())
    assert exact >= set(np.flatnonzero(~np.isfinite(x).all(1)).tolist())
    assert exact >= set(np.flatnonzero(~(norm <= limit * (1 + 1e-5))).tolist())
    ordinary = x[:kept][norm <= limit * (1 - 1e-5)]
    if len(ordinary):
        assert (q.offset <= ordinary.min(0)).all()
        greatest = ordinary.max(0)
        assert (q.offset + 254.0 * q.scale >= greatest - 1e-6 * np.abs(greatest)).all()
    if not usable.any():
        assert exact >= set(np.flatnonzero((x != 0).any(1)).tolist()), (
            "nothing but zeros lies in an empty range"
        )


@settings(max_examples=100)
@given(chunks())
def test_a_device_that_fuses_multiply_and_add_finds_the_same_bits(chunk):
    """float64 holds `offset + scale * code` of float32 numbers before its one rounding: that is what a fused one does."""
    rows, dtype, kept = chunk
    q, _, _ = quantise(rows, dtype, kept)
    assert (q.scale.view(np.uint32) & 0xFF == 0).all(), "16 significant bits"
    codes = np.arange(EXACT)[:, None]
    product = q.scale * codes.astype(np.float32)
    assert (product.astype(np.float64) == q.scale.astype(np.float64) * codes).all(), "products are exact"
    separate = q.offset + product
    # a sum of two float32 in long double is exact enough to be rounded once
    fused = (q.offset.astype(np.longdouble) + q.scale.astype(np.longdouble) * codes).astype(np.float32)
    assert separate.tobytes() == fused.tobytes() or np.array_equal(separate, fused)


@settings(max_examples=100)
@given(chunks())
def test_a_block_survives_and_a_wrong_one_is_refused(chunk):
    rows, dtype, kept = chunk
    q, said, _ = quantise(rows, dtype, kept)
    block = q.block()
    for data in (block, memoryview(b"x" + block)[1:]):  # aligned or not
        back = parse(q.codes, data, disk_dtype(dtype))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(back, q, strict=True))
        assert as_bits(dequantise(back, dtype)).tobytes() == as_bits(said).tobytes()
        assert all(part.flags.aligned for part in back)
    for wrong in (block[:-1], block + b"\0", b""):
        with pytest.raises(ValueError, match="block of scales"):
            parse(q.codes, wrong, disk_dtype(dtype))
    if len(q.exact_rows):
        at = 8 * rows.shape[1]
        with pytest.raises(ValueError, match="exact row"):
            parse(q.codes, block[:at] + b"\xff\xff\0\0" + block[at + 4 :], disk_dtype(dtype))


@settings(max_examples=100)
@given(chunks(), st.integers(1, 4), st.data())
def test_chunks_of_a_run_are_what_they_are_alone(chunk, n_chunks, data):
    rows, dtype, _ = chunk
    rng = np.random.default_rng(0)
    many = np.concatenate([rng.permutation(rows) for _ in range(n_chunks)])
    kept = data.draw(st.integers(0, len(many)))
    run = quantise_run(many, n_chunks, dtype, kept)
    said, exact_rows = run.said.copy(), []
    for i in range(n_chunks):
        at = slice(i * len(rows), (i + 1) * len(rows))
        alone, alone_said, _ = quantise(many[at], dtype, min(max(0, kept - at.start), len(rows)))
        assert run.chunks[i].codes.tobytes() == alone.codes.tobytes()
        assert run.chunks[i].block() == alone.block()
        assert as_bits(said[at]).tobytes() == as_bits(alone_said).tobytes()
        exact_rows += (alone.exact_rows + at.start).tolist()
    assert run.exact_rows.tolist() == exact_rows


def test_rounding_of_float16_at_its_greatest_is_not_infinity():
    rows = np.array([[65504.0, -65504.0], [0.0, 0.0], [-65504.0, 65504.0]], np.float16)
    _, said, _ = quantise(rows, "float16", 3)
    assert np.isfinite(said).all()
    assert np.array_equal(said[[0, 2]], rows[[0, 2]])


def test_very_large_numbers_do_not_overflow():
    rows = to_disk(np.array([[3e38, -3e38], [1.0, 2.0], [2.0, 1.0]], np.float32), "bfloat16")
    q, said, _ = quantise(rows, "bfloat16", 3)
    assert q.exact_rows.tolist() == [0]
    assert np.array_equal(said, rows)


@pytest.mark.parametrize("spike", [20_000.0, 3e4, 1e6])
def test_spikes_at_position_0_cost_the_others_nothing(tmp_path, spike):
    """Kept rows with massive ones among them, in every chunk: FVU of each layer and of its worst dimension."""
    rng = np.random.default_rng(0)
    n_layers, q, t, d = 2, 48, 32, 64
    x = rng.standard_normal((n_layers, q, t, d)) * np.exp(rng.normal(0, 0.5, d))
    x[:, :, 0, 3] += spike
    x[:, rng.random((q, t)) < 0.01, 5] += spike
    given = to_disk(x.astype(np.float32), "bfloat16")
    truth = write_store(
        tmp_path / "s.zarr", n_sequences=q, seq_len=t, per_shard=16, rows_per_chunk=256, layers=(0, 1), width=d,
        codec="uint8", drop=0.0, acts=given,
    )  # fmt: skip
    found = actcache.open(truth.root).quantisation_error(split=None)
    before, after = (
        as_float32(a, "bfloat16").astype(np.float64).reshape(n_layers, -1, d)
        for a in (given, truth.acts["resid_post"])
    )
    for i, error in found.items():
        ordinary = np.linalg.norm(before[i], axis=1) < 100
        assert error.fvu == pytest.approx(_fvu(before[i], after[i], ordinary)[0], rel=1e-3)
        assert error.worst == pytest.approx(_fvu(before[i], after[i], ordinary)[1], rel=1e-3)
        assert error.fvu_kept == pytest.approx(_fvu(before[i], after[i], np.ones(q * t, bool))[0], rel=1e-3)
        assert error.n_exact == (~ordinary).sum()
        assert error.fvu <= 5e-4
        assert error.worst <= 5e-4
        assert error.fvu_kept <= 1e-6, "the spikes are most of the variance, and exact"


def _fvu(before: np.ndarray, after: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    x, y = before[rows], after[rows]
    errors, deviations = ((x - y) ** 2).sum(0), ((x - x.mean(0)) ** 2).sum(0)
    return errors.sum() / deviations.sum(), (errors / deviations).max()
