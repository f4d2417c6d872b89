"""The command line: one command per arrow of the flow. The only module that wires, prints and reads the environment."""

import contextlib
import functools
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

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
from actcache.errors import ActcacheError, NotFoundError, UsageError

if TYPE_CHECKING:
    from actcache.producer.corpus import Corpus
    from actcache.producer.importing import ImportSettings, ImportSummary, Source
    from actcache.producer.plan import SizeForecast
    from actcache.producer.repair import RepairSummary
    from actcache.producer.settings import Settings
    from actcache.producer.summary import BuildReporter, BuildSummary
    from actcache.producer.workers import Rank
    from actcache.reader.access import Store
    from actcache.reader.consumer import Consumer
    from actcache.reader.follow import Waiting
    from actcache.reader.stream import Stream
    from actcache.service.retention import DiskBudget
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
RunChunks = Annotated[
    int,
    typer.Option(
        help="Adjacent chunks that stay together, read in one request from object storage. Part of the order; 1 mixes best."
    ),
]
Partial = Annotated[
    bool, typer.Option("--partial", help="Of an unfinished store, take the shards that are committed now.")
]
StorePath = Annotated[
    str,
    typer.Argument(
        metavar="STORE", help="A store: a folder, an fsspec URL such as s3://..., or grpc://HOST:PORT/NAME."
    ),
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


class _News:
    """What is waited for: a line below the bars; where that is no terminal, a line now and then."""

    _EVERY_S = 30.0

    def __init__(self, progress: _Progress, *, quiet: bool) -> None:
        self._progress, self._is_quiet = progress, quiet
        self._said_at = -self._EVERY_S

    def say(self, text: str | None) -> None:
        """None: nothing any more."""
        self._progress.news = text or ""
        if self._is_quiet or console.is_terminal or text is None:
            return
        if time.monotonic() - self._said_at >= self._EVERY_S:
            self._said_at = time.monotonic()
            console.print(text, highlight=False, soft_wrap=True)


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


def _service_options(location: str) -> dict[str, Any] | None:
    """What the environment says of a service: a token, and certificates by their files."""
    if not location.startswith("grpc"):
        return None
    names = ("ca", "cert", "key", "server_name")
    found = {name: os.environ.get(f"ACTCACHE_{name.upper()}") for name in names}
    return {name: value for name, value in {**found, "token": _read_token(None)}.items() if value}


def _open(location: str) -> "Store":
    return actcache.open(location, _service_options(location))


def _catalog(location: str) -> "Catalog":
    """A store without what reading rows takes: no torch is imported for a folder."""
    if location.startswith("grpc"):
        from actcache.service.client import open_catalog as open_remote

        return open_remote(location, _service_options(location))
    from actcache.store.open import open_catalog

    return open_catalog(location)


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
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="Hub id or local folder of a causal language model.")],
    out: Annotated[Path, typer.Option(help="Where the store goes, for example acts.zarr.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:WEIGHT]",
            help="Text: .txt, .jsonl or .json lines (.gz, .zst), .parquet; token ids: .npy, .bin. A file, a folder, a glob, or "
            "any fsspec URL such as hf://datasets/... Repeat, each with a weight, to mix several in these shares of the tokens.",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to cache. Without it: the whole corpus.")] = None,
    allow_short: Annotated[
        bool,
        typer.Option("--allow-short", help="With --tokens: take a corpus that has fewer as far as it goes."),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a hub model.")] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Field that holds the text: text, or messages with --chat-template, where left out."
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="tokenizer|NAME|FILE",
            help="Make text of lists of messages: by the tokenizer's own template, one it has by name, or a .jinja file.",
        ),
    ] = None,
    ids_column: Annotated[
        str | None,
        typer.Option(
            help="Field that holds token ids, such as input_ids, of a corpus that is tokenised already."
        ),
    ] = None,
    token_dtype: Annotated[
        str, typer.Option(help="Numbers in .bin files: uint16, uint32, int32 or int64.")
    ] = "uint16",
    document_tokens: Annotated[
        int | None,
        typer.Option(
            help="Ids per document of .bin and flat .npy files. Without it documents end at the EOS."
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence, the unit the model runs on.")] = 128,
    packing: Annotated[
        str,
        typer.Option(
            help="packed: documents end to end. document: one in each sequence, cut to it or filled up with padding."
        ),
    ] = "packed",
    isolate_documents: Annotated[
        bool,
        typer.Option(
            "--isolate-documents", help="Packed documents do not see each other: each as if run alone."
        ),
    ] = False,
    separator: Annotated[
        str,
        typer.Option(
            help="What begins every document: eos, bos, none, or auto: EOS (else BOS) before text, nothing before messages "
            "and ids."
        ),
    ] = "auto",
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
    hook_module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:in|:out]",
            help="Or any module of every block, its input or its output (where left out), such as "
            "layers.*.mlp.up_proj:out. Repeat for several.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Stored as bfloat16, float16 or float32.")] = "bfloat16",
    model_dtype: Annotated[
        str, typer.Option(help="The model computes in: float32, bfloat16, float16, or auto.")
    ] = "auto",
    codec: Annotated[
        str,
        typer.Option(
            help="zstd (smallest without loss), lz4 (faster), none, or uint8 (a byte a number, with loss)."
        ),
    ] = "zstd",
    holdout: Annotated[
        float, typer.Option(help="Fraction held out for evaluation: whole documents, whole shards.")
    ] = 0.01,
    exclude_first: Annotated[
        int,
        typer.Option(
            help="Never train on the first N positions of a sequence (of a document where they are isolated): attention "
            "sinks live there."
        ),
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
    device_map: Annotated[
        str | None,
        typer.Option(
            help="auto: spread a large model over all GPUs, then memory, then disk. Needs accelerate; --device is not used."
        ),
    ] = None,
    encode_threads: Annotated[
        int | None,
        typer.Option(help="Threads that compress. Without it: every core the model does not need."),
    ] = None,
    allow_non_finite: Annotated[
        bool,
        typer.Option(
            "--allow-non-finite", help="Store rows with NaN or infinity: counted, not in the statistics."
        ),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(help="This process is one of several; torchrun and Slurm say so by themselves."),
    ] = None,
    world_size: Annotated[int | None, typer.Option(help="How many they are.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="local: this process. ray: --workers actors on a Ray cluster, restarted when they die."
        ),
    ] = "local",
    workers: Annotated[int, typer.Option(help="With --engine ray: actors.")] = 1,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="With --engine ray. Without it: 1 for --device cuda, else 0.")
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option(help="With --engine ray.")] = 1.0,
    ray_address: Annotated[
        str | None,
        typer.Option(help="With --engine ray: a running cluster, such as auto. Default: on this machine."),
    ] = None,
    max_disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The store never takes more than this: shards are deleted once no consumer's saved checkpoint needs them, and "
            "the build waits until there is room. Read it with 'actcache train --follow --consumer NAME'. none lifts an "
            "earlier one.",
        ),
    ] = None,
    consumers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="With --max-disk: names of the trainers that shards are kept for; all are waited for.",
        ),
    ] = None,
    expire_after: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="With --max-disk: a consumer that is in the way and not heard of for so long is given up.",
        ),
    ] = 3600.0,
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="Add a hook or layers to the store that is there, from its own tokens: give --model, --out, --hook, --layers.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a language model over text and cache its activations. Run the same command again to continue."""
    options = {name: value for name, value in locals().items() if name != "ctx"}
    _check_build_choices(options)
    _end_with_supervisor()
    _quiet_transformers()
    given = {name for name in options if _is_given(ctx, name)}
    summary = _add(options, given) if add else _build_new(options, given)
    if as_json:
        print(json.dumps(summary.as_json()))


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _end_with_supervisor() -> None:
    """As a part of 'actcache run': end when it is gone."""
    from actcache.service.supervise import TETHER, end_with_parent

    if os.environ.get(TETHER):
        end_with_parent()


