"""Backward kernels of linear attention; formulas and prefixes as in the forward ones.

With g_i = dout_i / d_i and h_i = -dout_i · out_i / d_i, the gradient of [n_i, d_i]:

    R = Σ_i φ(q_i) g_iᵀ,  r = Σ_i φ(q_i) h_i          over the rows after a chunk of keys
    b_ij = g_i · v_j + h_i                            the gradient of a_ij inside the chunk
    dφ(q_i) = S g_i + z h_i + Σ_j b_ij φ(k_j)
    dφ(k_j) = R v_j + r + Σ_i b_ij φ(q_i),   dv_j = Rᵀ φ(k_j) + Σ_i a_ij g_i
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .linear_attention_forward import (
    key_features,
    load_features,
    load_rows,
    load_state,
    load_weights,
    product,
    query_features,
    store_rows,
)


@triton.jit
def _incoming(
    p_dout, p_out, p_norm, i_row, i_head, s_dout, s_douth, n_heads, tokens, count,
    HALF: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """g (BLOCK_L, BLOCK_V), as products take it, and h (BLOCK_L,) of a query head; 0 where d is."""
    o_row = tl.arange(0, BLOCK_L)
    p_norm += i_head.to(tl.int64) * tokens + i_row
    b_norm = tl.load(p_norm + o_row, mask=o_row < count, other=0.0)
    inverse = tl.where(b_norm == 0, 0.0, 1 / tl.where(b_norm == 0, 1.0, b_norm))
    s_out = n_heads * WIDTH_V
    b_dout = load_rows(p_dout + i_row * s_dout + i_head * s_douth, s_dout, count, WIDTH_V,
                       BLOCK_L, BLOCK_V).to(tl.float32)  # fmt: skip
    b_out = load_rows(p_out + i_row * s_out + i_head * WIDTH_V, s_out, count, WIDTH_V, BLOCK_L,
                      BLOCK_V).to(tl.float32)  # fmt: skip
    b_g = b_dout * inverse[:, None]
    b_h = -tl.sum(b_dout * b_out, 1) * inverse
    if HALF:
        b_g = b_g.to(tl.bfloat16)
    return b_g, b_h


@triton.jit
def _row_tops(p_row_top, i_row, i_head, tokens, count, EXPONENT: tl.constexpr,
              BLOCK_L: tl.constexpr):  # fmt: skip
    o_row = tl.arange(0, BLOCK_L)
    if EXPONENT:
        p_row_top += i_head.to(tl.int64) * tokens + i_row
        return tl.load(p_row_top + o_row, mask=o_row < count, other=float("inf"))
    else:
        return tl.zeros((BLOCK_L,), tl.float32)


@triton.jit
def _input_gradient(
    p_x, s_x, p_dx, s_dx, count, i_feature, b_dphi, b_phi, b_factor,
    MAP: tl.constexpr, FEATURES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Stores the features' columns of dx of the maps that work element by element."""
    o_row = tl.arange(0, BLOCK_L)[:, None]
    o_feature = i_feature + tl.arange(0, BLOCK_F)[None, :]
    m = (o_row < count) & (o_feature < FEATURES)
    if MAP == "exp":
        b_dx = b_dphi * b_phi
    else:
        b_x = tl.load(p_x + o_row * s_x + o_feature, mask=m, other=0.0).to(tl.float32)
        slope = tl.where(b_x > 0, 1.0, 0.0)
        if MAP == "elu":
            slope = tl.exp(tl.minimum(b_x, 0.0))
        b_dx = b_dphi * b_factor[:, None] * slope
    tl.store(p_dx + o_row * s_dx + o_feature, b_dx.to(p_dx.dtype.element_ty), mask=m)


