"""What stands around an example: the tokens beside it, and the same latent's activation on each of them at the same layer.

Axes: c examples, w tokens of a context, n tokens of a shard.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.examples import Examples
from analysis.latents import Codes, LatentStore
from analysis.subject import Subject

Pieces = Callable[[int], str]
"""The text of a token id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """The surroundings of some examples, all of the same store.

    example      [c] int64, which example.
    tokens       [c, w] int64, the tokens at position - radius ... position + radius; -1 beyond the sequence's borders.
    activations  [c, w] float32, the example's latent at its layer there; 0 where it is not active, NaN where no row is kept.
    """

    example: NDArray[np.int64]
    tokens: NDArray[np.int64]
    activations: NDArray[np.float32]


def iter_contexts(
    examples: Examples, subject: Subject, latents: LatentStore, radius: int
) -> Iterator[Contexts]:
    """Contexts shard by shard, `radius` tokens to either side. Memory: one shard's latents and its examples."""
    shards = subject.shards(latents.header["split"], latents.header["n_tokens"])
    for codes, shard in zip(latents, shards, strict=True):
        q = examples.sequence - shard.sequences.start
        chosen = np.flatnonzero((q >= 0) & (q < len(shard.sequences)))
        if not len(chosen):
            continue
        n_sequences, seq_len = shard.tokens.shape
        q_c, t_cw = q[chosen], examples.position[chosen, None] + np.arange(-radius, radius + 1)
        is_inside = (t_cw >= 0) & (t_cw < seq_len)
        t_cw = np.clip(t_cw, 0, seq_len - 1)
        token_of = np.full((n_sequences, seq_len), -1, np.int64)
        token_of[codes.sequence - shard.sequences.start, codes.position] = np.arange(len(codes))
        token_i = np.where(is_inside, token_of[q_c[:, None], t_cw], -1)
        found = look_up(codes, token_i, examples.layer_i[chosen, None], examples.latent[chosen, None])
        yield Contexts(
            example=chosen,
            tokens=np.where(is_inside, shard.tokens[q_c[:, None], t_cw], -1),
            activations=np.where(token_i >= 0, found, np.float32(np.nan)),
        )


def look_up(
    codes: Codes, token_i: NDArray[np.int64], layer_i: NDArray[np.int64], latent: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Activations of latents on rows; 0 where they are not active. The arguments are broadcast."""
    n_latents = int(max(codes.latent.max(initial=0), latent.max(initial=0))) + 1
    row = np.repeat(np.arange(codes.passes.size), np.diff(codes.offsets))
    keys = row * n_latents + codes.latent
    order = np.argsort(keys)
    wanted = (token_i * len(codes.layers) + layer_i) * n_latents + latent
    at = np.searchsorted(keys, wanted, sorter=order)
    is_there = at < len(keys)
    place = order[np.where(is_there, at, 0)] if len(keys) else np.zeros(at.shape, np.int64)
    if not len(keys):
        return np.zeros(at.shape, np.float32)
    return np.where(is_there & (keys[place] == wanted), codes.activation[place], np.float32(0))


def write_examples(
    path: Path,
    examples: Examples,
    contexts: Iterator[Contexts],
    layers: tuple[int, ...],
    radius: int,
    pieces: Pieces | None,
    on_examples: Callable[[int], None] = lambda _n: None,
) -> None:
    """Write examples with their contexts to Parquet, by shard, then latent, layer and rank.

    Columns: those of `Examples` (with the model's layer number), then `context_tokens` and `context_activations` (lists; the
    example itself stands at `context_at`), and, where the tokenizer is at hand, `text` and `context_before`, `context_after`.
    """
    schema = pa.schema(
        [
            ("latent", pa.uint32()),
            ("layer", pa.uint16()),
            ("rank", pa.uint16()),
            ("activation", pa.float32()),
            ("sequence", pa.uint32()),
            ("position", pa.uint32()),
            ("document", pa.uint32()),
            ("token", pa.uint32()),
            ("text", pa.string()),
            ("context_before", pa.string()),
            ("context_after", pa.string()),
            ("context_at", pa.uint16()),
            ("context_tokens", pa.list_(pa.uint32())),
            ("context_activations", pa.list_(pa.float32())),
        ]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in contexts:
            writer.write_table(_as_table(part, examples, layers, radius, pieces, schema))
            on_examples(len(part.example))


def _as_table(
    part: Contexts,
    examples: Examples,
    layers: tuple[int, ...],
    radius: int,
    pieces: Pieces | None,
    schema: pa.Schema,
) -> pa.Table:
    rows = Examples(**{f.name: getattr(examples, f.name)[part.example] for f in fields(Examples)})
    is_inside = part.tokens >= 0
    offsets = pa.array(np.concatenate([[0], is_inside.sum(1).cumsum()]), pa.int32())
    columns = {
        "latent": rows.latent,
        "layer": np.array(layers)[rows.layer_i],
        "rank": rows.rank,
        "activation": rows.activation.astype(np.float32),
        "sequence": rows.sequence,
        "position": rows.position,
        "document": rows.document,
        "token": rows.token,
        "context_at": is_inside[:, :radius].sum(1),
        "context_tokens": pa.ListArray.from_arrays(
            offsets, pa.array(part.tokens[is_inside].astype(np.uint32))
        ),
        "context_activations": pa.ListArray.from_arrays(offsets, pa.array(part.activations[is_inside])),
    }
    for name, at in (
        ("text", slice(radius, radius + 1)),
        ("context_before", slice(0, radius)),
        ("context_after", slice(radius + 1, None)),
    ):
        columns[name] = [
            None if pieces is None else "".join(pieces(t) for t in tokens if t >= 0)
            for tokens in part.tokens[:, at].tolist()
        ]
    return pa.table(
        {
            field.name: pa.array(columns[field.name], field.type)
            if not isinstance(columns[field.name], pa.Array)
            else columns[field.name].cast(field.type)
            for field in schema
        },
        schema=schema,
    )
