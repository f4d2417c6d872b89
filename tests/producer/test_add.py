"""Captures added to a store that is there: the same bytes as if they had been asked for at once, nothing rewritten, at
whatever step it is stopped."""

import shutil

import pytest
import torch

import actcache
from actcache.errors import (
    DiskFullError,
    ModelError,
    NotFoundError,
    PlanMismatchError,
    UncommittedError,
    UsageError,
)
from actcache.producer import plan as plan_module
from actcache.producer.add import Addition, add_to_store
from actcache.producer.build import BuildReporter
from actcache.store import create as create_module
from actcache.store.create import CaptureRequest, add_capture
from actcache.store.disk import Disk
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.verify import find_problems
from tests.conftest import WIDTH, all_files, make_decoder, small_settings, write_store
from tests.producer.test_build import snapshot
from tests.producer.test_crash import Died, Mortal

MLP = Addition(hooks=("mlp_out",), layers=(0, 1))
UP = "layers.*.mlp.dense_h_to_4h:out"


@pytest.fixture(autouse=True)
def _fast(fast_disk):
    """No test here cuts the power."""


def add(root, addition=MLP, decoder=None, **options):
    return add_to_store(root, addition, decoder or make_decoder(), **options)


def problems(root):
    return find_problems(Catalog(LocalObjects(root)), threads=1)


@pytest.mark.parametrize(
    "extra", [{}, {"isolate_documents": True, "exclude_first": 1}], ids=["packed", "isolated"]
)
def test_added_captures_are_what_a_build_of_all_makes(kit, tmp_path, extra):
    hooks = ("resid_post", "mlp_out", UP)
    kit.build(small_settings(tmp_path / "all.zarr", hooks=hooks, **extra))
    kit.build(small_settings(tmp_path / "s.zarr", **extra))
    before = snapshot(tmp_path / "s.zarr")
    summary = add(tmp_path / "s.zarr", Addition(hooks=("mlp_out", UP), layers=(0, 1)))
    assert summary.n_built == 6
    assert all_files(tmp_path / "s.zarr") == all_files(tmp_path / "all.zarr")
    after = snapshot(tmp_path / "s.zarr")
    assert {name: after[name] for name in before} == before  # nothing that was there was touched
    assert problems(tmp_path / "s.zarr") == []
    again = add(tmp_path / "s.zarr", Addition(hooks=(UP, "mlp_out"), layers=(0, 1)))
    assert again.was_complete
    assert kit.build(
        small_settings(tmp_path / "s.zarr", **extra)
    ).was_complete  # its own command is content too
    assert snapshot(tmp_path / "s.zarr") == after


def test_more_layers_of_a_hook_are_a_capture_beside_it(kit, tmp_path):
    kit.build(small_settings(tmp_path / "all.zarr", hooks=("resid_post", "mlp_out")))
    kit.build(small_settings(tmp_path / "s.zarr", hooks=("resid_post", "mlp_out"), layers=(1,)))
    add(tmp_path / "s.zarr", Addition(hooks=("resid_post", "mlp_out"), layers=(0,)))
    store, everything = actcache.open(tmp_path / "s.zarr"), actcache.open(tmp_path / "all.zarr")
    assert store.hooks == ("mlp_out", "mlp_out.2", "resid_post", "resid_post.2")
    for hook in ("resid_post", "mlp_out"):
        assert (store.layers_of(hook), store.layers_of(f"{hook}.2")) == ((1,), (0,))
        for layer, name in ((1, hook), (0, f"{hook}.2")):
            assert torch.equal(store.read(layer=layer, hook=name), everything.read(layer=layer, hook=hook))
    assert add(tmp_path / "s.zarr", Addition(hooks=("resid_post",), layers=(0,))).was_complete
    with store.stream(hook=["resid_post.2", "mlp_out.2"], layers=(0,), batch_size=16) as stream:
        batch = next(iter(stream))
    for i in range(16):
        q, t = int(batch.sequence[i]), int(batch.position[i])
        for name in ("resid_post.2", "mlp_out.2"):
            assert torch.equal(
                batch.hooks[name][i], store.read(layer=0, hook=name, sequences=q, positions=t)[0, 0]
            )


# Stopped anywhere.


