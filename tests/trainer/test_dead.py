import torch

from trainer.dead import DeadCounter, mark_active

CPU = torch.device("cpu")


def test_dead_exactly_at_the_threshold_in_rows():
    counter = DeadCounter(3, after_rows=100, device=CPU)
    active = torch.tensor([False, True, False])
    counter.update(active, 99)
    assert counter.dead().tolist() == []
    counter.update(torch.tensor([False, False, True]), 1)
    assert counter.dead().tolist() == [0]
    counter.update(torch.tensor([True, False, False]), 98)
    assert counter.dead().tolist() == []
    counter.update(torch.tensor([False, False, False]), 1)
    assert counter.rows_since.tolist() == [1, 100, 99]
    assert counter.dead().tolist() == [1]


def test_active_means_above_the_threshold_in_some_row():
    active = torch.zeros(6, dtype=torch.bool)
    values = torch.tensor([[2.0, 1e-3], [0.0011, 0.0]])
    mark_active(active, values, torch.tensor([[4, 0], [2, 5]]))
    assert active.nonzero().squeeze(1).tolist() == [2, 4]
