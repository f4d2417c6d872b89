"""What a build takes of memory follows from `--shard-memory`, not from how much it stores."""

import runpy

from tests.docs.pages import ROOT

SHARD_MEMORY, TOKENS = 32 << 20, 20_480


def test_a_build_stays_within_its_memory(tmp_path):
    """A store of twice the bound: whoever kept what was committed would be far beyond it."""
    bench = runpy.run_path(str(ROOT / "benchmarks/build_memory.py"))
    bound = SHARD_MEMORY + bench["BESIDE"]
    assert TOKENS * bench["ROW_BYTES"] > 1.8 * bound
    alone = bench["measure"](tmp_path, "model", 4_096, SHARD_MEMORY)
    built = bench["measure"](tmp_path, "build", TOKENS, SHARD_MEMORY, "none")
    assert built - alone <= bound
