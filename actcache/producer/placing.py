"""Vectors to their rows of a shard's buffer: rounded on the way, where they are not yet what is stored."""

import torch
from torch import Tensor

from actcache.loops.of_rows import STEP, row_loops


class Places:
    """Where the vectors of one batch go: `rows` [n] int64, of each; -1 for padding, which goes nowhere."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        is_stored = rows >= 0
        self._stored = None if bool(is_stored.all()) else torch.nonzero(is_stored).reshape(-1)
        self._rows_stored = rows if self._stored is None else rows[self._stored]

    def stored(self, acts_nd: Tensor) -> Tensor:
        """Those [m, d] of the vectors [n, d], on any device, that go somewhere."""
        return acts_nd if self._stored is None else acts_nd[self._stored.to(acts_nd.device)]

    def put_stored(self, target: Tensor, acts_md: Tensor) -> None:
        """Put what `stored` gave, in host memory now, to its rows of `target` [r, d]."""
        target.index_copy_(0, self._rows_stored, acts_md)

    def put(self, target: Tensor, acts_nd: Tensor) -> None:
        """Put vectors in host memory to their rows of `target` [r, d], to the nearest number of its dtype, ties to even."""
        if not self._put_at_once(target, acts_nd):
            self.put_stored(target, self.stored(acts_nd).to(target.dtype))

    def _put_at_once(self, target: Tensor, acts_nd: Tensor) -> bool:
        loops, (n, d) = row_loops().get(str(target.dtype).removeprefix("torch.")), acts_nd.shape
        step_bytes = STEP * target.element_size()
        fits = (acts_nd.dtype == torch.float32 and acts_nd.is_contiguous()) and (
            d % STEP == 0 and target.is_contiguous() and target.data_ptr() % step_bytes == 0
        )
        if loops is None or not fits:
            return False
        loops.placed(acts_nd.data_ptr(), n, d, self.rows.data_ptr(), target.data_ptr())
        return True
