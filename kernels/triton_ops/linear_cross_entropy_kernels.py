"""Triton kernels of linear_cross_entropy: what happens to logits between the matrix products.

A tile of logits (rows, columns) is (R, V) or some columns of it, with a row stride that is a
multiple of 16 bytes. With raw the product x Wᵀ as stored,

    l = raw + bias,  l = softcap · tanh(l / softcap) where there is one,  lse = max + log(total)

with total = Σ exp(l - max), whose digits a logarithm in between would cost.

All arithmetic is float32. p_row arguments have one element per row.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import is_full, load_tile, store_tile, tile_of


@triton.jit
def _segment_statistics_kernel(
    p_logits, p_bias, p_partial, stride, n_rows, n_columns, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of each row's segment of BLOCK_C classes: max l, Σ exp(l - max), Σ l.

    partial (3, n_rows, segments); one tile of BLOCK_R rows per program.
    """
    tile = tile_of(tl.program_id(0), n_rows, n_columns, BLOCK_R, BLOCK_C)
    bias = _load_bias(p_bias, tile[1], tile[3], HAS_BIAS, BLOCK_C)
    if is_full(tile, BLOCK_R, BLOCK_C):
        logit = load_tile(p_logits, stride, tile, BLOCK_R, BLOCK_C, False)
    else:
        logit = load_tile(p_logits, stride, tile, BLOCK_R, BLOCK_C, True)
    logit, _ = _finished(logit + bias, softcap, HAS_SOFTCAP)
    left = tl.minimum(tile[3], BLOCK_C).to(tl.int32)
    inside = (tl.arange(0, BLOCK_C) < left)[None, :]
    top = tl.max(tl.where(inside, logit, float("-inf")), axis=1)
    # A segment of classes that a bias of -inf forbids adds nothing, where -inf - -inf is NaN.
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.where(inside, tl.exp(logit - base[:, None]), 0.0), axis=1)
    plain = tl.sum(tl.where(inside, logit, 0.0), axis=1)

    segments = (n_columns - 1) // BLOCK_C + 1
    o_row = tl.arange(0, BLOCK_R)
    p_out = p_partial + (tile[0] + o_row) * segments + tile[1] // BLOCK_C
    size = tl.cast(n_rows, tl.int64) * segments
    tl.store(p_out, top, mask=o_row < tile[2])
    tl.store(p_out + size, total, mask=o_row < tile[2])
    tl.store(p_out + 2 * size, plain, mask=o_row < tile[2])


