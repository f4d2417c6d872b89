import pytest


@pytest.fixture(autouse=True, scope="session")
def _sparsify_without_triton():
    """sparsify's own switch: where triton is installed it decodes with it, which needs a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSIFY_DISABLE_TRITON", "1")
        yield
