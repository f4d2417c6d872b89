"""Long storms of kills of training runs, and what takes a compiler. `make soak` runs them."""

import pytest

from tests.trainer.test_kill import kill_and_resume
from tests.trainer.test_step import compiled_parts_agree

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("size", [1, 2])
def test_killed_and_resumed_at_twenty_random_steps(tmp_path, size):
    steps = kill_and_resume(tmp_path, size, rounds=20, seed=1)
    assert len(set(steps)) > 10
    print(f"processes: {size}, killed after steps {steps}")


@pytest.mark.filterwarnings("ignore")  # those of the compiler are not ours to answer for
def test_parts_compiled_to_machine_code_give_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled_parts_agree()
