import pytest


@pytest.fixture(autouse=True)
def _fast(fast_disk):
    """No test here cuts the power."""
