"""What a person sees of training: tables and lines, made from values, printed by whoever asks."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from trainer.heldout import HeldOut
from trainer.reports import StepReport
from trainer.sweep import Memory

SHOWN = 6


def size(n_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def memory_table(memory: Mapping[str, Memory]) -> Table:
    """What each SAE will take, and all together: weights of all at once, working memory of one at a time."""
    table = Table(title="memory for training, about", title_justify="left", show_edge=False)
    table.add_column("SAE")
    for column in ("weights, gradients, Adam", "one step"):
        table.add_column(column, justify="right")
    for name, one in memory.items():
        table.add_row(name or "one", size(one.weights), size(one.working))
    if len(memory) > 1:
        weights, working = sum(m.weights for m in memory.values()), max(m.working for m in memory.values())
        table.add_row("all", size(weights), size(working))
    return table


def news(reports: Mapping[str, StepReport], waited_frac: float) -> str:
    """The newest step of every SAE: loss, FVU, dead latents; how much of the time went into waiting for data."""
    if len(reports) == 1:
        (only,) = reports.values()
        fvu = "  ".join(f"{layer}: {value:.3f}" for layer, value in only.train_fvu.items())
        return f"{_numbers(only)}, waiting for data {100 * waited_frac:.1f} %\nFVU per layer  {fvu}"
    lines = [f"waiting for data {100 * waited_frac:.1f} %"]
    for name, report in list(reports.items())[:SHOWN]:
        fvu = sum(report.train_fvu.values()) / max(1, len(report.train_fvu))
        lines.append(f"{name}: {_numbers(report)}, FVU {fvu:.3f}")
    if len(reports) > SHOWN:
        lines.append(f"and {len(reports) - SHOWN} more")
    return "\n".join(lines)


def _numbers(report: StepReport) -> str:
    dead = 100 * report.n_dead / report.n_latents
    return f"loss {report.loss:.4f}, L0 {report.l0:.1f}, dead {dead:.1f} %"


def scores_table(found: HeldOut, relative_norms: Mapping[int, float] | None = None) -> Table:
    """Held-out scores per layer; with the mean relative decoder norm where a row holds all layers."""
    table = Table(title="held-out rows", title_justify="left", show_edge=False)
    names = ["layer", "rows", "FVU", "k=0", "FVU scalar", "k=0", "L0", "L1", "alive"]
    if relative_norms is not None:
        names.append("norm")
    for name in names:
        table.add_column(name, justify="right")
    for layer, s in [*found.layers.items(), ("mean", found.mean)]:
        cells = [
            str(layer),
            f"{s.n_rows:,}",
            f"{s.fvu:.4f}",
            f"{s.fvu_k0:.4f}",
            f"{s.fvu_scalar:.4f}",
            f"{s.fvu_scalar_k0:.4f}",
            f"{s.l0:.1f}",
            f"{s.l1:.1f}",
            f"{s.n_alive:,}",
        ]
        if relative_norms is not None:
            cells.append("" if layer == "mean" else f"{relative_norms[int(layer)]:.3f}")
        table.add_row(*cells)
    return table
