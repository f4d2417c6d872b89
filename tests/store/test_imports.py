"""Tools that only look at a store start without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = "import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"


def loads_torch(module: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", HEAVY.format(module=module)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return bool(done.returncode)


@pytest.mark.parametrize(
    "module", ["actcache", "actcache.store.verify", "actcache.reader.order", "actcache.errors"]
)
def test_these_load_no_torch(module):
    assert not loads_torch(module)


def test_the_check_can_fail():
    assert loads_torch("actcache.reader.stream")
