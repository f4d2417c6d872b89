"""The language model behind a store: found, loaded in the plan's dtype, and checked to be the one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from actcache.errors import UsageError
from actcache.model import Decoder, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from actcache.reader.access import Store


class Model(NamedTuple):
    """A store's model."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase

    def piece(self, token: int) -> str:
        """The text of a token id."""
        return str(self.tokenizer.decode([token]))


def find_model(store: Store) -> str | None:
    """Where the model probably is: a folder of its name beside the store, or the hub; None where neither can be.

    A plan holds a local model's name without its path.
    """
    name = store.plan.request.model.name
    beside = Path(store.url).parent / Path(name).name
    if (beside / "config.json").is_file():
        return str(beside)
    is_hub_id = name.count("/") == 1 and not name.startswith(("/", "."))
    return name if is_hub_id else None


def load_model_of(store: Store, name: str, device: str = "cpu") -> Model:
    """The model of a store.

    Raises:
        NotFoundError: nothing of that name.
        UsageError: it has other weights than the store was built with.
    """
    plan = store.plan.request.model
    revision = plan.revision if name == plan.name else None
    decoder = load_model(name, revision=revision, dtype=plan.compute_dtype, device=device)
    if decoder.weights_digest() != plan.digest:
        raise UsageError(
            f"{name} in {plan.compute_dtype} has other weights than {plan.name}, which {store.url} was built with; give "
            f"that model with --model"
        )
    return Model(decoder, load_tokenizer(name, revision))
