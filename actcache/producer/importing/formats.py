"""Which format a source is in."""

from collections.abc import Mapping
from pathlib import Path

from actcache.errors import NotFoundError, UsageError
from actcache.producer.importing.npy import open_npy
from actcache.producer.importing.saelens import INFO, STATE, open_saelens
from actcache.producer.importing.saev import METADATA, SHARDS, open_saev
from actcache.producer.importing.safetensors_files import open_safetensors
from actcache.producer.importing.source import RawSource

FORMATS = ("npy", "safetensors", "saelens", "saev")


def open_source(
    path: str | Path,
    *,
    source_format: str | None = None,
    layer_of: Mapping[str, int] | None = None,
    hook: str | None = None,
    bfloat16_bits: bool = False,
) -> RawSource:
    """Open others' activations: facts are checked now, numbers are read later.

    Args:
        path: a `.npy` or `.safetensors` file, or a folder.
        source_format: one of `FORMATS`; told from the files where left out.
        layer_of: name -> the model's layer number, where names do not say it: of a file (npy), a tensor (safetensors),
            a column (SAELens) or a layer counted from the end (saev).
        hook: where in a block the rows come from.
        bfloat16_bits: npy only: uint16 are the bits of bfloat16.

    Raises:
        NotFoundError: it, or a part of it, is not there. CorpusError: a file is not what it should be.
        UsageError: the format, a layer or the hook cannot be told.
    """
    root = Path(path)
    if not root.exists():
        raise NotFoundError(f"no activations at {root}: there is no such file or folder")
    chosen = source_format or _detect(root)
    if chosen not in FORMATS:
        raise UsageError(f"format {chosen!r}: expected one of {', '.join(FORMATS)}")
    if bfloat16_bits and chosen != "npy":
        raise UsageError(f"--bfloat16-bits is for .npy files; {chosen} says itself which dtype it holds")
    names = dict(layer_of or {})
    if chosen == "npy":
        return open_npy(root, layer_of=names, hook=hook, bfloat16_bits=bfloat16_bits)
    if chosen == "safetensors":
        return open_safetensors(root, layer_of=names, hook=hook)
    if chosen == "saelens":
        return open_saelens(root, layer_of=names, hook=hook)
    return open_saev(root, layer_of=names, hook=hook)


def _detect(root: Path) -> str:
    if root.is_file():
        found = [name for name in ("npy", "safetensors") if root.suffix == f".{name}"]
    else:
        signs = {
            "npy": any(root.glob("*.npy")),
            "safetensors": any(root.glob("*.safetensors")),
            "saelens": any((root / name).exists() for name in (STATE, INFO, ".tmp_shards"))
            or any(root.glob(f"*/{STATE}")),
            "saev": any((root / name).exists() for name in (METADATA, SHARDS)),
        }
        found = [name for name, is_there in signs.items() if is_there]
    if len(found) != 1:
        what = f"looks like {' and '.join(found)}" if found else "holds nothing that is known"
        raise UsageError(f"{root} {what}; say with --format which it is: {', '.join(FORMATS)}")
    return found[0]
