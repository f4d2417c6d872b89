"""Long storms of what the crash tests do a little of. `make soak` runs them."""

import pytest

from tests.conftest import all_files
from tests.producer.test_crash import (
    bench,
    build_at_once,
    die_again_and_again,
    die_everywhere,
    kill_builds,
    writes,
)
from tests.producer.test_workers import MANY, alone, fill_with_ray, kill_workers, one_thread

__all__ = ["alone", "bench", "one_thread"]  # fixtures
pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def test_dying_at_every_step(bench):
    assert die_everywhere(bench, range(len(bench.operations))) > 400


def test_dying_in_the_middle_of_every_write(bench):
    assert die_everywhere(bench, writes(bench), torn=True) > 60


def test_dying_again_and_again(bench):
    die_again_and_again(bench, rounds=200, seed=1)


def test_killing_thirty_times(bench):
    kill_builds(bench, rounds=30, seed=1)


def test_thirty_pairs_of_builds(bench):
    build_at_once(bench, rounds=30, kill_one=False)


def test_thirty_pairs_one_of_which_is_killed(bench):
    build_at_once(bench, rounds=30, kill_one=True)


def test_two_of_four_workers_killed_twenty_times(kit, make_store, tmp_path):
    kill_workers(kit, all_files(make_store(tmp_path, **MANY)), tmp_path, rounds=20, seed=1)


@pytest.mark.usefixtures("one_thread")
def test_two_of_four_actors_killed_twenty_times(alone, tmp_path):
    fill_with_ray(alone, tmp_path, rounds=20, seed=1)
