"""The command line: one command per arrow of the flow. The only module that wires, prints and reads the environment."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

import actcache
from actcache.errors import ActcacheError, UsageError

if TYPE_CHECKING:
    from actcache.producer.build import BuildSummary
    from actcache.producer.importing import ImportSettings, ImportSummary, Source
    from actcache.producer.plan import SizeForecast
    from actcache.reader.stream import Stream
    from actcache.store.open import Catalog
    from actcache.store.schema import Grid
    from analysis.evaluation import EvalReport
    from analysis.reporter import Reporter
    from trainer.config import TrainConfig
    from trainer.ranks import Ranks
    from trainer.reports import RunSummary, StepReport

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Cache transformer activations once, verifiably; stream them shuffled into sparse autoencoders.",
)
console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, for scripts.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU where there is one.")]
StorePath = Annotated[
    str, typer.Argument(metavar="STORE", help="A store: a folder, or an fsspec URL such as s3://...")
]


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(actcache.__version__)
        raise typer.Exit
    if debug:
        os.environ["ACTCACHE_DEBUG"] = "1"


def main() -> None:
    """Run the command line; an error that was meant for people is printed without a traceback."""
    try:
        app()
    except ActcacheError as error:
        if os.environ.get("ACTCACHE_DEBUG"):
            raise
        console.print(Text(f"error ({error.kind}): {_message(error)}"), style="red", soft_wrap=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        sys.exit(1)


def _message(error: ActcacheError) -> str:
    return str(error.args[-1]) if error.args else type(error).__name__


# Progress.


class _Rate(ProgressColumn):
    """Units per second of the running process, resumed work not counted."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", self._unit)
        return Text(f"{task.speed:,.0f} {unit}/s" if task.speed else f"- {unit}/s")


class _Progress(Progress):
    """Bars with a rate and an estimate of the end, and below them a line of news."""

    news = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars, then the news."""
        yield from super().get_renderables()
        if self.news:
            yield Text(self.news, style="dim")


def _progress(unit: str, *, quiet: bool) -> _Progress:
    return _Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        console=console,
        disable=quiet,
    )


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"


def _size(text: str) -> int:
    """Bytes of "2GiB", "500MB", "1000000"."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbIiKkMmGgTt")
    try:
        return int(float(number) * units[text.strip()[len(number) :].strip().upper()])
    except (ValueError, KeyError) as error:
        raise UsageError(f"{text!r} is not a size; write 500MB, 2GiB or a number of bytes") from error


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    return name


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. A second SIGINT interrupts at once."""
    stop = threading.Event()

    def ask(_number: int, _frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# build


@app.command()
def build(
    model: Annotated[str, typer.Option(help="Hub id or local folder of a causal language model.")],
    corpus: Annotated[
        str, typer.Option(help="Text: .txt, .jsonl, .jsonl.gz, .jsonl.zst, a folder of them, or a glob.")
    ],
    out: Annotated[Path, typer.Option(help="Where the store goes, for example acts.zarr.")],
    tokens: Annotated[int | None, typer.Option(help="Tokens to cache. Without it: the whole corpus.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a hub model.")] = None,
    text_column: Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")] = "text",
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence, the unit the model runs on.")] = 128,
    bos: Annotated[bool, typer.Option(help="Begin every sequence with the tokenizer's BOS token.")] = False,
    layers: Annotated[
        str, typer.Option(help='Blocks to cache: "all", "0,3,5" or "0:6" (6 not included).')
    ] = "all",
    hook: Annotated[
        list[str] | None,
        typer.Option(
            help="Where in a block: resid_post (default), resid_pre, mlp_in, mlp_out, attn_out. Repeat for several."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Stored as bfloat16, float16 or float32.")] = "bfloat16",
    model_dtype: Annotated[
        str, typer.Option(help="The model computes in: float32, bfloat16, float16, or auto.")
    ] = "auto",
    codec: Annotated[str, typer.Option(help="zstd (smallest), lz4 (faster) or none.")] = "zstd",
    holdout: Annotated[
        float, typer.Option(help="Fraction held out for evaluation: whole documents, whole shards.")
    ] = 0.01,
    exclude_first: Annotated[
        int,
        typer.Option(help="Never train on the first N positions of a sequence: attention sinks live there."),
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Decides the holdout, the order of sequences and the mixing of rows.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Sequences per forward pass. Part of the plan: it changes last bits.")
    ] = 16,
    shard_memory: Annotated[
        str, typer.Option(help="Memory for the two shards being filled; decides the shard size.")
    ] = "1GiB",
    sequences_per_shard: Annotated[int | None, typer.Option(help="Shard size by hand, in sequences.")] = None,
    device: Device = "auto",
    encode_threads: Annotated[int, typer.Option(help="Threads that compress.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a language model over text and cache its activations. Run the same command again to continue."""
    from actcache.model import load_model, load_tokenizer, parse_layers
    from actcache.producer.corpus import open_corpus
    from actcache.producer.plan import Settings

    _choice("dtype", dtype, ("bfloat16", "float16", "float32"))
    _choice("codec", codec, ("zstd", "lz4", "none"))
    _choice("model-dtype", model_dtype, ("auto", "bfloat16", "float16", "float32"))
    text = open_corpus(corpus, text_column)
    _quiet_transformers()
    tokenizer = load_tokenizer(model, revision)
    decoder = load_model(model, revision=revision, dtype=model_dtype, device=_device(device))
    settings = Settings(
        out=out,
        hooks=tuple(hook or ("resid_post",)),
        layers=parse_layers(layers, decoder.n_layers),
        dtype=dtype,
        codec=codec,
        n_tokens=tokens,
        seq_len=seq_len,
        bos=bos,
        holdout_frac=holdout,
        exclude_first=exclude_first,
        seed=seed,
        batch_size=batch_size,
        sequences_per_shard=sequences_per_shard,
        shard_memory_bytes=_size(shard_memory),
    )
    summary = _build(settings, decoder, tokenizer, text, Path(corpus).name, encode_threads, quiet=as_json)
    if as_json:
        print(json.dumps({**asdict(summary), "store": str(summary.store)}))


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"--{option} {value}: expected one of {', '.join(allowed)}")


