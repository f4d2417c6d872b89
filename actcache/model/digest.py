"""Which weights a model has: a digest over all of them, wherever they lie."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_DIGEST_ELEMENTS = 1 << 24


def digest_parameters(module: nn.Module) -> str:
    """Sha256 over name, dtype, shape and bytes of every parameter, in order of names; tied ones count once."""
    digest = hashlib.sha256()
    parameters = dict(module.named_parameters())
    if any(
        parameter.is_meta for parameter in parameters.values()
    ):  # apart, tied ones are no longer one object
        for name in getattr(module, "all_tied_weights_keys", {}):
            parameters.pop(name, None)
    for name, parameter in sorted(parameters.items()):
        header = f"{name} {str(parameter.dtype).removeprefix('torch.')} {list(parameter.shape)}\n"
        digest.update(header.encode())
        for part in _parts(_value(module, name, parameter)):
            digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _DIGEST_ELEMENTS):
        yield flat[start : start + _DIGEST_ELEMENTS].cpu().contiguous()


def _value(root: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter's numbers; where accelerate keeps them outside the device, the ones it keeps."""
    if not parameter.is_meta:
        return parameter
    path, _, own = name.rpartition(".")
    hook = getattr(root.get_submodule(path), "_hf_hook", None)
    kept = getattr(hook, "weights_map", None)
    assert kept is not None, f"{name} has no numbers"
    return kept[own]
