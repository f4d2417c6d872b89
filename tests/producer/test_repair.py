"""Damaged shards are rebuilt from the stored tokens: the same rows, nothing else touched, at no instant less than before."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem

import actcache
from actcache.errors import DamageError, PlanMismatchError, UsageError
from actcache.producer.repair import RepairSummary, repair
from actcache.store.arrays import side_key
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.schema import LEDGER_GENERATIONS
from actcache.store.verify import find_problems
from tests.conftest import all_files, as_bits, make_decoder, no_sync, write_store
from tests.producer.test_crash import Died, Mortal

pytestmark = pytest.mark.usefixtures("fast_disk")
HOOKS = ("resid_post", "mlp_out")
SIDES = {"zstd": ["norm", "moments", "totals"]}
SIDES["uint8"] = [*SIDES["zstd"], "scale", "offset", "exact", "error"]


@pytest.fixture(params=["zstd", "uint8"])
def codec(request) -> str:
    return request.param


@pytest.fixture
def whole(make_store, tmp_path, codec) -> Path:
    """Three shards of two captures."""
    return make_store(tmp_path, hooks=HOOKS, codec=codec)


def key_of(root: Path, name: str, shard: int, hook: str = "resid_post", generation: int = 0) -> Path:
    spec = Catalog(LocalObjects(root)).captures[hook].arrays[name]
    return root / (spec.key(0, shard) if name == "ledger" else side_key(spec, shard, generation))


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3 if at is None else at] ^= 1
    path.write_bytes(data)


FAULTS = {
    "flipped": flip,
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
}


def mend(root: Path, decoder=None, **options) -> RepairSummary:
    with no_sync():
        return repair(str(root), lambda _catalog: decoder or make_decoder(), **options)


def problems_of(root: Path) -> list:
    return find_problems(Catalog(LocalObjects(root)), threads=1)


def rows_of(root: Path, hook: str, shard: int) -> np.ndarray:
    """[l, q, t, d] bits; DamageError where they are damaged."""
    store = actcache.open(root)
    sequences = store.plan.grid.sequences_of(shard)
    chosen = slice(sequences.start, sequences.stop)
    return np.stack(
        [as_bits(store.read(hook=hook, layer=x, sequences=chosen)) for x in store.layers_of(hook)]
    )


def all_rows(root: Path) -> dict[tuple[str, int], np.ndarray]:
    return {(hook, shard): rows_of(root, hook, shard) for hook in HOOKS for shard in range(3)}


def without_generations(files: dict[str, bytes]) -> dict[str, bytes]:
    """What readers that know no ledger see: what stands under Zarr's names."""
    return {
        name: data
        for name, data in files.items()
        if "/ledger/c." not in name and not name.rsplit("/", 1)[-1].startswith("g")
    }


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_any_damage_of_a_shard_is_mended(whole, codec, fault):
    before, rows = all_files(whole), all_rows(whole)
    damaged = {("resid_post", 0): "rows", ("mlp_out", 2): "ledger"}
    damaged |= {("mlp_out", i % 2): name for i, name in enumerate(SIDES[codec][:2])}
    damaged |= {("resid_post", 1 + i % 2): name for i, name in enumerate(SIDES[codec][2:])}
    if fault == "missing":
        del damaged["mlp_out", 2]  # without its record a shard is not committed
    for (hook, shard), name in damaged.items():
        FAULTS[fault](key_of(whole, name, shard, hook))
    assert {(p.capture, p.shard) for p in problems_of(whole)} == set(damaged)
    done = mend(whole)
    assert (sorted(done.rebuilt), done.renamed, done.left) == (sorted(damaged), [], [])
    assert problems_of(whole) == []
    assert all(np.array_equal(found, rows[place]) for place, found in all_rows(whole).items())
    if fault != "missing":
        key_of(whole, "ledger", 2, "mlp_out").unlink()  # damaged still, and no longer in force
    after = all_files(whole)
    assert without_generations(after) == without_generations(before)
    for name in (name for name in before if "/ledger/c." in name):
        if ledger_place(name) in damaged:
            assert name.replace("c.0.", "c.1.") in after
        else:
            assert name.replace("c.0.", "c.1.") not in after
            assert after[name] == before[name]
    assert {name for name in after if "/g1." in name and "/rows/" in name} == {
        f"acts/{hook}/rows/g1.0.{shard}.0" for hook, shard in damaged
    }


