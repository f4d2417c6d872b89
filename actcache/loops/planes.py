"""Bytes of numbers taken apart: those of equal significance side by side, as Blosc's shuffle lays them. See planes.ll."""

from collections.abc import Callable
from functools import cache
from string import Template

from actcache.loops.engine import INTEGER, POINTER, Engine, features, text_of

STEP = 32
"""Items taken at once: their number is to be a multiple."""
_SIZES = (2, 4)


@cache
def plane_loops() -> dict[int, Callable[..., None]]:
    """By bytes of an item: (from, to, n), addresses and items. None without llvmlite."""
    if features() is None:
        return {}
    engine = Engine("".join(_text(size) for size in _SIZES))
    return {size: engine.loop(f"planes_{size}", None, POINTER, POINTER, INTEGER) for size in _SIZES}


def _text(size: int) -> str:
    lines = []
    for k in range(size):
        mask = ", ".join(f"i32 {size * i + k}" for i in range(STEP))
        lines += [
            f"%plane.{k} = shufflevector <{size * STEP} x i8> %all, <{size * STEP} x i8> poison, <{STEP} x i32> <{mask}>",
            f"%plane.{k}.first = mul i64 %n, {k}",
            f"%plane.{k}.i = add i64 %plane.{k}.first, %i",
            f"%plane.{k}.at = getelementptr i8, ptr %to, i64 %plane.{k}.i",
            f"store <{STEP} x i8> %plane.{k}, ptr %plane.{k}.at, align 1",
        ]
    return Template(text_of("planes.ll")).substitute(
        size=size, step=STEP, all=size * STEP, planes="\n  ".join(lines)
    )
