import json

import pytest
import torch

from trainer.metrics import Interval, MetricsFile, flatten
from trainer.step import StepSums


def sums(loss, n_rows, residual, total, n_active):
    return StepSums(
        loss=loss,
        aux_loss=0.5,
        extra_loss=0.25,
        rows=sum(n_rows),
        n_rows=torch.tensor(n_rows),
        residual=torch.tensor(residual, dtype=torch.float64),
        total=torch.tensor(total, dtype=torch.float64),
        n_active=torch.tensor(n_active),
        l1=torch.tensor(n_active, dtype=torch.float64) / 2,
        active=torch.zeros(1, dtype=torch.bool),
    )


def test_interval_weighs_by_rows():
    interval = Interval(3)
    interval.add(sums(1.0, [3, 1, 0], [2.0, 1.0, 0.0], [4.0, 4.0, 0.0], [6, 2, 0]), grad_norm=1.0, lr=0.1)
    interval.add(sums(4.0, [0, 2, 0], [0.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0, 4, 0]), grad_norm=2.0, lr=0.2)
    line = interval.line((1, 3, 8))
    assert line["loss"] == pytest.approx((1 * 4 + 4 * 2) / 6)
    assert (line["aux_loss"], line["extra_loss"]) == (pytest.approx(0.5), pytest.approx(0.25))
    assert line["train_fvu"] == {"1": 0.5, "3": 0.25, "8": None}
    assert (line["l0"], line["l1"]) == (2.0, 1.0)
    assert line["l0_layer"] == {"1": 2.0, "3": 2.0, "8": None}
    assert (line["grad_norm"], line["lr"]) == (2.0, 0.2)


def test_an_interval_without_rows_has_nulls():
    line = Interval(1).line((4,))
    assert line["loss"] is None
    assert line["train_fvu"] == {"4": None}
    assert json.dumps(line, allow_nan=False)


def test_flattened_for_dashboards():
    line = {"step": 3, "loss": 0.5, "train_fvu": {"1": 0.25, "8": None}, "layers": {"1": {"fvu": 1.0}}}
    assert flatten(line) == {"step": 3, "loss": 0.5, "train_fvu/1": 0.25, "layers/1/fvu": 1.0}


def test_reopening_keeps_only_whole_lines_up_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_to_step=0)
    for step in (10, 20, 30):
        file.append({"step": step})
    file.close()
    path.write_bytes(path.read_bytes() + b'{"step": 4')
    MetricsFile(path, keep_to_step=20).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
