"""Where in its document each token is."""

import numpy as np
from numpy.typing import NDArray


def document_positions(document: NDArray[np.integer]) -> NDArray[np.int64]:
    """The place of each token in its document's part of the sequence, from 0: [q, t].

    Args:
        document: [q, t] document numbers. A new document, or padding, begins wherever the number changes.
    """
    column = np.arange(document.shape[1])
    begins = np.ones(document.shape, bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    return column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