def _disk_budget(options: dict[str, Any], n_workers: int) -> "DiskBudget | None":
    """What --max-disk and what goes with it say; an earlier budget is lifted where that is asked for."""
    from actcache.service.retention import DiskBudget, lift_budget

    text, consumers = options["max_disk"], options["consumers"]
    if (text in (None, "none")) != (consumers is None):
        raise UsageError(
            "--max-disk and --consumers go together: how much, and who reads the shards before they go (--consumers a,b)"
        )
    if text is None:
        return None
    if options["engine"] == "ray":
        raise UsageError(
            "--max-disk with --engine ray: not there yet; start the workers with torchrun or Slurm"
        )
    if text == "none":
        if options["out"].is_dir():
            lift_budget(options["out"])
        return None
    names = tuple(name.strip() for name in consumers.split(",") if name.strip())
    return DiskBudget(
        max_bytes=_size(text), consumers=names, expire_s=options["expire_after"], n_workers=n_workers
    )


_SHARDS_OF_BUDGET = 20


def _shard_memory(options: dict[str, Any], given: set[str]) -> int:
    """For two shards being filled. With a disk budget, unless told otherwise, twenty shards fit into it."""
    if options["max_disk"] in (None, "none") or given & {"shard_memory", "sequences_per_shard"}:
        return _size(options["shard_memory"])
    from actcache.store.open import open_catalog

    if (options["out"] / "zarr.json").exists():  # another budget than before changes no plan
        return open_catalog(str(options["out"])).plan.request.shard_memory_bytes
    return min(_size(options["shard_memory"]), max(1, _size(options["max_disk"]) * 2 // _SHARDS_OF_BUDGET))


_OF_THE_RUN = frozenset(
    (
        *("max_disk", "consumers", "expire_after"),
        *("rank", "world_size", "engine", "workers", "gpus_per_worker", "cpus_per_worker", "ray_address"),
        *("model", "out", "revision", "layers", "hook", "hook_module", "dtype", "model_dtype", "codec"),
        *("shard_memory", "device", "device_map", "encode_threads", "allow_non_finite", "add", "as_json"),
    )
)
"""Options of `build` that go with --add; the plan of the store says the others."""


def _check_build_choices(options: dict[str, Any]) -> None:
    _choice("dtype", options["dtype"], ("bfloat16", "float16", "float32"))
    _choice("codec", options["codec"], ("zstd", "lz4", "none", "uint8"))
    _choice("model-dtype", options["model_dtype"], ("auto", "bfloat16", "float16", "float32"))
    _choice("packing", options["packing"], ("packed", "document"))
    _choice("separator", options["separator"], ("auto", "eos", "bos", "none"))
    _choice("engine", options["engine"], ("local", "ray"))


def _hooks(options: dict[str, Any]) -> tuple[str, ...]:
    modules = [name if ":" in name else f"{name}:out" for name in options["hook_module"] or ()]
    return (*(options["hook"] or ([] if modules else ["resid_post"])), *modules)


def _open_corpus(options: dict[str, Any], tokenizer: Any, n_ids: int) -> tuple["Corpus", str]:
    """The corpus, and what it is called in the plan."""
    from actcache.producer.corpus import choose_fields, open_corpus

    if not options["corpus"]:
        raise UsageError("--corpus is missing: what text is to be run? (Only --add needs none)")
    names = ("text_column", "ids_column", "chat_template", "token_dtype", "document_tokens")
    corpus = open_corpus(
        options["corpus"], choose_fields(tokenizer, n_ids, **{name: options[name] for name in names})
    )
    return corpus, " + ".join(source.name for source in corpus.sources)


def _settings(options: dict[str, Any], n_layers: int, shard_memory_bytes: int) -> "Settings":
    from actcache.model import parse_layers
    from actcache.producer.settings import Settings

    return Settings(
        out=options["out"],
        hooks=_hooks(options),
        layers=parse_layers(options["layers"], n_layers),
        dtype=options["dtype"],
        codec=options["codec"],
        n_tokens=options["tokens"],
        allow_short=options["allow_short"],
        seq_len=options["seq_len"],
        packing=options["packing"],
        isolate_documents=options["isolate_documents"],
        bos=options["bos"],
        separator=options["separator"],
        holdout_frac=options["holdout"],
        exclude_first=options["exclude_first"],
        seed=options["seed"],
        batch_size=options["batch_size"],
        sequences_per_shard=options["sequences_per_shard"],
        shard_memory_bytes=shard_memory_bytes,
    )


def _load(options: dict[str, Any], dtype: str, device: str) -> Any:
    from actcache.model import load_model

    return load_model(
        options["model"],
        revision=options["revision"],
        dtype=dtype,
        device=_device(device),
        device_map=options["device_map"],
    )


def _build_new(options: dict[str, Any], given: set[str]) -> "BuildSummary":
    from actcache.model import load_skeleton, load_tokenizer
    from actcache.producer.build import default_encode_threads
    from actcache.producer.workers import local_rank_in

    tokenizer = load_tokenizer(options["model"], options["revision"])
    skeleton = load_skeleton(options["model"], revision=options["revision"])
    corpus, name = _open_corpus(options, tokenizer, skeleton.vocab_size)
    rank, (local_rank, n_local) = _rank(options), local_rank_in(os.environ)
    budget = _disk_budget(options, rank.world_size)
    settings = _settings(options, skeleton.n_layers, _shard_memory(options, given))
    if options["engine"] == "ray":  # until here: mistakes are found before weights are loaded
        return _build_on_ray(options, settings, tokenizer, corpus, name)
    device = _device(options["device"])
    if device == "cuda" and n_local > 1:
        device = f"cuda:{local_rank}"
    decoder = _load(options, options["model_dtype"], device)
    return _build(
        settings,
        decoder,
        tokenizer,
        corpus,
        name,
        rank=rank,
        encode_threads=options["encode_threads"] or default_encode_threads(decoder.device.type, n_local),
        allow_non_finite=options["allow_non_finite"],
        budget=budget,
        quiet=options["as_json"] or rank.rank > 0,
    )


def _rank(options: dict[str, Any]) -> "Rank":
    from actcache.producer.workers import Rank, rank_in

    given = (options["rank"], options["world_size"])
    if given == (None, None):
        return rank_in(os.environ) or Rank()
    if None in given:
        raise UsageError("--rank and --world-size go together: which of how many processes is this?")
    return Rank(*given)


def _build_on_ray(
    options: dict[str, Any], settings: "Settings", tokenizer: Any, corpus: "Corpus", corpus_name: str
) -> "BuildSummary":
    from actcache.producer.build import ensure_planned
    from actcache.producer.ray_engine import RayPool, fill_on_ray

    device = "cpu" if options["device"] == "cpu" or _device_here(options["device"]) == "cpu" else "cuda"
    pool = {
        "out": settings.out.resolve(),
        "model": options["model"],
        "revision": options["revision"],
        "dtype": options["model_dtype"],
        "device": device,
        "device_map": options["device_map"],
        "n_workers": options["workers"],
        "n_gpus": options["gpus_per_worker"]
        if options["gpus_per_worker"] is not None
        else int(device == "cuda"),
        "n_cpus": options["cpus_per_worker"],
        "encode_threads": options["encode_threads"],
        "allow_non_finite": options["allow_non_finite"],
        "address": options["ray_address"],
    }

    def work(reporter: "BuildReporter") -> "BuildSummary":
        decoder = _load(options | {"device_map": None}, options["model_dtype"], "cpu")  # for its digest only
        _, names = ensure_planned(
            settings, decoder, tokenizer, corpus, corpus_name=corpus_name, device=device, reporter=reporter
        )
        del decoder
        return fill_on_ray(RayPool(captures=tuple(names), **pool), reporter)

    return _run_build(settings.out, settings.n_tokens, work, quiet=options["as_json"])


def _device_here(name: str) -> str:
    """The class of a device, where `cuda` may be one that only other machines have."""
    return "cuda" if name.startswith("cuda") else _device(name)


def _add(options: dict[str, Any], given: set[str]) -> "BuildSummary":
    from actcache.model import parse_layers
    from actcache.producer.add import Addition, add_to_store
    from actcache.store.open import open_catalog

    wrong = sorted(f"--{name.replace('_', '-')}" for name in given - _OF_THE_RUN)
    if wrong:
        raise UsageError(f"--add takes the plan from {options['out']}: leave out {', '.join(wrong)}")
    if given & {"max_disk", "consumers", "expire_after"}:
        raise UsageError(
            "--add with --max-disk: captures of a store come and go together; build it with all hooks at once"
        )
    request = open_catalog(str(options["out"])).plan.request
    decoder = _load(
        options,
        options["model_dtype"] if "model_dtype" in given else request.model.compute_dtype,
        options["device"] if "device" in given or request.device not in ("cpu", "cuda") else request.device,
    )
    addition = Addition(
        hooks=_hooks(options),
        layers=parse_layers(options["layers"], decoder.n_layers),
        dtype=options["dtype"],
        codec=options["codec"],
        memory_bytes=_size(options["shard_memory"]) if "shard_memory" in given else None,
    )
    return _run_build(
        options["out"],
        None,
        lambda reporter: add_to_store(
            options["out"],
            addition,
            decoder,
            encode_threads=options["encode_threads"],
            allow_non_finite=options["allow_non_finite"],
            reporter=reporter,
        ),
        quiet=options["as_json"],
    )


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"--{option} {value}: expected one of {', '.join(allowed)}")


def _quiet_transformers() -> None:
    """Our own progress bars are enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _build(
    settings: "Settings",
    decoder: Any,
    tokenizer: Any,
    corpus: "Corpus",
    corpus_name: str,
    *,
    rank: "Rank | None" = None,
    encode_threads: int | None = None,
    allow_non_finite: bool = False,
    budget: "DiskBudget | None" = None,
    quiet: bool,
) -> "BuildSummary":
    from actcache.producer.build import build
    from actcache.service.retention import bounded_by

    def work(reporter: "BuildReporter") -> "BuildSummary":
        admission = None
        if budget is not None:
            admission = bounded_by(
                budget, lambda blocked: reporter.on_blocked(None if blocked is None else blocked.reason)
            )
        return build(
            settings,
            decoder,
            tokenizer,
            corpus,
            corpus_name=corpus_name,
            rank=rank,
            encode_threads=encode_threads,
            allow_non_finite=allow_non_finite,
            admission=admission,
            max_disk_bytes=None if budget is None else budget.max_bytes,
            reporter=reporter,
        )

    return _run_build(settings.out, settings.n_tokens, work, quiet=quiet)


def _run_build(
    out: Path, n_tokens: int | None, work: Callable[["BuildReporter"], "BuildSummary"], *, quiet: bool
) -> "BuildSummary":
    """Do the work of a build with bars and messages; stopped with Ctrl-C or SIGTERM it says how to go on."""
    from actcache.producer.summary import BuildReporter

    with _progress("tok", quiet=quiet) as progress:
        planning = progress.add_task("tokenise", total=n_tokens, visible=False)
        running = progress.add_task("activations", total=None, visible=False)

        def started(n_done: int, n_tokens: int) -> None:
            progress.update(planning, visible=False)
            progress.update(running, total=n_tokens, completed=n_done, visible=True)

        def forecast(grid: "Grid", size: "SizeForecast") -> None:
            if not quiet:
                _print_forecast(out, grid, size)

        news = _News(progress, quiet=quiet)
        reporter = BuildReporter(
            on_tokens=lambda n: progress.update(planning, completed=n, visible=True),
            on_forecast=forecast,
            on_start=started,
            on_forward=lambda n: progress.advance(running, n),
            on_blocked=news.say,
        )
        terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            summary = work(reporter)
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                f"stopped; every committed shard of {out} is safe. Run the same command again to continue."
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
    from actcache.producer.present import stage_table

    if summary.was_complete:
        console.print(
            f"{summary.store} is complete: all {summary.n_shards} shards are committed. Nothing to do."
        )
        return
    console.print(stage_table(summary))
    console.print(
        f"{summary.n_tokens:,} tokens in {summary.filling_s:.1f} s ({summary.tokens_per_s:,.0f} tok/s, "
        f"{_bytes(summary.bytes_per_s)}/s); {_bytes(summary.raw_bytes)} -> {_bytes(summary.disk_bytes)} "
        f"({summary.ratio:.2f}x); the bottleneck was: {summary.bottleneck}"
        + (f"; waited {summary.blocked_s:.0f} s for room on disk" if summary.blocked_s else ""),
        highlight=False,
    )
    if summary.was_enough:
        console.print("ended before the last shard: no consumer needs more")


# plan


def _like_build(
    **changed: Any,
) -> Callable[[Callable[[dict[str, Any]], None]], Callable[..., None]]:
    """A command with the options of `build`, changed: other ones, and None for those it does not have."""

    def wrap(command: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        hints = get_type_hints(build, include_extras=True)
        own = {
            p.name: p.replace(annotation=hints[p.name]) for p in inspect.signature(build).parameters.values()
        }
        del own["ctx"]
        last = own.pop("as_json")
        parameters = [p for p in {**own, **changed, "as_json": last}.values() if p is not None]
        parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)

        @functools.wraps(command)
        def call(**options: Any) -> None:
            command(options)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return wrap


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation
    )


@app.command()
@_like_build(
    out=_option(
        "out",
        Annotated[Path, typer.Option(help="Where the store would go: what is free there is said.")],
        Path("acts.zarr"),
    ),
    model_dtype=None,
    device=None,
    device_map=None,
    encode_threads=None,
    max_disk=None,
    consumers=None,
    expire_after=None,
    add=None,
    read=_option(
        "read",
        Annotated[
            bool,
            typer.Option(
                "--read",
                help="Read the whole of what a build would read, to know whether there is enough. Always done where the "
                "number of tokens does not say all: without --tokens, and with --packing document.",
            ),
        ],
        default=False,
    ),
    tokens_per_s=_option(
        "tokens_per_s",
        Annotated[
            float | None,
            typer.Option(help="Tokens per second that the model runs at, to say how long it takes."),
        ],
        None,
    ),
)
def plan(options: dict[str, Any]) -> None:
    """What build would make of the same options: tokens, shards, bytes, time. Needs no weights, writes nothing."""
    from actcache.model import load_skeleton, load_tokenizer
    from actcache.producer.forecast import make_forecast
    from actcache.producer.present_forecast import forecast_lines, forecast_notes, forecast_table

    _check_build_choices({**options, "model_dtype": "auto"})
    _quiet_transformers()
    if options["tokens_per_s"] is not None and options["tokens_per_s"] <= 0:
        raise UsageError(f"--tokens-per-s {options['tokens_per_s']:g}: expected a number above 0")
    decoder = load_skeleton(options["model"], revision=options["revision"])
    tokenizer = load_tokenizer(options["model"], options["revision"])
    corpus, _name = _open_corpus(options, tokenizer, decoder.vocab_size)
    settings = _settings(options, decoder.n_layers, _size(options["shard_memory"]))
    with _progress("tok", quiet=options["as_json"]) as progress:
        task = progress.add_task("tokenise", total=settings.n_tokens, visible=False)
        found = make_forecast(
            settings,
            decoder,
            tokenizer,
            corpus,
            read=options["read"],
            tokens_per_s=options["tokens_per_s"],
            on_tokens=lambda n: progress.update(task, completed=n, visible=True),
        )
    if options["as_json"]:
        print(json.dumps({**asdict(found), "grid": found.grid.as_json()}))
        return
    out = Console()
    for line in forecast_lines(found):
        out.print(line, highlight=False)
    out.print(forecast_table(found))
    out.print(forecast_notes(found), highlight=False, style="dim")


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
    codec: Annotated[
        str,
        typer.Option(
            help="zstd (smallest without loss), lz4 (faster), none, or uint8 (a byte a number, with loss)."
        ),
    ] = "zstd",
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
    _choice("codec", codec, ("zstd", "lz4", "none", "uint8"))
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
    run_chunks: RunChunks = 1,
    partial: Partial = False,
    batches: Annotated[int, typer.Option(help="With --shuffle: batches to measure.")] = 200,
    as_json: Json = False,
) -> None:
    """Say what a store holds: model, text, layers, size, how much of it is committed. Of grpc://HOST:PORT, which stores it serves."""
    if _is_bare_service(store):
        _list_service(store, as_json=as_json)
        return
    catalog = _catalog(store)
    facts = _facts(catalog)
    if shuffle:
        with _open(store).stream(
            batch_size=batch_size,
            window_rows=window_rows,
            order=order,  # type: ignore[arg-type]
            commit_shards=commit_shards,
            run_chunks=run_chunks,
            partial=partial,
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

    from actcache.store.arrays import is_quantised
    from actcache.store.merged import quantisation_errors

    plan, grid = catalog.plan, catalog.grid
    request = plan.request
    stored = int(catalog.shards.stored.sum())
    captures = {}
    for name, found in catalog.captures.items():
        committed, live = found.committed(), found.live()
        rows = sum(int(catalog.shards.stored[s]) for s in live)
        itemsize = 4 if found.capture.dtype == "float32" else 2
        disk = sum(found.record(s).rows_bytes for s in live)
        raw = rows * len(found.capture.layers) * found.capture.width * itemsize
        totals = [found.side("totals", s)[0] for s in live]
        n_kept, norm_sum = (sum(t[:, i] for t in totals) for i in (0, 1))
        errors = quantisation_errors(found, live).values() if is_quantised(found.capture) else ()
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
            "fvu_of_quantising": [float(f"{e.fvu:.2g}") for e in errors] or None,
            "fvu_of_worst_dimension": [float(f"{e.worst:.2g}") for e in errors] or None,
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
        "retired_shards": len(next(iter(catalog.captures.values())).retired()),
        "rows_per_shard": grid.rows_per_shard,
        "rows_per_chunk": grid.rows_per_chunk,
        "exclude_first": request.exclude_first,
        "seed": request.seed,
        "actcache_version": plan.actcache_version,
        "digest": plan.digest,
        "captures": captures,
    }


def _is_bare_service(location: str) -> bool:
    """Whether a service is meant, and none of its stores by name."""
    if not location.startswith("grpc"):
        return False
    from actcache.service.link import parse_address

    return not parse_address(location).store


def _list_service(location: str, *, as_json: bool) -> None:
    from actcache.service.client import list_stores
    from actcache.service.present import stores_table

    found = list_stores(location, _service_options(location))
    if as_json:
        print(json.dumps({"stores": found}))
    else:
        Console().print(stores_table(location, found))


@app.command()
def verify(
    store: StorePath,
    threads: Annotated[int, typer.Option(help="Threads that read and check.")] = 2,
    as_json: Json = False,
) -> None:
    """Read every byte of a store and compare it with what was committed. Exit 1 and a list when anything differs."""
    from actcache.store.verify import find_problems

    catalog = _catalog(store)
    committed = {name: len(found.committed()) for name, found in catalog.captures.items()}
    n_live = sum(len(found.live()) for found in catalog.captures.values())
    n_retired = len(next(iter(catalog.captures.values())).retired())
    with _progress("shards", quiet=as_json) as progress:
        task = progress.add_task("verify", total=catalog.grid.n_shards + n_live)
        problems = find_problems(catalog, threads, lambda: progress.advance(task))
    if as_json:
        report = {
            "store": store,
            "shards": catalog.grid.n_shards,
            "committed": committed,
            "retired": n_retired,
        }
        print(json.dumps({**report, "problems": [p._asdict() for p in problems]}))
    else:
        for problem in problems:
            print(f"{problem.object}: {problem.what}")
        counts = ", ".join(f"{name} {n} of {catalog.grid.n_shards} shards" for name, n in committed.items())
        console.print(
            f"{store}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}; committed: {counts}"
            + (f"; {n_retired} retired, their rows are gone as planned" if n_retired else ""),
            highlight=False,
        )
    if problems:
        raise typer.Exit(1)


@app.command()
def repair(
    store: StorePath,
    model: Annotated[
        str | None,
        typer.Option(help="The model the store was made with. Without it: the hub id in the plan."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, branch or tag of a hub model. Without it: the plan's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... Without it: what the plan says.")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="auto: spread a large model over all GPUs, as build does.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads that read and check.")] = 2,
    encode_threads: Annotated[
        int | None,
        typer.Option(help="Threads that compress. Without it: every core the model does not need."),
    ] = None,
    allow_non_finite: Annotated[
        bool, typer.Option("--allow-non-finite", help="Store rows with NaN or infinity, as build does.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find damaged shards, as verify does, and rebuild them with the model. Exit 1 when something is left damaged."""
    from actcache.model import load_model
    from actcache.producer.repair import model_of, repair

    _quiet_transformers()

    def load(catalog: "Catalog") -> Any:
        name, its_revision, request = *model_of(catalog, model), catalog.plan.request
        return load_model(
            name,
            revision=revision or its_revision,
            dtype=request.model.compute_dtype,
            device=_device(device or request.device),
            device_map=device_map,
        )

    summary = _run_repair(
        store,
        lambda on_verify, reporter: repair(
            store,
            load,
            threads=threads,
            encode_threads=encode_threads,
            allow_non_finite=allow_non_finite,
            on_verify=on_verify,
            reporter=reporter,
        ),
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(summary.as_json()))
    if summary.left:
        raise typer.Exit(1)


def _run_repair(
    store: str,
    work: Callable[[Callable[[], None], "BuildReporter"], "RepairSummary"],
    *,
    quiet: bool,
) -> "RepairSummary":
    """Repair with bars and messages; stopped with Ctrl-C or SIGTERM it says how to go on."""
    from actcache.producer.present import repair_lines
    from actcache.producer.summary import BuildReporter
    from actcache.store.open import open_catalog

    catalog = open_catalog(store)
    n_checks = catalog.grid.n_shards + sum(len(found.committed()) for found in catalog.captures.values())
    with _progress("shards", quiet=quiet) as progress:
        checking = progress.add_task("verify", total=n_checks)
        running = progress.add_task("rebuild", total=None, visible=False, unit="tok")
        reporter = BuildReporter(
            on_start=lambda done, n: progress.update(running, total=n, completed=done, visible=True),
            on_forward=lambda n: progress.advance(running, n),
        )
        terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            summary = work(lambda: progress.advance(checking), reporter)
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                f"stopped; what is rebuilt of {store} is safe. Run the same command again to go on."
            )
            sys.exit(130)
        finally:
            signal.signal(signal.SIGTERM, terminate)
    if not quiet:
        for problem in summary.left:
            print(f"{problem.object}: {problem.what}")
        for line in repair_lines(summary):
            console.print(line, highlight=False)
    return summary


@app.command("bench")
def bench_(
    store: StorePath,
    hook: Annotated[str | None, typer.Option(help="Which capture, where the store has several.")] = None,
    threads: Annotated[int, typer.Option(help="Threads that read and decode.")] = 2,
    window_rows: Annotated[int, typer.Option(help="Rows shuffled together.")] = 131_072,
    run_chunks: RunChunks = 1,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 3,
    seconds: Annotated[float, typer.Option(help="Seconds for each part of a round.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Measure what limits reading a store here: memory, disk, decoding, the stream; name the bottleneck."""
    from actcache.reader.bench import bench

    opened = _open(store)
    catalog = _catalog(store)
    capture = catalog.capture(hook or ("resid_post" if "resid_post" in catalog.captures else opened.hooks[0]))
    found = bench(
        lambda: opened.stream(
            hook=capture.capture.name,
            threads=threads,
            window_rows=window_rows,
            run_chunks=run_chunks,
            partial=True,
            epochs=None,
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
    out.print(f"ratio {found.ratio:.2f}x; threads busy {100 * found.busy:.0f} %: {shares}", highlight=False)
    if found.from_disk is not None:
        out.print(
            f"of what was read {100 * found.from_disk:.0f} % came from the disk, not from memory",
            highlight=False,
        )
    if found.request_bytes is not None:
        out.print(f"{_bytes(found.request_bytes)} a request to object storage", highlight=False)
    out.print(f"bottleneck: {found.bottleneck}", highlight=False)


@app.command()
def codecs(
    store: Annotated[
        str | None,
        typer.Argument(metavar="[STORE]", help="Whose rows to try them on: a folder, or an fsspec URL."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Or a model (hub id or local folder), which is run on a sample of --corpus."),
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Text for --model: as for build.")] = None,
    text_column: Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")] = "text",
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a hub model.")] = None,
    hook: Annotated[
        str | None,
        typer.Option(help="Which capture of the store, or which hook of the model. Default: resid_post."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help='Layers to try, for example "0,5,10". Default: six spread over all.')
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="For --model: stored as bfloat16, float16 or float32.")
    ] = "bfloat16",
    seq_len: Annotated[int, typer.Option(help="For --model: tokens per sequence.")] = 128,
    tokens: Annotated[int, typer.Option(help="For --model: tokens to run.")] = 8192,
    sample: Annotated[str, typer.Option(help="Rows to try, as bytes before encoding.")] = "64MiB",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Try every codec on your own activations: ratio, speed and error of each, and which one to use."""
    import tempfile

    from actcache.store.codec_sample import compare_codecs, sample_chunks
    from actcache.store.present import codec_table

    if (store is None) == (model is None) or (model is None) != (corpus is None):
        raise UsageError(
            "give a STORE, or --model and --corpus: the rows that codecs are tried on come from there"
        )
    with contextlib.ExitStack() as stack:
        if model is not None and corpus is not None:
            folder = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="actcache-codecs-"))) / "s.zarr"
            )
            _sample_model(
                folder, model, revision, corpus, text_column, hook, layers, dtype, tokens, seq_len, device
            )
            store, layers = str(folder), None
        assert store is not None
        catalog = _catalog(store)
        name = hook or ("resid_post" if "resid_post" in catalog.captures else sorted(catalog.captures)[0])
        capture = catalog.capture(name)
        chosen = _layers_to_try(layers, capture.capture.layers)
        with _progress("codecs", quiet=as_json) as progress:
            task = progress.add_task("try codecs", total=None)
            chunks = sample_chunks(capture, catalog.shards.kept, _size(sample), chosen)
            report = compare_codecs(chunks, capture.capture.dtype, lambda _name: progress.advance(task))
    if as_json:
        print(json.dumps(report.as_json()))
        return
    title = f"{model or store}: {report.n_rows:,} rows of {report.row_bytes} bytes, layers {', '.join(map(str, chosen))}"
    out = Console()
    out.print(codec_table(report, title))
    out.print(f"* {report.recommended}: {report.reason}.", highlight=False)
    out.print(
        "Speeds are those of one core. FVU: error over the variance of ordinary kept rows.", style="dim"
    )


def _layers_to_try(text: str | None, there: tuple[int, ...]) -> tuple[int, ...]:
    from actcache.model import parse_layers
    from actcache.producer.sampling import spread_layers

    return spread_layers(there) if text is None else parse_layers(text, max(there) + 1)


def _sample_model(
    out: Path,
    model: str,
    revision: str | None,
    corpus: str,
    text_column: str | None,
    hook: str | None,
    layers: str | None,
    dtype: str,
    tokens: int,
    seq_len: int,
    device: str,
) -> None:
    from actcache.model import load_model, load_tokenizer
    from actcache.producer.corpus import choose_fields, open_corpus
    from actcache.producer.sampling import build_sample

    _choice("dtype", dtype, ("bfloat16", "float16", "float32"))
    _quiet_transformers()
    tokenizer = load_tokenizer(model, revision)
    decoder = load_model(model, revision=revision, device=_device(device))
    build_sample(
        out,
        decoder,
        tokenizer,
        open_corpus([corpus], choose_fields(tokenizer, decoder.vocab_size, text_column=text_column)),
        hook=hook or "resid_post",
        layers=_layers_to_try(layers, tuple(range(decoder.n_layers))),
        dtype=dtype,
        n_tokens=tokens,
        seq_len=seq_len,
    )


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
    run_chunks: RunChunks = 1,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Of an unfinished store, train on the shards that are committed now; --resume goes on with the same ones.",
        ),
    ] = False,
    order: Annotated[
        str,
        typer.Option(
            help="global: mixed over the whole store. commit: shard by shard as planned, mixing the last few, which is how a build "
            "is followed; also of a finished store, with the same result. auto: commit with --follow, else global."
        ),
    ] = "auto",
    commit_shards: Annotated[int, typer.Option(help="With --order commit: shards mixed together.")] = 4,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Train while the store is built, from before it is there: wait for shards that are not committed yet.",
        ),
    ] = False,
    consumer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --follow: which of the build's --consumers this is; shards go once its saved checkpoint is past them.",
        ),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="With --follow: give up when no producer was heard of for so long."
        ),
    ] = 600.0,
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
    kernels: Annotated[
        str,
        typer.Option(
            help="auto: triton on a GPU where it is installed, else sparse. Or reference, sparse, triton."
        ),
    ] = "auto",
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between checkpoints. Default: 1000; fewer where a disk budget has no room for so many rows."
        ),
    ] = None,
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

    _end_with_supervisor()
    _choice("order", order, ("auto", "global", "commit"))
    if follow and order == "global":
        raise UsageError(
            "--follow goes through shards as they are committed: leave --order out, or --order commit"
        )
    if consumer is not None and not follow:
        raise UsageError(f"--consumer {consumer} is for --follow: a finished store keeps all its shards")
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
        "run_chunks": run_chunks,
        "partial": (resume and _frozen_shards(out)) or partial,
        "partitions": partitions,
        "order": "commit" if follow or order == "commit" else "global",
        "commit_shards": commit_shards,
        "follow": follow,
        "consumer": consumer,
        "patience_s": patience,
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
        kernels=kernels,
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


def _frozen_shards(run: Path) -> str | None:
    """The shards that a run's newest cursor is about, where they are not all there are."""
    newest = max(
        run.glob("**/checkpoints/step-*/state.json"), key=lambda path: path.parent.name, default=None
    )
    if newest is None:
        return None
    found = json.loads(newest.read_text(encoding="utf-8"))["cursor"]["settings"].get("shards")
    return found if isinstance(found, str) else None


def _stream(store: Any, selection: dict[str, Any], **more: Any) -> "Stream":
    from actcache.model import parse_layers

    layers = selection["layers"]
    if isinstance(layers, str):
        layers = parse_layers(layers, store.plan.request.model.n_layers)
    names = (
        *("hook", "stack", "outlier_norm_ratio", "window_rows", "run_chunks", "partitions", "memory"),
        *("order", "commit_shards", "follow", "consumer", "patience_s"),
    )
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
    kernels: str = "auto",
    sweeps: list[str] | None = None,
    per_layer: bool = False,
    init_from: Path | None = None,
    lens: Path | None = None,
    boards: Any = (),
    resume: bool,
    quiet: bool,
) -> "RunSummary":
    import torch

    from actcache.flow import StopWaiting
    from trainer.checkpoint import load_sae
    from trainer.forms import FORMS
    from trainer.kernels import make_kernels
    from trainer.lens import load_lens
    from trainer.loop import train_many
    from trainer.ranks import leave
    from trainer.reports import RunSummary
    from trainer.sweep import make_configs

    config = next(iter(make_configs(settings, sweeps or []).values()))
    selection = {**selection, "stack": FORMS[config.form].stack}
    ranks, device = _processes(device)
    chosen_kernels = make_kernels(kernels, device)
    shown = not quiet and ranks.is_first
    summary = RunSummary(outcome="stopped", step=0, rows=0, elapsed_s=0.0, waited_s=0.0)
    with contextlib.suppress(StopWaiting), contextlib.ExitStack() as stack:
        progress = stack.enter_context(_progress("rows", quiet=not shown))
        stop = stack.enter_context(_stop_on_signals())
        news = _News(progress, quiet=not shown)
        follows = bool(selection.get("follow"))

        def waits(waiting: "Waiting | None") -> None:
            if stop.is_set():
                raise StopWaiting
            news.say(None if waiting is None else str(waiting))

        store = _open_to_follow(location, selection["patience_s"], waits) if follows else _open(location)
        reading = {
            "device": device,
            "dtype": torch.float32,
            "rank": ranks.rank,
            "world_size": ranks.size,
            "on_wait": waits if follows else None,
        }
        source = stack.enter_context(
            _stream(
                store,
                selection,
                batch_size=config.batch_rows,
                seed=config.seed,
                epochs=config.epochs,
                partial=selection["partial"],
                **reading,
            )
        )
        held_out = None
        if config.eval_every_steps is not None:
            held_out = stack.enter_context(_held_out(store, selection, config.batch_rows, reading))
        if "checkpoint_every_steps" not in settings:
            settings = {**settings, "checkpoint_every_steps": _checkpoint_steps(store, source)}
        configs = make_configs(settings, sweeps or [], source.layers if per_layer else None)
        if shown:
            _print_selection(store, source, selection)
            _print_memory(configs, source)
        n_total = config.rows if config.rows is not None else source.n_rows * (config.epochs or 1)
        consumer = None
        if selection.get("consumer") and ranks.is_first:
            consumer = stack.enter_context(
                _register(store, source, selection["consumer"], configs, out, resume=resume)
            )
        watch = _step_watcher(progress, progress.add_task("train", total=n_total))
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
            kernels=chosen_kernels,
            ranks=ranks,
            stop=stop.is_set,
            **_live_hooks(source, consumer, watch),
        )
        if consumer is not None and summary.outcome != "stopped":
            consumer.finished()
    if ranks.size > 1:
        leave()
    if shown:
        _print_run(out, summary)
    elif quiet and ranks.is_first:
        print(json.dumps(asdict(summary)))
    return summary


def _held_out(
    store: "Store", selection: dict[str, Any], batch_rows: int, reading: dict[str, Any]
) -> "Stream":
    """Rows to evaluate on. A follower waits for them here, so that no process waits in the middle of an evaluation."""
    found = _stream(store, selection, split="holdout", batch_size=min(batch_rows, 4096), **reading)
    if found.follower is not None:
        found.follower.wait_for(found.shard_numbers)
    return found


def _live_hooks(
    source: "Stream", consumer: "Consumer | None", watch: "Callable[[StepReport], None]"
) -> dict[str, Any]:
    """What training tells a build that it follows, and what makes it save when that build waits for it."""

    def offer_save(save: Callable[[], None]) -> None:
        if source.follower is not None:
            source.follower.on_starved = save

    if consumer is None:
        return {"on_step": watch, "offer_save": offer_save}

    def on_step(report: "StepReport") -> None:
        watch(report)
        consumer.update(rows=report.rows, loss=report.loss)

    return {"on_step": on_step, "on_saved": consumer.saved, "offer_save": offer_save}


def _open_to_follow(location: str, patience_s: float, waits: "Callable[[Waiting | None], None]") -> "Store":
    from actcache.reader.follow import wait_for_store

    planned_at = None if "://" in location else Path(location)
    return wait_for_store(lambda: _open(location), planned_at, patience_s=patience_s, on_wait=waits)


def _checkpoint_steps(store: "Store", source: "Stream") -> int:
    """Steps between checkpoints where nobody says: fewer where a disk budget has no room for so many rows."""
    from actcache.reader.consumer import rows_that_fit
    from trainer.config import TrainConfig

    most = TrainConfig.model_fields["checkpoint_every_steps"].default
    rows = None if source.follower is None else rows_that_fit(source, store.objects)
    return most if rows is None else max(1, min(most, rows // source.selection.batch_size))


def _register(
    store: "Store",
    source: "Stream",
    name: str,
    configs: "dict[str, TrainConfig]",
    out: Path,
    *,
    resume: bool,
) -> "Consumer":
    """Tell the build from where on shards are needed: from the checkpoint that the run will go on from."""
    from trainer.begin import saved_cursor
    from trainer.window import first_batches

    config = next(iter(configs.values()))
    cursor = saved_cursor(out, configs) if resume else None
    if cursor is not None:
        source.load_state_dict(cursor)
    first = first_batches(config, len(source.layers)) * config.batch_rows
    return store.register(
        name,
        source,
        checkpoint_rows=config.checkpoint_every_steps * config.batch_rows,
        first_rows=0 if cursor is not None else first,
    )


def _provenance(store: Any, location: str, selection: dict[str, Any], source: "Stream") -> dict[str, Any]:
    request = store.plan.request
    return {
        "store": Path(location).name,
        "plan": store.plan.digest,
        "model": request.model.as_json(),
        "corpus": request.corpus.name,
        "selection": {
            **{name: value for name, value in selection.items() if name not in _NOT_OF_ROWS},
            **_limits_found(source),
            "layers": list(source.layers),
        },
        "order": source.settings,
        "actcache_version": actcache.__version__,
    }


def _limits_found(source: "Stream") -> dict[str, Any]:
    """Of the `commit` order the norm limits themselves: what they were measured on may be deleted later."""
    limits = source.selection.rules.norm_limits
    if source.selection.order != "commit" or limits is None:
        return {}
    by_layer = {str(layer): limit for layer, limit in zip(source.layers, limits, strict=True)}
    return {"outlier_norm_ratio": None, "norm_limits": by_layer}


_NOT_OF_ROWS = frozenset(
    (
        *("memory", "partial", "partitions"),
        *("order", "commit_shards", "follow", "consumer", "patience_s"),
    )
)
"""Parts of a selection that change nothing about which rows an SAE is for."""


def _print_selection(store: Any, source: "Stream", selection: dict[str, Any]) -> None:
    plan = store.plan
    excluded = store.n_tokens - store.n_kept
    console.print(
        f"{source.n_rows:,} rows an epoch from layers {list(source.layers)}. Left out: {excluded:,} of {store.n_tokens:,} tokens "
        f"(first {plan.request.exclude_first} positions and special tokens)"
        + (
            f", {source.n_dropped:,} rows of more than {selection['outlier_norm_ratio']:g} x their layer's median norm"
            if selection["outlier_norm_ratio"] and source.selection.order == "global"
            else ""
        ),
        highlight=False,
    )
    if source.selection.order == "commit":
        console.print(
            f"in the order shards are committed in: each window mixes {source.shards_per_window} of "
            f"{len(source.shard_numbers)} shards ('actcache info --shuffle --order commit' measures how well)",
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
    opened = _open(store)
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
    subject = load_subject(run, _open(store), _device(device))
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
    opened = _open(store)
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
    opened = _open(store)
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

    opened = _open(store)
    plan = opened.plan.request.model
    chosen = opened.layers if layers is None else parse_layers(layers, plan.n_layers)
    lens = import_tuned_lens(folder, chosen, plan.n_layers, plan.width)
    save_lens(lens, out)
    if as_json:
        print(json.dumps({"lens": str(out), **lens_facts(lens, None)}))
    else:
        Console().print(lens_renderable(lens, None))


# export, push and import-sae


@app.command()
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run; or a folder of runs, as a sweep leaves them.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder; for a folder of runs, one folder in it for each.")],
    sae_format: Annotated[
        str,
        typer.Option("--format", help="actcache, saelens, sparsify, dictionary_learning, openai or mlsae."),
    ] = "actcache",
    layer: Annotated[
        int | None,
        typer.Option(
            help="For rows of this layer. Needed of an SAE of several layers whose rows are standardised by fixed numbers of "
            "their layer."
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A checkpoint instead of the result: best, last or its step.")
    ] = None,
    no_model: Annotated[
        bool,
        typer.Option("--no-model", help="Do not say which language model and revision it was trained on."),
    ] = False,
    push_to: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Also upload it to this repository of the Hugging Face hub, such as you/an-sae.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to: the repository is private.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a trained SAE in our own or another project's format, with a model card; its loaders read what comes out."""
    from trainer.export.formats import export_runs

    written = export_runs(run, out, sae_format, layer=layer, checkpoint=checkpoint, names_model=not no_model)
    for folder in written:
        console.print(f"wrote {folder}", highlight=False)
    commit = None if push_to is None else _push(out, push_to, private=private, quiet=as_json)
    if as_json:
        folders = [str(folder) for folder in written]
        print(json.dumps({"format": sae_format, "folders": folders, "commit": commit}))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What export wrote.")],
    repo: Annotated[
        str, typer.Argument(metavar="NAME", help="Repository of the Hugging Face hub, such as you/an-sae.")
    ],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made: private.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a folder that export wrote to the Hugging Face hub. Log in first, with 'hf auth login' or HF_TOKEN."""
    from trainer.export.formats import check_exported

    check_exported(folder)
    commit = _push(folder, repo, private=private, quiet=as_json)
    if as_json:
        print(json.dumps({"commit": commit}))


def _push(folder: Path, repo: str, *, private: bool, quiet: bool) -> str:
    from trainer.export import hub

    commit = hub.push(folder, repo, private=private, quiet=quiet)
    console.print(f"uploaded: {commit}", highlight=False)
    return commit


@app.command("import-sae")
def import_sae(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of files in one of the formats, or a repository of the Hugging Face hub, such as "
            "tim-lawson/mlsae-pythia-70m-deduped-x64-k32.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the run it becomes.")],
    sae_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="actcache, saelens, sparsify, dictionary_learning, openai or mlsae. Without it: told from the files.",
        ),
    ] = None,
    subfolder: Annotated[str | None, typer.Option(help="The SAE is in this folder of SOURCE.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a repository.")] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="STORE", help="A store of its rows: eval needs to know which rows an SAE is for."
        ),
    ] = None,
    hook: Annotated[
        str | None,
        typer.Option(help="Which capture of the store. Without it: what the files say, else resid_post."),
    ] = None,
    target_hook: Annotated[
        str | None,
        typer.Option(help="Of a transcoder: the capture it predicts. Without it: what the files say."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help='Layers its rows are of, such as "3" or "0:6". Without it: what the files say, else all of the store.'
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a run of an SAE that somebody else trained, to evaluate it, start from it, or export it again."""
    import tempfile

    from trainer.export import hub
    from trainer.export.formats import read
    from trainer.export.run import check_free, write_run

    check_free(out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(source)
        if not folder.exists():
            if not hub.is_repository(source):
                raise NotFoundError(
                    f"no {source}; and a repository of the Hugging Face hub is called OWNER/NAME"
                )
            folder = Path(temporary) / source.replace("/", "--")
            revision = hub.download(source, folder, revision=revision, quiet=as_json)
        found = read(folder / subfolder if subfolder else folder, sae_format)
    hooks = [name for name in (hook, target_hook) if name is not None] or list(found.hooks) or ["resid_post"]
    known = dict(found.provenance)
    if "imported" in known:
        known["imported"] = {**known["imported"], "from": source, "revision": revision}
    opened = None if store is None else _open(store)
    chosen = _layers_of_sae(found, layers, opened, hooks[0])
    if opened is not None:
        if opened.width != found.width:
            raise UsageError(
                f"{source} reads rows of width {found.width}, {store} holds rows of width {opened.width}"
            )
        if known.get("plan") != opened.plan.digest:  # else it says itself which of them it was trained on
            known |= _rows_of_sae(store or "", opened, found.form, hooks, chosen)
    write_run(found.make(chosen, known), out)
    console.print(
        f"{out}: {found.n_latents:,} latents of width {found.width} in {found.name} format, layers {list(chosen)}",
        highlight=False,
    )
    if as_json:
        print(
            json.dumps(
                {"run": str(out), "format": found.name, "n_latents": found.n_latents, "layers": chosen}
            )
        )


def _layers_of_sae(found: Any, layers: str | None, opened: Any, hook: str) -> tuple[int, ...]:
    from actcache.model import parse_layers

    stored = tuple(opened.layers_of(hook)) if opened is not None else ()
    if layers is not None:
        n_layers = opened.plan.request.model.n_layers if opened is not None else 10_000
        return tuple(parse_layers(layers, n_layers))
    if not found.layers and not stored:
        raise UsageError(
            "these files do not say which layers the SAE is for: give --layers, or a --store of its rows"
        )
    return found.layers or stored


def _rows_of_sae(
    location: str, opened: Any, form: str, hooks: list[str], layers: tuple[int, ...]
) -> dict[str, Any]:
    """What eval has to know of an SAE's rows, as of one that was trained on them."""
    from trainer.forms import FORMS

    missing = [layer for layer in layers if layer not in opened.layers_of(hooks[0])]
    if missing:
        raise UsageError(
            f"{location} holds layers {list(opened.layers_of(hooks[0]))} at {hooks[0]}, not {missing}"
        )
    request = opened.plan.request
    return {
        "store": Path(location).name,
        "plan": opened.plan.digest,
        "model": request.model.as_json(),
        "corpus": request.corpus.name,
        "selection": {
            "hook": hooks[0] if FORMS[form].n_hooks == 1 else hooks,
            "stack": FORMS[form].stack,
            "layers": list(layers),
            "outlier_norm_ratio": None,
            "window_rows": 131_072,
        },
        "actcache_version": actcache.__version__,
    }


# live: serve, top


@app.command()
def serve(
    location: Annotated[
        str,
        typer.Argument(
            metavar="STORE|DIR", help="A store (a folder or a URL), or a folder with stores in it."
        ),
    ],
    host: Annotated[
        str,
        typer.Option(
            help="Where to listen. Anything but this machine needs a token or --client-ca, and TLS."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one and says which.")] = 8815,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the token that every client must send. Or set ACTCACHE_TOKEN_FILE or ACTCACHE_TOKEN."
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="The service's certificate (PEM): serve over TLS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(help="Let in only clients with a certificate signed by this one (PEM): mTLS."),
    ] = None,
    memory: Annotated[str, typer.Option(help="Bound on decoded windows, shared by all clients.")] = "4GiB",
    threads: Annotated[int, typer.Option(help="Threads that decode, per order of rows.")] = 2,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Also answer Prometheus at http://127.0.0.1:PORT/metrics (this machine only)."),
    ] = None,
) -> None:
    """Serve stores over Arrow Flight: `actcache.open("grpc://HOST:PORT/NAME")` is then the same store, and the same stream.

    Windows are decoded once for all trainers and ranks that read the same order. Nothing is kept of a client: stop and start
    the service as you like, trainers go on where they were.
    """
    from actcache.service.access import Access, read_pem
    from actcache.service.server import Server

    token = _read_token(token_file)
    pems = {
        name: None if path is None else read_pem(path, f"--{option}")
        for name, option, path in (
            ("cert", "tls-cert", tls_cert),
            ("key", "tls-key", tls_key),
            ("client_ca", "client-ca", client_ca),
        )
    }
    _log_to_console()
    _open_many_files()
    server = Server(
        location,
        Access(token=token, **pems),
        host=host,
        port=port,
        memory_bytes=_size(memory),
        threads=threads,
    )
    scheme = "grpc" if tls_cert is None else "grpc+tls"
    for name in server.shelf.names():
        print(f"{scheme}://{host}:{server.port}/{name}", flush=True)
    if metrics_port is not None:
        from actcache.service.metrics import serve_http

        found, _http = serve_http(server, "127.0.0.1", metrics_port)
        console.print(f"metrics at http://127.0.0.1:{found}/metrics", highlight=False)
    console.print("serving; Ctrl-C stops", highlight=False)
    with _stop_on_signals() as stop:
        while not stop.wait(1.0):
            pass
    status, was_clean = server.status(), server.stop()
    console.print(
        f"stopped after {status['up_s']:,.0f} s: {status['rows']:,} rows in {sum(status['calls'].values()):,} calls, "
        f"{status['refused']:,} refused",
        highlight=False,
    )
    if not was_clean:  # a client that does not read keeps its call open; nothing of ours is in it
        sys.stdout.flush()
        os._exit(0)


def _read_token(path: Path | None) -> str | None:
    """A token out of a file, named here or by the environment; or out of the environment itself."""
    named = os.environ.get("ACTCACHE_TOKEN_FILE")
    if path is None and not named:
        return os.environ.get("ACTCACHE_TOKEN")
    found, option = (path, "--token-file") if path is not None else (Path(named or ""), "ACTCACHE_TOKEN_FILE")
    try:
        return found.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {found}: {getattr(error, 'strerror', 'it is no text')}") from error


_MOST_OPEN_FILES = 1 << 16


def _open_many_files() -> None:
    """As many as the system lets this process have: a service keeps those of many orders open."""
    try:
        import resource
    except ImportError:  # not this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _log_to_console() -> None:
    """What a service refuses, and what fails in it, with the time: its log."""
    import logging

    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )


@app.command()
def top(
    location: Annotated[
        str,
        typer.Argument(
            metavar="DIR|URL", help="A store, a folder of 'actcache run', or grpc://HOST:PORT/NAME."
        ),
    ],
    every: Annotated[float, typer.Option(help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a store live: producers and their stages, disk of budget, consumers and how far behind they are, the bottleneck."""
    from rich.live import Live

    from actcache.service.present import render
    from actcache.service.watch import Watcher

    catalog, status = _watched(location)
    watcher = Watcher(catalog)
    if as_json or once:
        look = watcher.look(status())
        if as_json:
            print(json.dumps(look.as_json()))
        else:
            Console().print(render(look))
        return
    with _stop_on_signals() as stop, Live(render(watcher.look(status())), console=Console()) as live:
        while not stop.wait(every):
            live.update(render(watcher.look(status())))


def _watched(location: str) -> tuple["Catalog", Callable[[], dict[str, Any] | None]]:
    """A store's catalog, and what asks its service, where there is one, how it is."""
    if location.startswith("grpc"):
        from actcache.service.client import connect

        link, _name = connect(location, _service_options(location))
        return _catalog(location), lambda: link.ask("status")
    inside = Path(location) / "acts.zarr"
    return _catalog(str(inside) if inside.is_dir() else location), lambda: None


# run


_CONSUMER = "sae"
_FIRST_WINDOW_SHARE = 4


def _names_of(name: str, declared: Any) -> str:
    """The option of a parameter, as it is written."""
    given = [text for text in declared.param_decls or () if text.startswith("--")]
    return given[0] if given else f"--{name.replace('_', '-')}"


def _as_arguments(options: dict[str, Any]) -> list[str]:
    """Options of `build` as they would be written, those that are as they are anyway left out."""
    hints, found = get_type_hints(build, include_extras=True), list[str]()
    for parameter in inspect.signature(build).parameters.values():
        value = options.get(parameter.name, parameter.default)
        if value == parameter.default or parameter.name in ("ctx", "as_json"):
            continue
        name = _names_of(parameter.name, hints[parameter.name].__metadata__[0])
        if isinstance(value, list):
            found += [text for item in value for text in (name, item)]
        else:
            found += [name] if value is True else [name, str(value)]
    return found


def _first_window_rows(options: dict[str, Any], out: Path) -> int:
    """What fits into a quarter of the disk budget; in a run that was begun, what it began with."""
    from actcache.model import load_skeleton
    from trainer.config import TrainConfig

    begun = next(out.glob("run/**/config.json"), None)
    if begun is not None:
        return TrainConfig.model_validate_json(begun.read_text(encoding="utf-8")).first_window_rows
    width = load_skeleton(options["model"], revision=options["revision"]).width
    itemsize = 4 if options["dtype"] == "float32" else 2
    rows = _size(options["max_disk"]) // _FIRST_WINDOW_SHARE // (width * itemsize * len(_hooks(options)))
    return max(1, min(TrainConfig.model_fields["first_window_rows"].default, rows))


@app.command("run")
@_like_build(
    out=_option(
        "out",
        Annotated[Path, typer.Option(help="Folder of it all: acts.zarr, run, and logs of both processes.")],
        inspect.Parameter.empty,
    ),
    max_disk=_option(
        "max_disk",
        Annotated[
            str,
            typer.Option(
                metavar="SIZE",
                help="The store never takes more than this, however many tokens it is of. Checkpoints come on top.",
            ),
        ],
        inspect.Parameter.empty,
    ),
    sae=_option(
        "sae",
        Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME=VALUE",
                help="Any setting of docs/reference/training.md, such as k=32 or expansion=16. Repeat.",
            ),
        ],
        None,
    ),
    train_options=_option(
        "train_options",
        Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[-- OPTIONS]",
                help="After two dashes: more options of 'actcache train', such as --per-layer.",
            ),
        ],
        None,
    ),
    **dict.fromkeys(
        ("consumers", "expire_after", "add", "rank", "world_size", "engine", "workers"),
    ),
    **dict.fromkeys(("gpus_per_worker", "cpus_per_worker", "ray_address")),
)
def run_(options: dict[str, Any]) -> None:
    """Build and train side by side, within a disk budget: from a model and text to a trained SAE in one command.

    The producer and the trainer are processes of their own. Ctrl-C stops both cleanly; the same command goes on where they
    were. When one fails, so does the command, with the end of its log.
    """
    from actcache.service.supervise import Part, held, supervise

    _check_build_choices({**options, "engine": "local"})
    out: Path = options["out"]
    me = [sys.executable, "-m", "cli"]
    settings = [*(options["sae"] or [])]
    if not any(text.startswith("first_window_rows=") for text in settings):
        settings.append(f"first_window_rows={_first_window_rows(options, out)}")
    building = _as_arguments(
        {**options, "out": out / "acts.zarr", "consumers": _CONSUMER, "max_disk": options["max_disk"]}
    )
    training = [
        *(str(out / "acts.zarr"), "--out", str(out / "run"), "--follow", "--consumer", _CONSUMER, "--resume"),
        *("--device", options["device"], "--seed", str(options["seed"])),
        *(text for setting in settings for text in ("--set", setting)),
        *(options["train_options"] or ()),
    ]
    parts = [
        Part(name="build", command=[*me, "build", *building], log=out / "logs/build.log"),
        Part(name="train", command=[*me, "train", *training], log=out / "logs/train.log", is_goal=True),
    ]
    with (
        held(out / "lock") as lock,
        _stop_on_signals() as stop,
        _watching(out, quiet=options["as_json"]) as tick,
    ):
        ended = supervise(parts, stop=stop.is_set, on_tick=lambda _codes: tick(), keep_open=[lock])
    said = {
        "outcome": ended.outcome,
        "part": ended.part,
        "store": str(out / "acts.zarr"),
        "run": str(out / "run"),
    }
    if options["as_json"]:
        print(json.dumps(said))
    if ended.outcome == "failed":
        console.print(Text(ended.tail), soft_wrap=True)
        how = f"was killed by signal {-ended.code}" if ended.code < 0 else f"ended with status {ended.code}"
        console.print(
            Text(
                f"{ended.part} {how}; its log is {out / 'logs' / f'{ended.part}.log'}. Nothing that was committed or saved is "
                f"lost: run the same command again to continue."
            ),
            style="red",
            soft_wrap=True,
        )
        raise typer.Exit(max(1, ended.code))
    if ended.outcome == "stopped":
        console.print(
            "stopped; everything committed and saved is safe. Run the same command again to continue."
        )
        raise typer.Exit(130)
    console.print(
        f"{out / 'run'}: finished; 'actcache eval {out / 'run'} {out / 'acts.zarr'}' says how well",
        soft_wrap=True,
    )


@contextlib.contextmanager
def _watching(out: Path, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """What is called often, and looks at the store every second: a live view, or a line now and then in a log."""
    from rich.live import Live

    from actcache.service.present import line, render
    from actcache.service.watch import Watcher

    watcher, looked_at = None, -1e9
    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal and not quiet:
            live = stack.enter_context(Live(Text("loading the model, tokenising the text"), console=console))
        every_s = 1.0 if live is not None else 30.0

        def tick() -> None:
            nonlocal watcher, looked_at
            if quiet or time.monotonic() - looked_at < every_s or not (out / "acts.zarr/zarr.json").exists():
                return
            looked_at = time.monotonic()
            watcher = watcher or Watcher(_catalog(str(out / "acts.zarr")))
            look = watcher.look()
            if live is not None:
                live.update(render(look))
            else:
                console.print(line(look), highlight=False, soft_wrap=True)

        yield tick


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
    from actcache.producer.settings import Settings
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
        "partial": False,
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
