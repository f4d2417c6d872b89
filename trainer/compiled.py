"""Element-wise parts of a step in one pass over memory each, where a run asks for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def fused(function: F, *, is_wanted: bool) -> F:
    """`function`, through torch.compile where that is wanted: for batches of any size, compiled once per process."""
    return cast("F", _compiled(function)) if is_wanted else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
