"""What the attention kernels share: which tile a program has, which keys it sees, loads, scores.

Query heads that share a key head are rows of one tile: row m of a key head is the query at position
m // GROUP of head m % GROUP, so short queries still fill tiles and keys are read once per group.
Head dimensions are one or two pieces, tiles of powers of two: 192 = 128 + 64, 80 = 64 + 16; only
the part of a last piece beyond its width is masked. Scores are in base 2: s · log2(e).
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(
    schedule, len_q, len_k, heads, n_tiles, section, VARLEN: tl.constexpr, DESCENDING: tl.constexpr
):
    """This program's (batch, key head, tile, first query, first key, queries, keys).

    Packed: row i of schedule (n, 5) int32 is a tile; heads share it. Dense: ``section`` key heads
    at a time, whose keys and values stay in the L2 cache, all of their first (or, DESCENDING, last)
    tiles before the next ones, so that the long rows of causal attention start early.
    """
    program = tl.program_id(0)
    if VARLEN:
        entry = schedule + (program // heads).to(tl.int64) * 5
        start_q = tl.load(entry).to(tl.int64)
        len_q = tl.load(entry + 1)
        start_k = tl.load(entry + 2).to(tl.int64)
        len_k = tl.load(entry + 3)
        return program * 0, program % heads, tl.load(entry + 4), start_q, start_k, len_q, len_k
    else:
        first = program // (section * n_tiles) * section
        inside = program % (section * n_tiles)
        size = tl.minimum(section, tl.num_programs(0) // n_tiles - first)
        tile = inside // size
        if DESCENDING:
            tile = n_tiles - 1 - tile
        batch_head = first + inside % size
        start = program.to(tl.int64) * 0
        return batch_head // heads, batch_head % heads, tile, start, start, len_q, len_k


@triton.jit
def key_range(
    first, last, len_q, len_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """(low, high, full_low, full_high): keys that some, and that all queries first..last see."""
    offset = len_k - len_q
    low, full_low = len_k * 0, len_k * 0
    high, full_high = len_k, len_k
    if HAS_RIGHT:
        high = tl.minimum(len_k, last + offset + right + 1)
        full_high = tl.minimum(len_k, first + offset + right + 1)
    if HAS_LEFT:
        low = tl.maximum(0, first + offset - left)
        full_low = tl.maximum(0, last + offset - left)
    return low, high, full_low, full_high


@triton.jit
def query_range(
    first, last, len_q, len_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """(low, high, full_low, full_high): queries that see some, and all of the keys first..last."""
    offset = len_k - len_q
    low, full_low = len_q * 0, len_q * 0
    high, full_high = len_q, len_q
    if HAS_RIGHT:
        low = tl.maximum(0, first - offset - right)
        full_low = tl.maximum(0, last - offset - right)
    if HAS_LEFT:
        high = tl.minimum(len_q, last - offset + left + 1)
        full_high = tl.minimum(len_q, first - offset + left + 1)
    return low, high, full_low, full_high


@triton.jit
def block_range(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Blocks that overlap [low, high): (first, first full, count of full, count of masked ones).

    A block is full where it lies inside [full_low, full_high); masked ones lie on either side.
    """
    first = tl.maximum(low, 0) // BLOCK
    last = tl.maximum((tl.maximum(high, 0) + BLOCK - 1) // BLOCK, first)
    first_full = tl.minimum(tl.maximum((tl.maximum(full_low, 0) + BLOCK - 1) // BLOCK, first), last)
    last_full = tl.minimum(tl.maximum(tl.maximum(full_high, 0) // BLOCK, first_full), last)
    n_full = last_full - first_full
    return first, first_full, n_full, last - first - n_full


@triton.jit
def masked_block(i, first, first_full, n_full):
    """The i-th block that is not full."""
    return first + i + tl.where(first + i >= first_full, n_full, 0)


@triton.jit
def row_offsets(o_row, i_first, stride, stride_head, GROUP: tl.constexpr):
    """Element offsets of rows from the position i_first // GROUP of a key head's first head."""
    if GROUP == 1:
        return (o_row - i_first) * stride
    else:
        return (o_row // GROUP - i_first // GROUP) * stride + (o_row % GROUP) * stride_head


@triton.jit
def stat_offsets(o_row, stride_head, GROUP: tl.constexpr):
    """Offsets of rows in a tensor (heads, length)."""
    if GROUP == 1:
        return o_row
    else:
        return o_row // GROUP + (o_row % GROUP).to(tl.int64) * stride_head


@triton.jit
def load_rows(base, o_row, m_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(rows, BLOCK) from base + o_row; 0 beyond WIDTH and, if MASKED, where m_row is false."""
    o_col = tl.arange(0, BLOCK)
    p = base + o_row[:, None] + o_col[None, :]
    if MASKED and WIDTH < BLOCK:
        return tl.load(p, mask=m_row[:, None] & (o_col < WIDTH)[None, :], other=0.0)
    elif MASKED:
        return tl.load(p, mask=m_row[:, None], other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(p, mask=(o_col < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def store_rows(base, o_row, m_row, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    o_col = tl.arange(0, BLOCK)
    m = m_row[:, None]
    if WIDTH < BLOCK:
        m = m & (o_col < WIDTH)[None, :]
    tl.store(base + o_row[:, None] + o_col[None, :], value.to(base.dtype.element_ty), mask=m)


@triton.jit
def visible(position, key, len_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which keys a query sees; ``position`` is its place among the keys. The two broadcast."""
    m = key < len_k
    if HAS_RIGHT:
        m = m & (key <= position + right)
    if HAS_LEFT:
        m = m & (key >= position - left)
    return m


@triton.jit
def score_factor(scale):
    """From q · k to base-2 scores. Above 0, as a masked product is -inf and -inf · 0 no number."""
    return tl.maximum(scale, 1e-30) * LOG2E


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh(x) from exp2. EXACT: a polynomial near 0, where the quotient loses digits."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(x < 0, -t, t)
    if EXACT:
        y = x * x
        series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
        t = tl.where(y < 0.0625, x * series, t)
    return t
