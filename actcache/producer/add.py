"""Another hook, or more layers of one, for a store that is there: new captures beside the old ones, row for row.

The plan is the store's: the model must be the one it was made with, and what it runs on are the stored tokens. Nothing
that is there is rewritten.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actcache.errors import PlanMismatchError, UsageError
from actcache.model import Decoder, check_isolation
from actcache.producer.build import fill_captures
from actcache.producer.plan import forecast
from actcache.producer.settings import list_differences
from actcache.producer.summary import BuildReporter, BuildSummary
from actcache.store.arrays import disk_dtype
from actcache.store.create import CaptureRequest, add_capture, as_requested, capture_name
from actcache.store.disk import Disk
from actcache.store.live import read_budget
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog

IMPORTED = "import"
"""In place of the device class in the plan of a store that no model of ours made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """What is to be added.

    hooks         names or modules.           layers   the model's layer numbers, of each hook.
    dtype, codec  as stored.                  memory_bytes  for the two shards being filled; None: what the plan says.
    """

    hooks: tuple[str, ...]
    layers: tuple[int, ...]
    dtype: str = "bfloat16"
    codec: str = "zstd"
    memory_bytes: int | None = None


def add_to_store(
    out: Path,
    addition: Addition,
    decoder: Decoder,
    *,
    encode_threads: int | None = None,
    allow_non_finite: bool = False,
    reporter: BuildReporter | None = None,
    on_operation: Callable[[str, str], None] | None = None,
) -> BuildSummary:
    """Add captures to a store and fill them, or go on filling them; what is there already is left as it is.

    Args:
        out: the store.
        addition: which captures.
        decoder: the model the store was made with; cut after the last captured layer.
        encode_threads: threads that compress; None: every core the model does not need.
        allow_non_finite: store rows with NaN or infinity instead of stopping.
        reporter: told about progress.
        on_operation: called before every step that changes the disk.

    Raises:
        NotFoundError: there is no store. PlanMismatchError: another model, dtype of computing or device class than the
            plan's, or a capture that is there in another form.
        UsageError: a hook or layer the model does not have, or too little memory. DiskFullError: it does not fit.
    """
    reporter = reporter or BuildReporter()
    catalog = Catalog(LocalObjects(out))
    check_model(catalog, decoder)
    asked = [_find_capture(catalog, hook, addition, decoder) for hook in addition.hooks]
    new = [capture for capture in asked if capture.group not in catalog.captures]
    _check_memory(catalog, asked, addition.memory_bytes)
    if new:
        _check_whole(catalog)
        reporter.on_forecast(catalog.grid, forecast(catalog.grid, new, out))
        with Disk(out, on_operation) as disk:
            for capture in new:
                add_capture(disk, catalog.plan, capture)
        catalog = Catalog(LocalObjects(out))
        for capture in new:  # another process may have been faster, with something else
            _check_capture(catalog, capture)
    return fill_captures(
        catalog,
        [capture.group for capture in asked],
        decoder,
        encode_threads=encode_threads,
        allow_non_finite=allow_non_finite,
        reporter=reporter,
        on_operation=on_operation,
    )


def _check_whole(catalog: Catalog) -> None:
    retired = next(iter(catalog.captures.values())).retired()
    if retired or read_budget(catalog.objects) is not None:
        raise UsageError(
            f"{catalog.objects.url} is built within a disk budget ({len(retired)} of {catalog.grid.n_shards} shards are retired "
            f"already): its captures come and go together, so none can be added. Build a store with all the hooks at once."
        )


def check_model(catalog: Catalog, decoder: Decoder) -> None:
    """PlanMismatchError where a model is not the one that a store was made with."""
    url, request = catalog.objects.url, catalog.plan.request
    if request.device == IMPORTED:
        raise PlanMismatchError(
            f"{url} was imported: no model is known to have made its rows, so none can be added to them. Build a store, or "
            f"import the other activations into one of their own."
        )
    here = {
        "compute_dtype": str(decoder.dtype).removeprefix("torch."),
        "device": decoder.device.type,
        "family": decoder.family,
        "n_layers": decoder.n_layers,
    }
    there = {
        "compute_dtype": request.model.compute_dtype,
        "device": request.device,
        "family": request.model.family,
        "n_layers": request.model.n_layers,
    }
    differ = list_differences(there, here, "")
    if not differ:
        differ = list_differences({"digest": request.model.digest}, {"digest": decoder.weights_digest()}, "")
    if differ:
        raise PlanMismatchError(
            f"{url} was made with {request.model.name}, and this model differs: {'; '.join(differ)}. Rows are made by the "
            f"same weights, dtype and device class only (--model, --revision, --model-dtype, --device)."
        )
    if request.isolate_documents:
        check_isolation(decoder)


def _find_capture(catalog: Catalog, hook: str, addition: Addition, decoder: Decoder) -> CaptureRequest:
    """The capture of these layers, under the name it has in the store, or the next free one."""
    hook, layers = decoder.spell(hook), addition.layers
    asked = CaptureRequest(
        hook=hook,
        layers=layers,
        width=decoder.hook_width(hook, layers),
        dtype=addition.dtype,
        codec=addition.codec,
    )
    same_hook = {name: c.capture for name, c in catalog.captures.items() if c.capture.hook == hook}
    for name, capture in same_hook.items():
        if capture.layers == layers:
            asked = asked.model_copy(update={"name": name})
            _check_capture(catalog, asked)
            return asked
        both = sorted(set(capture.layers) & set(layers))
        if both:
            there = {layer for found in same_hook.values() for layer in found.layers}
            lacking = [layer for layer in layers if layer not in there]
            raise UsageError(
                f"layers {both} of {hook} are in {catalog.objects.url} already (capture {name}); "
                + (
                    f"add the others: --layers {','.join(map(str, lacking))}"
                    if lacking
                    else "there is nothing to add"
                )
            )
    base, n = capture_name(hook), 1
    while (name := base if n == 1 else f"{base}.{n}") in catalog.captures:
        n += 1
    return asked.model_copy(update={"name": name})


def _check_capture(catalog: Catalog, asked: CaptureRequest) -> None:
    there = as_requested(catalog.captures[asked.group].capture)
    differ = list_differences(there.as_json(), asked.as_json(), f"capture {asked.group}")
    if differ:
        raise PlanMismatchError(
            f"{catalog.objects.url} has this capture with other arguments: {'; '.join(differ)}. Give the same ones to "
            f"continue it."
        )


def _check_memory(catalog: Catalog, asked: list[CaptureRequest], given: int | None) -> None:
    request, grid = catalog.plan.request, catalog.grid
    if given is None and request.sequences_per_shard is not None:
        return  # the shard size was given by hand, whatever memory it takes
    bound = given or request.shard_memory_bytes
    row_bytes = sum(len(c.layers) * c.width * disk_dtype(c.dtype).itemsize for c in asked)
    needed = 2 * row_bytes * grid.rows_per_shard
    if needed > bound:
        raise UsageError(
            f"two shards of these captures take {needed:,} bytes and --shard-memory is {bound:,}: the shards' size is the "
            f"store's. Add fewer layers or hooks at a time, or give --shard-memory {needed}"
        )
