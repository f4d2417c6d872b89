"""`build`: what it stores is what the model says; what it cannot do it says before it touches anything."""

import errno
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import (
    CorpusError,
    DamageError,
    DiskFullError,
    NonFiniteError,
    PlanMismatchError,
    UsageError,
)
from actcache.producer import plan as plan_module
from actcache.producer.summary import BuildReporter
from actcache.store import codec as codec_module
from actcache.store.arrays import NO_DOCUMENT
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.statistics import moments_of
from actcache.store.verify import find_problems
from tests.conftest import (
    SEPARATOR,
    Kit,
    all_files,
    make_decoder,
    read_texts,
    small_settings,
    train_tokenizer,
    write_corpus,
    write_store,
)

pytestmark = pytest.mark.usefixtures("fast_disk")


def snapshot(root):
    """Names, bytes and modification times of everything."""
    return {
        p.relative_to(root): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in root.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("hooks", [("resid_post",), ("resid_pre", "mlp_out")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_what_the_model_says(make_store, tmp_path, hooks, dtype):
    """The same batches through the model again, vector for vector, to the bit; a short last batch and shard included."""
    root = make_store(tmp_path, hooks=hooks, dtype=dtype, n_tokens=21 * 16, batch_size=3)
    store, decoder = actcache.open(root), make_decoder()
    grid = store.plan.grid
    assert (grid.n_sequences, grid.n_shards) == (21, 3)
    for shard in range(grid.n_shards):
        sequences = grid.sequences_of(shard)
        for start in range(sequences.start, sequences.stop, 3):
            chosen = slice(start, min(start + 3, sequences.stop))
            ids = torch.from_numpy(store.tokens[chosen].astype(np.int64))
            said = decoder.capture(ids, dict.fromkeys(hooks, (0, 1)))
            for (hook, layer), acts in said.items():
                found = store.read(hook=hook, layer=layer, sequences=chosen)
                assert torch.equal(found, acts.to(found.dtype))
    assert find_problems(Catalog(LocalObjects(root)), threads=1) == []


def test_all_captures_are_aligned(make_store, tmp_path):
    """One token, one row number, in every capture: resid_pre + attn_out + mlp_out = resid_post."""
    hooks = ("attn_out", "mlp_out", "resid_post", "resid_pre")
    store = actcache.open(make_store(tmp_path, hooks=hooks, dtype="float32"))
    for layer in (0, 1):
        of = {hook: store.read(hook=hook, layer=layer) for hook in hooks}
        torch.testing.assert_close(of["resid_pre"] + of["attn_out"] + of["mlp_out"], of["resid_post"])


def test_every_document_is_on_one_side(make_store, tmp_path):
    store = actcache.open(make_store(tmp_path))
    grid = store.plan.grid
    assert grid.n_holdout_shards == 1
    held_out = set(np.unique(store.document[: grid.n_holdout_sequences])) - {NO_DOCUMENT}
    trained = set(np.unique(store.document[grid.n_holdout_sequences :])) - {NO_DOCUMENT}
    assert held_out
    assert trained
    assert not held_out & trained
    for split, documents in (("holdout", held_out), ("train", trained)):
        with store.stream(batch_size=64, split=split) as stream:
            for batch in stream:
                assert set(batch.document.tolist()) <= documents


def test_tokens_lead_back_to_the_text(kit, make_store, tmp_path):
    store, texts = actcache.open(make_store(tmp_path)), list(kit.corpus.sources[0].documents())
    separator = kit.tokenizer.eos_token_id
    for sequence in range(0, store.plan.grid.n_sequences, 5):
        tokens, document = store.tokens[sequence], store.document[sequence]
        for number in np.unique(document):
            piece = [int(t) for t in tokens[document == number] if t != separator]
            assert kit.tokenizer.decode(piece) in texts[number]
        assert np.array_equal(store.keep[sequence], tokens != separator)


def test_a_whole_corpus_ends_in_padding(make_store, tmp_path):
    """With no number of tokens everything is stored; what is left over is padding, never stored and never streamed."""
    store = actcache.open(make_store(tmp_path, n_tokens=None, seq_len=24))
    grid = store.plan.grid
    padding = store.document == NO_DOCUMENT
    assert padding.any()
    assert not store.keep[padding].any()
    assert padding[: grid.n_holdout_sequences].any(), "the holdout is filled up to whole shards"
    assert store.n_tokens == (~padding).sum() == store.plan.text.n_tokens
    is_whole = ~padding.any(1)
    for shard in range(grid.n_shards):
        sequences = [s for s in grid.sequences_of(shard) if is_whole[s]]
        assert torch.isfinite(store.read(layer=1, sequences=sequences)).all()
    with pytest.raises(UsageError, match="padding"):
        store.read(layer=0, sequences=int(np.flatnonzero(~is_whole)[0]))
    with store.stream(batch_size=50) as stream:
        n = sum(len(batch) for batch in stream)
    assert n == 2 * store.keep[grid.n_holdout_sequences :].sum()
    assert store.n_kept == store.keep.sum()


def test_excluded_positions_are_stored_and_not_kept(make_store, tmp_path):
    store = actcache.open(make_store(tmp_path, exclude_first=2))
    assert not store.keep[:, :2].any()
    assert torch.isfinite(store.read(layer=0, positions=slice(0, 2))).all()
    assert store.stats(split=None)[0].n_rows == store.keep.sum()


# The same command again.


def test_a_finished_store_is_left_as_it_is(kit, make_store, tmp_path):
    root = make_store(tmp_path)
    before = snapshot(root)
    summary = kit.build(small_settings(root))
    assert summary.was_complete
    assert (summary.n_built, summary.n_adopted, summary.n_tokens) == (0, 0, 0)
    assert snapshot(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ["store.zarr"]


@pytest.mark.parametrize("codec", ["zstd", "uint8"])
def test_the_store_does_not_depend_on_threads_place_or_time(kit, make_store, tmp_path, codec):
    root = make_store(tmp_path, codec=codec)
    other = tmp_path / "elsewhere" / "other name.zarr"
    kit.build(small_settings(other, codec=codec), encode_threads=3)
    assert all_files(other) == all_files(root)
    shutil.move(root, tmp_path / "moved.zarr")
    assert kit.build(small_settings(tmp_path / "moved.zarr", codec=codec)).was_complete


@pytest.mark.parametrize("lost", [[0], [2], [0, 1, 2]])
def test_lost_shards_are_built_again(kit, make_store, tmp_path, lost):
    root = make_store(tmp_path)
    whole = all_files(root)
    for shard in lost:
        for path in [*root.glob(f"acts/*/ledger/c.0.{shard}"), *root.glob(f"acts/*/rows/c.0.{shard}.0")]:
            path.unlink()
    shards: list[int] = []
    summary = kit.build(small_settings(root), reporter=BuildReporter(on_shard=shards.append))
    assert (summary.n_built, summary.n_adopted) == (len(lost), 0)
    assert shards == lost
    assert summary.n_tokens == len(lost) * 8 * 16
    assert all_files(root) == whole


SIDES = {
    "zstd": ["norm/c.0.1", "moments/c.1.0.0.0", "totals/c.1.0.0"],
    "uint8": ["norm/c.0.1", "scale/c.0.1.0", "offset/c.0.1.0", "exact/c.0.1.0", "error/c.1.0.0.0"],
}


@pytest.mark.parametrize("with_sides", [True, False])
@pytest.mark.parametrize("codec", ["zstd", "uint8"])
def test_rows_without_a_record_are_adopted_without_the_model(kit, make_store, tmp_path, codec, with_sides):
    """Everything else is found again from the object of rows, the error of quantising included."""
    root = make_store(tmp_path, codec=codec, exclude_first=2)
    whole = all_files(root)
    for name in ["ledger/c.0.1", *([] if with_sides else SIDES[codec])]:
        (root / "acts/resid_post" / name).unlink()
    summary = kit.build(small_settings(root, codec=codec, exclude_first=2))
    assert (summary.n_built, summary.n_adopted, summary.n_tokens) == (0, 1, 0)
    assert all_files(root) == whole


def test_exact_rows_left_behind_by_another_version_are_taken_and_wrong_ones_refused(
    kit, make_store, tmp_path, monkeypatch
):
    """The same rows compressed to other bytes describe the codes beside them; other rows, or damage, do not."""
    chosen = {"codec": "uint8", "exclude_first": 2}
    root = make_store(tmp_path, **chosen)
    whole, exact = all_files(root), root / "acts/resid_post/exact"
    with monkeypatch.context() as patch:
        patch.setattr(codec_module.Codec, "blosc_settings", _other_settings)
        patch.setattr(codec_module, "shuffled_zstd", lambda _numbers: None)
        kit.build(small_settings(tmp_path / "other.zarr", **chosen))
    theirs = (tmp_path / "other.zarr/acts/resid_post/exact/c.0.1.0").read_bytes()
    mine = (exact / "c.0.1.0").read_bytes()
    assert theirs != mine
    record = root / "acts/resid_post/ledger/c.0.1"
    record.unlink()
    (exact / "c.0.1.0").write_bytes(theirs)
    assert kit.build(small_settings(root, **chosen)).n_adopted == 1
    assert find_problems(Catalog(LocalObjects(root)), threads=1) == []
    for wrong, message in (
        ((exact / "c.0.2.0").read_bytes(), "does not describe the rows"),
        (mine[:50] + bytes([mine[50] ^ 1]) + mine[51:], "left behind damaged"),
        (b"", "left behind damaged"),
    ):
        record.unlink(missing_ok=True)
        (exact / "c.0.1.0").write_bytes(wrong)
        with pytest.raises(DamageError, match=message):
            kit.build(small_settings(root, **chosen))
    (exact / "c.0.1.0").unlink()
    kit.build(small_settings(root, **chosen))
    assert all_files(root) == whole


def _other_settings(codec):
    return {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": codec.n_bytes}


@pytest.mark.parametrize("codec", ["zstd", "uint8"])
def test_damaged_rows_without_a_record_are_built_again(kit, make_store, tmp_path, codec):
    root = make_store(tmp_path, codec=codec)
    whole = all_files(root)
    (root / "acts/resid_post/ledger/c.0.1").unlink()
    rows = root / "acts/resid_post/rows/c.0.1.0"
    data = bytearray(rows.read_bytes())
    data[40] ^= 1
    rows.write_bytes(data)
    assert kit.build(small_settings(root, codec=codec)).n_built == 1
    assert all_files(root) == whole


def test_other_arguments_are_refused_by_name(kit, make_store, tmp_path):
    root = make_store(tmp_path)
    before = snapshot(root)
    changes = {
        "seed": {"seed": 1},
        "seq_len": {"seq_len": 8},
        "n_tokens": {"n_tokens": 4 * 8 * 16},
        "holdout_frac": {"holdout_frac": 0.4},
        "exclude_first": {"exclude_first": 1},
        "batch_size": {"batch_size": 5},
        "sequences_per_shard": {"sequences_per_shard": 4},
        "rows_per_chunk": {"rows_per_chunk": 16},
        "shard_memory_bytes": {"shard_memory_bytes": 1 << 20},
        "bos": {"bos": True},
        "packing": {"packing": "document"},
        "isolate_documents": {"isolate_documents": True},
        "allow_short": {"allow_short": True},
        "corpus.sources.separator_id": {"separator": "none"},
        "capture resid_post.layers": {"layers": (0,)},
        "capture resid_post.dtype": {"dtype": "float32"},
        "capture resid_post.codec": {"codec": "none"},
    }
    for name, change in changes.items():
        with pytest.raises(PlanMismatchError, match=rf"{name}\b.* is .* there and .* here"):
            kit.build(small_settings(root, **change))
    with pytest.raises(PlanMismatchError, match=r"capture mlp_in is not there \(--add adds one\)"):
        kit.build(small_settings(root, hooks=("resid_post", "mlp_in")))
    with pytest.raises(PlanMismatchError) as both:
        kit.build(small_settings(root, seed=1, codec="none"))
    assert "seed is 0 there and 1 here" in str(both.value)
    assert "capture resid_post.codec is 'zstd' there and 'none' here" in str(both.value)
    assert "seq_len" not in str(both.value)
    assert snapshot(root) == before


def test_another_model_tokenizer_or_corpus_is_refused(kit, make_store, tmp_path):
    root = make_store(tmp_path)
    before = snapshot(root)
    with pytest.raises(PlanMismatchError, match=r"model\.digest"):
        kit.build(small_settings(root), make_decoder(seed=1))
    with pytest.raises(PlanMismatchError, match=r"model\.name is 'random-neox' there and 'b' here"):
        kit.build(small_settings(root), make_decoder(name="b"))
    longer = Kit(kit.tokenizer, write_corpus(tmp_path / "longer", read_texts(25, 120)))
    with pytest.raises(PlanMismatchError, match=r"corpus\.sources\.files"):
        longer.build(small_settings(root))
    other = train_tokenizer()
    other.add_tokens(["quite-another-token"])
    with pytest.raises(PlanMismatchError, match=r"tokenizer\.digest"):
        Kit(other, kit.corpus).build(small_settings(root))
    assert snapshot(root) == before


# What is refused before anything is written.


def test_a_folder_that_is_no_store_is_not_touched(kit, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=r"not a store .* Nothing was touched"):
        kit.build(small_settings(out))
    file = tmp_path / "file.zarr"
    file.write_text("mine too")
    with pytest.raises(UsageError, match="not a store"):
        kit.build(small_settings(file))
    assert snapshot(tmp_path) == before | snapshot(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.zarr", "thesis"]


def test_an_empty_folder_is_as_good_as_none(kit, make_store, tmp_path):
    out = tmp_path / "empty.zarr"
    out.mkdir()
    kit.build(small_settings(out))
    assert all_files(out) == all_files(make_store(tmp_path))


def test_a_folder_that_appears_meanwhile_is_not_touched(kit, tmp_path):
    out = tmp_path / "s.zarr"

    def appear(name, key):
        if name == "rename":
            out.mkdir()
            (out / "mine.txt").write_text("mine")

    with pytest.raises(UsageError, match="appeared while the plan was written"):
        kit.build(small_settings(out), on_operation=appear)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_an_error_after_the_plan_appeared_does_not_take_it_away(kit, tmp_path):
    """Another build may be filling it already."""
    out = tmp_path / "s.zarr"
    renamed = []

    def fail(name, key):
        renamed.append(name)
        if "rename" in renamed and name == "fsync directory":
            raise OSError(errno.EIO, "the disk hiccups")

    with pytest.raises(OSError, match="hiccups"):
        kit.build(small_settings(out), on_operation=fail)
    assert (out / "zarr.json").exists()
    kit.build(small_settings(out))
    assert actcache.open(out).is_complete


def test_a_corpus_that_is_too_short(kit, tmp_path):
    with pytest.raises(CorpusError, match="too short"):
        kit.build(small_settings(tmp_path / "s.zarr", n_tokens=1_000_000))
    assert list(tmp_path.iterdir()) == []


def test_a_holdout_that_leaves_nothing_to_train_on(kit, tmp_path):
    with pytest.raises(UsageError, match="none is left to train"):
        kit.build(small_settings(tmp_path / "s.zarr", n_tokens=8 * 16))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_would_keep_nothing(tmp_path):
    special = Kit(train_tokenizer(), write_corpus(tmp_path / "corpus", [SEPARATOR] * 500))
    with pytest.raises(UsageError, match=r"no row of the \w+ part would be kept"):
        special.build(small_settings(tmp_path / "s.zarr"))
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("change", [{"seq_len": 0}, {"n_tokens": 0}, {"exclude_first": 16}, {"hooks": ()}])
def test_settings_that_cannot_be_used(tmp_path, change):
    with pytest.raises(UsageError):
        small_settings(tmp_path / "s.zarr", **change)


# A full disk.


@pytest.mark.parametrize("n_tokens", [3 * 8 * 16, None])
def test_a_disk_too_small_is_known_before_anything_is_written(kit, tmp_path, monkeypatch, n_tokens):
    monkeypatch.setattr(plan_module, "free_bytes", lambda _path: 1000)
    with pytest.raises(DiskFullError, match="Nothing was written"):
        kit.build(small_settings(tmp_path / "s.zarr", n_tokens=n_tokens))
    assert list(tmp_path.iterdir()) == []


@contextmanager
def full_after(n_calls: int, folder: Path):
    """Every call that takes room in `folder` fails from the n-th on, until `grow` is called, which is what is given."""
    left = [float(n_calls)]

    def limited(call, takes_room):
        def limited_call(*args, **kwargs):
            if takes_room(*args):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return limited_call

    def is_inside(path, *_more) -> bool:
        at = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(path)
        return folder in at.parents

    with pytest.MonkeyPatch.context() as patch:
        for name in ("writev", "fsync", "link", "rename", "mkdir"):
            patch.setattr(os, name, limited(getattr(os, name), is_inside))
        is_new = lambda path, flags=0, *_more: flags & os.O_CREAT and is_inside(path)  # noqa: E731
        patch.setattr(os, "open", limited(os.open, is_new))
        yield lambda: left.__setitem__(0, float("inf"))


def test_a_disk_that_fills_up_at_any_step(kit, make_store, tmp_path):
    """At every write, sync, link, rename, new file and new folder: of planning every eleventh, of filling each third."""
    decoder, whole = make_decoder(), all_files(make_store(tmp_path))
    states, said, i = [], [], 0
    while True:
        out = tmp_path / str(i) / "s.zarr"
        out.parent.mkdir()
        with full_after(i, out.parent) as grow:
            try:
                kit.build(small_settings(out), decoder)
            except DiskFullError as error:
                said.append("run the same command again" in str(error))
                states.append(check_what_a_full_disk_left(out))
            else:
                break
            grow()
            kit.build(small_settings(out), decoder)
        assert all_files(out) == whole
        assert [p.name for p in out.parent.iterdir()] == ["s.zarr"]
        i += 3 if states[-1].endswith("filling") else 11
    assert states == sorted(states)
    assert {"planning", "filling"} == {state.split()[1] for state in states}
    assert len(states) > 30
    assert all(said)


def check_what_a_full_disk_left(out) -> str:
    """Nothing of a plan, or a store in which only what is missing is missing."""
    if not out.exists():
        assert list(out.parent.iterdir()) == []
        return "1 planning"
    for problem in find_problems(Catalog(LocalObjects(out)), threads=1):
        assert "a build was stopped" in problem.what
    assert [p.name for p in out.parent.iterdir()] == ["s.zarr"]
    assert not (out / ".partial").exists()
    return "2 filling"


@contextmanager
def small_disk(folder, n_bytes: int):
    """A file system of its own where that is allowed, else a disk that counts what is done to it; and what makes it grow."""
    folder.mkdir()

    def mount(options: str):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if mount(f"size={n_bytes}"):
        try:
            yield lambda: mount(f"remount,size={n_bytes + (64 << 20)}")
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        with full_after(n_bytes // 1024, folder) as grow:
            yield grow


@pytest.mark.parametrize("kibibytes", [100, 200, 300, 400, 600, 1000])
def test_a_small_disk_fills_up(kit, make_store, tmp_path, monkeypatch, kibibytes):
    """One store after another until there is no room; with more room the last goes on as if nothing had happened."""
    monkeypatch.setattr(
        plan_module, "free_bytes", lambda _path: 1 << 40
    )  # the forecast would say so at the start
    decoder, whole = make_decoder(), all_files(make_store(tmp_path))
    disk = tmp_path / "small"
    with small_disk(disk, kibibytes << 10) as grow:
        out = fill_with_stores(kit, decoder, disk)
        check_what_a_full_disk_left(out)
        for store in disk.glob("*/s.zarr"):
            assert store == out or all_files(store) == whole
        grow()
        kit.build(small_settings(out), decoder)
        assert all_files(out) == whole


def fill_with_stores(kit, decoder, disk):
    """Build stores until the disk is full; returns the one that did not fit."""
    for n in range(1000):
        out = disk / str(n) / "s.zarr"
        try:
            kit.build(small_settings(out), decoder)
        except DiskFullError:
            return out
    raise AssertionError("the disk was never full")


# Numbers that are none.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nan_is_named_and_never_committed(kit, tmp_path, dtype):
    """One poisoned embedding: the error names a layer, position and sequence in which that token is."""
    out, poisoned = tmp_path / "s.zarr", 70
    decoder = make_decoder()
    decoder.base.get_input_embeddings().weight[poisoned] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"NaN in resid_post, layer \d, sequence \d+, position \d+"
    ) as raised:
        kit.build(small_settings(out, dtype=dtype), decoder)
    words = str(raised.value).replace(",", "").replace(":", "").split()
    layer, sequence, position = (
        int(words[words.index(name) + 1]) for name in ("layer", "sequence", "position")
    )
    store = actcache.open(out)
    assert layer == 0
    assert (
        store.tokens[sequence] == poisoned
    ).any()  # attention's masked zeros times NaN are NaN: before it too
    assert 0 <= position < store.plan.grid.seq_len
    shard = sequence // store.plan.grid.sequences_per_shard
    assert shard not in store.committed()
    assert not (out / f"acts/resid_post/ledger/c.0.{shard}").exists()
    with pytest.raises(NonFiniteError):
        kit.build(small_settings(out, dtype=dtype), decoder)


def test_float16_overflow_is_infinity(kit, tmp_path):
    decoder = make_decoder()
    decoder.base.get_input_embeddings().weight.mul_(1e7)
    with pytest.raises(NonFiniteError, match="infinity in resid_post, layer 0"):
        kit.build(small_settings(tmp_path / "s.zarr", dtype="float16"), decoder)
    kit.build(small_settings(tmp_path / "b.zarr", dtype="bfloat16"), decoder)


# Statistics.


def check_statistics(found, kept: np.ndarray) -> None:
    """Against float64 numpy in two passes, to 1e-6 of each number (of the spread, for a mean near 0)."""
    mean = kept.mean(0)
    spread = kept.std(0)
    assert found.n_rows == len(kept)
    assert (np.abs(found.mean - mean) <= 1e-6 * (np.abs(mean) + spread)).all()
    np.testing.assert_allclose(found.variance, ((kept - mean) ** 2).mean(0), rtol=1e-6, atol=1e-12)
    assert np.array_equal(found.least, kept.min(0))
    assert np.array_equal(found.greatest, kept.max(0))
    norms = np.linalg.norm(kept, axis=1)
    np.testing.assert_allclose([found.norm_mean, found.norm_max], [norms.mean(), norms.max()], rtol=1e-6)


@pytest.mark.parametrize("spike", [None, 20_000.0])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_statistics_of_any_subset_of_shards(tmp_path, spike, offset):
    """Position 0 of a real model holds massive activations: they may not cost the rest its digits."""
    rng = np.random.default_rng(0)
    acts = rng.standard_normal((2, 48, 40, 6)).astype(np.float32) + np.float32(offset)
    if spike:
        acts[:, :, 0, 2] = spike
    settings_ = {"n_sequences": 48, "seq_len": 40, "per_shard": 12, "rows_per_chunk": 64, "width": 6}
    for n, shards in enumerate([[0], [1, 3], [0, 1, 2, 3]]):
        truth = write_store(
            tmp_path / f"{n}.zarr", **settings_, dtype="float32", acts=acts, commit=shards, n_padding=7
        )
        store = actcache.open(truth.root)
        in_shards = np.isin(np.arange(48) // 12, shards)
        for split in (None, "train", "holdout"):
            chosen = truth.keep & in_shards[:, None] & np.isin(np.arange(48), truth.sequences(split))[:, None]
            for layer, found in store.stats(split=split).items():
                if chosen.any():
                    check_statistics(found, truth.floats()[truth.layers.index(layer)][chosen])
                else:
                    assert found.n_rows == 0


def test_statistics_of_a_built_store(make_store, tmp_path):
    store = actcache.open(make_store(tmp_path, exclude_first=1, n_tokens=None))
    grid = store.plan.grid
    for split, sequences in (
        ("train", range(grid.n_holdout_sequences, grid.n_sequences)),
        ("holdout", range(grid.n_holdout_sequences)),
    ):
        for layer, found in store.stats(split=split).items():
            kept = [
                store.read(layer=layer, sequences=q, positions=np.flatnonzero(store.keep[q]).tolist())[0]
                for q in sequences
                if store.keep[q].any()
            ]
            check_statistics(found, torch.cat(kept).double().numpy())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 700),
    scale=st.sampled_from([1e-20, 1.0, 1e15]),
    offset=st.sampled_from([0.0, 1.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_moments_keep_their_digits(n, scale, offset, seed):
    """Means a thousand spreads away, and numbers at the ends of float32."""
    rng = np.random.default_rng(seed)
    x = ((rng.standard_normal((n, 3)) + offset) * scale).astype(np.float32)
    found, exact = moments_of(x, "float32"), x.astype(np.float64)
    mean = exact.mean(0)
    assert (np.abs(found.mean - mean) <= 1e-6 * (exact.std(0) + 1e-3 * np.abs(mean))).all()
    expected = ((exact - mean) ** 2).sum(0)
    np.testing.assert_allclose(found.m2, expected, rtol=2e-4 if offset == 1000.0 else 2e-6, atol=1e-300)
