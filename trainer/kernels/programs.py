"""The programs that triton compiles, or interprets. `trainer.kernels.triton` runs them, and says what each is for.

Pointers are to contiguous tensors. EXACT is the dtype of sums.

Axes: b rows, d width, f latents.
"""
# pyright: reportOperatorIssue=false, reportArgumentType=false
# ruff: noqa: ANN001, ANN201, ANN202 (their arguments are triton's)

import triton
import triton.language as tl

NONE = tl.constexpr(-(2**63))
"""A key below that of any number."""


@triton.jit
def _keys(pre, among, at, n, IS_AMONG: tl.constexpr):
    """What orders values, and equal ones by place, the lowest first.

    The value's bits, made monotone, are the upper half; the lower is 2^32 - 1 - place.
    """
    place = at
    if IS_AMONG:
        place = tl.load(among + at, mask=at < n, other=0)
    value = tl.load(pre + place, mask=at < n, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value != value, 0x7FC00000, bits)  # NaN is the largest, as it is for torch.topk
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - at.to(tl.int64))
    return tl.where(at < n, keys, NONE)


@triton.jit
def search(
    pre,
    among,
    out,
    n,
    n_latents,
    LANES: tl.constexpr,
    PADDED: tl.constexpr,
    ROOM: tl.constexpr,
    IS_AMONG: tl.constexpr,
):
    """One row: keys of at least its PADDED largest values into out [ROOM], in no order; the rest of out stays."""
    row = tl.program_id(0).to(tl.int64)
    pre += row * n_latents
    out += row * ROOM
    lanes = tl.arange(0, LANES)
    best = tl.full([LANES], NONE, tl.int64)
    for start in range(0, n, LANES):
        best = tl.maximum(best, _keys(pre, among, start + lanes, n, IS_AMONG))
    bound = tl.min(tl.topk(best, PADDED))
    n_found = 0
    for start in range(0, n, LANES):
        keys = _keys(pre, among, start + lanes, n, IS_AMONG)
        n_found += tl.sum(((keys >= bound) & (start + lanes < n)).to(tl.int32))
    if n_found <= ROOM:
        n_written = 0
        for start in range(0, n, LANES):
            keys = _keys(pre, among, start + lanes, n, IS_AMONG)
            is_found = (keys >= bound) & (start + lanes < n)
            place = n_written + tl.cumsum(is_found.to(tl.int32)) - 1
            tl.store(out + place, keys, mask=is_found)
            n_written += tl.sum(is_found.to(tl.int32))
    else:
        largest = tl.full([PADDED], NONE, tl.int64)
        for start in range(0, n, LANES):
            keys = tl.topk(_keys(pre, among, start + lanes, n, IS_AMONG), PADDED)
            # of two descending lists, the larger of a[i] and b[-1 - i] are the largest of both
            largest = tl.sort(tl.maximum(largest, tl.flip(keys)), descending=True)
        tl.store(out + tl.arange(0, PADDED), largest)


@triton.jit
def bags(
    weights,
    indices,
    table,
    out,
    n_chosen,
    width,
    BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One row, BLOCK columns: the sum of its weights times rows of the table."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], EXACT)
    for start in range(0, n_chosen, CHOSEN):
        j = start + tl.arange(0, CHOSEN)
        index = tl.load(indices + row * n_chosen + j, mask=j < n_chosen, other=0)
        weight = tl.load(weights + row * n_chosen + j, mask=j < n_chosen, other=0.0).to(EXACT)
        inside = (j < n_chosen)[:, None] & (columns < width)[None, :]
        values = tl.load(table + index[:, None] * width + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(weight[:, None] * values.to(EXACT), axis=0)
    tl.store(out + row * width + columns, total, mask=columns < width)


@triton.jit
def dots(
    rows,
    indices,
    table,
    out,
    n_chosen,
    width,
    BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One row, CHOSEN of its indices: the products of the row with rows of the table."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * CHOSEN + tl.arange(0, CHOSEN)
    index = tl.load(indices + row * n_chosen + j, mask=j < n_chosen, other=0)
    total = tl.zeros([CHOSEN], EXACT)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(rows + row * width + columns, mask=columns < width, other=0.0).to(EXACT)
        inside = (j < n_chosen)[:, None] & (columns < width)[None, :]
        values = tl.load(table + index[:, None] * width + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(values.to(EXACT) * x[None, :], axis=1)
    tl.store(out + row * n_chosen + j, total, mask=j < n_chosen)


@triton.jit
def by_latent(
    weights,
    order,
    ends,
    rows,
    out,
    totals,
    n_chosen,
    width,
    BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One latent, BLOCK columns: the sum of the rows that chose it, each times its weight."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(ends + latent - 1, mask=latent > 0, other=0)
    end = tl.load(ends + latent)
    total = tl.zeros([BLOCK], EXACT)
    total_weight = tl.zeros([CHOSEN], EXACT)
    for start in range(begin, end, CHOSEN):
        at = start + tl.arange(0, CHOSEN)
        entry = tl.load(order + at, mask=at < end, other=0)
        weight = tl.load(weights + entry, mask=at < end, other=0.0).to(EXACT)
        inside = (at < end)[:, None] & (columns < width)[None, :]
        values = tl.load(
            rows + (entry // n_chosen)[:, None] * width + columns[None, :], mask=inside, other=0.0
        )
        total += tl.sum(weight[:, None] * values.to(EXACT), axis=0)
        total_weight += weight
    tl.store(out + latent * width + columns, total, mask=columns < width)
    if tl.program_id(1) == 0:
        tl.store(totals + latent, tl.sum(total_weight))
