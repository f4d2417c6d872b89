"""Tables of an analysis: named columns, written as CSV for people and Parquet for programs."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of values by column.

    name     of the files, without suffix.
    title    one line.
    note     how the columns are computed, with formulas.
    columns  by name; all of one length. A column of lists is JSON in the CSV.
    """

    name: str
    title: str
    note: str
    columns: Mapping[str, Sequence[Any] | np.ndarray]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        assert len(set(lengths.values())) <= 1, lengths

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))

    def rows(self) -> list[tuple[Any, ...]]:
        """Python values, row by row."""
        columns = [c.tolist() if isinstance(c, np.ndarray) else list(c) for c in self.columns.values()]
        return list(zip(*columns, strict=True))

    def as_arrow(self) -> pa.Table:
        """The same for pyarrow. NaN stays NaN, None is null."""
        arrays = {}
        for name, column in self.columns.items():
            if isinstance(column, np.ndarray) and column.ndim == 2:
                flat = pa.array(np.ascontiguousarray(column).reshape(-1))
                arrays[name] = pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
            else:
                arrays[name] = pa.array(column)
        return pa.table(arrays)

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.csv and NAME.parquet; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.csv", folder / f"{self.name}.parquet"]
        with paths[0].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            for row in self.rows():
                writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in row])
        pq.write_table(self.as_arrow(), paths[1], compression="zstd")
        return paths


def table_of(name: str, title: str, note: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of rows that all have the same keys."""
    names = list(rows[0]) if rows else []
    return Table(
        name=name, title=title, note=note, columns={key: [row[key] for row in rows] for key in names}
    )


def said(value: Any) -> str:
    """A cell's text."""
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or 0.001 <= abs(value) < 1e5:
            return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"
        return f"{value:.2e}"
    return str(value)
