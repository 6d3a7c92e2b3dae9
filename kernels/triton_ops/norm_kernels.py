# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of rms_norm and layer_norm. N rows, D columns (WIDTH); everything inside is float32.

Prefixes: p_ pointer, s_ row stride in elements, i_ index, o_ offset, m_ mask, b_ block. Rows are
addressed from a 64-bit base per tile; offsets inside a tile fit 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(p_x, i_first, stride, o_row, o_col, m):
    """Rows i_first + o_row of x as float32; 0 outside the mask."""
    p_tile = p_x + i_first * stride + o_row[:, None] * stride + o_col[None, :]
    return tl.load(p_tile, mask=m, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _norm_forward_kernel(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_y,
    p_summed,
    p_stats,
    s_x,
    s_residual,
    rows,
    eps,
    weight_offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y = (s - mean) · rstd · (weight_offset + weight) + bias, with s = x + residual as stored.

    rstd = rsqrt(mean((s - mean)²) + eps), and mean is 0 unless CENTERED. One program per tile.
    x, residual (N, D) with row strides; y, summed (N, D) contiguous; stats (2 or 1, N): rstd, then
    mean, which is all that the backward pass needs beside s.
    """
    i_first = tl.program_id(0).to(tl.int64) * TILE_ROWS
    o_row = tl.arange(0, TILE_ROWS)
    o_col = tl.arange(0, BLOCK)
    m_row = o_row < rows - i_first
    m_col = o_col < WIDTH
    m = m_row[:, None] & m_col[None, :]
    o_out = i_first * WIDTH + (o_row[:, None] * WIDTH + o_col[None, :])

    b_s = _tile(p_x, i_first, s_x, o_row, o_col, m)
    if HAS_RESIDUAL:
        b_s += _tile(p_residual, i_first, s_residual, o_row, o_col, m)
        b_summed = b_s.to(p_summed.dtype.element_ty)
        tl.store(p_summed + o_out, b_summed, mask=m)
        b_s = b_summed.to(tl.float32)
    b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32) + weight_offset
    if CENTERED:
        mean = tl.sum(b_s, 1) / WIDTH
        b_s = tl.where(m_col[None, :], b_s - mean[:, None], 0.0)
        tl.store(p_stats + rows + i_first + o_row, mean, mask=m_row)
    rstd = tl.rsqrt(tl.sum(b_s * b_s, 1) / WIDTH + eps)
    tl.store(p_stats + i_first + o_row, rstd, mask=m_row)
    b_y = b_s * rstd[:, None] * b_weight[None, :]
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    p_dy,
    p_dsummed,
    p_s,
    p_weight,
    p_stats,
    p_dx,
    p_partial,
    s_dy,
    s_dsummed,
    s_s,
    rows,
    weight_offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_DSUMMED: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """With n = (s - mean) · rstd and g = dy · (weight_offset + weight), means over D:

        dx = rstd · (g - n · mean(g · n) - [CENTERED] mean(g)) + dsummed
        partial[program, :D] = Σ_rows dy · n,   partial[program, D:] = Σ_rows dy   (BIAS_GRAD)

    One pass over dy and s: each program walks over tiles and keeps its sums in registers.
    dy, dsummed, s (N, D) with row strides; dx (N, D) contiguous; partial (programs, D or 2 D).
    """
    i_program = tl.program_id(0)
    programs = tl.num_programs(0)
    o_row = tl.arange(0, TILE_ROWS)
    o_col = tl.arange(0, BLOCK)
    m_col = o_col < WIDTH
    b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32) + weight_offset
    b_dweight = tl.zeros([TILE_ROWS, BLOCK], tl.float32)
    b_dbias = tl.zeros([TILE_ROWS, BLOCK], tl.float32)
    for i_tile in tl.range(i_program, tl.cdiv(rows, TILE_ROWS), programs, num_stages=NUM_STAGES):
        i_first = tl.cast(i_tile, tl.int64) * TILE_ROWS
        m_row = o_row < rows - i_first
        m = m_row[:, None] & m_col[None, :]
        b_dy = _tile(p_dy, i_first, s_dy, o_row, o_col, m)
        b_n = _tile(p_s, i_first, s_s, o_row, o_col, m)
        rstd = tl.load(p_stats + i_first + o_row, mask=m_row, other=0.0)
        if CENTERED:
            mean = tl.load(p_stats + rows + i_first + o_row, mask=m_row, other=0.0)
            b_n -= mean[:, None]
        b_n *= rstd[:, None]
        # Outside the mask dy is 0, so g and every sum below are too.
        b_g = b_dy * b_weight[None, :]
        b_dx = b_g - b_n * (tl.sum(b_g * b_n, 1) / WIDTH)[:, None]
        if CENTERED:
            b_dx -= (tl.sum(b_g, 1) / WIDTH)[:, None]
        b_dx *= rstd[:, None]
        if HAS_DSUMMED:
            b_dx += _tile(p_dsummed, i_first, s_dsummed, o_row, o_col, m)
        o_out = i_first * WIDTH + (o_row[:, None] * WIDTH + o_col[None, :])
        tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=m)
        if WEIGHT_GRAD:
            b_dweight += b_dy * b_n
        if BIAS_GRAD:
            b_dbias += b_dy
    p_partial += i_program.to(tl.int64) * (2 * WIDTH if BIAS_GRAD else WIDTH)
    if WEIGHT_GRAD:
        tl.store(p_partial + o_col, tl.sum(b_dweight, 0), mask=m_col)
    if BIAS_GRAD:
        tl.store(p_partial + WIDTH + o_col, tl.sum(b_dbias, 0), mask=m_col)