def test_it_may_die_at_any_step_and_goes_on(kit, make_store, tmp_path):
    base, decoder = make_store(tmp_path), make_decoder()
    witness = Mortal()
    whole = shutil.copytree(base, tmp_path / "whole" / "s.zarr")
    add(whole, MLP, decoder, on_operation=witness)
    expected = all_files(whole)
    renamed = witness.operations.index(("rename", "acts/mlp_out"))
    steps = [
        *range(0, renamed - 2, 3),
        *range(renamed - 2, renamed + 3),
        *range(renamed + 3, len(witness.operations), 12),
    ]
    assert renamed > 15
    there = set()
    for step in steps:
        root = shutil.copytree(base, tmp_path / str(step) / "s.zarr")
        with pytest.raises(Died):
            add(root, MLP, decoder, on_operation=Mortal(step))
        store = actcache.open(root)
        there.add(store.hooks)
        assert store.committed("resid_post") == [0, 1, 2]
        for problem in problems(root):
            assert "/ledger/" in problem.object, problem
            assert "a build was stopped at this shard" in problem.what, problem
        if "mlp_out" in store.hooks:
            for shard in set(range(3)) - set(store.committed("mlp_out")):
                with pytest.raises(UncommittedError):
                    store.read(layer=0, hook="mlp_out", sequences=8 * shard)
        add(root, MLP, decoder)
        assert all_files(root) == expected
        assert [path.name for path in root.parent.iterdir()] == ["s.zarr"]
        shutil.rmtree(root.parent)
    assert there == {("resid_post",), ("mlp_out", "resid_post")}


def test_two_that_add_the_same_at_once(make_store, tmp_path):
    """The other one comes in between the last look and the name: its capture is taken, its shards adopted."""
    root, whole = make_store(tmp_path), make_store(tmp_path / "w")
    add(whole)
    inner = []

    def interrupt(name, key):
        if name == "rename" and key == "acts/mlp_out" and not inner:
            inner.append(None)
            add(root)

    add(root, on_operation=interrupt)
    assert inner
    assert all_files(root) == all_files(whole)
    assert not (root / ".partial").exists()


def test_another_that_adds_something_else_under_the_name_is_noticed(make_store, tmp_path):
    root = make_store(tmp_path)

    def interrupt(name, key):
        if name == "rename" and key == "acts/mlp_out":
            asked = CaptureRequest(hook="mlp_out", layers=(0,), width=WIDTH, dtype="float32", codec="none")
            with Disk(root) as disk:
                add_capture(disk, Catalog(LocalObjects(root)).plan, asked)

    with pytest.raises(PlanMismatchError, match=r"capture mlp_out\.codec is 'none' there and 'zstd' here"):
        add(root, on_operation=interrupt)
    assert problems(root) == [p for p in problems(root) if "ledger" in p.object]


def test_an_unfinished_store_is_added_to_and_each_command_finishes_its_own(kit, tmp_path):
    root = tmp_path / "s.zarr"

    def die(name, key):
        if (name, key) == ("open", "acts/resid_post/rows/c.0.1.0"):
            raise Died

    with pytest.raises(Died):
        kit.build(small_settings(root), on_operation=die)
    assert actcache.open(root).committed("resid_post") == [0]
    add(root)
    store = actcache.open(root)
    assert (store.committed("resid_post"), store.committed("mlp_out")) == ([0], [0, 1, 2])
    kit.build(small_settings(root))
    assert actcache.open(root).is_complete
    kit.build(small_settings(tmp_path / "all.zarr", hooks=("resid_post", "mlp_out")))
    assert all_files(root) == all_files(tmp_path / "all.zarr")


# Refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.base.layers[0].mlp.dense_h_to_4h.bias.data.add_(1), r"digest is '.*there and '.*here"),
        (lambda d: d.causal_lm.to(torch.bfloat16), "compute_dtype is 'float32' there and 'bfloat16' here"),
    ],
)
def test_another_model_is_refused(make_store, tmp_path, change, message):
    root, decoder = make_store(tmp_path), make_decoder()
    change(decoder)
    before = snapshot(root)
    with pytest.raises(PlanMismatchError, match=message):
        add(root, decoder=decoder)
    assert snapshot(root) == before


def test_another_device_class_is_refused(make_store, tmp_path, monkeypatch):
    decoder = make_decoder()
    monkeypatch.setattr(type(decoder), "device", property(lambda self: torch.device("cuda")))
    with pytest.raises(PlanMismatchError, match=r"device is 'cpu' there and 'cuda' here.*--device"):
        add(make_store(tmp_path), decoder=decoder)