def ledger_place(name: str) -> tuple[str, int]:
    parts = name.split("/")
    return parts[1], int(parts[3].split(".")[-1])


def test_a_whole_store_needs_no_model(whole):
    before = all_files(whole)

    def load(_catalog):
        raise AssertionError("loaded")

    done = repair(str(whole), load)
    assert (done.found, done.rebuilt, done.renamed, done.left, done.build) == ([], [], [], [], None)
    assert all_files(whole) == before


def test_a_repaired_shard_is_repaired_again_until_the_ledger_is_full(whole):
    rows, decoder = all_rows(whole), make_decoder()
    for generation in range(1, LEDGER_GENERATIONS):
        flip(key_of(whole, "rows", 1, generation=generation - 1))
        assert mend(whole, decoder).rebuilt == [("resid_post", 1)]
        assert problems_of(whole) == []
        names = sorted(p.name for p in (whole / "acts/resid_post/rows").glob("*.1.0"))
        assert names == ["c.0.1.0", f"g{generation}.0.1.0"], "nothing of the generations between is left"
    assert np.array_equal(rows_of(whole, "resid_post", 1), rows["resid_post", 1])
    (whole / "acts/resid_post/norm/g15.0.1").unlink()
    with pytest.raises(UsageError, match="15 times"):
        mend(whole, decoder)


def test_what_other_readers_see_is_mended_without_the_model(whole):
    flip(key_of(whole, "rows", 1))
    mend(whole)
    for name in ("rows", "norm"):
        path = key_of(whole, name, 1)
        data = path.read_bytes()
        path.unlink()  # both names are one file's: it would be damaged under the other too
        path.write_bytes(data[:-1])
    assert {p.is_copy for p in problems_of(whole)} == {True}
    rows_of(whole, "resid_post", 1)  # ours are right

    def load(_catalog):
        raise AssertionError("loaded")

    with no_sync():
        done = repair(str(whole), load)
    assert (done.rebuilt, done.renamed, done.left) == ([], [("resid_post", 1)], [])
    assert problems_of(whole) == []


def test_a_copy_of_a_repaired_store_is_whole(whole, tmp_path):
    """Copied with nothing but names and bytes, as to object storage: two names are two objects then."""
    before = np.asarray(zarr.open_array(whole / "acts/resid_post/rows", mode="r")[...])
    flip(key_of(whole, "rows", 1))
    mend(whole)
    shutil.copytree(whole, tmp_path / "copy.zarr")
    assert problems_of(tmp_path / "copy.zarr") == []
    after = np.asarray(zarr.open_array(tmp_path / "copy.zarr/acts/resid_post/rows", mode="r")[...])
    assert before.tobytes() == after.tobytes()


def test_a_record_of_another_generation_is_refused(whole):
    flip(key_of(whole, "rows", 1))
    mend(whole)
    ledger = whole / "acts/resid_post/ledger"
    (ledger / "c.1.1").write_bytes((ledger / "c.0.1").read_bytes())
    with pytest.raises(DamageError, match="generation 0"):
        rows_of(whole, "resid_post", 1)
    assert mend(whole).left == []
    assert problems_of(whole) == []


# Readers.


def test_readers_that_were_open_go_on_or_say_why_not(whole):
    """One with the old record in its memory reads the new objects under the old names: they are the same rows."""
    rows = rows_of(whole, "resid_post", 1)
    reader = actcache.open(whole)
    sequences = reader.plan.grid.sequences_of(1)
    chosen = slice(sequences.start, sequences.stop)
    reader.read(layer=0, sequences=chosen, hook="resid_post")
    flip(key_of(whole, "rows", 1))
    unlucky = actcache.open(whole)
    with pytest.raises(DamageError, match="actcache repair"):
        [unlucky.read(layer=x, sequences=chosen, hook="resid_post") for x in (0, 1)]
    mend(whole)
    for store in (reader, unlucky):
        found = np.stack([as_bits(store.read(layer=x, sequences=chosen, hook="resid_post")) for x in (0, 1)])
        assert np.array_equal(found, rows)
    assert reader.stats(hook="resid_post").keys() == {0, 1}


