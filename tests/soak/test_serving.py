"""A long storm of kills of a server under a trainer. `make soak` runs it."""

import pytest

from tests.service.test_storm import kill_servers

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def test_a_server_killed_twenty_times_under_a_trainer(tmp_path):
    kill_servers(tmp_path, rounds=20, seed=2)
