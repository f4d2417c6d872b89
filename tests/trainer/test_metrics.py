import json

import pytest
import torch

from trainer.metrics import Interval, MetricsFile
from trainer.step import StepSums


def sums(loss, n_rows, residual, total, n_active):
    return StepSums(
        loss=loss,
        aux_loss=0.5,
        n_rows=torch.tensor(n_rows),
        residual=torch.tensor(residual, dtype=torch.float64),
        total=torch.tensor(total, dtype=torch.float64),
        n_active=n_active,
        active=torch.zeros(1, dtype=torch.bool),
    )


def test_interval_weighs_by_rows():
    interval = Interval(3)
    interval.add(sums(1.0, [3, 1, 0], [2.0, 1.0, 0.0], [4.0, 4.0, 0.0], 8), grad_norm=1.0, lr=0.1)
    interval.add(sums(4.0, [0, 2, 0], [0.0, 1.0, 0.0], [0.0, 4.0, 0.0], 4), grad_norm=2.0, lr=0.2)
    line = interval.line((1, 3, 8))
    assert line["loss"] == pytest.approx((1 * 4 + 4 * 2) / 6)
    assert line["aux_loss"] == pytest.approx(0.5)
    assert line["train_fvu"] == {"1": 0.5, "3": 0.25, "8": None}
    assert line["l0"] == 2.0
    assert (line["grad_norm"], line["lr"]) == (2.0, 0.2)


def test_reopening_keeps_only_whole_lines_up_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_to_step=0)
    for step in (10, 20, 30):
        file.append({"step": step})
    file.close()
    path.write_bytes(path.read_bytes() + b'{"step": 4')
    MetricsFile(path, keep_to_step=20).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
