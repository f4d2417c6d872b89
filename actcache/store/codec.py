"""Chunk bytes: numbers to the bytes of one Zarr chunk and back, with the codecs a store may use.

Every chunk is `bytes -> [blosc] -> crc32c`: standard Zarr v3, so any reader opens it and checks it.
Blosc compresses the typed view of the numbers: given plain bytes it would shuffle with an item size of one and
lose a tenth of the ratio. Its block is the whole chunk: with the default block zstd finds 1.28x for 1.41x.
"""

from dataclasses import dataclass
from typing import Any

import crc32c as crc32c_package
import numcodecs
import numpy as np
from numpy.typing import NDArray

from actcache.loops.compiled import compiled
from actcache.store.blosc import planes_of, shuffled_zstd

CRC_BYTES = 4
_LZ4_BLOCK_BYTES = 256 * 1024
_BLOSC_HEADER_BYTES = 16
_LONG_BYTES = 64 * 1024
"""Of which the compiled loop takes a third of the package's time, and for which it is worth being called."""
_NUMBERS = [np.dtype(name) for name in ("<u2", "<f2", "<f4")]
"""What activations, and numbers about them, lie on disk as; others, token ids among them, have matches to be found."""

EXPECTED_RATIO = {"zstd": 1.41, "lz4": 1.17, "none": 1.0, "uint8": 1.85}
"""Bytes in over bytes out for bfloat16 activations of a real decoder; a forecast, not a promise."""


def expected_ratio(codec: str, dtype: str) -> float:
    """The forecast for any logical dtype: only bfloat16 compresses, and `uint8` takes one byte whatever it was."""
    if codec == "uint8":
        return EXPECTED_RATIO[codec] * (2 if dtype == "float32" else 1)
    return EXPECTED_RATIO[codec] if dtype == "bfloat16" else 1.0


def crc32c(data: Any) -> int:
    """CRC-32C (Castagnoli) of a buffer."""
    return extend_crc32c(data, 0)


def extend_crc32c(data: Any, crc: int) -> int:
    """CRC-32C of what had the crc `crc`, followed by `data`."""
    loops = compiled() if memoryview(data).nbytes >= _LONG_BYTES else None
    if loops is None or loops.direct is None:
        return crc32c_package.crc32c(data, crc)
    numbers = np.frombuffer(data, np.uint8)
    return loops.direct.crc32c(numbers.ctypes.data, numbers.size, loops.direct.shift.ctypes.data, crc)


@dataclass(frozen=True, slots=True)
class Codec:
    """How the numbers of one array become chunk bytes.

    name     "zstd", "lz4" or "none".
    dtype    the numbers' dtype on disk (bfloat16 is uint16 here).
    n_items  numbers in one chunk.
    """

    name: str
    dtype: np.dtype[Any]
    n_items: int

    @property
    def n_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return self.n_items * self.dtype.itemsize

    def blosc_settings(self) -> dict[str, Any] | None:
        """Settings in the words of the Zarr v3 blosc codec; None when nothing compresses."""
        if self.name == "none":
            return None
        if self.name == "zstd":
            return {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": self.n_bytes}
        return {
            "cname": "lz4",
            "clevel": 5,
            "shuffle": "bitshuffle",
            "blocksize": min(_LZ4_BLOCK_BYTES, self.n_bytes),
        }

    def _blosc(self) -> numcodecs.Blosc:
        settings = self.blosc_settings()
        assert settings is not None
        shuffle = numcodecs.Blosc.SHUFFLE if settings["shuffle"] == "shuffle" else numcodecs.Blosc.BITSHUFFLE
        return numcodecs.Blosc(settings["cname"], settings["clevel"], shuffle, settings["blocksize"])

    def encode(self, values: NDArray[Any]) -> tuple[bytes | memoryview, int]:
        """Chunk bytes without their trailer, and their crc32c. `values` holds `n_items` contiguous numbers.

        With codec `none` the bytes are those of `values` themselves, not a copy.
        """
        flat = np.ascontiguousarray(values, dtype=self.dtype).reshape(-1)
        assert flat.size == self.n_items, (flat.size, self.n_items)
        data: bytes | memoryview
        if self.name == "none":
            data = flat.view(np.uint8).data
        else:
            data = self._compress(flat)
        return data, crc32c(data)

    def _compress(self, flat: NDArray[Any]) -> bytes:
        if self.name == "zstd" and self.dtype in _NUMBERS:
            found = shuffled_zstd(flat)
            if found is not None:
                return found
        return bytes(self._blosc().encode(flat.view(np.uint8) if self.dtype == np.bool_ else flat))

    def decode_into(self, data: memoryview, out: NDArray[Any]) -> str | None:
        """Decode chunk bytes (without trailer) into `out`; returns what is wrong, or None.

        The caller has compared the crc32c; the header is still checked, because the blosc decoder trusts it.
        """
        if self.name == "none":
            if len(data) != self.n_bytes:
                return f"{len(data)} bytes where {self.n_bytes} were expected"
            out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)
            return None
        if len(data) < _BLOSC_HEADER_BYTES:
            return f"a blosc chunk of only {len(data)} bytes"
        n_bytes, _block, c_bytes = (int.from_bytes(data[i : i + 4], "little") for i in (4, 8, 12))
        if c_bytes != len(data) or n_bytes != self.n_bytes:
            return f"a blosc header of {c_bytes} -> {n_bytes} bytes, expected {len(data)} -> {self.n_bytes}"
        numcodecs.blosc.decompress(data, out.reshape(-1).view(np.uint8))
        return None

    def planes(self, data: memoryview) -> NDArray[np.uint8] | None:
        """Bytes [itemsize, n_items] of chunk bytes (without trailer), those of equal significance side by side.

        In scratch memory of this thread. None: the chunk was made otherwise, decode it. ValueError: it cannot be decompressed.
        """
        return planes_of(data, self.n_items, self.dtype.itemsize) if self.name == "zstd" else None


def trailer(crc: int) -> bytes:
    """What the Zarr crc32c codec appends: four little-endian bytes."""
    return crc.to_bytes(CRC_BYTES, "little")


def with_trailer(data: bytes | memoryview, crc: int) -> bytes:
    """Chunk bytes as they lie on disk."""
    return b"".join((data, trailer(crc)))