def _quiet_transformers() -> None:
    """Our own progress bars are enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _build(
    settings: Any,
    decoder: Any,
    tokenizer: Any,
    text: Any,
    corpus_name: str,
    encode_threads: int,
    *,
    quiet: bool,
) -> "BuildSummary":
    from actcache.producer.build import Reporter, build

    with _progress("tok", quiet=quiet) as progress:
        planning = progress.add_task("tokenise", total=settings.n_tokens)
        running = progress.add_task("activations", total=None, visible=False)

        def started(n_done: int, n_tokens: int) -> None:
            progress.update(planning, visible=False)
            progress.update(running, total=n_tokens, completed=n_done, visible=True)

        def forecast(grid: "Grid", size: "SizeForecast") -> None:
            if not quiet:
                _print_forecast(settings.out, grid, size)

        reporter = Reporter(
            on_tokens=lambda n: progress.update(planning, completed=n),
            on_forecast=forecast,
            on_start=started,
            on_forward=lambda n: progress.advance(running, n),
        )
        terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            summary = build(
                settings,
                decoder,
                tokenizer,
                text,
                corpus_name=corpus_name,
                encode_threads=encode_threads,
                reporter=reporter,
            )
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                f"stopped; every committed shard of {settings.out} is safe. Run the same command again to continue."
            )
            sys.exit(130)
        finally:
            signal.signal(signal.SIGTERM, terminate)
    if not quiet:
        _print_build(summary)
    return summary


def _print_forecast(out: Path, grid: "Grid", size: "SizeForecast") -> None:
    console.print(
        f"{out}: {grid.n_sequences:,} sequences of {grid.seq_len} tokens in {grid.n_shards} shards of "
        f"{grid.rows_per_shard:,} rows, {grid.n_holdout_shards} held out",
        highlight=False,
    )
    console.print(
        f"on disk: about {_bytes(size.expected_bytes + size.side_bytes)} ({_bytes(size.raw_bytes)} before compression), "
        f"{_bytes(size.free_bytes)} free",
        highlight=False,
    )


def _print_build(summary: "BuildSummary") -> None:
    if summary.was_complete:
        console.print(
            f"{summary.store} is complete: all {summary.n_shards} shards are committed. Nothing to do."
        )
        return
    stages = dict(summary.stage_s)
    stages["forward"] -= stages["scatter"]
    table = Table(title=f"{summary.store}: built", title_justify="left", show_edge=False)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, seconds in stages.items():
        table.add_row(stage if stage != "wait" else "wait for commit", f"{seconds:.1f}")
    console.print(table)
    slowest = max(("forward", "commit"), key=lambda stage: stages[stage])
    console.print(
        f"{summary.n_tokens:,} tokens in {summary.elapsed_s:.1f} s ({summary.n_tokens / summary.elapsed_s:,.0f} tok/s); "
        f"{_bytes(summary.raw_bytes)} -> {_bytes(summary.disk_bytes)} "
        f"({summary.raw_bytes / max(1, summary.disk_bytes):.2f}x); the {slowest} was the bottleneck",
        highlight=False,
    )


# import


@app.command(name="import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Activations: .npy or safetensors (a file or a folder), SAELens caches, saev shards.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the store goes, for example acts.zarr.")],
    source_format: Annotated[
        str | None,
        typer.Option("--format", help="npy, safetensors, saelens or saev. Without it: told from the files."),
    ] = None,
    layers: Annotated[
        str, typer.Option(help='Layers to import: "all", "0,3,5" or "0:6" (6 not included).')
    ] = "all",
    layer_of: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N",
            help="Layer number of a file (npy), tensor (safetensors), column (SAELens) or layer (saev) whose name does not "
            "say it. What is not named is then left out. Repeat for several.",
        ),
    ] = None,
    hook: Annotated[
        str | None,
        typer.Option(
            help="Where in a block the rows come from: resid_post, resid_pre, mlp_in, mlp_out, attn_out. Without it: what "
            "the source says, else resid_post."
        ),
    ] = None,
    bfloat16_bits: Annotated[
        bool, typer.Option("--bfloat16-bits", help="Numbers of type uint16 in .npy files are bfloat16.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Stored as bfloat16, float16 or float32. Without it: as in the source, bit for bit."
        ),
    ] = None,
    codec: Annotated[str, typer.Option(help="zstd (smallest), lz4 (faster) or none.")] = "zstd",
    holdout: Annotated[
        float, typer.Option(help="Fraction held out for evaluation: whole documents, whole shards.")
    ] = 0.01,
    exclude_first: Annotated[
        int | None,
        typer.Option(
            help="Never train on the first N positions of a sequence. Without it: 1, or 0 where a sequence has one position "
            "or a saev example has no [CLS]."
        ),
    ] = None,
    special_id: Annotated[
        list[int] | None,
        typer.Option(help="Never train on tokens of this id, such as BOS or EOS. Repeat for several."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Decides the holdout, the order of sequences and the mixing of rows.")
    ] = 0,
    model_name: Annotated[
        str | None, typer.Option(help="What the model is called in the plan, where the source does not say.")
    ] = None,
    tokenizer_name: Annotated[
        str | None, typer.Option(help="What the tokenizer is called: only its digest is kept.")
    ] = None,
    shard_memory: Annotated[
        str, typer.Option(help="Memory for the two shards being filled; decides the shard size.")
    ] = "1GiB",
    sequences_per_shard: Annotated[int | None, typer.Option(help="Shard size by hand, in sequences.")] = None,
    encode_threads: Annotated[int, typer.Option(help="Threads that compress.")] = 1,
    as_json: Json = False,
) -> None:
    """Make a store of activations that something else wrote. Run the same command again to continue."""
    from actcache.model import parse_layers
    from actcache.producer.importing import ImportSettings, open_source

    if dtype is not None:
        _choice("dtype", dtype, ("bfloat16", "float16", "float32"))
    _choice("codec", codec, ("zstd", "lz4", "none"))
    opened = open_source(
        source,
        source_format=source_format,
        layer_of=_named_layers(layer_of or []),
        hook=hook,
        bfloat16_bits=bfloat16_bits,
    )
    settings = ImportSettings(
        out=out,
        layers=None if layers == "all" else parse_layers(layers, max(opened.facts.layers) + 1),
        dtype=dtype,
        codec=codec,
        holdout_frac=holdout,
        exclude_first=exclude_first,
        special_ids=tuple(special_id or ()),
        seed=seed,
        model_name=model_name,
        tokenizer_name=tokenizer_name,
        sequences_per_shard=sequences_per_shard,
        shard_memory_bytes=_size(shard_memory),
    )
    summary = _import(opened, settings, encode_threads, quiet=as_json)
    if as_json:
        print(json.dumps({**asdict(summary), "store": str(summary.store)}))


def _named_layers(given: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if not name or not number.isdigit():
            raise UsageError(f"--layer-of {text}: expected NAME=N, such as acts.npy=3")
        found[name] = int(number)
    return found


def _import(
    source: "Source", settings: "ImportSettings", encode_threads: int, *, quiet: bool
) -> "ImportSummary":
    from actcache.producer.importing import ImportReporter, import_activations

    with _progress("tok", quiet=quiet) as progress:
        hashing = progress.add_task("fingerprint (MiB)", total=None)
        running = progress.add_task("activations", total=None, visible=False)

        def hashed(n_bytes: int, total: int) -> None:
            progress.update(hashing, completed=n_bytes >> 20, total=max(1, total >> 20))

        def started(n_done: int, n_tokens: int) -> None:
            progress.update(hashing, visible=False)
            progress.update(running, total=n_tokens, completed=n_done, visible=True)

        def forecast(grid: "Grid", size: "SizeForecast") -> None:
            if not quiet:
                _print_forecast(settings.out, grid, size)

        reporter = ImportReporter(
            on_fingerprint=hashed,
            on_forecast=forecast,
            on_start=started,
            on_tokens=lambda n: progress.advance(running, n),
        )
        terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            summary = import_activations(source, settings, encode_threads=encode_threads, reporter=reporter)
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                f"stopped; every committed shard of {settings.out} is safe. Run the same command again to continue."
            )
            sys.exit(130)
        finally:
            signal.signal(signal.SIGTERM, terminate)
    if not quiet:
        _print_import(summary)
    return summary


def _print_import(summary: "ImportSummary") -> None:
    if summary.was_complete:
        console.print(
            f"{summary.store} is complete: all {summary.n_shards} shards are committed. Nothing to do."
        )
        return
    console.print(
        f"{summary.store}: {summary.n_tokens:,} tokens in {summary.elapsed_s:.1f} s; {_bytes(summary.raw_bytes)} -> "
        f"{_bytes(summary.disk_bytes)} ({summary.raw_bytes / max(1, summary.disk_bytes):.2f}x)",
        highlight=False,
    )


# info and verify


@app.command()
def info(
    store: StorePath,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Also measure how well its stream is shuffled.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="With --shuffle: rows per batch.")] = 8192,
    window_rows: Annotated[int, typer.Option(help="With --shuffle: rows shuffled together.")] = 131_072,
    order: Annotated[str, typer.Option(help="With --shuffle: global or commit.")] = "global",
    commit_shards: Annotated[int, typer.Option(help="With --order commit: shards mixed together.")] = 4,
    batches: Annotated[int, typer.Option(help="With --shuffle: batches to measure.")] = 200,
    as_json: Json = False,
) -> None:
    """Say what a store holds: model, text, layers, size, how much of it is committed."""
    from actcache.store.open import open_catalog

    catalog = open_catalog(store)
    facts = _facts(catalog)
    if shuffle:
        with actcache.open(store).stream(
            batch_size=batch_size,
            window_rows=window_rows,
            order=order,  # type: ignore[arg-type]
            commit_shards=commit_shards,
        ) as stream:
            facts["shuffle"] = stream.quality(batches).as_json()
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, show_edge=False, title=store, title_justify="left")
    for name, value in facts.items():
        if name not in ("captures", "shuffle"):
            table.add_row(name.replace("_", " "), _said(value))
    console_out = Console()
    console_out.print(table)
    for name, capture in facts["captures"].items():
        table = Table(show_header=False, show_edge=False, title=f"\n{name}", title_justify="left")
        for key, value in capture.items():
            table.add_row(key.replace("_", " "), _said(value))
        console_out.print(table)
    if shuffle:
        _print_shuffle(console_out, facts["shuffle"])


def _print_shuffle(out: Console, quality: dict[str, Any]) -> None:
    title = f"\nshuffle, {quality['n_batches']} batches of {quality['batch_size']:,} rows"
    table = Table(show_edge=False, title=title, title_justify="left")
    for name in ("", "measured", "perfect in its window", "perfect over all rows"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("variance of batch means", f"{quality['variance_ratio']:.3f}", "", "1.000")
    for name, said, form in (
        ("sequences", "distinct sequences in a batch", ",.1f"),
        ("documents", "distinct documents in a batch", ",.1f"),
        ("largest_document", "largest share of one document", ".2%"),
        ("previous_sequence", "rows whose sequence was in the batch before", ".2%"),
    ):
        values = (quality[name], quality["window"][name], quality["everything"][name])
        table.add_row(said, *(f"{value:{form}}" for value in values))
    out.print(table)
    for warning in quality["warnings"]:
        out.print(f"warning: {warning}", style="yellow")


def _said(value: Any) -> str:
    if isinstance(value, bool | str) or value is None:
        return str(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _facts(catalog: "Catalog") -> dict[str, Any]:
    import numpy as np

    plan, grid = catalog.plan, catalog.grid
    request = plan.request
    stored = int(catalog.shards.stored.sum())
    captures = {}
    for name, found in catalog.captures.items():
        committed = found.committed()
        rows = sum(int(catalog.shards.stored[s]) for s in committed)
        itemsize = 4 if found.capture.dtype == "float32" else 2
        disk = sum(found.record(s).rows_bytes for s in committed)
        raw = rows * len(found.capture.layers) * found.capture.width * itemsize
        totals = [found.side("totals", s)[0] for s in committed]
        n_kept, norm_sum = (sum(t[:, i] for t in totals) for i in (0, 1))
        captures[name] = {
            "hook": found.capture.hook,
            "layers": list(found.capture.layers),
            "width": found.capture.width,
            "dtype": found.capture.dtype,
            "codec": found.capture.codec,
            "committed_shards": len(committed),
            "complete": len(committed) == grid.n_shards,
            "rows_bytes": disk,
            "ratio": round(raw / disk, 3) if disk else None,
            "norm_mean": np.round(norm_sum / n_kept, 2).tolist() if totals else None,
            "norm_max": np.round(np.max([t[:, 3] for t in totals], axis=0), 1).tolist() if totals else None,
            "digest": found.capture.digest,
        }
    return {
        "format": plan.format,
        "model": request.model.name,
        "revision": request.model.revision,
        "family": request.model.family,
        "corpus": request.corpus.name,
        "documents": plan.text.n_documents_used,
        "tokens": stored,
        "kept_tokens": plan.n_kept,
        "seq_len": grid.seq_len,
        "sequences": grid.n_sequences,
        "shards": grid.n_shards,
        "holdout_shards": grid.n_holdout_shards,
        "rows_per_shard": grid.rows_per_shard,
        "rows_per_chunk": grid.rows_per_chunk,
        "exclude_first": request.exclude_first,
        "seed": request.seed,
        "actcache_version": plan.actcache_version,
        "digest": plan.digest,
        "captures": captures,
    }


@app.command()
def verify(
    store: StorePath,
    threads: Annotated[int, typer.Option(help="Threads that read and check.")] = 2,
    as_json: Json = False,
) -> None:
    """Read every byte of a store and compare it with what was committed. Exit 1 and a list when anything differs."""
    from actcache.store.open import open_catalog
    from actcache.store.verify import find_problems

    catalog = open_catalog(store)
    committed = {name: len(found.committed()) for name, found in catalog.captures.items()}
    with _progress("shards", quiet=as_json) as progress:
        task = progress.add_task("verify", total=catalog.grid.n_shards + sum(committed.values()))
        problems = find_problems(catalog, threads, lambda: progress.advance(task))
    if as_json:
        report = {"store": store, "shards": catalog.grid.n_shards, "committed": committed}
        print(json.dumps({**report, "problems": [p._asdict() for p in problems]}))
    else:
        for problem in problems:
            print(f"{problem.object}: {problem.what}")
        counts = ", ".join(f"{name} {n} of {catalog.grid.n_shards} shards" for name, n in committed.items())
        console.print(
            f"{store}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}; committed: {counts}",
            highlight=False,
        )
    if problems:
        raise typer.Exit(1)


@app.command("bench")
def bench_(
    store: StorePath,
    hook: Annotated[str | None, typer.Option(help="Which capture, where the store has several.")] = None,
    threads: Annotated[int, typer.Option(help="Threads that read and decode.")] = 2,
    window_rows: Annotated[int, typer.Option(help="Rows shuffled together.")] = 131_072,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 3,
    seconds: Annotated[float, typer.Option(help="Seconds for each part of a round.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Measure what limits reading a store here: memory, disk, decoding, the stream; name the bottleneck."""
    from actcache.reader.bench import bench
    from actcache.store.open import open_catalog

    opened = actcache.open(store)
    catalog = open_catalog(store)
    capture = catalog.capture(hook or ("resid_post" if "resid_post" in catalog.captures else opened.hooks[0]))
    found = bench(
        lambda: opened.stream(
            hook=capture.capture.name, threads=threads, window_rows=window_rows, epochs=None
        ),
        capture,
        rounds=rounds,
        seconds=seconds,
    )
    if as_json:
        print(json.dumps(asdict(found)))
        return
    table = Table(show_edge=False, title=f"{store}, {threads} threads", title_justify="left")
    table.add_column("what")
    table.add_column("per second", justify="right")
    table.add_column("of memcpy", justify="right")
    for name, value in (
        ("memcpy, 1 thread", found.memcpy),
        ("disk, bytes on disk", found.disk),
        ("read + check + decode, 1 thread", found.decode),
        ("stream", found.stream),
        ("stream, per CPU second", found.stream_cpu),
    ):
        if value is not None:
            table.add_row(name, _bytes(value), f"{value / found.memcpy:.2f}")
    out = Console()
    out.print(table)
    shares = ", ".join(f"{name} {100 * value:.0f} %" for name, value in found.share.items())
    out.print(f"ratio {found.ratio:.2f}x; threads' time: {shares}", highlight=False)
    out.print(f"bottleneck: {found.bottleneck}", highlight=False)


