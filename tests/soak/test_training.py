"""Long storms of kills of training runs. `make soak` runs them."""

import pytest

from tests.trainer.test_kill import kill_and_resume

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("size", [1, 2])
def test_killed_and_resumed_at_twenty_random_steps(tmp_path, size):
    steps = kill_and_resume(tmp_path, size, rounds=20, seed=1)
    assert len(set(steps)) > 10
    print(f"processes: {size}, killed after steps {steps}")
