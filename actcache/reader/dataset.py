"""A stream as a PyTorch dataset, for code that insists on a DataLoader."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from actcache.errors import UsageError
from actcache.flow import Batch
from actcache.reader.stream import Stream


class StreamDataset(IterableDataset[Batch]):
    """Whole batches of a stream: use `DataLoader(dataset, batch_size=None)`, without workers.

    The stream has threads of its own; worker processes would each read everything again.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the cursor on."""
        if get_worker_info() is not None:
            raise UsageError(
                "a stream reads with its own threads: use DataLoader(..., batch_size=None, num_workers=0). "
                "More threads: Store.stream(threads=...)"
            )
        return iter(self.stream)

    def __len__(self) -> int:
        """Batches in all epochs."""
        return len(self.stream)

    def state_dict(self) -> dict[str, Any]:
        """The stream's cursor."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the cursor was taken."""
        self.stream.load_state_dict(state)
