"""What a producer found out, as tables for people."""

from rich.table import Table

from actcache.producer.clock import STAGES
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
