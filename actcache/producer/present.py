"""What a producer found out, as tables for people."""

from rich.table import Table

from actcache.producer.clock import STAGES
from actcache.producer.repair import RepairSummary
from actcache.producer.summary import BuildSummary

_SAID = {
    "forward": "forward",
    "copy": "copy from the device",
    "scatter": "rows to their place",
    "encode": "encode",
    "write": "write",
    "sync": "sync and commit",
    "wait": "forward waited",
}


def stage_table(summary: BuildSummary) -> Table:
    """Seconds, threads and busy share of every stage of a build."""
    table = Table(title=f"{summary.store}: built", title_justify="left", show_edge=False)
    for name in ("stage", "seconds", "threads", "busy"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in STAGES:
        if summary.stage_s[stage] or stage == "forward":
            row = (_SAID[stage], f"{summary.stage_s[stage]:.1f}", str(summary.stage_threads[stage]))
            table.add_row(*row, f"{summary.busy(stage):.0%}")
    table.add_row(_SAID["wait"], f"{summary.stage_s['wait']:.1f}", "", "")
    return table


def repair_lines(summary: RepairSummary) -> list[str]:
    """What a repair found and did."""
    store, left = summary.store, len(summary.left)
    if not summary.found:
        return [f"{store}: no problem; nothing to do"]
    lines = [
        f"shard {shard} of {name}: rebuilt from its tokens as a new generation of the ledger"
        for name, shard in summary.rebuilt
    ]
    lines += [
        f"shard {shard} of {name}: other readers see what is committed again"
        for name, shard in summary.renamed
    ]
    if summary.build is not None:
        lines.append(f"{summary.build.n_tokens:,} tokens in {summary.build.filling_s:.1f} s")
    found = f"{len(summary.found)} problem{'s' * (len(summary.found) != 1)}"
    lines.append(
        f"{store}: {found} found, {left or 'none'} left"
        + ("; those are not of a shard that its tokens can bring back: see 'Check a store'" if left else "")
    )
    return lines
