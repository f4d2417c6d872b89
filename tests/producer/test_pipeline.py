"""The stages of a build: nothing is lost between them, nobody runs ahead without bound, whoever fails stops them all.

A `LateCopier` stands in for a GPU: a copy is done when a thread of its own gets to it, in any order, and until then
the bytes are not there.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import ActcacheError, DiskFullError
from actcache.producer import build as build_module
from actcache.producer import forward as forward_module
from actcache.producer import pipeline as pipeline_module
from actcache.producer.clock import Clock
from actcache.producer.forward import Forward
from actcache.producer.staging import CudaCopier, Filling, Staged
from actcache.store.ledger import ShardCommitter
from tests.conftest import all_files, make_decoder, small_settings

pytestmark = pytest.mark.usefixtures("fast_disk")


class LateCopier:
    """Copies when told to. Asserts that no more is under way than there are slots."""

    def __init__(self, n_slots: int, *, seed: int = 0, fails_at: int | None = None) -> None:
        self.n_slots, self.fails_at = n_slots, fails_at
        self.n_allocated = self.n_started = 0
        self._rng, self._lock = np.random.default_rng(seed), threading.Lock()
        self.started = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(n_slots + 1)
        self._busy: set[int] = set()
        self.may_copy = threading.Event()
        self.may_copy.set()

    def allocate(self, n_bytes: int) -> torch.Tensor:
        self.n_allocated += 1
        return torch.full((n_bytes,), 0xEE, dtype=torch.uint8)

    def start(self, source: torch.Tensor, target: torch.Tensor):
        with self._lock:
            assert target.data_ptr() not in self._busy, (
                "a slot was used again while a copy to it was under way"
            )
            self._busy.add(target.data_ptr())
            assert len(self._busy) <= self.n_slots
            number, self.n_started = self.n_started, self.n_started + 1
        self.started.release()
        job = self._pool.submit(self._copy, source, target, number)

        def wait() -> None:
            try:
                job.result()
            finally:
                with self._lock:
                    self._busy.discard(target.data_ptr())

        return wait

    def _copy(self, source: torch.Tensor, target: torch.Tensor, number: int) -> None:
        assert self.may_copy.wait(60)
        if number == self.fails_at:
            raise OSError("the device fell off the bus")
        with torch.inference_mode():  # as the model's thread is in: a device would not ask
            target.fill_(0)
            target.copy_(source)


@settings(max_examples=40, deadline=None)
@given(
    n_slots=st.integers(1, 4),
    n_threads=st.integers(1, 3),
    n=st.integers(1, 30),
    width=st.integers(1, 8),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_every_vector_arrives_at_its_row(n_slots, n_threads, n, width, dtype, seed):
    """Batches of any length, every row written once, through slots that are used again and again."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, n)
    order = torch.from_numpy(rng.permutation(int(lengths.sum())))
    expected = torch.from_numpy(rng.standard_normal((len(order), width))).to(dtype)
    found, copier = torch.full_like(expected, torch.nan), LateCopier(n_slots, seed=seed)
    staged, filling = Staged(copier, 9 * width * dtype.itemsize, n_slots, n_threads, Clock()), Filling()
    for rows in torch.split(order, lengths.tolist()):

        def place(vectors, rows=rows):
            found.index_copy_(0, rows, vectors)

        staged.put(expected[rows], place, filling)
    filling.wait()
    staged.close()
    assert torch.equal(found, expected)
    assert copier.n_allocated == n_slots
    assert copier.n_started == n


def test_with_no_slot_free_the_model_waits(tmp_path):
    copier = LateCopier(2)
    staged, filling, placed = Staged(copier, 64, 2, 1, Clock()), Filling(), []
    copier.may_copy.clear()

    def hand_over() -> None:
        for i in range(5):
            staged.put(
                torch.full((4, 4), float(i)), lambda vectors: placed.append(int(vectors[0, 0])), filling
            )

    model = threading.Thread(target=hand_over)
    model.start()
    for _ in range(2):
        assert copier.started.acquire(timeout=60)
    assert model.is_alive()
    assert copier.n_started == 2, "the third waits for a slot, whose copy has not been made"
    assert placed == []
    copier.may_copy.set()
    model.join(60)
    filling.wait()
    staged.close()
    assert sorted(placed) == list(range(5))