# train


@app.command()
def train(
    store: StorePath,
    out: Annotated[
        Path, typer.Option(help="The run's folder: checkpoints, metrics.jsonl and the finished SAE.")
    ],
    form: Annotated[
        str,
        typer.Option(
            help="stacked: one SAE on the rows of all layers (MLSAE). feature: a token's layers side by side. crosscoder: all "
            "layers of a token at once. transcoder: --hook in, --target-hook out."
        ),
    ] = "stacked",
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer", help="One SAE for each layer, all from one read: OUT/layer=3, OUT/layer=4, ..."
        ),
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help='Layers to train on, for example "0,5,10". Default: all stored.')
    ] = None,
    hook: Annotated[str | None, typer.Option(help="Which capture, where the store has several.")] = None,
    target_hook: Annotated[
        str | None, typer.Option(help="Of a transcoder: the capture that is to be predicted.")
    ] = None,
    expansion: Annotated[int, typer.Option(help="Latents per width of one layer.")] = 16,
    k: Annotated[int, typer.Option(help="Active latents per row; with batchtopk on average.")] = 32,
    activation: Annotated[
        str,
        typer.Option(
            help="topk: k of every row. batchtopk: k times the rows, over the batch. relu: all, with an L1 penalty."
        ),
    ] = "topk",
    auxk: Annotated[
        int | None,
        typer.Option(
            help="Dead latents that explain the residual; 0 is off. Default: 256, and off with relu."
        ),
    ] = None,
    dead_after_tokens: Annotated[
        int, typer.Option(help="A latent is dead after this many tokens without activity.")
    ] = 10_000_000,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. Default: 2e-4 * sqrt(2^14 / latents).")
    ] = None,
    batch_rows: Annotated[int, typer.Option(help="Rows per optimiser step, over all processes.")] = 8192,
    micro_rows: Annotated[
        int | None,
        typer.Option(help="Rows per forward and backward pass: bounds memory, changes nothing else."),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Stop after this many rows.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Or after this many epochs. Default: 1.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting of docs/reference/training.md, such as warmup_steps=1000 or precision=bfloat16. Repeat.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=A,B,...",
            help="Train one SAE for each value, all on the same batches in one pass: OUT/k=16, OUT/k=32, ... Repeat for every "
            "combination.",
        ),
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Start from the weights of this finished run instead of random ones.")
    ] = None,
    outlier_norm_ratio: Annotated[
        float,
        typer.Option(help="Drop rows whose norm exceeds this many times their layer's median; 0 keeps all."),
    ] = 10.0,
    window_rows: Annotated[int, typer.Option(help="Rows shuffled together in memory.")] = 131_072,
    lens: Annotated[
        Path | None,
        typer.Option(
            help="See every row through this lens (actcache lens train): the SAE is trained in its space, and gives raw rows back."
        ),
    ] = None,
    partitions: Annotated[
        int, typer.Option(help="What processes share out; their number must divide it. Part of the order.")
    ] = 8,
    memory: Annotated[str | None, typer.Option(help="Bound on memory for reading, such as 2GiB.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of rows and of the initial weights.")] = 0,
    device: Device = "auto",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    keep: Annotated[
        int, typer.Option(help="Newest checkpoints kept; the best on held-out rows is kept too.")
    ] = 2,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations on held-out rows. Default: none.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write RUN/tensorboard.")] = False,
    wandb: Annotated[
        str | None,
        typer.Option(
            metavar="PROJECT", help="Also log to this Weights & Biases project (WANDB_MODE=offline works)."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; begin it where there is none.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train sparse autoencoders on shuffled token x layer rows of a store; by default one on all layers (MLSAE).

    Under torchrun the processes share every batch: same rows, same result within rounding. Ctrl-C or SIGTERM saves a
    checkpoint and ends the run; the same command with --resume goes on exactly there.
    """
    from trainer import trackers
    from trainer.sweep import parse_setting, value_of

    given = {name: value_of(text) for name, text in map(parse_setting, settings or [])}
    if rows is None and epochs is None and not {"rows", "epochs"} & given.keys():
        epochs = 1
    chosen = {
        "form": form,
        "expansion": expansion,
        "k": k,
        "activation": activation,
        "auxk": auxk,
        "dead_after_tokens": dead_after_tokens,
        "lr": lr,
        "batch_rows": batch_rows,
        "micro_rows": micro_rows,
        "rows": rows,
        "epochs": epochs,
        "seed": seed,
        "checkpoint_every_steps": checkpoint_every,
        "keep_newest": keep,
        "eval_every_steps": eval_every,
    }
    selection = {
        "hook": hook if target_hook is None else [hook, target_hook],
        "layers": layers,
        "outlier_norm_ratio": outlier_norm_ratio or None,
        "window_rows": window_rows,
        "partitions": partitions,
        "memory": None if memory is None else _size(memory),
    }
    if (form == "transcoder") != (hook is not None and target_hook is not None):
        raise UsageError(
            "--form transcoder reads --hook and predicts --target-hook: give both, or another form without --target-hook"
        )
    boards = [trackers.tensorboard()] if tensorboard else []
    summary = _train(
        store,
        out,
        {name: value for name, value in chosen.items() if value is not None} | given,
        selection,
        device,
        sweeps=sweep or [],
        per_layer=per_layer,
        init_from=init_from,
        lens=lens,
        boards=boards + ([trackers.wandb(wandb)] if wandb else []),
        resume=resume,
        quiet=as_json,
    )
    if summary.outcome == "stopped":
        raise typer.Exit(130)
    if summary.failed:
        raise typer.Exit(1)


def _stream(store: Any, selection: dict[str, Any], **more: Any) -> "Stream":
    from actcache.model import parse_layers

    layers = selection["layers"]
    if isinstance(layers, str):
        layers = parse_layers(layers, store.plan.request.model.n_layers)
    names = ("hook", "stack", "outlier_norm_ratio", "window_rows", "partitions", "memory")
    chosen = {name: selection[name] for name in names if selection.get(name) is not None}
    return store.stream(layers=layers, **chosen, **more)


def _processes(device: str) -> tuple["Ranks", str]:
    """The processes of this run, as torchrun says, and this one's device."""
    from trainer.ranks import ALONE, join

    size, rank, local = (
        int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    chosen = _device(device)
    if size == 1:
        return ALONE, chosen
    import torch

    if chosen == "cuda":
        chosen = f"cuda:{local}"
        torch.cuda.set_device(local)
    return join(torch.device(chosen), "env://", rank, size), chosen


def _train(
    location: str,
    out: Path,
    settings: dict[str, Any],
    selection: dict[str, Any],
    device: str,
    *,
    sweeps: list[str] | None = None,
    per_layer: bool = False,
    init_from: Path | None = None,
    lens: Path | None = None,
    boards: Any = (),
    resume: bool,
    quiet: bool,
) -> "RunSummary":
    import torch

    from trainer.checkpoint import load_sae
    from trainer.forms import FORMS
    from trainer.lens import load_lens
    from trainer.loop import train_many
    from trainer.ranks import leave
    from trainer.sweep import make_configs

    config = next(iter(make_configs(settings, sweeps or []).values()))
    selection = {**selection, "stack": FORMS[config.form].stack}
    store = actcache.open(location)
    ranks, device = _processes(device)
    shown = not quiet and ranks.is_first
    reading = {
        "device": device,
        "dtype": torch.float32,
        "rank": ranks.rank,
        "world_size": ranks.size,
    }
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(
            _stream(
                store,
                selection,
                batch_size=config.batch_rows,
                seed=config.seed,
                epochs=config.epochs,
                **reading,
            )
        )
        held_out = None
        if config.eval_every_steps is not None:
            held_out = stack.enter_context(
                _stream(store, selection, split="holdout", batch_size=min(config.batch_rows, 4096), **reading)
            )
        configs = make_configs(settings, sweeps or [], source.layers if per_layer else None)
        if shown:
            _print_selection(store, source, selection)
            _print_memory(configs, source)
        n_total = config.rows if config.rows is not None else source.n_rows * (config.epochs or 1)
        progress = stack.enter_context(_progress("rows", quiet=not shown))
        stop = stack.enter_context(_stop_on_signals())
        summary = train_many(
            source,
            configs,
            out,
            device=device,
            resume=resume,
            provenance=_provenance(store, location, selection, source),
            held_out=held_out,
            init=None if init_from is None else load_sae(init_from, device=device),
            lens=None if lens is None else load_lens(lens),
            trackers=boards,
            ranks=ranks,
            on_step=_step_watcher(progress, progress.add_task("train", total=n_total)),
            stop=stop.is_set,
        )
    if ranks.size > 1:
        leave()
    if shown:
        _print_run(out, summary)
    elif quiet and ranks.is_first:
        print(json.dumps(asdict(summary)))
    return summary


def _provenance(store: Any, location: str, selection: dict[str, Any], source: "Stream") -> dict[str, Any]:
    request = store.plan.request
    return {
        "store": Path(location).name,
        "plan": store.plan.digest,
        "model": request.model.as_json(),
        "corpus": request.corpus.name,
        "selection": {
            **{k: v for k, v in selection.items() if k not in ("memory", "partitions")},
            "layers": list(source.layers),
        },
        "order": source.settings,
        "actcache_version": actcache.__version__,
    }


def _print_selection(store: Any, source: "Stream", selection: dict[str, Any]) -> None:
    plan = store.plan
    excluded = store.n_tokens - store.n_kept
    console.print(
        f"{source.n_rows:,} rows an epoch from layers {list(source.layers)}. Left out: {excluded:,} of {store.n_tokens:,} tokens "
        f"(first {plan.request.exclude_first} positions and special tokens)"
        + (
            f", {source.n_dropped:,} rows of more than {selection['outlier_norm_ratio']:g} x their layer's median norm"
            if selection["outlier_norm_ratio"]
            else ""
        ),
        highlight=False,
    )


def _print_memory(configs: dict[str, "TrainConfig"], source: "Stream") -> None:
    from trainer.forms import FORMS
    from trainer.present import memory_table
    from trainer.sweep import memory_of

    layers = tuple(source.layers)
    memory = {}
    for name, config in configs.items():
        try:
            memory[name] = memory_of(config, FORMS[config.form].width(source.width, layers), len(layers))
        except ValueError as error:
            raise UsageError(f"{name + ': ' if name else ''}{_validation(error)}") from error
    console.print(memory_table(memory))


def _print_run(out: Path, summary: "RunSummary") -> None:
    said = {
        "finished": f"finished after {summary.step:,} steps",
        "stopped": "stopped; a checkpoint is saved. Go on with --resume",
        "already finished": "is finished already. Nothing to do",
    }[summary.outcome]
    waited = 100 * summary.waited_s / max(summary.elapsed_s, 1e-9)
    console.print(
        f"{out}: {said} ({summary.elapsed_s:.0f} s, {waited:.1f} % waiting for data)", highlight=False
    )
    for name, message in summary.failed.items():
        console.print(Text(f"error (non_finite): {name}: {message}"), style="red", soft_wrap=True)


def _validation(error: ValueError) -> str:
    from pydantic import ValidationError

    from trainer.sweep import describe

    return describe(error) if isinstance(error, ValidationError) else str(error)


def _step_watcher(progress: _Progress, task: Any) -> Callable[["StepReport"], None]:
    from trainer.present import news

    started, first_waited, newest = time.perf_counter(), None, dict[str, "StepReport"]()

    def watch(report: "StepReport") -> None:
        nonlocal first_waited
        if first_waited is None:  # what an earlier call trained is not this one's speed
            progress.reset(task, completed=report.rows)
            first_waited = report.waited_s
        newest[report.name] = report
        waited = (report.waited_s - first_waited) / max(time.perf_counter() - started, 1e-9)
        progress.news = news(newest, waited)
        progress.update(task, completed=report.rows)

    return watch


# eval, encode and analyze


ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The store's model: a folder or hub id. Without it: a folder of that name beside the store, or the hub.",
    ),
]
ModelTokens = Annotated[
    int,
    typer.Option(help="Kept tokens the model is run on, to the end of a sequence; the first of the split."),
]
PatchPositions = Annotated[
    str,
    typer.Option(
        help="kept: patch rows that the run's filter lets pass. all: patch every position. both: one after the other."
    ),
]


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    store: StorePath,
    split: Annotated[str, typer.Option(help="holdout or train.")] = "holdout",
    loss: Annotated[
        bool,
        typer.Option(
            "--loss", help="Also run the model with reconstructions in its place: loss, KL, logits."
        ),
    ] = False,
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix", help="Of a --per-layer run: the SAE of each layer on the rows of every layer."
        ),
    ] = False,
    model: ModelName = None,
    model_tokens: ModelTokens = 1000,
    patch_positions: PatchPositions = "kept",
    picture: Annotated[
        Path | None, typer.Option(help="Also draw FVU per layer and the spread of latents (.png, .pdf).")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Reconstruction and sparsity of a run on held-out rows, filtered as its training rows were; with --loss, what the model loses."""
    from analysis.evaluation import Wanted, evaluate_run
    from analysis.present import evaluation_renderables

    _choice("patch-positions", patch_positions, ("kept", "all", "both"))
    _choice("split", split, ("holdout", "train"))
    opened = actcache.open(store)
    wanted = Wanted(
        split=split,  # type: ignore[arg-type]
        loss=loss,
        matrix=matrix,
        model_tokens=model_tokens,
        positions=_positions(patch_positions),
    )
    chosen = _device(device)
    with _stages(quiet=as_json) as reporter:
        found = evaluate_run(
            run, opened, wanted, lambda: _load_model_of(opened, model, chosen), chosen, reporter
        )
    if picture is not None:
        _draw(found, run, picture)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    for table in evaluation_renderables(found):
        Console().print(table)


@contextlib.contextmanager
def _stages(*, quiet: bool) -> "Iterator[Reporter]":
    """A bar for every stage that is reported."""
    from analysis.reporter import Reporter

    with _progress("", quiet=quiet) as progress:
        tasks: list[Any] = []

        def stage(name: str, total: int | None, unit: str) -> None:
            tasks.append(progress.add_task(name, total=total, unit=unit))

        yield Reporter(on_stage=stage, on_advance=lambda n: progress.advance(tasks[-1], n))


def _positions(text: str) -> Any:
    return ("kept", "all") if text == "both" else (text,)


def _load_model_of(store: Any, given: str | None, device: str) -> Any:
    from analysis.models import find_model, load_model_of

    _quiet_transformers()
    name = given or find_model(store)
    if name is None:
        raise UsageError(
            f"the plan of {store.url} calls its model {store.plan.request.model.name}, without a path, and there is no folder of "
            f"that name beside the store: say where it is with --model"
        )
    return load_model_of(store, name, device)


@app.command()
def encode(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    store: StorePath,
    out: Annotated[Path, typer.Option(help="Folder for the latents.")],
    split: Annotated[str, typer.Option(help="holdout or train.")] = "holdout",
    tokens: Annotated[
        int | None,
        typer.Option(help="Stop with the sequence that completes so many kept tokens. Default: all."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write the active latents of every kept token at every layer, once, as Parquet. Run it again to continue."""
    from analysis.latents import encode_store
    from analysis.subject import load_subject

    _choice("split", split, ("holdout", "train"))
    subject = load_subject(run, actcache.open(store), _device(device))
    with _progress("rows", quiet=as_json) as progress:
        n_rows = sum(shard.passes.size for shard in subject.shards(split, tokens))  # type: ignore[arg-type]
        task = progress.add_task("encode", total=n_rows)
        latents = encode_store(
            subject,
            out,
            split=split,  # type: ignore[arg-type]
            n_tokens=tokens,
            on_rows=lambda n: progress.advance(task, n),
        )
    n_bytes = sum(file["bytes"] for file in latents.header["files"])
    n_entries = sum(file["n_entries"] for file in latents.header["files"])
    facts = {
        "latents": str(out),
        "n_tokens": latents.n_tokens,
        "n_rows": n_rows,
        "n_entries": n_entries,
        "bytes": n_bytes,
    }
    if as_json:
        print(json.dumps(facts))
    else:
        console.print(
            f"{out}: {latents.n_tokens:,} tokens x {len(latents.layers)} layers, {n_entries:,} active latents, {_bytes(n_bytes)}",
            highlight=False,
        )


@app.command()
def analyze(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    store: StorePath,
    out: Annotated[Path, typer.Option(help="Folder for report.html, tables, figures and the dataset.")],
    split: Annotated[str, typer.Option(help="holdout or train.")] = "holdout",
    tokens: Annotated[
        int | None,
        typer.Option(help="Stop with the sequence that completes so many kept tokens. Default: all."),
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            help="Latents that 'actcache encode' wrote, or will be written here. Default: in --out."
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            help="Beside another run: a folder that analyze wrote, or a run, which is then analysed on the same store. Repeat."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text to look at alone. Repeat. Default: the one of the MLSAE paper."),
    ] = None,
    model: ModelName = None,
    no_model: Annotated[
        bool,
        typer.Option("--no-model", help="Only what the rows tell: no loss, no prompts, no text of tokens."),
    ] = False,
    model_tokens: ModelTokens = 1000,
    patch_positions: PatchPositions = "both",
    examples: Annotated[int, typer.Option(help="Most active rows kept per latent and layer.")] = 8,
    min_tokens: Annotated[
        int, typer.Option(help="Tokens a latent must be active on to count in the variance decomposition.")
    ] = 10,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Every table and figure of the multi-layer SAE paper about one run, in one page: OUT/report.html."""
    from analysis.output import analyse_and_write
    from analysis.run import PAPER_PROMPT, Request

    _choice("split", split, ("holdout", "train"))
    _choice("patch-positions", patch_positions, ("kept", "all", "both"))
    opened = actcache.open(store)
    found = None if no_model else _load_model_of(opened, model, _device(device))
    request = Request(
        split=split,  # type: ignore[arg-type]
        n_tokens=tokens,
        min_tokens=min_tokens,
        n_examples=examples,
        model_tokens=model_tokens,
        positions=_positions(patch_positions),
        prompts=tuple(prompt or (PAPER_PROMPT,)),
    )
    with _stages(quiet=as_json) as reporter:
        summary = analyse_and_write(
            run,
            opened,
            out,
            request,
            model=found,
            latents=latents,
            compare=compare or [],
            device=_device(device),
            reporter=reporter,
        )
    if as_json:
        print(json.dumps(summary.as_json()))
    else:
        console.print(f"look at {out / 'report.html'}", highlight=False)


def _draw(found: "EvalReport", run: Path, path: Path) -> None:
    from analysis.figures import save_overview

    if found.latents is None:
        raise UsageError(
            "--picture shows where latents are active; those of rows that hold several layers are at none"
        )
    mean = found.scores.mean
    title = f"{run.resolve().name}: {len(found.scores.layers)} layers, {len(found.latents.mean):,} latents; {mean.n_rows:,} held-out rows"
    save_overview(found.scores, found.latents, title, path)
    console.print(f"drew {path}", highlight=False)


# lens


lens_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Lenses: one invertible affine map per layer; 'actcache train --lens' trains in their space.",
)
app.add_typer(lens_app, name="lens")
LensOut = Annotated[Path, typer.Option(help="The lens: one .safetensors file.")]
LensLayers = Annotated[
    str | None, typer.Option(help='Layers to map, for example "0,5,10". Default: all stored.')
]


@lens_app.command("train")
def lens_train(
    store: StorePath,
    out: LensOut,
    kind: Annotated[
        str,
        typer.Option(
            help="tuned: h + W h + c, trained to the model's own predictions. scale: each layer's mean taken off, divided by one "
            "number. whiten: by the root of its covariance."
        ),
    ] = "tuned",
    layers: LensLayers = None,
    outlier_norm_ratio: Annotated[
        float,
        typer.Option(help="Leave out rows whose norm exceeds this many times their layer's median; 0: none."),
    ] = 10.0,
    tokens: Annotated[
        int | None,
        typer.Option(help="Kept training tokens. Default: 250,000 for tuned, all for scale and whiten."),
    ] = None,
    lr: Annotated[float, typer.Option(help="tuned: Adam's learning rate, falling to 0.")] = 1e-3,
    batch_tokens: Annotated[int, typer.Option(help="tuned: tokens of one step.")] = 512,
    eval_tokens: Annotated[int, typer.Option(help="tuned: held-out kept tokens it is judged on.")] = 1000,
    shrink: Annotated[
        float, typer.Option(help="whiten: this share of the mean variance is added to every variance.")
    ] = 1e-3,
    model: ModelName = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make a lens from a store's training rows: tuned, mean and scale, or whitening."""
    from actcache.model import parse_layers
    from actcache.patching import Patcher
    from analysis.lens_fit import RowChoice, Tuning, fit_lens, tune_lens
    from analysis.present import lens_facts, lens_renderable
    from trainer.lens import save_lens

    _choice("kind", kind, ("tuned", "scale", "whiten"))
    opened = actcache.open(store)
    choice = RowChoice(
        layers=None if layers is None else parse_layers(layers, opened.plan.request.model.n_layers),
        outlier_norm_ratio=outlier_norm_ratio or None,
        n_tokens=tokens,
    )
    patcher = None if kind != "tuned" else Patcher(_load_model_of(opened, model, _device(device)).decoder)
    tuned = None
    with _stages(quiet=as_json) as reporter:
        if patcher is not None:
            tuning = Tuning(n_tokens=tokens or 250_000, batch_tokens=batch_tokens, lr=lr)
            tuned = tune_lens(opened, patcher, choice, tuning, eval_tokens=eval_tokens, reporter=reporter)
            lens = tuned.lens
        else:
            lens = fit_lens(opened, kind, choice, shrink=shrink, reporter=reporter)  # type: ignore[arg-type]
    save_lens(lens, out)
    if as_json:
        print(json.dumps({"lens": str(out), **lens_facts(lens, tuned)}))
    else:
        Console().print(lens_renderable(lens, tuned))


@lens_app.command("import")
def lens_import(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="What the package tuned-lens saved: config.json and params.pt."
        ),
    ],
    store: StorePath,
    out: LensOut,
    layers: LensLayers = None,
    as_json: Json = False,
) -> None:
    """Read a tuned lens of the package tuned-lens as a lens for a store's layers."""
    from actcache.model import parse_layers
    from analysis.lens_import import import_tuned_lens
    from analysis.present import lens_facts, lens_renderable
    from trainer.lens import save_lens

    opened = actcache.open(store)
    plan = opened.plan.request.model
    chosen = opened.layers if layers is None else parse_layers(layers, plan.n_layers)
    lens = import_tuned_lens(folder, chosen, plan.n_layers, plan.width)
    save_lens(lens, out)
    if as_json:
        print(json.dumps({"lens": str(out), **lens_facts(lens, None)}))
    else:
        Console().print(lens_renderable(lens, None))


