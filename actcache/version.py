"""Which actcache this is."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("actcache")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"