@triton.jit
def _favor_gradient(
    p_x, s_x, p_dx, s_dx, count, b_dx, b_total, root,
    WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = root · Σ_f du_f w_f - root² x Σ_f du_f, for the sums over features dx and total."""
    b_x = load_rows(p_x, s_x, count, WIDTH, BLOCK_L, BLOCK_D).to(tl.float32)
    b_dx = root * b_dx - (root * root) * b_x * b_total[:, None]
    store_rows(p_dx, s_dx, count, b_dx, WIDTH, BLOCK_L, BLOCK_D)


@triton.jit(do_not_specialize=["heads", "tokens"])
def _linear_query_states_kernel(
    p_q, p_w, p_tops, p_dout, p_out, p_norm, p_row_top, p_state, p_sums, p_table,
    s_q, s_qh, s_dout, s_douth, heads, tokens, root,
    CAUSAL: tl.constexpr, MAP: tl.constexpr, EXPONENT: tl.constexpr, HALF: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """R and r of one chunk of queries, all heads of the group: state (chunks, heads, FEATURES,
    WIDTH_V) and sums (chunks, heads, FEATURES) float32. One program per chunk, key head and block
    of features."""
    n_blocks = (FEATURES + BLOCK_F - 1) // BLOCK_F
    i_chunk = (tl.program_id(0) // (heads * n_blocks)).to(tl.int64)
    i_head = (tl.program_id(0) // n_blocks) % heads
    i_feature = tl.program_id(0) % n_blocks * BLOCK_F
    document = tl.load(p_table + i_chunk * 3).to(tl.int64)
    if document < 0:
        return
    start = tl.load(p_table + i_chunk * 3 + 1).to(tl.int64)
    count = tl.load(p_table + i_chunk * 3 + 2)
    p_tops += ((i_chunk if CAUSAL else document) * heads + i_head) * FEATURES
    b_state = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    b_sums = tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, GROUP):
        i_query = i_head * GROUP + i
        b_g, b_h = _incoming(
            p_dout, p_out, p_norm, start, i_query, s_dout, s_douth, heads * GROUP, tokens, count,
            HALF, WIDTH_V, BLOCK_L, BLOCK_V,
        )  # fmt: skip
        b_row_top = _row_tops(p_row_top, start, i_query, tokens, count, EXPONENT, BLOCK_L)
        b_phi = query_features(
            p_q + start * s_q + i_query * s_qh, s_q, count, p_w, p_tops, b_row_top, i_feature,
            root, MAP, EXPONENT, WIDTH, FEATURES, BLOCK_L, BLOCK_D, BLOCK_F, PRECISION, SPLIT,
        )  # fmt: skip
        b_state += product(tl.trans(b_phi), b_g, HALF, PRECISION)
        b_sums += tl.sum(b_phi * b_h[:, None], 0)
    i_state = (i_chunk * heads + i_head) * FEATURES
    o_feature = i_feature + tl.arange(0, BLOCK_F)
    o_column = tl.arange(0, BLOCK_V)[None, :]
    m_feature = o_feature < FEATURES
    tl.store(p_sums + i_state + o_feature, b_sums, mask=m_feature)
    m = m_feature[:, None] & (o_column < WIDTH_V)
    tl.store(p_state + (i_state + o_feature[:, None]) * WIDTH_V + o_column, b_state, mask=m)


@triton.jit(do_not_specialize=["heads", "tokens"])
def _linear_query_gradients_kernel(
    p_q, p_k, p_v, p_w, p_bias, p_state, p_sums, p_tops, p_dout, p_out, p_norm, p_row_top, p_dq,
    p_table,
    s_q, s_qh, s_k, s_kh, s_v, s_vh, s_bias, s_dout, s_douth, heads, tokens, root,
    CAUSAL: tl.constexpr, MAP: tl.constexpr, EXPONENT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dq (tokens, heads · GROUP, WIDTH) contiguous, through dφ(q) and the map. One program per
    chunk and query head; state, sums and tops as the forward pass used them."""
    i_chunk = (tl.program_id(0) // (heads * GROUP)).to(tl.int64)
    i_query = tl.program_id(0) % (heads * GROUP)
    i_head = i_query // GROUP
    document = tl.load(p_table + i_chunk * 3).to(tl.int64)
    if document < 0:
        return
    start = tl.load(p_table + i_chunk * 3 + 1).to(tl.int64)
    count = tl.load(p_table + i_chunk * 3 + 2)
    i_state = ((i_chunk if CAUSAL else document) * heads + i_head) * FEATURES
    p_q += start * s_q + i_query * s_qh
    p_k += start * s_k + i_head * s_kh
    p_bias += i_head * s_bias + start
    s_dq = heads * GROUP * WIDTH
    p_dq += start * s_dq + i_query * WIDTH
    o_row = tl.arange(0, BLOCK_L)
    b_g, b_h = _incoming(p_dout, p_out, p_norm, start, i_query, s_dout, s_douth, heads * GROUP,
                         tokens, count, HALF, WIDTH_V, BLOCK_L, BLOCK_V)  # fmt: skip
    b_row_top = _row_tops(p_row_top, start, i_query, tokens, count, EXPONENT, BLOCK_L)
    b_slope = b_row_top
    if CAUSAL:
        b_v = load_rows(p_v + start * s_v + i_head * s_vh, s_v, count, WIDTH_V, BLOCK_L, BLOCK_V)
        b_slope = product(b_g, tl.trans(b_v), HALF, PRECISION) + b_h[:, None]
        b_slope = tl.where(o_row[:, None] >= o_row[None, :], b_slope, 0.0)
        if HALF:
            b_slope = b_slope.to(tl.bfloat16)
    b_dx = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    b_total = tl.zeros((BLOCK_L,), tl.float32)
    for i_feature in tl.range(0, FEATURES, BLOCK_F, disable_licm=True):
        b_state = load_state(p_state + i_state * WIDTH_V, i_feature, FEATURES, WIDTH_V, BLOCK_F,
                             BLOCK_V)  # fmt: skip
        b_sums = load_features(p_sums + i_state, i_feature, FEATURES, BLOCK_F, 0.0)
        # Read again: kept over the loop it would take the registers of an accumulator.
        b_g, b_h = _incoming(p_dout, p_out, p_norm, start, i_query, s_dout, s_douth, heads * GROUP,
                             tokens, count, HALF, WIDTH_V, BLOCK_L, BLOCK_V)  # fmt: skip
        b_dphi = product(b_g, tl.trans(b_state), HALF, PRECISION)
        b_dphi += b_h[:, None] * b_sums[None, :]
        if CAUSAL:
            b_phi_k = key_features(
                p_k, s_k, count, p_w, p_bias, p_tops + i_state, i_feature, root, MAP, EXPONENT,
                HAS_BIAS, WIDTH, FEATURES, BLOCK_L, BLOCK_D, BLOCK_F, PRECISION, SPLIT,
            )  # fmt: skip
            b_dphi += product(b_slope, b_phi_k, HALF, PRECISION)
        b_phi = query_features(
            p_q, s_q, count, p_w, p_tops + i_state, b_row_top, i_feature, root, MAP, EXPONENT,
            WIDTH, FEATURES, BLOCK_L, BLOCK_D, BLOCK_F, PRECISION, SPLIT,
        )  # fmt: skip
        if MAP == "favor":
            b_du = b_dphi * b_phi
            b_w = load_weights(p_w, i_feature, WIDTH, FEATURES, BLOCK_F, BLOCK_D)
            b_dx += product(b_du, b_w, HALF, PRECISION)
            b_total += tl.sum(b_du, 1)
        else:
            _input_gradient(p_q, s_q, p_dq, s_dq, count, i_feature, b_dphi, b_phi,
                            b_total + 1.0, MAP, FEATURES, BLOCK_L, BLOCK_F)  # fmt: skip
    if MAP == "favor":
        _favor_gradient(p_q, s_q, p_dq, s_dq, count, b_dx, b_total, root, WIDTH, BLOCK_L, BLOCK_D)


@triton.jit(do_not_specialize=["heads", "tokens", "key_tokens"])
def _linear_key_gradients_kernel(
    p_q, p_k, p_v, p_w, p_bias, p_state, p_sums, p_tops, p_dout, p_out, p_norm, p_row_top,
    p_dk, p_dbias, p_table,
    s_q, s_qh, s_k, s_kh, s_v, s_vh, s_bias, s_dout, s_douth, heads, tokens, key_tokens, root,
    CAUSAL: tl.constexpr, MAP: tl.constexpr, EXPONENT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk (tokens, heads, WIDTH) contiguous and dbias (heads, tokens) float32, through dφ(k) and
    the map. One program per chunk and key head; state and sums are R and r of the rows after the
    chunk (of all rows unless CAUSAL), tops as in the forward pass."""
    i_chunk = (tl.program_id(0) // heads).to(tl.int64)
    i_head = tl.program_id(0) % heads
    document = tl.load(p_table + i_chunk * 3).to(tl.int64)
    if document < 0:
        return
    start = tl.load(p_table + i_chunk * 3 + 1).to(tl.int64)
    count = tl.load(p_table + i_chunk * 3 + 2)
    i_state = ((i_chunk if CAUSAL else document) * heads + i_head) * FEATURES
    p_k += start * s_k + i_head * s_kh
    p_v += start * s_v + i_head * s_vh
    p_bias += i_head * s_bias + start
    s_dk = heads * WIDTH
    p_dk += start * s_dk + i_head * WIDTH
    o_row = tl.arange(0, BLOCK_L)
    b_factor = tl.full((BLOCK_L,), 1.0, tl.float32)
    if HAS_BIAS:
        b_factor = tl.exp(tl.load(p_bias + o_row, mask=o_row < count, other=0.0))
    b_dx = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    b_total = tl.zeros((BLOCK_L,), tl.float32)
    for i_feature in tl.range(0, FEATURES, BLOCK_F, disable_licm=True):
        b_v = load_rows(p_v, s_v, count, WIDTH_V, BLOCK_L, BLOCK_V)
        b_state = load_state(p_state + i_state * WIDTH_V, i_feature, FEATURES, WIDTH_V, BLOCK_F,
                             BLOCK_V)  # fmt: skip
        b_sums = load_features(p_sums + i_state, i_feature, FEATURES, BLOCK_F, 0.0)
        b_dphi = product(b_v, tl.trans(b_state), HALF, PRECISION) + b_sums[None, :]
        if CAUSAL:
            for i in tl.range(0, GROUP, disable_licm=True):
                i_query = i_head * GROUP + i
                b_g, b_h = _incoming(
                    p_dout, p_out, p_norm, start, i_query, s_dout, s_douth, heads * GROUP,
                    tokens, count, HALF, WIDTH_V, BLOCK_L, BLOCK_V,
                )  # fmt: skip
                b_v = load_rows(p_v, s_v, count, WIDTH_V, BLOCK_L, BLOCK_V)
                # Keys down, queries across.
                b_slope = product(b_v, tl.trans(b_g), HALF, PRECISION) + b_h[None, :]
                b_slope = tl.where(o_row[:, None] <= o_row[None, :], b_slope, 0.0)
                b_row_top = _row_tops(p_row_top, start, i_query, tokens, count, EXPONENT, BLOCK_L)
                b_phi_q = query_features(
                    p_q + start * s_q + i_query * s_qh, s_q, count, p_w, p_tops + i_state,
                    b_row_top, i_feature, root, MAP, EXPONENT, WIDTH, FEATURES, BLOCK_L, BLOCK_D,
                    BLOCK_F, PRECISION, SPLIT,
                )  # fmt: skip
                b_dphi += product(b_slope, b_phi_q, HALF, PRECISION)
        b_phi = key_features(
            p_k, s_k, count, p_w, p_bias, p_tops + i_state, i_feature, root, MAP, EXPONENT,
            HAS_BIAS, WIDTH, FEATURES, BLOCK_L, BLOCK_D, BLOCK_F, PRECISION, SPLIT,
        )  # fmt: skip
        b_du = b_dphi * b_phi
        b_total += tl.sum(b_du, 1)
        if MAP == "favor":
            b_w = load_weights(p_w, i_feature, WIDTH, FEATURES, BLOCK_F, BLOCK_D)
            b_dx += product(b_du, b_w, HALF, PRECISION)
        else:
            _input_gradient(p_k, s_k, p_dk, s_dk, count, i_feature, b_dphi, b_phi, b_factor, MAP,
                            FEATURES, BLOCK_L, BLOCK_F)  # fmt: skip
    if MAP == "favor":
        _favor_gradient(p_k, s_k, p_dk, s_dk, count, b_dx, b_total, root, WIDTH, BLOCK_L, BLOCK_D)
    if HAS_BIAS:
        p_dbias += i_head.to(tl.int64) * key_tokens + start
        tl.store(p_dbias + o_row, b_total, mask=o_row < count)


@triton.jit(do_not_specialize=["heads", "tokens"])
def _linear_value_gradients_kernel(
    p_q, p_k, p_w, p_bias, p_state, p_tops, p_dout, p_out, p_norm, p_row_top, p_dv, p_table,
    s_q, s_qh, s_k, s_kh, s_bias, s_dout, s_douth, heads, tokens, root,
    CAUSAL: tl.constexpr, MAP: tl.constexpr, EXPONENT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dv_j = Rᵀ φ(k_j) + Σ_i a_ij g_i, (tokens, heads, WIDTH_V) contiguous. A launch of its own:
    the accumulators of dk and dv together do not fit the registers. One program per chunk and key
    head; state and tops as for dk."""
    i_chunk = (tl.program_id(0) // heads).to(tl.int64)
    i_head = tl.program_id(0) % heads
    document = tl.load(p_table + i_chunk * 3).to(tl.int64)
    if document < 0:
        return
    start = tl.load(p_table + i_chunk * 3 + 1).to(tl.int64)
    count = tl.load(p_table + i_chunk * 3 + 2)
    i_state = ((i_chunk if CAUSAL else document) * heads + i_head) * FEATURES
    p_k += start * s_k + i_head * s_kh
    p_bias += i_head * s_bias + start
    o_row = tl.arange(0, BLOCK_L)
    b_dv = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)
    for i_feature in tl.range(0, FEATURES, BLOCK_F, disable_licm=True):
        b_phi = key_features(
            p_k, s_k, count, p_w, p_bias, p_tops + i_state, i_feature, root, MAP, EXPONENT,
            HAS_BIAS, WIDTH, FEATURES, BLOCK_L, BLOCK_D, BLOCK_F, PRECISION, SPLIT,
        )  # fmt: skip
        b_state = load_state(p_state + i_state * WIDTH_V, i_feature, FEATURES, WIDTH_V, BLOCK_F,
                             BLOCK_V)  # fmt: skip
        b_dv += product(b_phi, b_state, HALF, PRECISION)
    if CAUSAL:
        for i in tl.range(0, GROUP, disable_licm=True):
            i_query = i_head * GROUP + i
            b_row_top = _row_tops(p_row_top, start, i_query, tokens, count, EXPONENT, BLOCK_L)
            b_scores = tl.zeros((BLOCK_L, BLOCK_L), tl.float32)
            for i_feature in tl.range(0, FEATURES, BLOCK_F, disable_licm=True):
                b_phi = key_features(
                    p_k, s_k, count, p_w, p_bias, p_tops + i_state, i_feature, root, MAP,
                    EXPONENT, HAS_BIAS, WIDTH, FEATURES, BLOCK_L, BLOCK_D, BLOCK_F, PRECISION,
                    SPLIT,
                )  # fmt: skip
                b_phi_q = query_features(
                    p_q + start * s_q + i_query * s_qh, s_q, count, p_w, p_tops + i_state,
                    b_row_top, i_feature, root, MAP, EXPONENT, WIDTH, FEATURES, BLOCK_L, BLOCK_D,
                    BLOCK_F, PRECISION, SPLIT,
                )  # fmt: skip
                b_scores += product(b_phi, tl.trans(b_phi_q), HALF, PRECISION)
            b_scores = tl.where(o_row[:, None] <= o_row[None, :], b_scores, 0.0)
            b_g, _ = _incoming(
                p_dout, p_out, p_norm, start, i_query, s_dout, s_douth, heads * GROUP,
                tokens, count, HALF, WIDTH_V, BLOCK_L, BLOCK_V,
            )  # fmt: skip
            b_dv += product(b_scores, b_g, HALF, PRECISION)
    s_dv = heads * WIDTH_V
    store_rows(p_dv + start * s_dv + i_head * WIDTH_V, s_dv, count, b_dv, WIDTH_V, BLOCK_L,
               BLOCK_V)  # fmt: skip
