"""What is shown on a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table as RichTable

from analysis.evaluation import EvalReport
from analysis.findings_tables import losses_table, matrix_table
from analysis.lens_fit import Tuned
from analysis.tables import Table, said, table_of
from trainer.lens import Lens
from trainer.present import scores_table

LOSS_COLUMNS = (
    "positions", "layer", "n_tokens", "loss", "change", "change_se", "zero_change", "mean_change", "recovered_zero", "recovered_zero_se",
    "recovered_mean", "recovered_mean_se", "kl", "kl_se", "logit_mse",
)  # fmt: skip
"""What a terminal has room for."""


def evaluation_renderables(found: EvalReport) -> list[RichTable]:
    """What `actcache eval` shows."""
    shown = [scores_table(found.scores, found.norms)]
    if found.in_lens is not None:
        table = scores_table(found.in_lens)
        table.title = "the same in the space of the lens"
        shown.append(table)
        conditions = found.conditions or {}
        rows = [{"layer": layer, "condition number": value} for layer, value in conditions.items()]
        shown.append(rich_table(table_of("lens", "the lens", "", rows)))
    if found.losses:
        shown.append(rich_table(losses_table(found.losses), LOSS_COLUMNS))
    if found.matrix is not None:
        shown.append(rich_table(matrix_table(found.matrix, found.matrix_losses)))
    return shown


def lens_facts(lens: Lens, tuned: Tuned | None) -> dict[str, Any]:
    """A lens in plain values: how it was made, its condition numbers, and what training it gave."""
    found: dict[str, Any] = {"about": lens.about, "digest": lens.digest, "condition": lens.conditions()}
    if tuned is not None:
        found |= {"kl_before": tuned.before, "kl_after": tuned.after, "eval_tokens": tuned.n_tokens}
    return found


def lens_renderable(lens: Lens, tuned: Tuned | None) -> RichTable:
    """A lens, layer by layer."""
    rows = []
    for layer, condition in lens.conditions().items():
        row: dict[str, Any] = {"layer": layer, "condition number": condition}
        if tuned is not None:
            row |= {"KL, logit lens": tuned.before[layer], "KL, tuned lens": tuned.after[layer]}
        rows.append(row)
    judged = "" if tuned is None else f"; KL(model || lens) per token on {tuned.n_tokens:,} held-out tokens"
    return rich_table(table_of("lens", f"lens: {lens.about['kind']}{judged}", "", rows))


def rich_table(table: Table, columns: Sequence[str] | None = None) -> RichTable:
    """A table for the terminal. columns: which; None: all."""
    names = list(columns or table.columns)
    shown = RichTable(title=table.title, title_justify="left", show_edge=False)
    for name in names:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in zip(*(list(table.columns[name]) for name in names), strict=True):
        shown.add_row(*(said(value) for value in row))
    return shown
