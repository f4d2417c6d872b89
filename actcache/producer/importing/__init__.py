"""A store from activations that others wrote: files -> facts -> plan -> rows in their mixed place -> commit.

    source = open_source("cache/")                       # .npy, safetensors, SAELens or saev; format.py tells them apart
    import_activations(source, ImportSettings(out=Path("acts.zarr")))

Each format module only says where in which file the numbers of a layer lie (`raw.RawArray`); reading, planning and
committing are the same for all, and the store is written by what `actcache build` writes it with.
"""

from actcache.producer.importing.formats import FORMATS, open_source
from actcache.producer.importing.layout import ImportSettings
from actcache.producer.importing.run import ImportReporter, ImportSummary, import_activations
from actcache.producer.importing.source import Facts, Source

__all__ = [
    "FORMATS",
    "Facts",
    "ImportReporter",
    "ImportSettings",
    "ImportSummary",
    "Source",
    "import_activations",
    "open_source",
]
