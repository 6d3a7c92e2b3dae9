"""The backward pass of attention: three kernels without atomics, the same bits every time.

With Δ_i = Σ_d dout_i · out_i - dlse_i and p[i, j] = exp(s[i, j] - lse_i) computed again,

    ds = p ∘ (dout vᵀ - Δ),  dv = pᵀ dout,  dk = scale · dsᵀ q,  dq = scale · ds k
    dbias_j = Σ_i ds[i, j],  dsink = - Σ_i exp(sink - lse_i) Δ_i

and ds multiplied by 1 - tanh² under a cap. One kernel walks the queries for each tile of keys (dk,
dv, dbias, summed over the query heads of a key head), one the keys for each tile of queries (dq).
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    LOG2E,
    block_range,
    load_rows,
    locate,
    masked_block,
    query_range,
    row_offsets,
    score_factor,
    stat_offsets,
    store_rows,
    tanh,
    visible,
)


@triton.jit(do_not_specialize=["length", "heads"])
def _attention_delta_kernel(
    out, dout, lse, dlse, sinks, stats, dsinks,
    s_ob, s_ol, s_oh, s_db, s_dl, s_dh, length, heads, n_stats,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """stats[0] = lse, +inf where a row sees nothing; stats[1] = Δ = Σ dout · out - dlse · log2(e).

    out, dout (B, L, heads, WIDTH); lse in base 2 and its gradient dlse (B, heads, L) float32; stats
    (2, B, heads, L) float32, n_stats apart; dsinks (tiles · B, heads) float32: - Σ_i exp(sink -
    lse_i) Δ_i of a tile's rows. Grid (tiles, heads, B).
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_row = tl.program_id(0) * BLOCK_M
    o_row = tl.arange(0, BLOCK_M)
    m_row = o_row < length - i_row
    p_out = out + i_batch * s_ob + i_row.to(tl.int64) * s_ol + i_head * s_oh
    p_dout = dout + i_batch * s_db + i_row.to(tl.int64) * s_dl + i_head * s_dh
    b_out = load_rows(p_out, o_row * s_ol, m_row, WIDTH, BLOCK_D, True).to(tl.float32)
    b_dout = load_rows(p_dout, o_row * s_dl, m_row, WIDTH, BLOCK_D, True).to(tl.float32)
    delta = tl.sum(b_out * b_dout, 1)
    o_stat = (i_batch * heads + i_head) * length + i_row + o_row
    if HAS_DLSE:
        delta -= tl.load(dlse + o_stat, mask=m_row, other=0.0) * LOG2E
    b_lse = tl.load(lse + o_stat, mask=m_row, other=float("inf"))
    seen = b_lse > float("-inf")
    tl.store(stats + o_stat, tl.where(seen, b_lse, float("inf")), mask=m_row)
    tl.store(stats + n_stats + o_stat, delta, mask=m_row)
    if HAS_SINKS:
        sink = tl.load(sinks + i_head).to(tl.float32)
        weight = tl.where(seen, tl.exp2(sink * LOG2E - b_lse), 0.0)
        i_partial = i_batch * tl.num_programs(0) + tl.program_id(0)
        tl.store(dsinks + i_partial * heads + i_head, -tl.sum(weight * delta, 0))


