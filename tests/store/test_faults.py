"""Every kind of object, damaged in every way: the check names it, and nothing that depends on it hands out a wrong row."""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.errors import ActcacheError, DamageError, NotFoundError, UncommittedError, UsageError
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.schema import digest_of
from actcache.store.verify import find_problems
from tests.conftest import Truth, as_bits, check_rows, commit_shards, write_store

HOOK = "acts/resid_post"
N_LAYERS, WIDTH = 2, 4

# What a reader can ask for. Each raises, or returns having compared everything with the truth.


def _open(truth: Truth) -> None:
    actcache.open(truth.root)


def _read(truth: Truth) -> None:
    """Sequences one by one, so that everything before the damage is handed out."""
    store = actcache.open(truth.root)
    for layer in truth.layers:
        for sequence in range(truth.grid.n_sequences):
            positions = np.flatnonzero(truth.is_stored[sequence]).tolist()
            found = store.read(layer=layer, sequences=sequence, positions=positions)
            assert np.array_equal(as_bits(found)[0], truth.bits(layer, sequence, positions))


def _stream_rows(truth: Truth, **options) -> None:
    """Rows alone, told apart by their bits: nothing else of the store is asked for."""
    layer, sequence, position = truth.kept().T
    true_rows = {
        (int(a), r.tobytes()) for a, r in zip(layer, truth.bits(layer, sequence, position), strict=True)
    }
    with actcache.open(truth.root).stream(batch_size=5, window_rows=16, **options) as stream:
        for batch in stream:
            for layer, row in zip(batch.layer.tolist(), as_bits(batch.rows), strict=True):
                assert (layer, row.tobytes()) in true_rows
                true_rows.remove((layer, row.tobytes()))
    assert not true_rows


def _stream_without_outliers(truth: Truth) -> None:
    _stream_rows(truth, outlier_norm_ratio=1e6)


def _stream_with_provenance(truth: Truth) -> None:
    with actcache.open(truth.root).stream(batch_size=5, window_rows=16) as stream:
        for batch in stream:
            check_rows(truth, batch)


def _stats(truth: Truth) -> None:
    floats = truth.floats()
    for i, (_layer, found) in enumerate(actcache.open(truth.root).stats(split=None).items()):
        assert found.n_rows == truth.keep.sum()
        kept = floats[i][truth.keep]
        np.testing.assert_allclose(found.variance, kept.var(0), rtol=1e-5)
        np.testing.assert_allclose(found.norm_mean, np.linalg.norm(kept, axis=1).mean(), rtol=1e-5)


def _errors(truth: Truth) -> None:
    """Of quantising; rows that are stored as they are have none."""
    store = actcache.open(truth.root)
    if not (truth.root / HOOK / "error").exists():
        with pytest.raises(UsageError, match="there is no error"):
            store.quantisation_error()
        return
    for found in store.quantisation_error(split=None).values():
        assert found.n_rows == truth.keep.sum()
        assert 0 < found.fvu <= found.worst < 1e-4


def _plan_array(name: str) -> Callable[[Truth], None]:
    def read(truth: Truth) -> None:
        assert np.array_equal(getattr(actcache.open(truth.root), name), getattr(truth, name))

    return read


OPERATIONS = {
    "open": _open,
    "read": _read,
    "rows": _stream_rows,
    "outliers": _stream_without_outliers,
    "provenance": _stream_with_provenance,
    "stats": _stats,
    "errors": _errors,
    "tokens": _plan_array("tokens"),
    "document": _plan_array("document"),
    "keep": _plan_array("keep"),
}
STREAMS = {"rows", "outliers", "provenance"}
EVERYTHING = set(OPERATIONS)
ENOUGH = {"read", "provenance"}

# Which object which of them depends on: these must fail, and all others must not even notice.

DEPENDENTS = {
    f"{HOOK}/rows/c.0.1.0": {"read", *STREAMS},
    f"{HOOK}/norm/c.0.1": {"outliers"},
    f"{HOOK}/moments/c.1.0.0.0": {"stats"},
    f"{HOOK}/totals/c.1.0.0": {"stats"},
    f"{HOOK}/ledger/c.0.1": {"read", "stats", *STREAMS},
    f"{HOOK}/layer/c.0": set(),  # layer numbers are in the capture's record; this is for other readers
    "tokens/c.1.0": {"tokens", "provenance"},
    "document/c.1.0": {"document", "provenance"},
    "keep/c.1.0": {"keep"},  # rows lie kept first, and how many is in the shard table
    "row_sequence/c.1": {"read", "provenance"},
    "row_position/c.1": {"read", "provenance"},
    "shards/c.0": EVERYTHING - {"open", "stats", "errors"},
    "zarr.json": EVERYTHING,
    f"{HOOK}/zarr.json": {"read", "stats", "errors", *STREAMS},
    "acts/zarr.json": set(),  # this and all below describe arrays to other readers
    **{
        f"{name}/zarr.json": set()
        for name in ("tokens", "document", "keep", "row_sequence", "row_position", "shards", "retired")
    },
    **{
        f"{HOOK}/{name}/zarr.json": set() for name in ("rows", "norm", "moments", "totals", "layer", "ledger")
    },
}

