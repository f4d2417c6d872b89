"""A small store of a model's activations on the beginning of a corpus, for measuring before anything large is built."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actcache.model import Decoder
from actcache.producer.build import build
from actcache.producer.corpus import Corpus
from actcache.producer.settings import Settings
from actcache.producer.summary import BuildSummary

MOST_LAYERS = 6


def spread_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """At most `MOST_LAYERS` of them, first and last included."""
    chosen = np.linspace(0, len(layers) - 1, min(MOST_LAYERS, len(layers))).round().astype(int)
    return tuple(layers[i] for i in chosen)


def build_sample(
    out: Path,
    decoder: Decoder,
    tokenizer: Any,
    corpus: Corpus,
    *,
    hook: str,
    layers: Sequence[int],
    dtype: str,
    n_tokens: int,
    seq_len: int,
) -> BuildSummary:
    """Build it uncompressed, with nothing held out and, as by default, first positions and special tokens not kept."""
    settings = Settings(
        out=out,
        hooks=(hook,),
        layers=tuple(layers),
        dtype=dtype,
        codec="none",
        n_tokens=n_tokens,
        seq_len=seq_len,
        holdout_frac=0.0,
        exclude_first=min(1, seq_len - 1),
    )
    return build(settings, decoder, tokenizer, corpus, corpus_name="sample")
