import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are tiny: handing them to a second thread on a busy machine costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
