"""How far a long piece of work is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporter:
    """Hears how far the work is: a stage begins with its size (None: not known) and unit, then advances."""

    on_stage: Callable[[str, int | None, str], None] = lambda _name, _total, _unit: None
    on_advance: Callable[[int], None] = lambda _n: None
