"""One layer of a store read alone: it costs its share of the bytes, and damage to it shows as it does with all of them."""

from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.errors import DamageError
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from tests.conftest import as_bits, check_rows, write_store

ROWS = "acts/resid_post/rows"
LAYERS = (0, 3, 5)
SHARD, OTHER = 1, 2


@pytest.fixture(scope="module", params=["zstd", "lz4", "none"])
def truth(request, tmp_path_factory):
    """Where nothing compresses, all shards are of one length, so that only what is in them can tell them apart."""
    root = tmp_path_factory.mktemp("one-layer") / "s.zarr"
    return write_store(
        root,
        codec=request.param,
        layers=LAYERS,
        rows_per_chunk=8,
        n_sequences=16,
        seq_len=8,
        per_shard=4,
        drop=0.0,
    )


def place_of(truth, layer: int) -> tuple[Path, int, int]:
    """The file of a shard, and where one layer's bytes begin and end in it."""
    chunks = Catalog(LocalObjects(truth.root)).capture("resid_post").reader(SHARD).chunks
    i = LAYERS.index(layer)
    start = int(chunks.offset[i, 0])
    return truth.root / f"{ROWS}/c.0.{SHARD}.0", start, start + int(chunks.length[i].sum(dtype=np.int64))


def _flip(data: bytes, start: int, end: int) -> bytes:
    at = (start + end) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _flip_first_bit(data: bytes, start: int, end: int) -> bytes:
    return data[:start] + bytes([data[start] ^ 0x80]) + data[start + 1 :]


def _zero_block(data: bytes, start: int, end: int) -> bytes:
    n = min(64, end - start)
    return data[:start] + bytes(n) + data[start + n :]


def _cut_inside(data: bytes, start: int, end: int) -> bytes:
    return data[: (start + end) // 2]


def _cut_before(data: bytes, start: int, end: int) -> bytes:
    return data[:start]


def _empty(data: bytes, start: int, end: int) -> bytes:
    return b""


def _shift(data: bytes, start: int, end: int) -> bytes:
    return data[:start] + b"\0" + data[start:]


BYTES = {
    f.__name__.strip("_"): f
    for f in (_flip, _flip_first_bit, _zero_block, _cut_inside, _cut_before, _empty, _shift)
}


def damage(truth, layer: int, fault: str) -> None:
    path, start, end = place_of(truth, layer)
    other = truth.root / f"{ROWS}/c.0.{OTHER}.0"
    mine, theirs = path.read_bytes(), other.read_bytes()
    if fault == "missing":
        path.unlink()
    elif fault == "swapped":
        path.write_bytes(theirs)
        other.write_bytes(mine)
    elif (
        fault == "another layer's bytes"
    ):  # in the same object, and of the same length where nothing compresses
        i = (LAYERS.index(layer) + 1) % len(LAYERS)
        other_start, other_end = place_of(truth, LAYERS[i])[1:]
        n = min(end - start, other_end - other_start)
        path.write_bytes(mine[:start] + mine[other_start : other_start + n] + mine[start + n :])
    else:
        path.write_bytes(BYTES[fault](mine, start, end))


@pytest.mark.parametrize("fault", [*BYTES, "missing", "swapped", "another layer's bytes"])
@pytest.mark.parametrize("layer", LAYERS)
def test_damage_raises_when_only_its_layer_is_read(truth, layer, fault):
    before = {path: path.read_bytes() for path in (truth.root / ROWS).glob("c.*")}
    try:
        damage(truth, layer, fault)
        store = actcache.open(truth.root)
        with (
            pytest.raises(DamageError, match=rf"{ROWS}/c\.0\.[{SHARD}{OTHER}]\.0"),
            store.stream(batch_size=5, window_rows=16, layers=[layer]) as stream,
        ):
            [check_rows(truth, batch) for batch in stream]
        with pytest.raises(DamageError):
            store.read(layer=layer)
    finally:
        for path, data in before.items():
            path.write_bytes(data)


@pytest.mark.parametrize("layer", LAYERS)
def test_damage_to_other_layers_is_not_in_the_way(truth, layer):
    """What is handed out is right; `verify` looks at the rest."""
    path = truth.root / f"{ROWS}/c.0.{SHARD}.0"
    data = path.read_bytes()
    try:
        for other in set(LAYERS) - {layer}:
            path.write_bytes(_flip(path.read_bytes(), *place_of(truth, other)[1:]))
        with actcache.open(truth.root).stream(batch_size=5, window_rows=16, layers=[layer]) as stream:
            assert sum(len(check_rows(truth, batch)) for batch in stream) == len(truth.kept([layer]))
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("layer", LAYERS)
def test_one_layer_costs_its_share_of_the_bytes(truth, layer):
    """Counted as read, and, by the system, as asked of files: 1.05 / L."""
    with actcache.open(truth.root).stream(batch_size=5, window_rows=16, layers=[layer]) as stream:
        found = np.concatenate([as_bits(batch.rows) for batch in stream])
        counted = stream.counters.read_bytes
    assert len(found) == len(truth.kept([layer]))
    streamed = range(truth.grid.n_holdout_shards, truth.grid.n_shards)
    total = sum((truth.root / f"{ROWS}/c.0.{s}.0").stat().st_size for s in streamed)
    assert counted <= 1.05 * total / len(LAYERS)
