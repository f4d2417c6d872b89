"""What one pass over rows can do: norms, moments and extremes of columns, codes and what codes stand for.

See of_rows.ll and of_columns.ll.
"""

from collections.abc import Callable
from functools import cache
from string import Template
from typing import Any, NamedTuple

from numpy.typing import NDArray

from actcache.loops.engine import INTEGER, POINTER, Engine, features, text_of

STEP = 16
"""Numbers of a row that are taken at once: widths are to be a multiple."""


class _Stored(NamedTuple):
    """How numbers of a dtype lie in memory: LLVM's type of one; floats %to from what lies at %from; %kept, which %y becomes."""

    type: str
    n_bytes: int
    load: tuple[str, ...]
    keep: tuple[str, ...]


_STORED = {
    "float32": _Stored(
        "float",
        4,
        ("%$to = load <$step x float>, ptr %$from, align 4",),
        ("%kept = bitcast <$step x float> %y to <$step x float>",),
    ),
    "float16": _Stored(
        "half",
        2,
        (
            "%$to.half = load <$step x half>, ptr %$from, align 2",
            "%$to = fpext <$step x half> %$to.half to <$step x float>",
        ),
        ("%kept = fptrunc <$step x float> %y to <$step x half>",),
    ),
    "bfloat16": _Stored(
        "i16",
        2,
        (
            "%$to.upper = load <$step x i16>, ptr %$from, align 2",
            "%$to.wide = zext <$step x i16> %$to.upper to <$step x i32>",
            "%$to.bits = shl <$step x i32> %$to.wide, $sixteens",
            "%$to = bitcast <$step x i32> %$to.bits to <$step x float>",
        ),
        (  # to the nearest, ties to even
            "%y.bits = bitcast <$step x float> %y to <$step x i32>",
            "%y.above = lshr <$step x i32> %y.bits, $sixteens",
            "%y.is_odd = and <$step x i32> %y.above, $ones",
            "%y.tie = add <$step x i32> %y.is_odd, $halves",
            "%y.up = add <$step x i32> %y.bits, %y.tie",
            "%y.shifted = lshr <$step x i32> %y.up, $sixteens",
            "%y.rounded = trunc <$step x i32> %y.shifted to <$step x i16>",
            "%y.is_nan = fcmp uno <$step x float> %y, %y",
            "%kept = select <$step x i1> %y.is_nan, <$step x i16> $nans, <$step x i16> %y.rounded",
        ),
    ),
}


class RowLoops(NamedTuple):
    """Loops over rows of one dtype. Arguments are addresses and numbers; see of_rows.ll and of_columns.ll.

    norms    (rows, n, d, norms).
    said     (codes, n, d, scale, offset, rows).
    placed   (numbers, n, d, slots, target).
    moments  (rows, stride, n, d, block, centre, sums, squares, least, greatest).
    extremes (rows, n, d, least, greatest).
    errors   (rows, others, n, d, block, squares).
    coded    (rows, n, d, block, fits, inverse, scale, offset, codes, said, squares).
    """

    norms: Callable[..., None]
    said: Callable[..., None]
    placed: Callable[..., None]
    moments: Callable[..., None]
    extremes: Callable[..., None]
    errors: Callable[..., None]
    coded: Callable[..., None]


@cache
def row_loops() -> dict[str, RowLoops]:
    """By logical dtype; none without llvmlite, or on a processor (x86, before 2012) that does not know halves."""
    able = features()
    if able is None or ("sse2" in able and not able.get("f16c", False)):
        return {}
    numbers = f"<{STEP} x float>"
    declared = (
        f"declare float @llvm.sqrt.f32(float)\ndeclare {numbers} @llvm.roundeven.v{STEP}f32({numbers})\n"
    )
    around_caches = "\n!0 = !{i32 1}\n"
    texts = [_text(name, dtype) for dtype in _STORED for name in ("of_rows.ll", "of_columns.ll")]
    engine = Engine(declared + "".join(texts) + around_caches)
    of_one = [POINTER, INTEGER, INTEGER]
    return {
        dtype: RowLoops(
            engine.loop(f"norms_{dtype}", None, *of_one, POINTER),
            engine.loop(f"said_{dtype}", None, *of_one, *[POINTER] * 3),
            engine.loop(f"placed_{dtype}", None, *of_one, POINTER, POINTER),
            engine.loop(f"moments_{dtype}", None, POINTER, *[INTEGER] * 4, *[POINTER] * 5),
            engine.loop(f"extremes_{dtype}", None, *of_one, POINTER, POINTER),
            engine.loop(f"errors_{dtype}", None, POINTER, *of_one, INTEGER, POINTER),
            engine.loop(f"coded_{dtype}", None, *of_one, INTEGER, *[POINTER] * 7),
        )
        for dtype in _STORED
    }


def row_loops_for(rows: NDArray[Any], dtype: str) -> RowLoops | None:
    """Those that can be used on rows [r, d] of a logical dtype. NumPy does the same, within rounding."""
    if rows.shape[1] % STEP or not rows.flags.c_contiguous:
        return None
    return row_loops().get(dtype)


def _text(name: str, dtype: str) -> str:
    stored = _STORED[dtype]

    def lines(several: tuple[str, ...], **names: str) -> str:
        text = "\n  ".join(several)
        return Template(text).substitute(
            step=STEP,
            sixteens=_same("i32", 16),
            ones=_same("i32", 1),
            halves=_same("i32", 0x7FFF),
            nans=_same("i16", 0x7FC0),
            **names,
        )

    return Template(text_of(name)).substitute(
        name=dtype,
        step=STEP,
        stored=stored.type,
        load=lines(stored.load, **{"to": "x", "from": "from"}),
        load_other=lines(stored.load, **{"to": "other", "from": "other.from"}),
        keep=lines(stored.keep),
        aligned=STEP * stored.n_bytes,
        most=_same("float", 255.0),
        exact=_same("i8", 255),
        total="\n  ".join(_folded("%sum.next", STEP)),
    )


def _same(kind: str, value: float) -> str:
    """A vector of one number."""
    return f"<{', '.join([f'{kind} {value}'] * STEP)}>"


def _folded(vector: str, n: int) -> list[str]:
    """Add the upper half of a vector of floats to its lower half until one number, %total, is left."""
    lines = []
    while n > 1:
        half = n // 2
        for name, first in (("lower", 0), ("upper", half)):
            mask = ", ".join(f"i32 {first + i}" for i in range(half))
            lines.append(
                f"%{name}.{half} = shufflevector <{n} x float> {vector}, <{n} x float> poison, <{half} x i32> <{mask}>"
            )
        lines.append(f"%folded.{half} = fadd <{half} x float> %lower.{half}, %upper.{half}")
        vector, n = f"%folded.{half}", half
    return [*lines, f"%total = extractelement <1 x float> {vector}, i64 0"]
