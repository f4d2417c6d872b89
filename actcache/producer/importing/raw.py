"""Numbers that lie in files as they are: read with `pread`, some sequences at a time.

Nothing is mapped: a file that shrinks meanwhile is an error with its name rather than a dead process, and the memory
taken is that of the result.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorpusError, NotFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some sequences in one file: number i begins at byte `offset + i * stride` and is contiguous."""

    path: Path
    offset: int
    stride: int
    n_sequences: int


class RawArray:
    """Pieces laid end to end: an array [q, *shape] of `dtype`.

    Raises:
        CorpusError: a file ends before its last sequence does.
    """

    def __init__(self, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._pieces = [piece for piece in pieces if piece.n_sequences]
        self._shape, self._dtype = shape, dtype
        self._item_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._starts = np.cumsum([0] + [piece.n_sequences for piece in self._pieces])
        for piece in self._pieces:
            needed = piece.offset + (piece.n_sequences - 1) * piece.stride + self._item_bytes
            size = piece.path.stat().st_size
            if size < needed:
                raise CorpusError(
                    f"{piece.path} is cut short: {size:,} bytes where its numbers end at {needed:,}"
                )

    def __len__(self) -> int:
        """Sequences."""
        return int(self._starts[-1])

    def read(self, sequences: NDArray[np.int64]) -> NDArray[Any]:
        """[n, *shape] of some sequences, ascending. Neighbours in a file are one request."""
        out = np.empty((len(sequences), *self._shape), self._dtype)
        flat, size = out.reshape(-1).view(np.uint8), self._item_bytes
        which = np.searchsorted(self._starts, sequences, side="right") - 1
        for i in np.unique(which):
            at = np.flatnonzero(which == i)
            part = flat[int(at[0]) * size : (int(at[-1]) + 1) * size]
            self._read_piece(self._pieces[i], sequences[at] - self._starts[i], part)
        return out

    def locate(self, sequence: int) -> Path:
        """The file that holds a sequence."""
        return self._pieces[int(np.searchsorted(self._starts, sequence, side="right")) - 1].path

    def _read_piece(self, piece: Piece, index: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        size = self._item_bytes
        is_new = np.diff(index) != 1 if piece.stride == size else np.ones(len(index) - 1, bool)
        starts = np.concatenate([[0], np.flatnonzero(is_new) + 1, [len(index)]]).tolist()
        try:
            fd = os.open(piece.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise NotFoundError(f"{piece.path} went away while it was imported") from error
        try:
            for start, stop in itertools.pairwise(starts):
                first = piece.offset + int(index[start]) * piece.stride
                _fill(fd, out.data[start * size : stop * size], first, piece.path)
        finally:
            os.close(fd)


def _fill(fd: int, out: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(out):
        n = os.preadv(fd, [out[done:]], offset + done)
        if n == 0:
            raise CorpusError(
                f"{path} ends at byte {offset + done:,}: it was cut short while it was imported"
            )
        done += n