@triton.jit
def _row_losses_kernel(
    p_logits, p_bias, p_partial, p_target, p_weight, p_loss, p_max, p_total,
    stride, n_rows, n_columns, segments, smoothing, z_loss, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """loss = weight · ((1 - s)(max - l_target) + s (max - mean l) + log(total) + z lse²) of each
    row, from the segments' statistics; 0 where the weight is 0.

    Differences to the largest logit come first: lse would round at its magnitude.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    segment = tl.arange(0, BLOCK_S)
    m_row = row < n_rows
    m = m_row[:, None] & (segment < segments)[None, :]
    p_in = p_partial + row[:, None] * segments + segment[None, :]
    size = tl.cast(n_rows, tl.int64) * segments
    tops = tl.load(p_in, mask=m, other=float("-inf"))
    totals = tl.load(p_in + size, mask=m, other=0.0)
    plain = tl.sum(tl.load(p_in + 2 * size, mask=m, other=0.0), axis=1)
    top = tl.where(m_row, tl.max(tops, axis=1), 0.0)
    total = tl.sum(totals * tl.exp(tops - top[:, None]), axis=1)
    log_total = tl.log(tl.where(m_row, total, 1.0))

    target = tl.load(p_target + row, mask=m_row, other=-1)
    known = (target >= 0) & (target < n_columns)
    picked = tl.load(p_logits + row * stride + target, mask=known, other=0.0).to(tl.float32)
    if HAS_BIAS:
        picked += tl.load(p_bias + target, mask=known, other=0.0).to(tl.float32)
    picked, _ = _finished(picked, softcap, HAS_SOFTCAP)
    # A target that is no class shows.
    picked = tl.where(known, picked, float("nan"))
    loss = (top - picked) * (1.0 - smoothing) + log_total
    loss += tl.where(smoothing != 0.0, (top - plain / n_columns) * smoothing, 0.0)
    lse = top + log_total
    loss += lse * lse * z_loss
    weight = tl.load(p_weight + row, mask=m_row, other=0.0)
    tl.store(p_loss + row, tl.where(weight == 0.0, 0.0, loss * weight), mask=m_row)
    tl.store(p_max + row, top, mask=m_row)
    tl.store(p_total + row, total, mask=m_row)


@triton.jit
def _logits_gradient_kernel(
    p_logits, p_bias, p_target, p_factor, p_max, p_total, p_partial,
    stride, n_rows, n_columns, first, classes, walk, smoothing, z_loss, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BIAS_GRAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Logits of classes ``first`` to ``first + n_columns`` become their gradients, in place:

        factor · ((1 + 2 z lse) exp(l - max) / total - (1 - s) [v = target] - s / classes) · dl/draw

    and 0 where the factor is 0. p_bias begins at class ``first``. A program walks down ``walk``
    rows of BLOCK_C classes; partial (ranges, n_columns) float32 is the sum over them (BIAS_GRAD).
    """
    blocks = (n_columns - 1) // BLOCK_C + 1
    i_range = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C
    o_column = tl.arange(0, BLOCK_C)
    bias = _load_bias(p_bias, column, n_columns - column, HAS_BIAS, BLOCK_C)
    b_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, walk, BLOCK_R):
        i_row = i_range * walk + start
        tile = (i_row, column, n_rows - i_row, n_columns - column)
        row = i_row + tl.arange(0, BLOCK_R)
        m_row = row < n_rows
        target = tl.load(p_target + row, mask=m_row, other=-1)
        factor = tl.load(p_factor + row, mask=m_row, other=0.0)
        top = tl.load(p_max + row, mask=m_row, other=0.0)
        total = tl.load(p_total + row, mask=m_row, other=1.0)
        full = is_full(tile, BLOCK_R, BLOCK_C)
        if full:
            logit = load_tile(p_logits, stride, tile, BLOCK_R, BLOCK_C, False)
        else:
            logit = load_tile(p_logits, stride, tile, BLOCK_R, BLOCK_C, True)
        logit, slope = _finished(logit + bias, softcap, HAS_SOFTCAP)
        pull = ((top + tl.log(total)) * (2.0 * z_loss) + 1.0) / total
        g = tl.exp(logit - top[:, None]) * pull[:, None] - smoothing / classes
        hit = (target - first - column).to(tl.int32)[:, None] == o_column[None, :]
        g = tl.where(hit, g - (1.0 - smoothing), g)
        if HAS_SOFTCAP:
            g *= slope
        g = tl.where((factor != 0.0)[:, None], g * factor[:, None], 0.0)
        if full:
            store_tile(p_logits, stride, tile, g, BLOCK_R, BLOCK_C, False)
        else:
            store_tile(p_logits, stride, tile, g, BLOCK_R, BLOCK_C, True)
        if BIAS_GRAD:
            b_sum += g
    if BIAS_GRAD:
        p_out = p_partial + i_range * n_columns + column + o_column
        tl.store(p_out, tl.sum(b_sum, axis=0), mask=o_column < n_columns - column)


@triton.jit
def _scale_kernel(p_x, p_factor, n_elements, BLOCK: tl.constexpr):
    """x ← factor · x, flat and in place; nothing is read or written where the factor is 1."""
    factor = tl.load(p_factor)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0) * BLOCK
        for start in range(first, n_elements, step):
            offset = start + tl.arange(0, BLOCK)
            inside = offset < n_elements
            x = tl.load(p_x + offset, mask=inside, other=0.0).to(tl.float32)
            tl.store(p_x + offset, (x * factor).to(p_x.dtype.element_ty), mask=inside)


@triton.jit
def _load_bias(p_bias, column, left, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr):
    if HAS_BIAS:
        o_column = tl.arange(0, BLOCK_C)
        bias = tl.load(p_bias + column + o_column, mask=o_column < left, other=0.0)
        return bias.to(tl.float32)[None, :]
    else:
        return tl.zeros((1, BLOCK_C), tl.float32)


@triton.jit
def _finished(logit, softcap, HAS_SOFTCAP: tl.constexpr):
    """(l, 1), or (softcap · tanh(l / softcap), its derivative) without forming 1 - tanh².

    Near 0 tanh is its series, elsewhere (1 - e) / (1 + e) with e = exp(-2 |u|), which would cancel.
    """
    if HAS_SOFTCAP:
        u = logit / softcap
        size = tl.abs(u)
        e = tl.exp(size * -2.0)
        far = (1.0 - e) / (1.0 + e)
        s = u * u
        tail = s * (s * (s * 0.021869488536155203 - 0.05396825396825397) + 0.13333333333333333)
        near = size + size * s * (tail - 0.3333333333333333)
        t = tl.where(size < 0.25, near, far)
        return tl.where(u < 0, -t, t) * softcap, e * 4.0 / ((1.0 + e) * (1.0 + e))
    else:
        return logit, 1.0
