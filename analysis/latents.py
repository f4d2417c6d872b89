"""A store of latents: what an SAE made of the kept tokens of a store, written once, read by every analysis.

    LATENTS/
      latents.json            what it is of, and its files with their SHA-256; rewritten as a whole after every shard
      shard-00000.parquet     one per shard of the activation store: one row per (kept token, layer), in the order of the text

Format 1 is described in docs/reference/latents.md. Latents with an activation above 0 are listed, so rows can be decoded again.

Axes: n tokens, l layers, e entries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from actcache.errors import DamageError, NotFoundError, UsageError
from actcache.version import __version__
from analysis.entries import Entries
from analysis.subject import Subject
from trainer import durable
from trainer.checkpoint import check_same
from trainer.dead import ACTIVE_ABOVE

if TYPE_CHECKING:
    from actcache.reader.access import Split
    from actcache.reader.shard_rows import ShardRows

FORMAT = 1
HEADER = "latents.json"
ENCODE_ROWS = 4096
_ROW_GROUP_ROWS = 1 << 17

SCHEMA = pa.schema(
    [
        pa.field("sequence", pa.uint32(), nullable=False),
        pa.field("position", pa.uint32(), nullable=False),
        pa.field("layer", pa.uint16(), nullable=False),
        pa.field("token", pa.uint32(), nullable=False),
        pa.field("document", pa.uint32(), nullable=False),
        pa.field("passes", pa.bool_(), nullable=False),
        pa.field("latents", pa.list_(pa.field("item", pa.uint32(), nullable=False)), nullable=False),
        pa.field("activations", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """The latents of one shard's kept tokens at every layer.

    shard       its number.
    layers      the model's layer numbers.
    sequence, position, token, document  [n] int64.
    passes      [n, l] bool, whether the row passes the run's filter.
    offsets     [n * l + 1] int64: entries of row (token i, layer j) are [offsets[i * l + j], offsets[i * l + j + 1]).
    latent      [e] int64.
    activation  [e] float32, > 0, standardised units, largest first within a row.
    """

    shard: int
    layers: tuple[int, ...]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    token: NDArray[np.int64]
    document: NDArray[np.int64]
    passes: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    latent: NDArray[np.int64]
    activation: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.sequence)

    def entries(self, *, aligned: bool = False, above: float = ACTIVE_ABOVE) -> Entries:
        """Active latents of rows that pass; with `aligned`, of tokens that pass at all layers."""
        passes = self.passes & self.passes.all(axis=1, keepdims=True) if aligned else self.passes
        row = np.repeat(np.arange(self.passes.size), np.diff(self.offsets))
        chosen = passes.reshape(-1)[row] & (self.activation > above)
        row = row[chosen]
        return Entries(
            token=row // len(self.layers),
            layer_i=row % len(self.layers),
            latent=self.latent[chosen],
            activation=self.activation[chosen].astype(np.float64),
        )

    def padded(self, layer_i: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Activations [n, k] and latents [n, k] of one layer, k the most in any row; 0 where a row has fewer."""
        starts, stops = (ends[layer_i :: len(self.layers)] for ends in (self.offsets[:-1], self.offsets[1:]))
        sizes = stops - starts
        slot = np.arange(int(sizes.max(initial=0)))
        is_used = slot < sizes[:, None]
        at = np.where(is_used, starts[:, None] + slot, 0)
        if not len(self.latent):
            return np.zeros(at.shape, np.float32), np.zeros(at.shape, np.int64)
        return np.where(is_used, self.activation[at], np.float32(0)), np.where(is_used, self.latent[at], 0)