# demo


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, text, store, run and picture.")] = Path(
        "demo"
    ),
    tokens: Annotated[int, typer.Option(help="Tokens to cache.")] = 60_000,
) -> None:
    """The main job on real input: cache SmolLM2-135M on real text, train an MLSAE, evaluate it, draw the result."""
    from actcache.model import load_model, load_tokenizer
    from actcache.producer import samples
    from actcache.producer.corpus import open_corpus
    from actcache.producer.plan import Settings
    from analysis.evaluation import Wanted, evaluate_run
    from analysis.present import evaluation_renderables

    started = time.perf_counter()
    _quiet_transformers()
    console.print("1/4 real weights and real text, from packages", style="bold")
    model_dir = samples.make_model(out / "SmolLM2-135M-Instruct")
    corpus_path = samples.make_corpus(out / "sotu.jsonl")
    console.print("2/4 cache the residual stream of six layers", style="bold")
    settings = Settings(
        out=out / "acts.zarr",
        layers=(0, 5, 10, 15, 20, 25),
        n_tokens=tokens,
        seq_len=128,
        holdout_frac=0.1,
        exclude_first=1,
    )
    decoder = load_model(model_dir, dtype="float32")
    _build(
        settings,
        decoder,
        load_tokenizer(model_dir),
        open_corpus(corpus_path),
        corpus_path.name,
        1,
        quiet=False,
    )
    del decoder
    console.print("3/4 train one SAE on all of them", style="bold")
    config = {"expansion": 8, "k": 32, "batch_rows": 4096, "lr": 1e-3, "epochs": 3, "warmup_steps": 20}
    selection = {
        "hook": None,
        "layers": None,
        "outlier_norm_ratio": 10.0,
        "window_rows": 131_072,
        "memory": None,
    }
    _train(str(settings.out), out / "run", config, selection, "cpu", resume=True, quiet=False)
    console.print("4/4 evaluate it on held-out documents", style="bold")
    with _stages(quiet=False) as reporter:
        found = evaluate_run(out / "run", actcache.open(settings.out), Wanted(), reporter=reporter)
    _draw(found, out / "run", out / "result.png")
    (out / "result.json").write_text(json.dumps(found.as_json(), indent=2) + "\n")
    for table in evaluation_renderables(found):
        Console().print(table)
    console.print(
        f"done in {time.perf_counter() - started:.0f} s; look at {out / 'result.png'}", highlight=False
    )


if __name__ == "__main__":
    main()
