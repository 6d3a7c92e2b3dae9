"""The forward pass of attention: one pass over the keys with a running maximum and sum."""

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
def _attention_forward_kernel(
    q, q1, k, k1, v, out, lse, bias, sinks, schedule,
    s_qb, s_ql, s_qh, s_q1b, s_q1l, s_q1h,
    s_kb, s_kl, s_kh, s_k1b, s_k1l, s_k1h,
    s_vb, s_vl, s_vh, s_bias_b, s_bias_h, s_lse,
    len_q, len_k, heads, n_tiles, section, left, right, scale, cap,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_V0: tl.constexpr, WIDTH_V1: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_j exp(s[i, j] - lse_i) v_j,  lse_i = log(exp(sink) + Σ_j exp(s[i, j])).

    s = scale · (q · k + q1 · k1) [capped] + bias over the visible keys. One program per tile of
    BLOCK_M rows of a key head. q (B, Lq, heads · GROUP, WIDTH_0), q1 the same with WIDTH_1; k, k1
    (B, Lk, heads, ·); v (B, Lk, heads, WIDTH_V0 + WIDTH_V1); out (B, Lq, heads · GROUP, WIDTH_V)
    contiguous; lse (B, heads · GROUP, s_lse) float32, in base 2; bias (B, heads or 1, Lk), sinks
    (heads · GROUP,). Packed tensors are a batch of one. The backward pass needs out and lse.
    """
    i_batch, i_head, tile, start_q, start_k, len_q, len_k = locate(
        schedule, len_q, len_k, heads, n_tiles, section, VARLEN, HAS_RIGHT
    )
    i_row = tile * BLOCK_M
    o_row = i_row + tl.arange(0, BLOCK_M)
    m_row = o_row < len_q * GROUP
    i_query = start_q + i_row // GROUP
    i_batch = i_batch.to(tl.int64)
    i_head = i_head.to(tl.int64)
    p_q = q + i_batch * s_qb + i_query * s_ql + i_head * GROUP * s_qh
    b_q = load_rows(p_q, row_offsets(o_row, i_row, s_ql, s_qh, GROUP), m_row, WIDTH_0, D0, True)
    b_q1 = b_q
    if D1 > 0:
        p_q1 = q1 + i_batch * s_q1b + i_query * s_q1l + i_head * GROUP * s_q1h
        o_q1 = row_offsets(o_row, i_row, s_q1l, s_q1h, GROUP)
        b_q1 = load_rows(p_q1, o_q1, m_row, WIDTH_1, D1, True)
    p_k = k + i_batch * s_kb + start_k * s_kl + i_head * s_kh
    p_k1 = k1 + i_batch * s_k1b + start_k * s_k1l + i_head * s_k1h
    p_v = v + i_batch * s_vb + start_k * s_vl + i_head * s_vh
    p_bias = bias + i_batch * s_bias_b + i_head * s_bias_h + start_k

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SINKS:
        maximum = tl.load(sinks + i_head * GROUP + o_row % GROUP).to(tl.float32) * LOG2E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    acc = tl.zeros((BLOCK_M, V0), tl.float32)
    acc1 = acc
    if V1 > 0:
        acc1 = tl.zeros((BLOCK_M, V1), tl.float32)

    i_last = tl.minimum((i_row + BLOCK_M - 1) // GROUP, len_q - 1)
    low, high, full_low, full_high = key_range(
        i_row // GROUP, i_last, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT
    )
    first, first_full, n_full, n_masked = block_range(low, high, full_low, full_high, BLOCK_N)
    position = o_row // GROUP + (len_k - len_q)
    for i in tl.range(0, n_full):
        acc, acc1, maximum, total = _attend(
            acc, acc1, maximum, total, b_q, b_q1, p_k, p_k1, p_v, p_bias, s_kl, s_k1l, s_vl,
            position, (first_full + i) * BLOCK_N, len_k, left, right, scale, cap,
            WIDTH_0, WIDTH_1, WIDTH_V0, WIDTH_V1, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_BIAS,
            HAS_CAP, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    for i in tl.range(0, n_masked):
        block = masked_block(i, first, first_full, n_full)
        acc, acc1, maximum, total = _attend(
            acc, acc1, maximum, total, b_q, b_q1, p_k, p_k1, p_v, p_bias, s_kl, s_k1l, s_vl,
            position, block * BLOCK_N, len_k, left, right, scale, cap,
            WIDTH_0, WIDTH_1, WIDTH_V0, WIDTH_V1, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_BIAS,
            HAS_CAP, BLOCK_N, PRECISION, True,
        )  # fmt: skip

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    b_lse = tl.where(seen, maximum + tl.log2(total), float("-inf"))
    p_lse = lse + (i_batch * heads + i_head) * GROUP * s_lse + start_q
    tl.store(p_lse + stat_offsets(o_row, s_lse, GROUP), b_lse, mask=m_row)
    inverse = 1.0 / total
    WIDTH_V: tl.constexpr = WIDTH_V0 + WIDTH_V1
    p_out = out + i_batch * s_lse * heads * GROUP * WIDTH_V
    p_out += (i_query * heads + i_head) * GROUP * WIDTH_V
    o_out = row_offsets(o_row, i_row, heads * GROUP * WIDTH_V, WIDTH_V, GROUP)
    store_rows(p_out, o_out, m_row, acc * inverse[:, None], WIDTH_V0, V0)
    if V1 > 0:
        store_rows(p_out + WIDTH_V0, o_out, m_row, acc1 * inverse[:, None], WIDTH_V1, V1)


@triton.jit
def _attend(
    acc, acc1, maximum, total, b_q, b_q1, p_k, p_k1, p_v, p_bias, s_kl, s_k1l, s_vl,
    position, i_key, len_k, left, right, scale, cap,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_V0: tl.constexpr, WIDTH_V1: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: m' = max(m, s), l' = l 2^(m - m') + Σ p, acc' = acc 2^(m - m') + p v."""
    o_block = tl.arange(0, BLOCK_N)
    m_key = o_block < len_k - i_key
    i_key64 = i_key.to(tl.int64)
    b_k = load_rows(p_k + i_key64 * s_kl, o_block * s_kl, m_key, WIDTH_0, D0, MASKED)
    s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if D1 > 0:
        b_k1 = load_rows(p_k1 + i_key64 * s_k1l, o_block * s_k1l, m_key, WIDTH_1, D1, MASKED)
        s = tl.dot(b_q1, tl.trans(b_k1), s, input_precision=PRECISION)
    factor = score_factor(scale)
    if HAS_CAP:
        s = tanh(s * (scale / cap), PRECISION == "ieee") * (cap * LOG2E)
        factor = 1.0
    if HAS_BIAS:
        b_bias = tl.load(p_bias + i_key64 + o_block, mask=m_key, other=0.0)
        s = s * factor + (b_bias * LOG2E)[None, :]
        factor = 1.0
    if MASKED:
        m = visible(position[:, None], (i_key + o_block)[None, :], len_k, left, right,
                    HAS_LEFT, HAS_RIGHT)  # fmt: skip
        s = tl.where(m, s, float("-inf"))
    raised = tl.maximum(maximum, tl.max(s, 1) * factor)
    base = raised
    if MASKED or HAS_BIAS:
        # A row that has seen no key yet: -inf - -inf is not a number.
        base = tl.where(raised == float("-inf"), 0.0, raised)
    p = tl.exp2(s * factor - base[:, None])
    decay = tl.exp2(maximum - base)
    total = total * decay + tl.sum(p, 1)
    b_v = load_rows(p_v + i_key64 * s_vl, o_block * s_vl, m_key, WIDTH_V0, V0, MASKED)
    p = p.to(b_v.dtype)
    acc = tl.dot(p, b_v, acc * decay[:, None], input_precision=PRECISION)
    if V1 > 0:
        p_v1 = p_v + i_key64 * s_vl + WIDTH_V0
        b_v1 = load_rows(p_v1, o_block * s_vl, m_key, WIDTH_V1, V1, MASKED)
        acc1 = tl.dot(p, b_v1, acc1 * decay[:, None], input_precision=PRECISION)
    return acc, acc1, raised, total