class LatentStore:
    """A finished store of latents. Files are compared with their SHA-256 as they are read.

    Raises:
        NotFoundError: there is none.
        UsageError: it is of another format, or not finished.
        DamageError: its header cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        header = _read_header(root)
        if header is None:
            raise NotFoundError(f"no latents in {root} (no {HEADER}); 'actcache encode' writes them")
        if not header["complete"]:
            raise UsageError(f"{root} is not finished; run the same 'actcache encode' again to continue")
        self.header: dict[str, Any] = header
        self.layers: tuple[int, ...] = tuple(header["layers"])
        self.n_latents: int = header["n_latents"]
        self.n_tokens: int = sum(file["n_tokens"] for file in header["files"])

    def __iter__(self) -> Iterator[Codes]:
        """Shard after shard. Memory: one shard."""
        for file in self.header["files"]:
            yield self._read(file)

    def _read(self, file: dict[str, Any]) -> Codes:
        path = self.root / file["name"]
        again = f"remove {self.root} and run 'actcache encode' again"
        if not path.exists():
            raise DamageError(f"{path} is missing; {again}")
        found = durable.file_digest(path)
        if found != file["sha256"]:
            raise DamageError(f"{path} has SHA-256 {found}, written was {file['sha256']}; {again}")
        table = pq.read_table(path)
        n_layers = len(self.layers)

        def per_token(name: str) -> NDArray[np.int64]:
            return table[name].to_numpy()[::n_layers].astype(np.int64)

        latents, activations = (_flat(table[name]) for name in ("latents", "activations"))
        return Codes(
            shard=file["shard"],
            layers=self.layers,
            sequence=per_token("sequence"),
            position=per_token("position"),
            token=per_token("token"),
            document=per_token("document"),
            passes=table["passes"].to_numpy().astype(np.bool_).reshape(-1, n_layers),
            offsets=latents[0],
            latent=latents[1].astype(np.int64),
            activation=activations[1],
        )


def encode_store(
    subject: Subject,
    out: Path,
    *,
    split: Split = "holdout",
    n_tokens: int | None = None,
    on_rows: Callable[[int], None] = lambda _n: None,
) -> LatentStore:
    """Encode the kept tokens of a split and write their latents; what is there already is not done again.

    Memory: one shard's latents, and its activations of one layer.

    Args:
        subject: the SAE and its store.
        out: the folder.
        split: "holdout" or "train".
        n_tokens: stop after the sequence that completes so many; None: the whole split.
        on_rows: called with how many more rows are done.

    Raises:
        PlanMismatchError: the folder holds latents of something else; names what differs.
        UsageError: the folder holds something else.
    """
    request = _request(subject, split, n_tokens)
    header = _read_header(out)
    if header is None:
        if out.exists() and any(not entry.name.startswith(durable.TEMPORARY) for entry in out.iterdir()):
            raise UsageError(f"{out} is not empty and holds no latents; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, **request, "complete": False, "files": []}
        _write_header(out, header)
    check_same({name: (header.get(name), value) for name, value in request.items()}, str(out))
    done = {file["shard"] for file in header["files"]}
    for rows in subject.shards(split, n_tokens):
        if rows.shard in done:
            on_rows(rows.passes.size)
            continue
        path = out / f"shard-{rows.shard:05d}.parquet"
        temporary = path.with_name(durable.TEMPORARY + path.name)
        n_entries = _write_codes(temporary, encode_shard(subject, rows, on_rows))
        durable.sync(temporary)
        file = {
            "name": path.name,
            "shard": rows.shard,
            "n_tokens": len(rows),
            "n_entries": n_entries,
            "bytes": temporary.stat().st_size,
            "sha256": durable.file_digest(temporary),
        }
        durable.put_in_place(temporary, path)
        header["files"].append(file)
        _write_header(out, header)
    header["complete"] = True
    _write_header(out, header)
    return LatentStore(out)


def encode_shard(
    subject: Subject, rows: ShardRows, on_rows: Callable[[int], None] = lambda _n: None
) -> Codes:
    """The latents of one shard. Every kept row is encoded, whether it passes the run's filter or not."""
    values, latents = [], []
    for layer in rows.layers:
        x, first = rows.rows(layer, subject.hook), subject.first_latent(layer)
        parts = []
        for part in x.split(ENCODE_ROWS):
            code = subject.encode(part.to(torch.float32), layer)
            parts.append(
                (code.values.float().cpu().numpy(), (code.indices.cpu().numpy() + first).astype(np.uint32))
            )
            on_rows(len(part))
        values.append(_stack([value for value, _ in parts]))
        latents.append(_stack([latent for _, latent in parts]))
    n_slots = max((value.shape[1] for value in values), default=0)
    shape = (len(rows), len(rows.layers), n_slots)
    all_values, all_latents = np.zeros(shape, np.float32), np.zeros(shape, np.uint32)
    for layer_i, (value, latent) in enumerate(zip(values, latents, strict=True)):
        all_values[:, layer_i, : value.shape[1]] = value
        all_latents[:, layer_i, : value.shape[1]] = latent
    is_active = all_values > 0
    return Codes(
        shard=rows.shard,
        layers=rows.layers,
        sequence=rows.sequence,
        position=rows.position,
        token=rows.token,
        document=rows.document,
        passes=np.ascontiguousarray(rows.passes.T),
        offsets=np.concatenate([[0], is_active.sum(2, dtype=np.int64).reshape(-1).cumsum()]),
        latent=all_latents[is_active].astype(np.int64),
        activation=all_values[is_active],
    )


def _stack(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Rows of several parts, which may have different numbers of slots."""
    n_slots = max((part.shape[1] for part in parts), default=0)
    return np.concatenate([np.pad(part, ((0, 0), (0, n_slots - part.shape[1]))) for part in parts])


def _request(subject: Subject, split: Split, n_tokens: int | None) -> dict[str, Any]:
    """All that decides what the latents are."""
    plan = subject.store.plan
    request = {
        "sae": subject.digest,
        "plan": plan.digest,
        "model": plan.request.model.name,
        "hook": subject.hook,
        "target_hook": subject.target_hook,
        "layers": list(subject.layers),
        "n_latents": subject.n_latents,
        "split": split,
        "n_tokens": n_tokens,
        "filters": subject.filters,
    }
    return json.loads(json.dumps(request))


def _write_codes(path: Path, codes: Codes) -> int:
    n_layers = len(codes.layers)
    columns: dict[str, Any] = {
        name: np.repeat(getattr(codes, name), n_layers).astype(np.uint32)
        for name in ("sequence", "position", "token", "document")
    }
    columns["layer"] = np.tile(np.array(codes.layers, np.uint16), len(codes))
    columns["passes"] = codes.passes.reshape(-1)
    offsets = pa.array(codes.offsets, pa.int32())
    for name, values in (("latents", codes.latent.astype(np.uint32)), ("activations", codes.activation)):
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values), type=SCHEMA.field(name).type)
    table = pa.table({field.name: columns[field.name] for field in SCHEMA}, schema=SCHEMA)
    pq.write_table(table, path, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    return len(codes.latent)


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Offsets and values of a column of lists."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]


def _read_header(root: Path) -> dict[str, Any] | None:
    path = root / HEADER
    if not path.exists():
        return None
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamageError(
            f"{path} cannot be read: {error}; remove {root} and run 'actcache encode' again"
        ) from error
    if header.get("format") != FORMAT:
        raise UsageError(
            f"{root} is written in format {header.get('format')!r}; this actcache reads format {FORMAT}"
        )
    return header


def _write_header(root: Path, header: dict[str, Any]) -> None:
    text = json.dumps({**header, "actcache_version": __version__}, indent=2, allow_nan=False)
    durable.write_text(root / HEADER, text + "\n")
