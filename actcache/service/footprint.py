"""What a store takes on disk: what is there for good, and what each shard takes, at most and really.

Counted as `du` counts: whole blocks of the file system, folders included.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.store.arrays import ERRORS, ArraySpec, is_quantised
from actcache.store.codec import CRC_BYTES
from actcache.store.disk import WORK_DIR
from actcache.store.dtypes import disk_dtype
from actcache.store.live import LIVE_DIR, MOST_BYTES
from actcache.store.open import CaptureCatalog, Catalog
from actcache.store.retire import shard_objects
from actcache.store.shard import n_stored_chunks

_CODEC_OVERHEAD = 16
"""Bytes by which blosc may make a chunk larger."""
_EXTENTS_BYTES = 1 << 14
"""What a file system may keep to say where a large file lies."""
_NAME_BYTES = 64
"""Of a name in a folder."""
_RECORD_BYTES = 4096
"""Of a record, without its tables."""


def most_bytes(capture: CaptureCatalog, stored: int, block: int) -> int:
    """What a shard of `stored` rows can take in one capture, if nothing of it can be compressed."""
    found = sum(_blocks(_most_of(spec, stored), block) for spec, _key in shard_objects(capture.arrays, 0))
    return found + (_blocks(_most_of_blocks(capture, stored), block) if is_quantised(capture.capture) else 0)


def _most_of_blocks(capture: CaptureCatalog, stored: int) -> int:
    """What lies in a quantised shard beside the codes, if every row were stored exactly."""
    inner, n_layers = capture.arrays["rows"].inner, len(capture.capture.layers)
    assert inner is not None
    _one, r, width = inner
    per_chunk = 8 * width + 4 * r + r * width * disk_dtype(capture.capture.dtype).itemsize + CRC_BYTES
    return n_layers * (n_stored_chunks(stored, r) * per_chunk + 8 * len(ERRORS) * width) + CRC_BYTES


def _most_of(spec: ArraySpec, stored: int) -> int:
    assert spec.dtype is not None
    if spec.inner is None:
        return math.prod(spec.chunk) * spec.dtype.itemsize + _CODEC_OVERHEAD + CRC_BYTES
    n_chunks = spec.chunk[0] * n_stored_chunks(stored, spec.inner[1])
    chunk = math.prod(spec.inner) * spec.dtype.itemsize + _CODEC_OVERHEAD + CRC_BYTES
    index = 16 * spec.chunk[0] * (spec.chunk[1] // spec.inner[1]) + CRC_BYTES
    return n_chunks * chunk + index + _EXTENTS_BYTES


def _record_bytes(capture: CaptureCatalog) -> int:
    """The most a ledger record takes: two tables of 4 bytes for every chunk, in base64."""
    spec = capture.arrays["rows"]
    assert spec.inner is not None
    n_chunks = spec.chunk[0] * (spec.chunk[1] // spec.inner[1])
    return _RECORD_BYTES + 4 * 6 * n_chunks


def _blocks(n_bytes: int, block: int) -> int:
    return -(-n_bytes // block) * block


def bytes_of(path: Path) -> int:
    """What a file or folder takes itself; 0 where it is not there."""
    try:
        found = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return 0
    return found.st_blocks * 512


def bytes_under(root: Path) -> int:
    """What a folder takes with everything in it, as `du` counts: a file of several names once."""
    total, seen = bytes_of(root), set[int]()
    for entry in _walk(str(root)):
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if found.st_ino in seen:  # one that is given its final name meanwhile is met under both
            continue
        seen.add(found.st_ino)
        total += found.st_blocks * 512
    return total


def _walk(folder: str, leave_out: frozenset[str] = frozenset()) -> Iterator[os.DirEntry[str]]:
    """Everything under a folder, but nothing in the folders `leave_out`."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False) and entry.path not in leave_out:
            yield from _walk(entry.path, leave_out)


class Footprint:
    """The disk that a store in a local folder takes.

    block        bytes of a block.
    fixed_bytes  the plan, all records there will ever be, what is written beside them: whatever happens to shards.
    most         [shard] int64, what each shard takes at most, over all captures.
    """

    def __init__(self, catalog: Catalog, root: Path, n_consumers: int) -> None:
        self._catalog, self._root = catalog, root
        self.block = max(512, os.statvfs(root).f_frsize)
        stored = catalog.shards.stored.tolist()
        captures = list(catalog.captures.values())
        by_stored = {n: sum(most_bytes(found, n, self.block) for found in captures) for n in set(stored)}
        self.most: NDArray[np.int64] = np.array([by_stored[n] for n in stored], np.int64)
        self.fixed_bytes = self._fixed(captures, n_consumers)

    def _fixed(self, captures: Sequence[CaptureCatalog], n_consumers: int) -> int:
        n_shards = len(self.most)
        records = sum(_blocks(_record_bytes(found), self.block) for found in captures)
        records += _blocks(_RECORD_BYTES + 100 * n_consumers, self.block)  # its retirement
        folders = sum(len(shard_objects(found.arrays, 0)) + 1 for found in captures) + 1
        names = folders * _blocks(n_shards * _NAME_BYTES, self.block)
        beside = (4 + 3 * n_consumers) * MOST_BYTES
        return n_shards * records + names + beside + self._plan_bytes(captures)

    def _plan_bytes(self, captures: Sequence[CaptureCatalog]) -> int:
        """What is on disk already and neither belongs to a shard nor is a record of one."""
        growing = [WORK_DIR, LIVE_DIR, "retired"]
        for found in captures:
            growing += [found.arrays["ledger"].path]
            growing += [spec.path for spec, _key in shard_objects(found.arrays, 0)]
        left_out = frozenset(str(self._root / path) for path in growing)
        total = bytes_of(self._root)
        for entry in _walk(str(self._root), left_out):
            if entry.path not in left_out:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
        return total + sum(bytes_of(self._root / path / "zarr.json") for path in growing)

    def actual(self, shard: int) -> int:
        """What a shard takes now: its rows and what is small beside them, in every capture."""
        keys = (
            key
            for found in self._catalog.captures.values()
            for _spec, key in shard_objects(found.arrays, shard)
        )
        return sum(bytes_of(self._root / key) for key in keys)
