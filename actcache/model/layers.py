"""Layer numbers as people write them."""

from actcache.errors import UsageError


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Layer numbers from `"all"`, or from numbers and half-open ranges such as `"0,3,5"`, `"0:6"` and `"0:6,11"`.

    Returns:
        The layer numbers, ascending, each once.

    Raises:
        UsageError: empty, not numbers, out of range, a range with nothing in it, or a layer named twice.
    """
    if text.strip() == "all":
        return tuple(range(n_layers))
    layers: list[int] = []
    for part in text.split(","):
        layers.extend(_parse_range(part.strip(), text))
    wrong = sorted({layer for layer in layers if layer >= n_layers})
    if wrong:
        raise UsageError(f"layers {text!r}: no layer {wrong[0]}; the model has 0 to {n_layers - 1}")
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise UsageError(f"layers {text!r}: layer {twice[0]} is named twice; name each once")
    return tuple(sorted(layers))


def _parse_range(part: str, text: str) -> range:
    first, colon, end = part.partition(":")
    if not (first.isdecimal() and (end.isdecimal() if colon else True)):
        raise UsageError(
            f'layers {text!r}: {part!r} is neither a layer nor a range; write "all", "0,3,5" or "0:6"'
        )
    layers = range(int(first), int(end) if colon else int(first) + 1)
    if not layers:
        raise UsageError(f"layers {text!r}: {part!r} is empty; a:b goes from a to b - 1")
    return layers
