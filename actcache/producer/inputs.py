"""What the model is run on: the tokens that the plan stored, and where in its document each is, where that matters."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.model import document_positions
from actcache.store.open import Catalog


class ModelInputs:
    """The sequences of one shard, as a forward pass takes them. Whoever fills a shard, or fills it again, asks here."""

    def __init__(self, catalog: Catalog, shard: int) -> None:
        self._tokens = catalog.plan_object("tokens", shard).astype(np.int64)
        is_isolated = catalog.plan.request.isolate_documents
        self._positions = document_positions(catalog.plan_object("document", shard)) if is_isolated else None

    def __len__(self) -> int:
        """Sequences."""
        return len(self._tokens)

    def of(self, chosen: NDArray[np.integer]) -> tuple[Tensor, Tensor | None]:
        """Token ids of some sequences [n, t], and positions [n, t] where documents are isolated, else None."""
        positions = None if self._positions is None else torch.from_numpy(self._positions[chosen])
        return torch.from_numpy(self._tokens[chosen]), positions
