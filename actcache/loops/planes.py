"""Bytes of numbers taken apart, those of equal significance side by side, as Blosc's shuffle lays them; and put together.

See planes.ll.
"""

from collections.abc import Callable
from functools import cache
from string import Template
from typing import NamedTuple

from actcache.loops.engine import INTEGER, POINTER, Engine, features, text_of

STEP = 32
"""Items taken at once: their number is to be a multiple."""
_SIZES = (2, 4)


class PlaneLoops(NamedTuple):
    """Loops for items of some bytes. Arguments are addresses and numbers.

    planes  (items, planes, n).
    woven   (planes, n, d, slots, chosen, rows, window, stride): items to rows of a window, as `Loops.scatter` does.
    """

    planes: Callable[..., None]
    woven: Callable[..., None]


@cache
def plane_loops() -> dict[int, PlaneLoops]:
    """By bytes of an item. None without llvmlite."""
    if features() is None:
        return {}
    engine = Engine("".join(_text(size) for size in _SIZES) + "\n!0 = !{i32 1}\n")
    woven = (POINTER, INTEGER, INTEGER, POINTER, POINTER, INTEGER, POINTER, INTEGER)
    return {
        size: PlaneLoops(
            engine.loop(f"planes_{size}", None, POINTER, POINTER, INTEGER),
            engine.loop(f"woven_{size}", None, *woven),
        )
        for size in _SIZES
    }


def _text(size: int) -> str:
    return Template(text_of("planes.ll")).substitute(
        size=size,
        step=STEP,
        all=size * STEP,
        planes="\n  ".join(_apart(size)),
        woven="\n  ".join(_together(size)),
    )


def _apart(size: int) -> list[str]:
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
    return lines


def _together(size: int) -> list[str]:
    """%all from %i on of each plane: pairs of bytes, then pairs of pairs."""
    lines, bits = [], 8
    for k in range(size):
        lines += [
            f"%plane.{k}.first = mul i64 %n, {k}",
            f"%plane.{k}.i = add i64 %plane.{k}.first, %i",
            f"%plane.{k}.at = getelementptr i8, ptr %planes, i64 %plane.{k}.i",
            f"%woven.{k}.8 = load <{STEP} x i8>, ptr %plane.{k}.at, align 1",
        ]
    mask = ", ".join(f"i32 {i + half}" for i in range(STEP) for half in (0, STEP))
    names = [f"%woven.{k}.8" for k in range(size)]
    while len(names) > 1:
        joined = []
        for i, (low, high) in enumerate(zip(names[::2], names[1::2], strict=True)):
            kind, wide = f"<{STEP} x i{bits}>", f"<{STEP} x i{2 * bits}>"
            lines += [
                f"%pairs.{i}.{bits} = shufflevector {kind} {low}, {kind} {high}, <{2 * STEP} x i32> <{mask}>",
                f"%woven.{i}.{2 * bits} = bitcast <{2 * STEP} x i{bits}> %pairs.{i}.{bits} to {wide}",
            ]
            joined.append(f"%woven.{i}.{2 * bits}")
        names, bits = joined, 2 * bits
    return [*lines, f"%all = bitcast <{STEP} x i{bits}> {names[0]} to <{size * STEP} x i8>"]
