"""Read one row of a store with the standard library, NumPy and numcodecs, following docs/format.md and nothing else.

    python examples/read_without_actcache.py acts.zarr LAYER SEQUENCE POSITION

For checking the format, and as a pattern for other languages. To use a store from Python, `import actcache`.
"""

import base64
import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np

MASK = (1 << 64) - 1


def canonical(value: Any) -> str:
    """Section 3."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """Section 3."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), bit by bit through a table: slow, and plain."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def derive(seed: int, *labels: int | str) -> int:
    """Section 7."""
    text = json.dumps([seed, *labels], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def mix64(x: int) -> int:
    """Section 7."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def hash_u64(key: int, i: int) -> int:
    """Section 7."""
    return mix64(mix64((i * 0x9E3779B97F4A7C15 + key) & MASK) ^ key)


def permutation(key: int, n: int) -> list[int]:
    """Section 7."""
    return sorted(range(n), key=lambda i: hash_u64(key, i))


def strings(data: bytes) -> list[str]:
    """A vlen-utf8 object, section 5."""
    (count,), at, found = struct.unpack_from("<I", data), 4, []
    for _ in range(count):
        (n_bytes,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + n_bytes].decode())
        at += 4 + n_bytes
    return found


def expect(is_true: object, what: str) -> None:
    """A check of section 11."""
    if not is_true:
        raise OSError(f"damaged: {what}")


def decode(data: bytes, codec: str) -> bytes:
    """A chunk without its trailer, section 6."""
    return data if codec == "none" else numcodecs.Blosc().decode(data)


def table(record: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and crc32c, section 4."""
    lengths, crcs = (
        np.frombuffer(base64.b64decode(record[x]), "<u4").astype(int) for x in ("lengths", "crc32c")
    )
    return lengths, crcs


def quantised_row(codes: np.ndarray, i: int, block: bytes, dtype: str) -> np.ndarray:
    """Row `i` of a chunk from its codes and the chunk's block, sections 6 and 8, in the dtype on disk."""
    width = len(codes)
    n_exact = (len(block) - 8 * width) // (4 + np.dtype(dtype).itemsize * width)
    scale, offset = np.frombuffer(block, "<f4", 2 * width).reshape(2, width)
    numbers = np.frombuffer(block, "<u4", n_exact, 8 * width)
    if (codes == 255).all():
        exact = np.frombuffer(block, dtype, n_exact * width, 8 * width + 4 * n_exact).reshape(-1, width)
        return exact[numbers.tolist().index(i)]
    value = offset + scale * codes.astype("<f4")
    if dtype != "<u2":
        return value.astype(dtype)
    bits = value.view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(dtype)


class Store:
    """A store of format 1."""

    def __init__(self, root: Path) -> None:
        self.root = root
        attributes = json.loads((root / "zarr.json").read_bytes())["attributes"]["actcache"]
        expect(attributes["format"] == 1, "another format")
        self.plan, self.digest = attributes["plan"], attributes["digest"]
        expect(digest_of(self.plan) == self.digest, "plan")
        self.grid = self.plan["grid"]
        texts: list[str] = []
        for block in range(-(-self.grid["n_shards"] // 4096)):
            texts += strings((root / f"shards/c.{block}").read_bytes())
        texts = texts[: self.grid["n_shards"]]
        expect(digest_of(texts) == self.plan["shards_digest"], "shards")
        self.shards = [json.loads(text) for text in texts]

    def plan_object(self, name: str, shard: int, dtype: str) -> np.ndarray:
        """One shard's object of a plan array."""
        is_2d = name in ("tokens", "document", "keep")
        data = (self.root / name / f"c.{shard}{'.0' * is_2d}").read_bytes()
        n_bytes, crc = self.shards[shard]["objects"][name]
        expect(len(data) == n_bytes and crc32c(data[:-4]) == crc == int.from_bytes(data[-4:], "little"), name)
        values = np.frombuffer(decode(data[:-4], "zstd"), dtype)
        return values.reshape(-1, self.grid["seq_len"]) if is_2d else values

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        """Shard and row within it of a token, computed from the plan (section 7), not looked up."""
        per_shard, seq_len = self.grid["sequences_per_shard"], self.grid["seq_len"]
        shard = sequence // per_shard
        first = shard * per_shard
        n = min(per_shard, self.grid["n_sequences"] - first) * seq_len
        keep = self.plan_object("keep", shard, "?").reshape(-1)[:n]
        has_text = self.plan_object("document", shard, "<u4").reshape(-1)[:n] != 0xFFFFFFFF
        order = permutation(derive(self.plan["request"]["seed"], "mix", shard), n)
        rows = [i for i in order if keep[i]] + [i for i in order if has_text[i] and not keep[i]]
        return shard, rows.index((sequence - first) * seq_len + position)

    def row(self, layer: int, sequence: int, position: int, hook: str = "resid_post") -> np.ndarray:
        """One activation vector, float64."""
        capture_dir = self.root / "acts" / hook
        attributes = json.loads((capture_dir / "zarr.json").read_bytes())["attributes"]["actcache"]
        capture = attributes["capture"]
        expect(digest_of(capture) == attributes["digest"], "capture")
        expect(capture["plan_digest"] == self.digest, "a capture of another plan")
        shard, j = self.place(sequence, position)

        ledger = sorted(
            capture_dir.glob(f"ledger/c.*.{shard}"), key=lambda path: int(path.name.split(".")[1])
        )
        record = json.loads(strings(ledger[-1].read_bytes())[0])
        generation = int(ledger[-1].name.split(".")[1])
        facts = {name: value for name, value in record.items() if name not in ("digest", "producer")}
        expect(digest_of(facts) == record["digest"], "ledger record")
        place = (record["shard"], record["generation"], record["capture_digest"])
        expect(place == (shard, generation, attributes["digest"]), "ledger place")

        lengths, crcs = table(record["chunks"])
        block_lengths, block_crcs = table(record["scales"]) if record["scales"] else (lengths * 0, crcs)
        rows_per_chunk = self.grid["rows_per_chunk"]
        per_layer = -(-self.shards[shard]["stored"] // rows_per_chunk)
        k = capture["layers"].index(layer) * per_layer + j // rows_per_chunk
        name = f"g{generation}" if generation else "c"
        with (capture_dir / f"rows/{name}.0.{shard}.0").open("rb") as file:
            file.seek(int(lengths[:k].sum() + block_lengths[:k].sum()))
            data, block = file.read(int(lengths[k])), file.read(int(block_lengths[k]))
        expect(crc32c(data[:-4]) == crcs[k], "chunk")
        dtype = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}[capture["dtype"]]
        width, i = capture["width"], j % rows_per_chunk
        if capture["codec"] == "uint8":
            expect(crc32c(block[:-4]) == block_crcs[k], "block of scales")
            codes = np.frombuffer(data, "u1", width, i * width)
            row = quantised_row(codes, i, block[:-4], dtype)
        else:
            row = np.frombuffer(decode(data[:-4], capture["codec"]), dtype).reshape(-1, width)[i]
        if capture["dtype"] == "bfloat16":
            row = (row.astype("<u4") << 16).view("<f4")
        return row.astype(np.float64)


if __name__ == "__main__":
    print(Store(Path(sys.argv[1])).row(*map(int, sys.argv[2:5])))
