"""Forward kernels of linear attention: states of chunks of keys, their scan, outputs.

A chunk is up to BLOCK_L tokens of one document; tensors are (tokens, heads, width). Feature maps
are computed in the kernels, BLOCK_F features at a time: u = log φ for "favor" and "exp" (EXPONENT),
φ itself for "elu" and "relu". State, its sums and every exponent are float32; products take bf16
operands for bf16 inputs, float32 ones otherwise.

Prefixes: p_ pointer, s_ stride in elements, i_ index, o_ offset, m_ mask, b_ block.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """a b in float32, of bfloat16 operands where HALF."""
    if HALF:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def load_rows(p_x, stride, count, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr,
              BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows (BLOCK_L, BLOCK_D) of x; 0 beyond ``count`` and WIDTH."""
    o_row, o_column = tl.arange(0, BLOCK_L)[:, None], tl.arange(0, BLOCK_D)[None, :]
    m = (o_row < count) & (o_column < WIDTH)
    return tl.load(p_x + o_row * stride + o_column, mask=m, other=0.0)


@triton.jit
def store_rows(p_x, stride, count, value, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    o_row, o_column = tl.arange(0, BLOCK_L)[:, None], tl.arange(0, BLOCK_D)[None, :]
    m = (o_row < count) & (o_column < WIDTH)
    tl.store(p_x + o_row * stride + o_column, value.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def load_state(p_state, i_feature, FEATURES: tl.constexpr, WIDTH_V: tl.constexpr,
               BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Features i_feature.. of a state (FEATURES, WIDTH_V); 0 beyond."""
    o_feature = i_feature + tl.arange(0, BLOCK_F)[:, None]
    o_column = tl.arange(0, BLOCK_V)[None, :]
    m = (o_feature < FEATURES) & (o_column < WIDTH_V)
    return tl.load(p_state + o_feature * WIDTH_V + o_column, mask=m, other=0.0)


@triton.jit
def load_features(p_x, i_feature, FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, other):
    """A vector over features i_feature.."""
    o_feature = i_feature + tl.arange(0, BLOCK_F)
    return tl.load(p_x + o_feature, mask=o_feature < FEATURES, other=other)


@triton.jit
def load_weights(p_w, i_feature, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
                 BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows i_feature.. of W (FEATURES, WIDTH)."""
    o_feature = i_feature + tl.arange(0, BLOCK_F)[:, None]
    o_column = tl.arange(0, BLOCK_D)[None, :]
    m = (o_feature < FEATURES) & (o_column < WIDTH)
    return tl.load(p_w + o_feature * WIDTH + o_column, mask=m, other=0.0)


@triton.jit
def map_rows(
    p_x, stride, count, p_w, i_feature, root,
    MAP: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """u or φ (BLOCK_L, BLOCK_F) of features i_feature..; u = -inf and φ = 0 beyond the edges."""
    o_row = tl.arange(0, BLOCK_L)[:, None]
    o_feature = i_feature + tl.arange(0, BLOCK_F)[None, :]
    m = (o_row < count) & (o_feature < FEATURES)
    if MAP == "favor":
        b_x = load_rows(p_x, stride, count, WIDTH, BLOCK_L, BLOCK_D)
        b_w = load_weights(p_w, i_feature, WIDTH, FEATURES, BLOCK_F, BLOCK_D)
        b_u = tl.dot(b_x, tl.trans(b_w), input_precision=PRECISION)
        if SPLIT:
            # The rest of W, in x's dtype too: an exponent needs more digits than one term has.
            p_rest = p_w + FEATURES * WIDTH
            b_w = load_weights(p_rest, i_feature, WIDTH, FEATURES, BLOCK_F, BLOCK_D)
            b_u = tl.dot(b_x, tl.trans(b_w), b_u)
        b_wide = b_x.to(tl.float32)
        b_u = b_u * root - 0.5 * root * root * tl.sum(b_wide * b_wide, 1)[:, None]
        return tl.where(m, b_u, float("-inf"))
    else:
        b_x = tl.load(p_x + o_row * stride + o_feature, mask=m, other=0.0).to(tl.float32)
        if MAP == "exp":
            return tl.where(m, b_x, float("-inf"))
        else:
            if MAP == "elu":
                b_x = tl.where(b_x > 0, b_x + 1, tl.exp(tl.minimum(b_x, 0.0)))
            else:
                b_x = tl.maximum(b_x, 0.0)
            return tl.where(m, b_x, 0.0)


@triton.jit
def key_features(
    p_k, s_k, count, p_w, p_bias, p_top, i_feature, root,
    MAP: tl.constexpr, EXPONENT: tl.constexpr, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """φ(k) exp(bias) (BLOCK_L, BLOCK_F), exponents relative to ``top``."""
    b_phi = map_rows(p_k, s_k, count, p_w, i_feature, root, MAP, WIDTH, FEATURES, BLOCK_L,
                     BLOCK_D, BLOCK_F, PRECISION, SPLIT)  # fmt: skip
    if HAS_BIAS:
        o_row = tl.arange(0, BLOCK_L)
        b_bias = tl.load(p_bias + o_row, mask=o_row < count, other=0.0)
        b_phi = b_phi + b_bias[:, None] if EXPONENT else b_phi * tl.exp(b_bias)[:, None]
    if EXPONENT:
        b_top = load_features(p_top, i_feature, FEATURES, BLOCK_F, float("-inf"))
        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_phi = tl.exp(b_phi - b_top[None, :])
    return b_phi


@triton.jit
def query_features(
    p_q, s_q, count, p_w, p_top, b_row_top, i_feature, root,
    MAP: tl.constexpr, EXPONENT: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """φ(q) (BLOCK_L, BLOCK_F): exp(u + top - row_top), at most 1, for the exponential maps."""
    b_phi = map_rows(p_q, s_q, count, p_w, i_feature, root, MAP, WIDTH, FEATURES, BLOCK_L,
                     BLOCK_D, BLOCK_F, PRECISION, SPLIT)  # fmt: skip
    if EXPONENT:
        b_top = load_features(p_top, i_feature, FEATURES, BLOCK_F, float("-inf"))
        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_phi = tl.exp(b_phi + b_top[None, :] - b_row_top[:, None])
    return b_phi


@triton.jit(do_not_specialize=["heads"])
def _linear_key_states_kernel(
    p_k, p_v, p_w, p_bias, p_state, p_sums, p_tops, p_table,
    s_k, s_kh, s_v, s_vh, s_bias, heads, root,
    MAP: tl.constexpr, EXPONENT: tl.constexpr, HAS_BIAS: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of one chunk of keys: top_f = max u(k)_f, S = Σ_j φ(k_j) v_jᵀ, z = Σ_j φ(k_j).

    φ = exp(u + bias - top). k (tokens, heads, WIDTH), v (tokens, heads, WIDTH_V), w (1 or 2
    terms, FEATURES, WIDTH), bias (heads or 1, tokens); state (chunks, heads, FEATURES, WIDTH_V),
    sums and tops (chunks, heads, FEATURES) float32. One program per chunk, head and block of
    features.
    """
    n_blocks = (FEATURES + BLOCK_F - 1) // BLOCK_F
    i_chunk = (tl.program_id(0) // (heads * n_blocks)).to(tl.int64)
    i_head = (tl.program_id(0) // n_blocks) % heads
    i_feature = tl.program_id(0) % n_blocks * BLOCK_F
    document = tl.load(p_table + i_chunk * 3)
    if document < 0:
        return
    start = tl.load(p_table + i_chunk * 3 + 1).to(tl.int64)
    count = tl.load(p_table + i_chunk * 3 + 2)
    o_row = tl.arange(0, BLOCK_L)
    o_feature = i_feature + tl.arange(0, BLOCK_F)
    m_feature = o_feature < FEATURES
    i_state = (i_chunk * heads + i_head) * FEATURES
    b_phi = map_rows(p_k + start * s_k + i_head * s_kh, s_k, count, p_w, i_feature, root, MAP,
                     WIDTH, FEATURES, BLOCK_L, BLOCK_D, BLOCK_F, PRECISION, SPLIT)  # fmt: skip
    if HAS_BIAS:
        p_bias += i_head * s_bias + start
        b_bias = tl.load(p_bias + o_row, mask=o_row < count, other=0.0)
        b_phi = b_phi + b_bias[:, None] if EXPONENT else b_phi * tl.exp(b_bias)[:, None]
    if EXPONENT:
        b_top = tl.max(b_phi, 0)
        tl.store(p_tops + i_state + o_feature, b_top, mask=m_feature)
        b_phi = tl.exp(b_phi - tl.where(b_top == float("-inf"), 0.0, b_top)[None, :])
    b_v = load_rows(p_v + start * s_v + i_head * s_vh, s_v, count, WIDTH_V, BLOCK_L, BLOCK_V)
    b_state = product(tl.trans(b_phi), b_v, HALF, PRECISION)
    tl.store(p_sums + i_state + o_feature, tl.sum(b_phi, 0), mask=m_feature)
    o_column = tl.arange(0, BLOCK_V)[None, :]
    m = m_feature[:, None] & (o_column < WIDTH_V)
    tl.store(p_state + (i_state + o_feature[:, None]) * WIDTH_V + o_column, b_state, mask=m)


@triton.jit(do_not_specialize=["heads"])
def _linear_scan_kernel(
    p_state, p_sums, p_tops, p_running, p_total, p_total_sums, p_documents, heads,
    CAUSAL: tl.constexpr, REVERSE: tl.constexpr, EXPONENT: tl.constexpr,
    WIDTH_V: tl.constexpr, FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sums the states of a document's chunks, in the unit exp(top) of each feature.

    CAUSAL: total c is the sum of the states before chunk c (REVERSE: after it), in the unit of
    running top c = max of tops up to c, which the forward scan writes and the reverse one reads.
    Otherwise the totals are one per document; ``running`` too. total (..., heads, FEATURES,
    WIDTH_V) in the dtype of its products. One program per document, head and tile of BLOCK_F
    features x BLOCK_V columns.
    """
    n_rows = (FEATURES + BLOCK_F - 1) // BLOCK_F
    n_columns = (WIDTH_V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    i_column = program % n_columns * BLOCK_V
    o_feature = program // n_columns % n_rows * BLOCK_F + tl.arange(0, BLOCK_F)
    i_head = program // (n_columns * n_rows) % heads
    document = (program // (n_columns * n_rows * heads)).to(tl.int64)
    first = tl.load(p_documents + document * 2).to(tl.int64)
    n_chunks = tl.load(p_documents + document * 2 + 1)
    o_column = i_column + tl.arange(0, BLOCK_V)[None, :]
    m_feature = o_feature < FEATURES
    m = m_feature[:, None] & (o_column < WIDTH_V)
    b_state = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    b_sums = tl.zeros((BLOCK_F,), tl.float32)
    b_top = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    for i in range(0, n_chunks):
        i_chunk = first + (n_chunks - 1 - i if REVERSE else i)
        o_sums = (i_chunk * heads + i_head) * FEATURES + o_feature
        o_state = o_sums[:, None] * WIDTH_V + o_column
        b_more = tl.load(p_state + o_state, mask=m, other=0.0)
        b_more_sums = tl.load(p_sums + o_sums, mask=m_feature, other=0.0)
        if EXPONENT and (not REVERSE):
            b_chunk = tl.load(p_tops + o_sums, mask=m_feature, other=0.0)
            b_next = tl.maximum(b_top, b_chunk)
            safe = tl.where(b_next == float("-inf"), 0.0, b_next)
            factor = tl.exp(b_top - safe)
            factor_more = tl.exp(b_chunk - safe)
            b_top = b_next
            b_state *= factor[:, None]
            b_sums *= factor
            b_more *= factor_more[:, None]
            b_more_sums *= factor_more
        if EXPONENT and (REVERSE and CAUSAL):
            b_next = tl.load(p_running + o_sums, mask=m_feature, other=0.0)
            # The unit falls on the way back; behind the last chunk the sum is 0.
            nothing = (b_next == float("-inf")) | (b_top == float("-inf"))
            factor = tl.where(nothing, 0.0, tl.exp(b_next - b_top))
            b_top = b_next
            b_state *= factor[:, None]
            b_sums *= factor
        if CAUSAL:
            tl.store(p_total + o_state, b_state.to(p_total.dtype.element_ty), mask=m)
            if i_column == 0:
                tl.store(p_total_sums + o_sums, b_sums, mask=m_feature)
                if EXPONENT and (not REVERSE):
                    tl.store(p_running + o_sums, b_top, mask=m_feature)
        b_state += b_more
        b_sums += b_more_sums
    if not CAUSAL:
        o_sums = (document * heads + i_head) * FEATURES + o_feature
        p_total += o_sums[:, None] * WIDTH_V + o_column
        tl.store(p_total, b_state.to(p_total.dtype.element_ty), mask=m)
        if i_column == 0:
            tl.store(p_total_sums + o_sums, b_sums, mask=m_feature)
            if EXPONENT and (not REVERSE):
                tl.store(p_running + o_sums, b_top, mask=m_feature)


@triton.jit(do_not_specialize=["heads", "tokens"])
def _linear_outputs_kernel(
    p_q, p_k, p_v, p_w, p_bias, p_state, p_sums, p_tops, p_out, p_norm, p_row_top, p_table,
    s_q, s_qh, s_k, s_kh, s_v, s_vh, s_bias, heads, tokens, root,
    CAUSAL: tl.constexpr, MAP: tl.constexpr, EXPONENT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """n_i = φ(q_i)ᵀ S + Σ_j a_ij v_j,  d_i = φ(q_i)ᵀ z + Σ_j a_ij,  out_i = n_i / d_i.

    a_ij = φ(q_i) · φ(k_j) over the chunk's own keys j <= i where CAUSAL, S and z the state before
    it; else none, S and z those of the document. q (tokens, heads · GROUP, WIDTH), out (tokens,
    heads · GROUP, WIDTH_V) contiguous; norm (d) and row_top (heads · GROUP, tokens) float32, which
    the backward pass needs beside out. One program per chunk and query head.
    """
    i_chunk = (tl.program_id(0) // (heads * GROUP)).to(tl.int64)
    i_query_head = tl.program_id(0) % (heads * GROUP)
    i_head = i_query_head // GROUP
    document = tl.load(p_table + i_chunk * 3).to(tl.int64)
    if document < 0:
        return
    start = tl.load(p_table + i_chunk * 3 + 1).to(tl.int64)
    count = tl.load(p_table + i_chunk * 3 + 2)
    i_state = ((i_chunk if CAUSAL else document) * heads + i_head) * FEATURES
    p_q += start * s_q + i_query_head * s_qh
    p_k += start * s_k + i_head * s_kh
    p_bias += i_head * s_bias + start
    o_row = tl.arange(0, BLOCK_L)
    b_row_top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    if EXPONENT:
        for i_feature in tl.range(0, FEATURES, BLOCK_F, disable_licm=True):
            b_u = map_rows(p_q, s_q, count, p_w, i_feature, root, MAP, WIDTH, FEATURES, BLOCK_L,
                           BLOCK_D, BLOCK_F, PRECISION, SPLIT)  # fmt: skip
            b_top = load_features(p_tops + i_state, i_feature, FEATURES, BLOCK_F, float("-inf"))
            b_row_top = tl.maximum(b_row_top, tl.max(b_u + b_top[None, :], 1))
        # A row without keys has only zeros.
        b_row_top = tl.where(b_row_top == float("-inf"), float("inf"), b_row_top)
    b_out = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)
    b_norm = tl.zeros((BLOCK_L,), tl.float32)
    b_scores = tl.zeros((BLOCK_L, BLOCK_L), tl.float32)
    for i_feature in tl.range(0, FEATURES, BLOCK_F, disable_licm=True):
        b_phi_q = query_features(
            p_q, s_q, count, p_w, p_tops + i_state, b_row_top, i_feature, root, MAP, EXPONENT,
            WIDTH, FEATURES, BLOCK_L, BLOCK_D, BLOCK_F, PRECISION, SPLIT,
        )  # fmt: skip
        b_state = load_state(p_state + i_state * WIDTH_V, i_feature, FEATURES, WIDTH_V, BLOCK_F,
                             BLOCK_V)  # fmt: skip
        b_out += product(b_phi_q, b_state, HALF, PRECISION)
        b_sums = load_features(p_sums + i_state, i_feature, FEATURES, BLOCK_F, 0.0)
        b_norm += tl.sum(b_phi_q * b_sums[None, :], 1)
        if CAUSAL:
            b_phi_k = key_features(
                p_k, s_k, count, p_w, p_bias, p_tops + i_state, i_feature, root, MAP, EXPONENT,
                HAS_BIAS, WIDTH, FEATURES, BLOCK_L, BLOCK_D, BLOCK_F, PRECISION, SPLIT,
            )  # fmt: skip
            b_scores += product(b_phi_q, tl.trans(b_phi_k), HALF, PRECISION)
    if CAUSAL:
        b_scores = tl.where(o_row[:, None] >= o_row[None, :], b_scores, 0.0)
        b_v = load_rows(p_v + start * s_v + i_head * s_vh, s_v, count, WIDTH_V, BLOCK_L, BLOCK_V)
        b_out += product(b_scores, b_v, HALF, PRECISION)
        b_norm += tl.sum(b_scores, 1)
    b_out = b_out / tl.where(b_norm == 0, 1.0, b_norm)[:, None]
    s_out = heads * GROUP * WIDTH_V
    store_rows(p_out + start * s_out + i_query_head * WIDTH_V, s_out, count, b_out, WIDTH_V,
               BLOCK_L, BLOCK_V)  # fmt: skip
    o_stat = i_query_head.to(tl.int64) * tokens + start + o_row
    tl.store(p_norm + o_stat, b_norm, mask=o_row < count)
    if EXPONENT:
        tl.store(p_row_top + o_stat, b_row_top, mask=o_row < count)
