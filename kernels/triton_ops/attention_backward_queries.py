"""The part of attention's backward pass that walks the keys: dq. See attention_backward.py."""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    LOG2E,
    block_range,
    key_range,
    load_rows,
    locate,
    masked_block,
    row_offsets,
    score_factor,
    stat_offsets,
    store_rows,
    tanh,
    visible,
)


@triton.jit(do_not_specialize=["len_q", "len_k", "heads", "n_tiles", "section", "left", "right"])
def _attention_backward_queries_kernel(
    q, q1, k, k1, v, dout, stats, bias, dq, dq1, schedule,
    s_qb, s_ql, s_qh, s_q1b, s_q1l, s_q1h,
    s_kb, s_kl, s_kh, s_k1b, s_k1l, s_k1h,
    s_vb, s_vl, s_vh, s_db, s_dl, s_dh,
    s_dqb, s_dql, s_dqh, s_dq1b, s_dq1l, s_dq1h,
    s_bias_b, s_bias_h, s_stat, n_stats,
    len_q, len_k, heads, n_tiles, section, left, right, scale, cap,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_V0: tl.constexpr, WIDTH_V1: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale · ds k with ds = p ∘ (dout vᵀ - Δ), for BLOCK_M query rows of a key head.

    Shapes as in the forward kernel; stats (2, B, heads · GROUP, s_stat) float32, n_stats apart:
    lse in base 2 and Δ; dq (B, Lq, heads · GROUP, WIDTH_0), dq1 alike, any strides.
    """
    i_batch, i_head, tile, start_q, start_k, len_q, len_k = locate(
        schedule, len_q, len_k, heads, n_tiles, section, VARLEN, HAS_RIGHT
    )
    i_batch = i_batch.to(tl.int64)
    i_head = i_head.to(tl.int64)
    i_row = tile * BLOCK_M
    o_row = i_row + tl.arange(0, BLOCK_M)
    m_row = o_row < len_q * GROUP
    i_query = start_q + i_row // GROUP
    p_q = q + i_batch * s_qb + i_query * s_ql + i_head * GROUP * s_qh
    b_q = load_rows(p_q, row_offsets(o_row, i_row, s_ql, s_qh, GROUP), m_row, WIDTH_0, D0, True)
    p_dout = dout + i_batch * s_db + i_query * s_dl + i_head * GROUP * s_dh
    o_dout = row_offsets(o_row, i_row, s_dl, s_dh, GROUP)
    b_dout = load_rows(p_dout, o_dout, m_row, WIDTH_V0, V0, True)
    acc = tl.zeros((BLOCK_M, D0), tl.float32)
    b_q1, b_dout1, acc1 = b_q, b_dout, acc
    if D1 > 0:
        p_q1 = q1 + i_batch * s_q1b + i_query * s_q1l + i_head * GROUP * s_q1h
        o_q1 = row_offsets(o_row, i_row, s_q1l, s_q1h, GROUP)
        b_q1 = load_rows(p_q1, o_q1, m_row, WIDTH_1, D1, True)
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    if V1 > 0:
        b_dout1 = load_rows(p_dout + WIDTH_V0, o_dout, m_row, WIDTH_V1, V1, True)
    p_row = stats + (i_batch * heads + i_head) * GROUP * s_stat + start_q
    p_row += stat_offsets(o_row, s_stat, GROUP)
    b_lse = tl.load(p_row, mask=m_row, other=float("inf"))
    b_delta = tl.load(p_row + n_stats, mask=m_row, other=0.0)
    p_k = k + i_batch * s_kb + start_k * s_kl + i_head * s_kh
    p_k1 = k1 + i_batch * s_k1b + start_k * s_k1l + i_head * s_k1h
    p_v = v + i_batch * s_vb + start_k * s_vl + i_head * s_vh
    p_bias = bias + i_batch * s_bias_b + i_head * s_bias_h + start_k

    i_last = tl.minimum((i_row + BLOCK_M - 1) // GROUP, len_q - 1)
    low, high, full_low, full_high = key_range(
        i_row // GROUP, i_last, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT
    )
    first, first_full, n_full, n_masked = block_range(low, high, full_low, full_high, BLOCK_N)
    position = o_row // GROUP + (len_k - len_q)
    for i in tl.range(0, n_full):
        acc, acc1 = _add_query_gradient(
            acc, acc1, b_q, b_q1, b_dout, b_dout1, b_lse, b_delta, p_k, p_k1, p_v, p_bias,
            s_kl, s_k1l, s_vl, position, (first_full + i) * BLOCK_N, len_k, left, right, scale, cap,
            WIDTH_0, WIDTH_1, WIDTH_V0, WIDTH_V1, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_BIAS,
            HAS_CAP, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    for i in tl.range(0, n_masked):
        block = masked_block(i, first, first_full, n_full)
        acc, acc1 = _add_query_gradient(
            acc, acc1, b_q, b_q1, b_dout, b_dout1, b_lse, b_delta, p_k, p_k1, p_v, p_bias,
            s_kl, s_k1l, s_vl, position, block * BLOCK_N, len_k, left, right, scale, cap,
            WIDTH_0, WIDTH_1, WIDTH_V0, WIDTH_V1, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_BIAS,
            HAS_CAP, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    p_dq = dq + i_batch * s_dqb + i_query * s_dql + i_head * GROUP * s_dqh
    o_dq = row_offsets(o_row, i_row, s_dql, s_dqh, GROUP)
    store_rows(p_dq, o_dq, m_row, acc * scale, WIDTH_0, D0)
    if D1 > 0:
        p_dq1 = dq1 + i_batch * s_dq1b + i_query * s_dq1l + i_head * GROUP * s_dq1h
        o_dq1 = row_offsets(o_row, i_row, s_dq1l, s_dq1h, GROUP)
        store_rows(p_dq1, o_dq1, m_row, acc1 * scale, WIDTH_1, D1)


@triton.jit
def _add_query_gradient(
    acc, acc1, b_q, b_q1, b_dout, b_dout1, b_lse, b_delta, p_k, p_k1, p_v, p_bias,
    s_kl, s_k1l, s_vl, position, i_key, len_k, left, right, scale, cap,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_V0: tl.constexpr, WIDTH_V1: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: acc += ds k, acc1 += ds k1."""
    o_block = tl.arange(0, BLOCK_N)
    m_key = o_block < len_k - i_key
    i_key64 = i_key.to(tl.int64)
    b_k = load_rows(p_k + i_key64 * s_kl, o_block * s_kl, m_key, WIDTH_0, D0, MASKED)
    s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_k1 = b_k
    if D1 > 0:
        b_k1 = load_rows(p_k1 + i_key64 * s_k1l, o_block * s_k1l, m_key, WIDTH_1, D1, MASKED)
        s = tl.dot(b_q1, tl.trans(b_k1), s, input_precision=PRECISION)
    p_v += i_key64 * s_vl
    b_v = load_rows(p_v, o_block * s_vl, m_key, WIDTH_V0, V0, MASKED)
    dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
    if V1 > 0:
        b_v1 = load_rows(p_v + WIDTH_V0, o_block * s_vl, m_key, WIDTH_V1, V1, MASKED)
        dp = tl.dot(b_dout1, tl.trans(b_v1), dp, input_precision=PRECISION)
    factor = score_factor(scale)
    slope = 1.0
    if HAS_CAP:
        t = tanh(s * (scale / cap), PRECISION == "ieee")
        s = t * (cap * LOG2E)
        slope = 1.0 - t * t
        factor = 1.0
    if HAS_BIAS:
        b_bias = tl.load(p_bias + i_key64 + o_block, mask=m_key, other=0.0)
        s = s * factor + (b_bias * LOG2E)[None, :]
        factor = 1.0
    if MASKED:
        m = visible(position[:, None], (i_key + o_block)[None, :], len_k, left, right,
                    HAS_LEFT, HAS_RIGHT)  # fmt: skip
        s = tl.where(m, s, float("-inf"))
    p = tl.exp2(s * factor - b_lse[:, None])
    ds = p * (dp - b_delta[:, None])
    if HAS_CAP:
        ds *= slope
    ds = ds.to(b_k.dtype)
    acc = tl.dot(ds, b_k, acc, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(ds, b_k1, acc1, input_precision=PRECISION)
    return acc, acc1