QUANTISED = {
    f"{HOOK}/rows/c.0.1.0": {"read", *STREAMS},
    f"{HOOK}/moments/c.1.0.0.0": {"stats", "errors"},
    f"{HOOK}/totals/c.1.0.0": {"stats", "errors"},
    f"{HOOK}/ledger/c.0.1": {"read", "stats", "errors", *STREAMS},
    f"{HOOK}/scale/c.0.1.0": set(),  # what lies beside the codes counts here; these are for other readers
    f"{HOOK}/offset/c.0.1.0": set(),
    f"{HOOK}/exact/c.0.1.0": set(),
    f"{HOOK}/error/c.1.0.0.0": {"errors"},
    **{f"{HOOK}/{name}/zarr.json": set() for name in ("scale", "offset", "exact", "error")},
}

# How each is damaged. `other` is the same object of the next shard, or, where there is none, of another kind.


def _flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 20] ^= 0xFF
    path.write_bytes(data)


def _zero(path: Path, other: Path) -> None:
    data = path.read_bytes()
    n = min(4096, len(data) // 2)
    path.write_bytes(b"\0" * n + data[n:])


def _truncate(path: Path, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def _delete(path: Path, other: Path) -> None:
    path.unlink()


def _swap(path: Path, other: Path) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


FAULTS = {f.__name__.strip("_"): f for f in (_flip, _zero, _truncate, _empty, _delete, _swap)}


def _other(key: str) -> str:
    if key.endswith("zarr.json"):
        return "tokens/zarr.json" if key != "tokens/zarr.json" else "keep/zarr.json"
    if key in ("shards/c.0", f"{HOOK}/layer/c.0"):
        return "tokens/c.1.0"
    folder, _, name = key.rpartition("/")
    digits = name.split(".")
    shard_at = 2 if digits[1] == "0" else 1
    return f"{folder}/{'.'.join([*digits[:shard_at], '2', *digits[shard_at + 1 :]])}"


@pytest.fixture(scope="module", params=["zstd", "none", "uint8"])
def truth(request, tmp_path_factory):
    """Three shards whose objects are of equal length where nothing compresses; the first is held out."""
    root = tmp_path_factory.mktemp("faults") / "s.zarr"
    drop = 0.5 if request.param == "uint8" else 0.2  # chunks without a kept row are stored exactly
    return write_store(root, codec=request.param, rows_per_chunk=8, drop=drop)


@contextmanager
def restored(root: Path):
    """Put every file back afterwards."""
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    try:
        yield
    finally:
        for path, data in before.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)


def problems_of(root: Path) -> list[str]:
    """What the check names, or what opening says where it cannot be opened."""
    try:
        catalog = Catalog(LocalObjects(root))
    except ActcacheError as error:
        return [str(error)]
    return [f"{found.object}: {found.what}" for found in find_problems(catalog, threads=1)]


def test_a_whole_store_has_no_problem_and_the_table_is_complete(truth):
    assert problems_of(truth.root) == []
    for operation in OPERATIONS.values():
        operation(truth)
    kinds = {p.relative_to(truth.root).parent.as_posix() for p in truth.root.rglob("*") if p.is_file()}
    assert {key.rpartition("/")[0] or "." for key in _table(truth)} == kinds
    for p in truth.root.rglob("zarr.json"):
        assert p.relative_to(truth.root).as_posix() in _table(truth)


CASES = [
    (codec, key, fault)
    for codec in ("zstd", "none")
    for key in DEPENDENTS
    for fault in FAULTS
    if codec == "zstd" or not key.endswith("zarr.json")
] + [("uint8", key, fault) for key in QUANTISED for fault in FAULTS]


@pytest.mark.parametrize(("truth", "key", "fault"), CASES, indirect=["truth"])
def test_damage_is_named_and_never_handed_out(truth, key, fault):
    with restored(truth.root):
        FAULTS[fault](truth.root / key, truth.root / _other(key))
        named = problems_of(truth.root)
        what = key.removesuffix("/c.0") if key.startswith("shards") else key
        assert any(what in text for text in named), named
        dependents = _dependents(_table(truth), key, fault)
        for name, operation in OPERATIONS.items():
            if name in dependents:
                with pytest.raises(_expected_error(key, fault)):
                    operation(truth)
            elif name in ENOUGH or not key.endswith("zarr.json"):
                operation(truth)
    assert problems_of(truth.root) == []


def _table(truth: Truth) -> dict[str, set[str]]:
    return DEPENDENTS | (QUANTISED if (truth.root / HOOK / "error").exists() else {})


def _dependents(of: dict[str, set[str]], key: str, fault: str) -> set[str]:
    """A swap damages two objects, of two kinds where there is no second of the first."""
    return of[key] | (of.get(_other(key), set()) if fault == "swap" else set())


def _expected_error(key: str, fault: str) -> type[Exception] | tuple[type[Exception], ...]:
    if key == f"{HOOK}/ledger/c.0.1" and fault == "delete":
        return (
            UncommittedError,
            AssertionError,
        )  # statistics are of what is committed: they count fewer rows
    if key in ("zarr.json", f"{HOOK}/zarr.json") and fault == "delete":
        return NotFoundError
    return DamageError


def test_statistics_say_how_many_rows_they_are_of(truth):
    with restored(truth.root):
        (truth.root / f"{HOOK}/ledger/c.0.1").unlink()
        found = actcache.open(truth.root).stats(split=None)
        assert {s.n_rows for s in found.values()} == {int(truth.keep[[*range(4), *range(8, 12)]].sum())}


def test_every_byte_of_a_ledger_record_counts_but_who_wrote_it(truth):
    path = truth.root / f"{HOOK}/ledger/c.0.1"
    data = path.read_bytes()
    start, end = data.index(b'"producer":{'), data.index(b"}", data.index(b'"producer":{'))
    before = Catalog(LocalObjects(truth.root)).capture("resid_post").record(1)
    with restored(truth.root):
        for i in range(len(data)):
            damaged = bytearray(data)
            damaged[i] ^= 1
            path.write_bytes(damaged)
            catalog = Catalog(LocalObjects(truth.root)).capture("resid_post")
            if start < i < end:  # in the record's `producer`, which is no part of what was committed
                with suppress(DamageError):
                    assert catalog.record(1).digest == before.digest
                continue
            with pytest.raises(DamageError, match=f"{HOOK}/ledger/c.0.1"):
                catalog.record(1)
        started = time.perf_counter()
        for i in range(8):  # how many strings, and how long: nothing may be made of that size
            path.write_bytes(data[:i] + bytes([data[i] ^ 0x80]) + data[i + 1 :])
            with pytest.raises(DamageError, match=f"{HOOK}/ledger/c.0.1"):
                Catalog(LocalObjects(truth.root)).capture("resid_post").record(1)
        assert time.perf_counter() - started < 5


def test_every_byte_of_the_shard_table_counts(truth):
    path = truth.root / "shards/c.0"
    data = path.read_bytes()
    texts_end = len(data.rstrip(b"\0"))
    with restored(truth.root):
        for i in [*range(0, texts_end, 7), texts_end, (texts_end + len(data)) // 2, len(data) - 1]:
            for bit in (1, 0x80):
                damaged = bytearray(data)
                damaged[i] ^= bit
                path.write_bytes(damaged)
                with pytest.raises(DamageError, match="shard"):
                    _ = Catalog(LocalObjects(truth.root)).shards
        path.write_bytes(data + b"\0")
        with pytest.raises(DamageError, match="shard"):
            _ = Catalog(LocalObjects(truth.root)).shards


def _edited(path: Path, edit: Callable[[dict], None]) -> None:
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_text(json.dumps(document))


PLAN_EDITS = {
    "seed": lambda p: p["request"].update(seed=1),
    "grid": lambda p: p["grid"].update(rows_per_chunk=4),
    "n_kept": lambda p: p.update(n_kept=p["n_kept"] + 1),
    "version": lambda p: p.update(actcache_version="other"),
    "metadata": lambda p: p["metadata"].update(tokens="0" * 64),
    "unknown": lambda p: p.update(surprise=1),
    "missing": lambda p: p.pop("text"),
    "type": lambda p: p["grid"].update(seq_len="8"),
}


@pytest.mark.parametrize("name", PLAN_EDITS)
def test_an_edited_plan_is_refused(truth, name):
    with restored(truth.root):
        _edited(truth.root / "zarr.json", lambda d: PLAN_EDITS[name](d["attributes"]["actcache"]["plan"]))
        with pytest.raises(DamageError, match=r"zarr\.json"):
            actcache.open(truth.root)


@pytest.mark.parametrize("value", [None, 3, "text", [], {}, {"format": 1}, {"format": 1, "plan": None}])
def test_a_plan_of_another_shape_is_refused(truth, value):
    with restored(truth.root):
        _edited(truth.root / "zarr.json", lambda d: d["attributes"].update(actcache=value))
        with pytest.raises((DamageError, UsageError)):
            actcache.open(truth.root)


def test_a_plan_edited_with_its_digest_no_longer_fits_its_captures(truth):
    def edit(document):
        found = document["attributes"]["actcache"]
        found["plan"]["request"]["seed"] = 1
        found["digest"] = digest_of(found["plan"])

    with restored(truth.root):
        _edited(truth.root / "zarr.json", edit)
        store = actcache.open(truth.root)
        with pytest.raises(DamageError, match=f"{HOOK}/zarr.json"):
            store.stats()
        assert any(f"{HOOK}/zarr.json" in text for text in problems_of(truth.root))


CAPTURE_EDITS = {
    "layers": lambda c: c.update(layers=[0, 2]),
    "dtype": lambda c: c.update(dtype="float16"),
    "codec": lambda c: c.update(codec="lz4"),
    "width": lambda c: c.update(width=2),
    "missing": lambda c: c.pop("hook"),
}


@pytest.mark.parametrize("name", CAPTURE_EDITS)
def test_an_edited_capture_is_refused(truth, name):
    with restored(truth.root):
        _edited(
            truth.root / HOOK / "zarr.json",
            lambda d: CAPTURE_EDITS[name](d["attributes"]["actcache"]["capture"]),
        )
        for operation in (_read, _stats, _stream_rows):
            with pytest.raises(DamageError, match=f"{HOOK}/zarr.json"):
                operation(truth)
        assert any(f"{HOOK}/zarr.json" in text for text in problems_of(truth.root))


def test_another_format_says_so(truth):
    with restored(truth.root):
        _edited(truth.root / "zarr.json", lambda d: d["attributes"]["actcache"].update(format=2))
        with pytest.raises(UsageError, match="format 2; this actcache reads format 1"):
            actcache.open(truth.root)


@pytest.mark.parametrize("key", ["zarr.json", f"{HOOK}/zarr.json"])
@pytest.mark.parametrize("change", [{"zarr_format": 2}, {"node_type": "array"}])
def test_what_others_read_in_a_group_is_checked_too(truth, key, change):
    with restored(truth.root):
        _edited(truth.root / key, lambda d: d.update(change))
        assert any(text.startswith(f"{key}:") for text in problems_of(truth.root))


def test_the_ledger_of_another_capture_is_refused(tmp_path):
    """Two captures of one plan, of equal shape: their records and rows cannot stand for each other."""
    truth = write_store(tmp_path / "s.zarr", hooks=("resid_post", "resid_pre"), codec="none", drop=0.0)
    for name in ("ledger/c.0.1", "rows/c.0.1.0"):
        with restored(truth.root):
            _swap(truth.root / "acts/resid_post" / name, truth.root / "acts/resid_pre" / name)
            with pytest.raises(DamageError):
                _read(truth)
            named = problems_of(truth.root)
            for hook in ("resid_post", "resid_pre"):
                assert any(f"acts/{hook}/{name}" in text for text in named)


def test_all_damage_is_found_not_just_the_first(truth):
    damaged = [
        f"{HOOK}/rows/c.0.0.0",
        f"{HOOK}/rows/c.0.2.0",
        "tokens/c.1.0",
        f"{HOOK}/norm/c.0.2",
        "keep/zarr.json",
    ]
    with restored(truth.root):
        for key in damaged:
            _flip(truth.root / key, truth.root)
        named = problems_of(truth.root)
        for key in damaged:
            assert any(text.startswith(key) for text in named), key


def test_a_lost_record_is_mended_by_committing_again(tmp_path):
    """The rows are adopted as they are."""
    truth = write_store(tmp_path / "s.zarr")
    rows = (truth.root / f"{HOOK}/rows/c.0.1.0").stat().st_ino
    (truth.root / f"{HOOK}/ledger/c.0.1").unlink()
    assert any(f"{HOOK}/ledger/c.0.1" in text for text in problems_of(truth.root))
    commit_shards(truth, [1])
    assert problems_of(truth.root) == []
    assert (truth.root / f"{HOOK}/rows/c.0.1.0").stat().st_ino == rows
    _read(truth)