@pytest.mark.parametrize("where", ["copy", "place"])
def test_what_goes_wrong_on_the_way_is_raised_and_costs_no_slot(where):
    copier = LateCopier(2, fails_at=3 if where == "copy" else None)
    staged, filling, n_placed = Staged(copier, 64, 2, 2, Clock()), Filling(), []

    def place(vectors) -> None:
        n_placed.append(1)
        if where == "place" and len(n_placed) == 3:
            raise OSError("no such row")

    for i in range(20):  # more than would fit if the slot of the failed one were lost
        staged.put(torch.full((4, 4), float(i)), place, filling)
    with pytest.raises(OSError, match="bus" if where == "copy" else "row"):
        filling.wait()
    staged.close()


def test_nothing_is_taken_after_the_end():
    staged = Staged(LateCopier(1), 64, 1, 1, Clock())
    staged.close()
    with pytest.raises(RuntimeError):
        staged.put(torch.zeros(4, 4), lambda _: None, Filling())


# Whole builds, as beside a GPU: encoding and committing go on while the model runs.


@pytest.fixture
def overlapped(monkeypatch):
    """The stages overlap, and vectors come through slots."""
    copiers = []

    def make_transfer(decoder, catalog, captures, clock):
        copiers.append(LateCopier(forward_module.N_SLOTS))
        n_bytes = forward_module.slot_bytes(catalog, captures)
        return Staged(copiers[-1], n_bytes, forward_module.N_SLOTS, forward_module.N_SCATTER_THREADS, clock)

    monkeypatch.setattr(build_module, "make_transfer", make_transfer)
    monkeypatch.setattr(build_module, "takes_turns", lambda _device: False)
    return copiers


@pytest.mark.parametrize(
    "changes", [{}, {"hooks": ("mlp_in", "resid_post"), "codec": "uint8"}, {"n_tokens": None}]
)
def test_overlapped_stages_write_the_same_store(kit, make_store, tmp_path, overlapped, changes):
    """Padding (no number of tokens) included."""
    out = tmp_path / "overlapped.zarr"
    summary = kit.build(small_settings(out, seq_len=24, **changes), encode_threads=2)
    n_shards = actcache.open(out).plan.grid.n_shards
    assert summary.n_built == n_shards * len(changes.get("hooks", ("resid_post",)))
    assert overlapped[0].n_started > 0
    assert summary.stage_s["copy"] > 0
    assert all_files(out) == all_files(make_store(tmp_path, seq_len=24, **changes))


MANY = {"n_tokens": 16 * 2 * 16, "sequences_per_shard": 2, "holdout_frac": 0.1}


@pytest.mark.parametrize("turns", [True, False])
def test_nobody_runs_ahead_without_bound(kit, tmp_path, monkeypatch, overlapped, turns):
    """However slow the disk is: shards begun and not committed are at most those the buffers and files hold."""
    monkeypatch.setattr(build_module, "takes_turns", lambda _device: turns)
    state, lock = {"begun": 0, "committed": 0, "most": 0}, threading.Lock()
    run, finish = Forward.run, ShardCommitter.finish

    def counted_run(self, shard, *args):
        with lock:
            state["begun"] += 1
            state["most"] = max(state["most"], state["begun"] - state["committed"])
        run(self, shard, *args)

    def slow_finish(self, written):
        gate.wait(0.02)  # a slow disk: nothing depends on how slow
        record = finish(self, written)
        with lock:
            state["committed"] += 1
        return record

    gate = threading.Event()
    monkeypatch.setattr(Forward, "run", counted_run)
    monkeypatch.setattr(ShardCommitter, "finish", slow_finish)
    kit.build(small_settings(tmp_path / "s.zarr", **MANY))
    assert state["begun"] == state["committed"] == 16
    n_buffers = 1 if turns else pipeline_module.N_BUFFERS
    assert state["most"] <= n_buffers + pipeline_module.N_UNCOMMITTED


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("stage", ["write", "finish", "run"])
def test_whoever_fails_stops_them_all(kit, make_store, tmp_path, monkeypatch, overlapped, turns, stage):
    """The error is the stage's own, what was committed before it stays, and the same command goes on."""
    monkeypatch.setattr(build_module, "takes_turns", lambda _device: turns)
    owner = Forward if stage == "run" else ShardCommitter
    real, calls, out = getattr(owner, stage), [], tmp_path / "s.zarr"

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise DiskFullError("full")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, stage, failing)
        with pytest.raises(DiskFullError, match="full"):
            kit.build(small_settings(out, **MANY))
    assert len(calls) < 5 + pipeline_module.N_BUFFERS + pipeline_module.N_UNCOMMITTED
    assert not (out / ".partial").exists(), "no temporary file is left"
    committed = actcache.open(out).committed()
    assert committed == list(range(len(committed)))
    assert 0 < len(committed) < 16
    assert kit.build(small_settings(out, **MANY)).n_built + len(committed) == 16
    assert all_files(out) == all_files(make_store(tmp_path, **MANY))


