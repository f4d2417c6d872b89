"""An analysis on disk.

DIR/
  report.html        everything on one page
  summary.json       the numbers by which runs are compared
  tables/            every table as CSV and Parquet
  figures/           every figure as SVG
  dataset/           latents.parquet, examples.parquet and README.md, a card: ready to publish
  latents/           the store of latents, unless it is elsewhere
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from actcache.errors import UsageError
from actcache.version import __version__
from analysis.dictionary import max_cosines
from analysis.findings_tables import findings_tables
from analysis.layers import spread
from analysis.models import Model
from analysis.report import report
from analysis.reporter import Reporter
from analysis.run import Between, Findings, Request, analyse
from analysis.subject import Subject, load_subject
from analysis.summary import FILE as SUMMARY
from analysis.summary import Summary, comparison_table, read_summary, summarise, write_summary
from analysis.tables import Table

if TYPE_CHECKING:
    from actcache.reader.access import Store


def analyse_and_write(
    run: Path,
    store: Store,
    out: Path,
    request: Request,
    *,
    model: Model | None = None,
    latents: Path | None = None,
    compare: Sequence[Path] = (),
    device: str = "cpu",
    reporter: Reporter | None = None,
) -> Summary:
    """Analyse a run on a store, and write everything.

    Args:
        run: a finished run.
        store: of the same model.
        out: the folder.
        request: what is asked for.
        model: the store's, where losses, prompts and texts are wanted.
        latents: where the latents are, or are to be; None: in `out`.
        compare: folders that this wrote for other runs; or finished runs, which are analysed first, in `out`/compare/NAME.
        device: where the SAE runs.
        reporter: hears of progress.

    Raises:
        UsageError: two runs to compare have one name.
    """
    subject = load_subject(run, store, device)
    others: list[Summary] = []
    between: list[Between] = []
    for other in compare:
        if (other / SUMMARY).exists():
            others.append(read_summary(other))
            continue
        beside = load_subject(other, store, device)
        folder = out / "compare" / beside.name
        if beside.name in {s.name for s in others}:
            raise UsageError(
                f"{other}: another run to compare with is called {beside.name} too; rename a folder"
            )
        others.append(write_analysis(analyse(beside, folder, request, model, reporter=reporter), [], folder))
        between += _between(subject, beside)
    found = analyse(subject, out, request, model, latents, reporter)
    return write_analysis(replace(found, between=[*found.between, *between]), others, out)


def _between(one: Subject, other: Subject) -> list[Between]:
    """Cosines of two runs' dictionaries, each way; none where their rows are of other widths."""
    if one.out_width != other.out_width:
        return []
    pairs = ((one, other), (other, one))
    return [
        Between(a.name, b.name, spread(max_cosines(a.directions, b.directions).cpu().numpy()))
        for a, b in pairs
    ]


def write_analysis(found: Findings, others: Sequence[Summary], folder: Path) -> Summary:
    """Write all of it but the latents and examples, which are there already."""
    own = summarise(found)
    tables = findings_tables(found)
    if others:
        tables.append(comparison_table([own, *others]))
    for table in tables:
        table.write(folder / "tables")
    text, svgs = report(found, others, own)
    (folder / "figures").mkdir(exist_ok=True)
    for name, svg in svgs.items():
        alone = svg.replace("<svg", '<svg color="#333"', 1)
        (folder / "figures" / f"{name}.svg").write_text(alone + "\n", encoding="utf-8")
    write_dataset(found, next(t for t in tables if t.name == "latents"), folder / "dataset")
    write_summary(own, folder)
    (folder / "report.html").write_text(text, encoding="utf-8")
    return own


def write_dataset(found: Findings, latents: Table, folder: Path) -> None:
    """The latents' distributions beside the examples, with a card."""
    pq.write_table(latents.as_arrow(), folder / "latents.parquet", compression="zstd")
    (folder / "README.md").write_text(card(found, latents), encoding="utf-8")


def card(found: Findings, latents: Table) -> str:
    """A dataset card: YAML for the hub, then what the columns are and how they were computed."""
    subject, request = found.subject, found.subject.store.plan.request
    examples = pq.read_schema(found.examples_path).names
    return f"""---
pretty_name: "Latents over layers of {subject.name} on {request.model.name}"
tags:
- sparse-autoencoder
- interpretability
configs:
- config_name: latents
  data_files: latents.parquet
- config_name: examples
  data_files: examples.parquet
---

# Latents of {subject.name} over the layers of {request.model.name}

One sparse autoencoder of {subject.n_latents:,} latents on layers {list(subject.layers)} ({subject.hook}) of {request.model.name}, looked at on
{found.n_tokens:,} kept {found.request.split} tokens of {request.corpus.name}: {found.evaluation.mean.n_rows:,} rows.

## latents.parquet

One row per latent: {", ".join(f"`{name}`" for name in latents.columns)}. Lists are in the order of the layers above.

{latents.note}

## examples.parquet

The {found.request.n_examples} most active rows of each latent at each layer: {", ".join(f"`{name}`" for name in examples)}. A context has up to
{found.request.context} tokens to either side and ends at its sequence's borders; `context_activations` are the same latent's at the same layer, NaN where
the store keeps no row.

## How it was made

actcache {__version__}, `actcache analyze`. Run: SHA-256 of sae.json `{subject.digest}`. Store: plan `{subject.store.plan.digest}`. Model weights: `{request.model.digest}`.
"""