def test_a_store_that_no_model_made_is_refused(tmp_path):
    truth = write_store(tmp_path / "s.zarr")
    with pytest.raises(PlanMismatchError, match="this model differs"):
        add(truth.root)
    from tests.producer.test_importing import import_activations, make_acts, open_source, settings, write_npy

    folder = write_npy(tmp_path / "in", make_acts())
    import_activations(open_source(folder), settings(tmp_path / "i.zarr"))
    with pytest.raises(PlanMismatchError, match="was imported: no model is known to have made its rows"):
        add(tmp_path / "i.zarr")
    with pytest.raises(NotFoundError):
        add(tmp_path / "nowhere.zarr")


@pytest.mark.parametrize(
    ("addition", "error", "message"),
    [
        (
            Addition(hooks=("resid_post",), layers=(0,)),
            UsageError,
            r"layers \[0\] of resid_post are in .*there is nothing to add",
        ),
        (
            Addition(hooks=("resid_post",), layers=(0, 1), codec="lz4"),
            PlanMismatchError,
            r"capture resid_post\.codec is 'zstd' there and 'lz4' here",
        ),
        (
            Addition(hooks=("resid_post",), layers=(0, 1), dtype="float32"),
            PlanMismatchError,
            r"capture resid_post\.dtype is 'bfloat16' there and 'float32' here",
        ),
        (Addition(hooks=("mlp_out",), layers=(0, 2)), UsageError, r"mlp_out: no layers \[2\]"),
        (Addition(hooks=("nose",), layers=(0,)), UsageError, "no hook 'nose'"),
        (
            Addition(hooks=("mlp_out",), layers=(0, 1), memory_bytes=10_000),
            UsageError,
            r"two shards of these captures take 16,384 bytes and --shard-memory is 10,000.*--shard-memory 16384",
        ),
    ],
)
def test_what_cannot_be_added(make_store, tmp_path, addition, error, message):
    root = make_store(tmp_path)
    before = snapshot(root)
    with pytest.raises(error, match=message):
        add(root, addition)
    assert snapshot(root) == before


def test_layers_that_are_left_are_named(kit, tmp_path):
    kit.build(small_settings(tmp_path / "s.zarr", layers=(1,)))
    with pytest.raises(UsageError, match=r"layers \[1\] of resid_post are in .*add the others: --layers 0$"):
        add(tmp_path / "s.zarr", Addition(hooks=("resid_post",), layers=(0, 1)))


def test_a_shard_size_that_was_chosen_by_memory_is_held_to(kit, tmp_path):
    kit.build(small_settings(tmp_path / "s.zarr", sequences_per_shard=None, shard_memory_bytes=20_000))
    with pytest.raises(UsageError, match="--shard-memory is 20,000"):
        add(tmp_path / "s.zarr", Addition(hooks=(UP,), layers=(0, 1)))
    add(tmp_path / "s.zarr", Addition(hooks=(UP,), layers=(0, 1), memory_bytes=1 << 20))
    assert actcache.open(tmp_path / "s.zarr").is_complete


def test_a_disk_too_small_is_known_before_anything_is_written(make_store, tmp_path, monkeypatch):
    root = make_store(tmp_path)
    before = snapshot(root)
    monkeypatch.setattr(plan_module, "free_bytes", lambda _path: 1000)
    with pytest.raises(DiskFullError, match="Nothing was written"):
        add(root)
    assert snapshot(root) == before


def test_a_model_that_cannot_isolate_any_more_is_refused(kit, tmp_path, monkeypatch):
    """The store was isolated with another version, say: mixed rows may not come beside isolated ones."""
    kit.build(small_settings(tmp_path / "s.zarr", isolate_documents=True))
    decoder = make_decoder()
    monkeypatch.setattr(decoder, "_isolating", lambda *_: {})
    with pytest.raises(ModelError, match="documents cannot be isolated"):
        add(tmp_path / "s.zarr", decoder=decoder)


def test_it_says_what_it_does(make_store, tmp_path):
    seen = []
    reporter = BuildReporter(
        on_forecast=lambda grid, size: seen.append(("size", grid.n_shards, size.raw_bytes)),
        on_start=lambda done, total: seen.append(("start", done, total)),
    )
    summary = add(make_store(tmp_path), reporter=reporter)
    assert seen == [("size", 3, 384 * 2 * WIDTH * 2), ("start", 0, 384)]
    assert (summary.n_tokens, summary.n_shards) == (384, 3)


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        ("resid_post", "resid_post"),
        ("layers.*.mlp.up_proj:out", "mlp.up_proj.out"),
        ("h.*.attn.c_proj:in", "attn.c_proj.in"),
        ("layers.*:out", "block.out"),
    ],
)
def test_names_of_captures(hook, name):
    assert create_module.capture_name(hook) == name