def test_an_interrupt_commits_what_is_written(kit, tmp_path, monkeypatch, overlapped):
    """Ctrl-C: the shard at hand is given up, those that are written are not."""
    run, out = Forward.run, tmp_path / "s.zarr"

    def interrupted(self, shard, *args):
        run(self, shard, *args)
        if shard == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kit.build(small_settings(out, **MANY))
    committed = actcache.open(out).committed()
    assert committed == list(range(len(committed)))
    assert len(committed) <= 5
    assert not (out / ".partial").exists()
    kit.build(small_settings(out, **MANY))
    assert actcache.open(out).is_complete


def test_a_stopped_pipeline_takes_no_more(kit, tmp_path, monkeypatch):
    pipelines = []
    enter = pipeline_module.Pipeline.__enter__
    monkeypatch.setattr(
        pipeline_module.Pipeline, "__enter__", lambda self: pipelines.append(self) or enter(self)
    )
    kit.build(small_settings(tmp_path / "s.zarr"))
    capture = actcache.open(tmp_path / "s.zarr")._catalog.capture("resid_post")
    (tmp_path / "s.zarr/acts/resid_post/ledger/c.0.1").unlink()
    (tmp_path / "s.zarr/acts/resid_post/rows/c.0.1.0").unlink()
    with pytest.raises(ActcacheError, match="stopped"):
        pipelines[0].add(1, [capture])


# What a build says at its end.


def test_the_summary_adds_up(kit, tmp_path):
    summary = kit.build(small_settings(tmp_path / "s.zarr"))
    said = summary.as_json()
    assert said["n_tokens"] == 3 * 8 * 16
    assert said["raw_bytes"] == 3 * 8 * 16 * 2 * 16 * 2
    assert said["ratio"] == pytest.approx(said["raw_bytes"] / said["disk_bytes"])
    assert said["bottleneck"] in said["busy"]
    assert said["busy"][said["bottleneck"]] == max(said["busy"].values())
    assert said["tokens_per_s"] == pytest.approx(said["n_tokens"] / said["filling_s"])
    assert 0 < said["filling_s"] <= said["elapsed_s"]
    for stage in ("forward", "scatter", "encode", "write", "sync"):
        assert said["stage_s"][stage] > 0
    main_thread = sum(said["stage_s"][stage] for stage in ("forward", "scatter", "wait"))
    assert main_thread <= said["filling_s"]


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["zstd", "uint8"])
def test_a_gpu_fills_a_store_with_what_it_says(kit, tmp_path, codec):
    """Every vector as the same batches give it when captured one by one, through pinned slots and a stream of its own."""
    settings_ = small_settings(tmp_path / "s.zarr", batch_size=3, n_tokens=64 * 8 * 16)
    decoder = make_decoder()
    decoder.base.to("cuda")
    summary = kit.build(settings_, decoder)
    assert summary.stage_s["copy"] > 0
    assert 0 < summary.stage_s["forward"] <= summary.filling_s
    store = actcache.open(settings_.out)
    for start in range(0, store.plan.grid.n_sequences, 3):
        chosen = slice(start, min(start + 3, store.plan.grid.n_sequences))
        if len({s // 8 for s in range(chosen.start, chosen.stop)}) > 1:
            continue  # batches end with their shard
        ids = torch.from_numpy(store.tokens[chosen].astype(np.int64)).to("cuda")
        for (hook, layer), acts in decoder.capture(ids, {"resid_post": (0, 1)}).items():
            assert torch.equal(store.read(hook=hook, layer=layer, sequences=chosen), acts.bfloat16().cpu())


@pytest.mark.gpu
def test_copies_of_a_gpu_wait_for_what_they_copy():
    """A product that takes a while, copied through slots while the next one is computed."""
    copier, filling = CudaCopier(), Filling()
    staged, found = Staged(copier, 1024 * 1024 * 4, 2, 2, Clock()), {}
    a = torch.randn(1024, 1024, device="cuda")
    for i in range(50):
        x = a
        for _ in range(10):
            x = torch.tanh(x @ a)
        staged.put(x + i, lambda vectors, i=i: found.__setitem__(i, float(vectors.double().sum())), filling)
        del x
    filling.wait()
    staged.close()
    x = a
    for _ in range(10):
        x = torch.tanh(x @ a)
    for i in range(50):
        assert found[i] == pytest.approx(float((x + i).cpu().double().sum()), rel=1e-6)
