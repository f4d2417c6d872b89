"""Documents packed into one sequence, kept from seeing each other: each is as if the model were run on it alone.

`positions` [q, t] say where in its document each token is; a document begins wherever they do not go on by one.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actcache.errors import ModelError
from actcache.model.families import Family

if TYPE_CHECKING:
    from actcache.model.decoder import Decoder

_DOCUMENT_TOKENS = 5
_MOST_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def isolating_arguments(
    positions_qt: Tensor, family: Family, config: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a decoder's forward pass is told, besides the ids, to keep documents apart.

    From positions that begin again transformers makes a mask that is block-diagonal (within any sliding window), in the
    form its attention implementation takes. A family that does not look at them gets the mask itself.
    """
    arguments = {"position_ids": positions_qt}
    if not family.masks_by_position:
        arguments["attention_mask"] = _mask(positions_qt, config, dtype)
    return arguments


def _mask(positions_qt: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """[q, 1, t, t]: bool, true where a token is seen; or, for eager attention, what is added to the scores."""
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ModelError(
            f"{config.model_type} with attention {implementation!r}: documents cannot be isolated; load it with sdpa or eager"
        )
    goes_on = positions_qt[:, 1:] == positions_qt[:, :-1] + 1
    document = torch.nn.functional.pad((~goes_on).cumsum(-1), (1, 0))
    is_seen = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    if implementation == "sdpa":
        return is_seen
    return torch.zeros_like(is_seen, dtype=dtype).masked_fill(~is_seen, torch.finfo(dtype).min)


def check_isolation(decoder: "Decoder") -> None:
    """Try it: a document behind another one must not depend on it, and must be what it is alone.

    Whether it works depends on the family, its attention implementation and the version of transformers, so it is tried
    on the model itself, with two documents of five tokens.

    Raises:
        ModelError: it does not.
    """
    t = _DOCUMENT_TOKENS
    ids = (torch.arange(3 * t) * 7 + 3) % decoder.vocab_size
    first, other, second = ids.view(3, t)
    positions = torch.arange(t).repeat(2)[None]
    last = len(decoder.blocks) - 1

    def run(*documents: Tensor) -> Tensor:
        packed = torch.cat(documents)[None]
        found = decoder.capture(packed, {"resid_post": [last]}, positions[:, : packed.shape[1]])
        return found["resid_post", last][0, -t:]

    behind_one, behind_another, alone = run(first, second), run(other, second), run(second)
    difference = ((behind_one - alone).float().norm() / alone.float().norm()).item()
    if not torch.equal(behind_one, behind_another) or difference > _MOST_DIFFERENCE[decoder.dtype]:
        raise ModelError(
            f"{decoder.name or decoder.family}: documents cannot be isolated: run behind another document the rows of one "
            f"differ by {difference:.1%} of their norm from those of the document alone. The {decoder.family} of this "
            f"transformers version, with attention {decoder.config._attn_implementation!r}, does not keep packed documents "
            f"apart; leave out --isolate-documents, or use --packing document"
        )
