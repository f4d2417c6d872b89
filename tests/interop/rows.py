"""Rows that an SAE can learn, as a store and as a tensor, and how well a trained SAE reconstructs them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import actcache
from actcache.reader.stream import Stream
from tests.conftest import write_store

WIDTH, N_LATENTS, K = 16, 256, 4
BATCH, STEPS = 128, 300
LAYER = 3
N_ATOMS, N_ATOMS_IN_A_SEQUENCE, N_ATOMS_IN_A_ROW = 48, 6, 3

Train = Callable[[Iterator[Tensor], int], Callable[[Tensor], Tensor]]
"""Rows and a seed in; what reconstructs rows out."""


class Rows(NamedTuple):
    """The same rows twice. path: a store.   train, heldout  [n, d] float32: what its layer LAYER holds."""

    path: Path
    train: Tensor
    heldout: Tensor

    def stream(self, seed: int = 0, **changes) -> Stream:
        """Endless batches of BATCH rows; an epoch takes several windows."""
        chosen = {"dtype": torch.float32, "epochs": None, "drop_last": True, "window_rows": 1024}
        store = actcache.open(self.path)
        return store.stream(batch_size=BATCH, layers=[LAYER], seed=seed, **chosen | changes)


def make_rows(folder: Path) -> Rows:
    """4,096 rows to train on and 1,024 held out, bfloat16: each a few of 48 directions, an offset and some noise.

    Rows of a sequence share 6 directions, so that it matters how rows are shuffled.
    """
    rng = np.random.default_rng(0)
    n_sequences, seq_len = 320, 16
    n_rows = n_sequences * seq_len
    atoms = rng.standard_normal((N_ATOMS, WIDTH))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    weights = np.zeros((n_rows, N_ATOMS))
    of_sequence = rng.random((n_sequences, N_ATOMS)).argsort(1)[:, :N_ATOMS_IN_A_SEQUENCE]
    of_row = rng.random((n_rows, N_ATOMS_IN_A_SEQUENCE)).argsort(1)[:, :N_ATOMS_IN_A_ROW]
    chosen = np.take_along_axis(of_sequence.repeat(seq_len, 0), of_row, axis=1)
    np.put_along_axis(weights, chosen, rng.uniform(1, 3, chosen.shape), axis=1)
    values = weights @ atoms + rng.standard_normal(WIDTH) + 0.05 * rng.standard_normal((n_rows, WIDTH))
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    acts = np.stack([np.zeros_like(bits), bits]).reshape(2, n_sequences, seq_len, WIDTH)
    truth = write_store(
        folder / "acts.zarr",
        n_sequences=n_sequences,
        seq_len=seq_len,
        per_shard=32,
        rows_per_chunk=64,
        layers=(0, LAYER),
        width=WIDTH,
        n_holdout_shards=2,
        drop=0,
        acts=acts,
    )
    rows = torch.from_numpy(truth.floats()[1]).float()
    first = truth.sequences("train").start
    return Rows(truth.root, rows[first:].reshape(-1, WIDTH), rows[:first].reshape(-1, WIDTH))


def shuffled(rows: Tensor, seed: int) -> Iterator[Tensor]:
    """Endless batches of BATCH rows of a tensor, in another random order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for at in torch.randperm(len(rows), generator=generator).split(BATCH):
            if len(at) == BATCH:
                yield rows[at]


def fvu(reconstruct: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """The share of the variance of rows that their reconstruction leaves unexplained."""
    with torch.no_grad():
        error = reconstruct(rows) - rows
    return float(error.square().sum() / (rows - rows.mean(0)).square().sum())