@triton.jit(do_not_specialize=["len_q", "len_k", "heads", "n_tiles", "section", "left", "right"])
def _attention_backward_keys_kernel(
    q, q1, k, k1, v, dout, stats, bias, dk, dk1, dv, dbias, schedule,
    s_qb, s_ql, s_qh, s_q1b, s_q1l, s_q1h,
    s_kb, s_kl, s_kh, s_k1b, s_k1l, s_k1h,
    s_vb, s_vl, s_vh, s_db, s_dl, s_dh,
    s_dkb, s_dkl, s_dkh, s_dk1b, s_dk1l, s_dk1h, s_dvb, s_dvl, s_dvh,
    s_bias_b, s_bias_h, s_stat, s_dbias, n_stats,
    len_q, len_k, heads, n_tiles, section, left, right, scale, cap,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_V0: tl.constexpr, WIDTH_V1: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BIAS_GRAD: tl.constexpr,
    K_GRAD: tl.constexpr, V_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = pᵀ dout, dk = scale · dsᵀ q and dbias = Σ_i ds for BLOCK_N keys of a key head.

    Scores are computed transposed, keys by queries, so that pᵀ and dsᵀ are left operands and stay
    in registers. Wide heads take two launches, K_GRAD (with dbias) and V_GRAD: one accumulator
    each. Shapes as in the forward kernel; stats from the delta kernel; dk (B, Lk, heads, WIDTH_0),
    dk1, dv alike, any strides; dbias (B, heads, s_dbias) float32.
    """
    i_batch, i_head, tile, start_q, start_k, len_q, len_k = locate(
        schedule, len_q, len_k, heads, n_tiles, section, VARLEN, False
    )
    i_batch = i_batch.to(tl.int64)
    i_head = i_head.to(tl.int64)
    i_key = tile * BLOCK_N
    o_block = tl.arange(0, BLOCK_N)
    m_key = o_block < len_k - i_key
    i_first = start_k + i_key
    p_k = k + i_batch * s_kb + i_first * s_kl + i_head * s_kh
    p_v = v + i_batch * s_vb + i_first * s_vl + i_head * s_vh
    b_k = load_rows(p_k, o_block * s_kl, m_key, WIDTH_0, D0, True)
    b_v = load_rows(p_v, o_block * s_vl, m_key, WIDTH_V0, V0, True)
    acc_k = tl.zeros((BLOCK_N, D0), tl.float32)
    acc_v = tl.zeros((BLOCK_N, V0), tl.float32)
    b_k1, b_v1, acc_k1, acc_v1 = b_k, b_v, acc_k, acc_v
    if D1 > 0:
        p_k1 = k1 + i_batch * s_k1b + i_first * s_k1l + i_head * s_k1h
        b_k1 = load_rows(p_k1, o_block * s_k1l, m_key, WIDTH_1, D1, True)
        acc_k1 = tl.zeros((BLOCK_N, D1), tl.float32)
    if V1 > 0:
        b_v1 = load_rows(p_v + WIDTH_V0, o_block * s_vl, m_key, WIDTH_V1, V1, True)
        acc_v1 = tl.zeros((BLOCK_N, V1), tl.float32)
    b_bias = tl.zeros((BLOCK_N,), tl.float32)
    sum_bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        p_bias = bias + i_batch * s_bias_b + i_head * s_bias_h + i_first
        b_bias = tl.load(p_bias + o_block, mask=m_key, other=float("-inf")) * LOG2E

    p_q = q + i_batch * s_qb + start_q * s_ql + i_head * GROUP * s_qh
    p_q1 = q1 + i_batch * s_q1b + start_q * s_q1l + i_head * GROUP * s_q1h
    p_dout = dout + i_batch * s_db + start_q * s_dl + i_head * GROUP * s_dh
    p_stat = stats + (i_batch * heads + i_head) * GROUP * s_stat + start_q
    low, high, full_low, full_high = query_range(
        i_key, i_key + BLOCK_N - 1, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT
    )
    first, first_full, n_full, n_masked = block_range(
        low * GROUP, high * GROUP, full_low * GROUP, full_high * GROUP, BLOCK_M
    )
    for i in tl.range(0, n_full):
        acc_k, acc_k1, acc_v, acc_v1, sum_bias = _attend_transposed(
            acc_k, acc_k1, acc_v, acc_v1, sum_bias, b_k, b_k1, b_v, b_v1, b_bias,
            p_q, p_q1, p_dout, p_stat, s_ql, s_qh, s_q1l, s_q1h, s_dl, s_dh, s_stat, n_stats,
            i_key + o_block, (first_full + i) * BLOCK_M, len_q, len_k, left, right, scale, cap,
            WIDTH_0, WIDTH_1, WIDTH_V0, WIDTH_V1, D0, D1, V0, V1, GROUP, HAS_LEFT, HAS_RIGHT,
            HAS_BIAS, HAS_CAP, BIAS_GRAD, K_GRAD, V_GRAD, BLOCK_M, PRECISION, False,
        )  # fmt: skip
    for i in tl.range(0, n_masked):
        block = masked_block(i, first, first_full, n_full)
        acc_k, acc_k1, acc_v, acc_v1, sum_bias = _attend_transposed(
            acc_k, acc_k1, acc_v, acc_v1, sum_bias, b_k, b_k1, b_v, b_v1, b_bias,
            p_q, p_q1, p_dout, p_stat, s_ql, s_qh, s_q1l, s_q1h, s_dl, s_dh, s_stat, n_stats,
            i_key + o_block, block * BLOCK_M, len_q, len_k, left, right, scale, cap,
            WIDTH_0, WIDTH_1, WIDTH_V0, WIDTH_V1, D0, D1, V0, V1, GROUP, HAS_LEFT, HAS_RIGHT,
            HAS_BIAS, HAS_CAP, BIAS_GRAD, K_GRAD, V_GRAD, BLOCK_M, PRECISION, True,
        )  # fmt: skip

    if K_GRAD:
        p_dk = dk + i_batch * s_dkb + i_first * s_dkl + i_head * s_dkh
        store_rows(p_dk, o_block * s_dkl, m_key, acc_k * scale, WIDTH_0, D0)
        if D1 > 0:
            p_dk1 = dk1 + i_batch * s_dk1b + i_first * s_dk1l + i_head * s_dk1h
            store_rows(p_dk1, o_block * s_dk1l, m_key, acc_k1 * scale, WIDTH_1, D1)
    if V_GRAD:
        p_dv = dv + i_batch * s_dvb + i_first * s_dvl + i_head * s_dvh
        store_rows(p_dv, o_block * s_dvl, m_key, acc_v, WIDTH_V0, V0)
        if V1 > 0:
            store_rows(p_dv + WIDTH_V0, o_block * s_dvl, m_key, acc_v1, WIDTH_V1, V1)
    if BIAS_GRAD:
        p_dbias = dbias + (i_batch * heads + i_head) * s_dbias + i_first
        tl.store(p_dbias + o_block, sum_bias, mask=m_key)


@triton.jit
def _attend_transposed(
    acc_k, acc_k1, acc_v, acc_v1, sum_bias, b_k, b_k1, b_v, b_v1, b_bias,
    p_q, p_q1, p_dout, p_stat, s_ql, s_qh, s_q1l, s_q1h, s_dl, s_dh, s_stat, n_stats,
    key, i_row, len_q, len_k, left, right, scale, cap,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_V0: tl.constexpr, WIDTH_V1: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    GROUP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr, BIAS_GRAD: tl.constexpr, K_GRAD: tl.constexpr, V_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of query rows: acc_v += pᵀ dout, acc_k += dsᵀ q, sum_bias += Σ ds.

    Rows beyond the last have lse = +inf, hence p = 0. Keys beyond the last get sums of their own
    which are never stored.
    """
    o_row = i_row + tl.arange(0, BLOCK_M)
    m_row = o_row < len_q * GROUP
    i_query = (i_row // GROUP).to(tl.int64)
    o_q = row_offsets(o_row, i_row, s_ql, s_qh, GROUP)
    b_q = load_rows(p_q + i_query * s_ql, o_q, m_row, WIDTH_0, D0, MASKED)
    s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    b_q1 = b_q
    if D1 > 0:
        o_q1 = row_offsets(o_row, i_row, s_q1l, s_q1h, GROUP)
        b_q1 = load_rows(p_q1 + i_query * s_q1l, o_q1, m_row, WIDTH_1, D1, MASKED)
        s = tl.dot(b_k1, tl.trans(b_q1), s, input_precision=PRECISION)
    slope = 1.0
    factor = score_factor(scale)
    if HAS_CAP:
        t = tanh(s * (scale / cap), PRECISION == "ieee")
        s = t * (cap * LOG2E)
        slope = 1.0 - t * t
        factor = 1.0
    if HAS_BIAS:
        s = s * factor + b_bias[:, None]
        factor = 1.0
    if MASKED and (HAS_LEFT or HAS_RIGHT):
        position = o_row // GROUP + (len_k - len_q)
        m = visible(position[None, :], key[:, None], len_k, left, right, HAS_LEFT, HAS_RIGHT)
        s = tl.where(m, s, float("-inf"))
    p_row = p_stat + stat_offsets(o_row, s_stat, GROUP)
    if MASKED:
        b_lse = tl.load(p_row, mask=m_row, other=float("inf"))
        b_delta = tl.load(p_row + n_stats, mask=m_row, other=0.0)
    else:
        b_lse = tl.load(p_row)
        b_delta = tl.load(p_row + n_stats)
    p = tl.exp2(s * factor - b_lse[None, :])
    p_dout += i_query * s_dl
    o_dout = row_offsets(o_row, i_row, s_dl, s_dh, GROUP)
    b_dout = load_rows(p_dout, o_dout, m_row, WIDTH_V0, V0, MASKED)
    b_dout1 = b_dout
    if V1 > 0:
        b_dout1 = load_rows(p_dout + WIDTH_V0, o_dout, m_row, WIDTH_V1, V1, MASKED)
    if V_GRAD:
        acc_v = tl.dot(p.to(b_dout.dtype), b_dout, acc_v, input_precision=PRECISION)
        if V1 > 0:
            acc_v1 = tl.dot(p.to(b_dout.dtype), b_dout1, acc_v1, input_precision=PRECISION)
    if K_GRAD:
        dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        if V1 > 0:
            dp = tl.dot(b_v1, tl.trans(b_dout1), dp, input_precision=PRECISION)
        ds = p * (dp - b_delta[None, :])
        if BIAS_GRAD:
            sum_bias += tl.sum(ds, 1)
        if HAS_CAP:
            ds *= slope
        ds = ds.to(b_q.dtype)
        acc_k = tl.dot(ds, b_q, acc_k, input_precision=PRECISION)
        if D1 > 0:
            acc_k1 = tl.dot(ds, b_q1, acc_k1, input_precision=PRECISION)
    return acc_k, acc_k1, acc_v, acc_v1, sum_bias
