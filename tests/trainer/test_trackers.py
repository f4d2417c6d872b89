"""Dashboards, with the real packages, offline."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from actcache.errors import UsageError
from tests.trainer.list_source import random_source
from trainer import trackers
from trainer.config import TrainConfig
from trainer.loop import train, train_many

CONFIG = TrainConfig(
    n_latents=40,
    k=4,
    batch_rows=32,
    rows=333,
    log_every_steps=3,
    checkpoint_every_steps=4,
    eval_every_steps=5,
)


@pytest.fixture(autouse=True)
def _fast(fast_disk):
    return fast_disk


def run(out, make, *, stop=None, **more):
    held_out = random_source(60, seed=5)
    return train(random_source(epochs=2), CONFIG, out, held_out=held_out, trackers=[make], stop=stop, **more)


class Recorder:
    """A tracker that remembers."""

    def __init__(self):
        self.sent, self.opened, self.closed = [], [], 0

    def __call__(self, folder, name, config, step):
        self.opened.append((folder, name, config["k"], step))
        return self

    def log(self, step, numbers):
        self.sent.append((step, numbers))

    def close(self):
        self.closed += 1


def test_every_line_is_sent(tmp_path):
    recorder = Recorder()
    run(tmp_path, recorder)
    assert recorder.opened == [(tmp_path, "", 4, 0)]
    assert recorder.closed == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sent = [(step, numbers) for step, numbers in recorder.sent if "train/loss" in numbers]
    assert [step for step, _ in sent] == [line["step"] for line in lines]
    assert sent[0][1]["train/loss"] == lines[0]["loss"]
    assert sent[0][1]["train/train_fvu/2"] == lines[0]["train_fvu"]["2"]
    held_out = [(step, n) for step, n in recorder.sent if "held_out/mean/fvu" in n]
    assert [step for step, _ in held_out] == [0, 5, 10, 11]
    assert {
        "held_out/layers/5/fvu_scalar",
        "held_out/mean/explained_variance",
        "held_out/dead_frac",
    } <= held_out[0][1].keys()


def test_each_sae_of_a_sweep_has_its_own(tmp_path):
    recorder = Recorder()
    configs = {"a": CONFIG, "b": CONFIG.model_copy(update={"k": 2})}
    train_many(random_source(epochs=2), configs, tmp_path, held_out=random_source(60), trackers=[recorder])
    assert recorder.opened == [(tmp_path / "a", "a", 4, 0), (tmp_path / "b", "b", 2, 0)]
    assert recorder.closed == 2


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_holds_what_the_run_wrote_also_after_a_resume(tmp_path):
    count = iter(range(100))
    run(tmp_path / "run", trackers.tensorboard(), stop=lambda: next(count) >= 7)
    run(tmp_path / "run", trackers.tensorboard(), resume=True)
    found = scalars(tmp_path / "run" / "tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in found["train/loss"]] == [line["step"] for line in lines] == [3, 6, 9, 11]
    for (_, value), line in zip(found["train/loss"], lines, strict=True):
        assert value == pytest.approx(line["loss"], rel=1e-6)
    assert [step for step, _ in found["held_out/mean/fvu"]] == [0, 5, 10, 11]


WANDB = """
import sys
sys.path.insert(0, {root!r})
from tests.trainer.test_trackers import run
from pathlib import Path
from trainer import trackers
count = iter(range(100))
run(Path("run"), trackers.wandb("saes"), stop=lambda: next(count) >= 7)
run(Path("run"), trackers.wandb("saes"), resume=True)
"""


def test_wandb_offline_holds_what_the_run_wrote(tmp_path):
    """In a process of its own: wandb starts a service that outlives what it was started for."""
    root = str(Path(__file__).parents[2])
    environment = {
        "WANDB_MODE": "offline",
        "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", WANDB.format(root=root)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    rows = read_wandb(tmp_path / "run" / "wandb")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    sent = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert sent == {line["step"]: pytest.approx(line["loss"]) for line in lines}
    assert {row["step"] for row in rows if "held_out/mean/fvu" in row} == {0, 5, 10, 11}
    # offline-run-<date>_<time>-<id>, and a number behind it where the second began within the same second
    ids = {path.name.split("-")[3] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "run" / "wandb-id").read_text()}  # one run, continued


def records(data):
    """Records of wandb's offline file: a LevelDB log (blocks of 32 KiB, chunks of crc32, length, type) after 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, n, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + n]
        at += 7 + n
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def read_wandb(folder):
    """Rows of history in wandb's own offline files."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                )
    return rows


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("torch.utils.tensorboard", trackers.tensorboard, "tensorboard"),
        ("wandb", lambda: trackers.wandb("p"), "wandb"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_done(monkeypatch, module, make, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"pip install 'actcache\[{extra}\]'"):
        make()


def test_a_dashboard_that_cannot_be_opened_leaves_the_folder_free(tmp_path):
    def broken(folder, name, config, step):
        raise UsageError("no network")

    with pytest.raises(UsageError, match="no network"):
        run(tmp_path / "run", broken)
    assert run(tmp_path / "run", Recorder(), resume=True).outcome == "finished"
