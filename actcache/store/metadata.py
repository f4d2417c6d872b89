"""The `zarr.json` documents of a store, written by zarr-python so that they say what it would say."""

import json
from typing import Any

import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from actcache.store.arrays import ArraySpec

ATTRIBUTE = "actcache"


def _document(store: MemoryStore, path: str) -> bytes:
    key = f"{path}/zarr.json" if path else "zarr.json"
    return store._store_dict[key].to_bytes()


def group_json(attributes: dict[str, Any]) -> bytes:
    """The metadata document of a group."""
    store = MemoryStore()
    zarr.create_group(store, attributes=attributes, zarr_format=3)
    return _document(store, "")


def array_json(spec: ArraySpec) -> bytes:
    """The metadata document of an array."""
    store = MemoryStore()
    common: dict[str, Any] = {
        "name": "a",
        "shape": spec.shape,
        "fill_value": spec.fill,
        "dimension_names": spec.dims,
        "attributes": spec.attributes,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }
    if spec.dtype is None:
        zarr.create_array(store, dtype=str, chunks=spec.chunk, compressors=None, **common)
        return _document(store, "a")
    settings = spec.codec.blosc_settings()
    blosc = [] if settings is None else [BloscCodec(typesize=spec.dtype.itemsize, **settings)]
    zarr.create_array(
        store,
        dtype=spec.dtype,
        chunks=spec.inner or spec.chunk,
        shards=spec.chunk if spec.inner else None,
        serializer=BytesCodec(endian="little" if spec.dtype.itemsize > 1 else None),
        compressors=[*blosc, Crc32cCodec()],
        **common,
    )
    return _document(store, "a")


def attributes_of(document: bytes) -> dict[str, Any] | None:
    """Our attributes in a group's document; None when it is a group of somebody else's."""
    return json.loads(document).get("attributes", {}).get(ATTRIBUTE)