def test_readers_that_were_open_refuse_rows_that_came_out_otherwise(whole, monkeypatch):
    """Rebuilt by other arithmetic, in last bits: an open reader may not mix the two."""
    reader, key = actcache.open(whole), key_of(whole, "rows", 1)
    sequences = reader.plan.grid.sequences_of(1)
    reader.read(layer=0, sequences=sequences.start, hook="resid_post")
    key.unlink()
    monkeypatch.setattr("actcache.producer.repair.check_model", lambda _catalog, _decoder: None)
    mend(whole, make_decoder(seed=1))
    assert problems_of(whole) == []
    with pytest.raises(DamageError, match="open it again"):
        reader.read(layer=1, sequences=slice(sequences.start, sequences.stop), hook="resid_post")
    actcache.open(whole).read(layer=1, sequences=sequences.start, hook="resid_post")


# What it does not do.


def test_what_it_cannot_mend_is_left_and_said(whole):
    before = all_files(whole)
    flip(key_of(whole, "rows", 1))
    flip(whole / "tokens/c.1.0")
    flip(key_of(whole, "norm", 2))
    done = mend(whole)
    assert done.rebuilt == [("resid_post", 2)]
    assert {p.object for p in done.left} == {"tokens/c.1.0", "acts/resid_post/rows/c.0.1.0"}
    (whole / "tokens/c.1.0").write_bytes(before["tokens/c.1.0"])
    assert mend(whole).left == []
    assert problems_of(whole) == []


def test_another_model_is_refused(whole):
    flip(key_of(whole, "rows", 1))
    before = all_files(whole)
    with pytest.raises(PlanMismatchError, match="digest"):
        mend(whole, make_decoder(seed=1))
    assert all_files(whole) == before


def test_an_imported_store_is_refused(tmp_path):
    truth = write_store(tmp_path / "s.zarr", device="import")
    flip(truth.root / "acts/resid_post/rows/c.0.1.0")
    with pytest.raises(PlanMismatchError, match="actcache import"):
        mend(truth.root)


def test_a_url_is_refused(whole):
    MemoryFileSystem().pipe("/s.zarr/zarr.json", (whole / "zarr.json").read_bytes())
    with pytest.raises(UsageError, match="copy the store here"):
        repair("fsspec+memory://s.zarr", lambda _catalog: make_decoder())


# At any instant.


def damaged_store(whole: Path, out: Path) -> Path:
    shutil.copytree(whole, out)
    flip(key_of(out, "rows", 1))
    (key_of(out, "norm", 1, "mlp_out")).unlink()
    return out


def die_repairing(whole: Path, tmp_path: Path, every: int) -> None:
    """What was right stays right, what was damaged is so or right; the next repair makes it whole."""
    rows, decoder, witness = all_rows(whole), make_decoder(), Mortal()
    mend(damaged_store(whole, tmp_path / "w" / "s.zarr"), decoder, on_operation=witness)
    expected = all_files(tmp_path / "w" / "s.zarr")
    assert len(witness.operations) > 60
    for i, step in list(enumerate(witness.operations))[::every]:
        out = damaged_store(whole, tmp_path / str(i) / "s.zarr")
        mortal = Mortal(i)
        with pytest.raises(Died):
            mend(out, decoder, on_operation=mortal)
        for place in rows:
            with suppress(DamageError):
                assert np.array_equal(rows_of(out, *place), rows[place]), (i, step, place)
            assert place in (("resid_post", 1), ("mlp_out", 1)) or rows_of(out, *place).size
        assert mend(out, decoder).left == [], (i, step)
        assert problems_of(out) == [], (i, step)
        assert all_files(out) == expected, (i, step)
        shutil.rmtree(out.parent)


def test_dying_at_steps_of_a_repair(whole, codec, tmp_path):
    """`make soak` dies at them all."""
    die_repairing(whole, tmp_path, every=1 if codec == "zstd" else 5)


def test_two_repairs_at_once(whole, tmp_path):
    out, rows = damaged_store(whole, tmp_path / "d" / "s.zarr"), all_rows(whole)
    with ThreadPoolExecutor(2) as pool:
        done = [job.result() for job in [pool.submit(mend, out, make_decoder()) for _ in range(2)]]
    assert [d.left for d in done] == [[], []]
    assert problems_of(out) == []
    for place, found in rows.items():
        assert np.array_equal(rows_of(out, *place), found)
