"""Softmax attention, dense or over packed documents.

    s[i, j] = softcap · tanh(scale · q_i · k_j / softcap) + key_bias[j]     (or scale · q_i · k_j)
    lse_i = log(exp(sink) + Σ_j exp(s[i, j])),   out_i = Σ_j exp(s[i, j] - lse_i) v_j

with j over the keys that causal, window, mask and document boundaries all allow. Row i of Lq sits
at position i + Lk - Lq among the keys (bottom-right alignment). A row that may see no key gives 0,
an lse of -inf (its sink's logit where there is one) and no gradient.

B batch, L length, H heads, D width; packed tensors are (total, H, D) with cu_seqlens (n + 1,).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch

Window = tuple[int, int]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, in the dtype of ``q`` throughout (lse: float32, or float64 for float64)."""
    if cu_seqlens_q is not None:
        return _packed_reference(
            q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, return_lse,
            causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale(q, scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    keep = keep_matrix(q.shape[1], k.shape[1], causal, window, q.device)
    keep = torch.ones((), dtype=torch.bool, device=q.device) if keep is None else keep
    if mask is not None:
        keep = keep & mask
    if key_bias is not None:
        bias = expand_key_bias(key_bias, q.shape[2])[:, :, None, :]
        scores = scores + bias.to(scores.dtype)
        keep = keep & (bias != -torch.inf)
    scores = scores.masked_fill(~keep, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    high = torch.promote_types(q.dtype, torch.float32)
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:3], -torch.inf, dtype=high)
    else:
        lse = torch.logsumexp(scores.to(high), dim=-1)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(scores - finite[..., None].to(scores.dtype))[..., : k.shape[1]]
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return (out, lse) if return_lse else out


def _packed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    key_bias: Tensor | None,
    return_lse: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    bounds_q = cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    high = torch.promote_types(q.dtype, torch.float32)
    # Without documents the empty result still belongs to the graph of q.
    outs = [q[:0, :, :1].expand(0, q.shape[1], v.shape[2])]
    lses = [q.new_zeros(q.shape[1], 0, dtype=high)]
    for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        bias = None if key_bias is None else key_bias[None, :, c:d]
        out, lse = attention_reference(
            q[None, a:b], k[None, c:d], v[None, c:d], key_bias=bias, return_lse=True, **options
        )
        outs.append(out[0])
        lses.append(lse[0])
    out = torch.cat(outs)
    return (out, torch.cat(lses, dim=1)) if return_lse else out


def softmax_scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale


def keep_matrix(
    lq: int, lk: int, causal: bool, window: Window | None, device: torch.device
) -> Tensor | None:
    """(lq, lk) bool of what causality and the window allow; None when that is everything."""
    left, right = window_limits(causal, window)
    if left < 0 and right < 0:
        return None
    row = torch.arange(lq, device=device)[:, None] + (lk - lq)
    column = torch.arange(lk, device=device)[None, :]
    keep = torch.ones(lq, lk, dtype=torch.bool, device=device)
    if left >= 0:
        keep &= column >= row - left
    if right >= 0:
        keep &= column <= row + right
    return keep


def window_limits(causal: bool, window: Window | None) -> Window:
    """Keys allowed to the left and right of a row's own position; -1: unlimited."""
    left, right = window if window is not None else (-1, -1)
    return (left, 0 if causal else right)


def expand_key_bias(key_bias: Tensor, heads: int) -> Tensor:
    """(..., Hkv or 1, Lk) to one row per query head, or to 1 for all."""
    rows = key_bias.shape[-2]
    return key_bias if rows == 1 else key_bias.repeat_interleave(heads // rows, dim=-2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    impl: str | None = None,
) -> Any:
    """Softmax attention (formula: top of this file), differentiable in q, k, v, key_bias and sinks.

    Args:
        q: (B, Lq, Hq, Dqk), or packed (total_q, Hq, Dqk).
        k: (B, Lk, Hkv, Dqk), or packed (total_k, Hkv, Dqk); Hq is a multiple of Hkv.
        v: (B, Lk, Hkv, Dv), or packed (total_k, Hkv, Dv); Dv may differ from Dqk.
        causal: row i sees keys up to i + Lk - Lq, in each document when packed.
        scale: factor on q · k; 1 / sqrt(Dqk) when None.
        key_bias: float32 (B, Hkv or 1, Lk), packed (Hkv or 1, total_k), added to the scores of a
            key; -inf hides the key.
        mask: bool (B, 1 or Hq, Lq, Lk), True = may attend. Dense tensors only.
        window: (left, right) keys around a row's own position; -1 = unlimited.
        softcap: bounds the scaled scores to (-softcap, softcap), before key_bias.
        sinks: (Hq,) logits of an extra key without value.
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 document boundaries of packed tensors, from 0 to
            the total; cu_seqlens_k defaults to cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: longest document, where the caller knows it.
        return_lse: also returns lse, float32 (B, Hq, Lq), packed (Hq, total_q).
        deterministic: bit-equal gradients from run to run (every variant on a CPU is).
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        (B, Lq, Hq, Dv), or packed (total_q, Hq, Dv), in q's dtype (autocast's under autocast).

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist for the case.
    """
    _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _check_options(q, k, key_bias, mask, window, softcap, sinks, packed=cu_seqlens_q is not None)
    if window is not None:
        window = (int(window[0]), int(window[1])) if max(window) >= 0 else None
    options = {
        "causal": causal,
        "scale": scale,
        "key_bias": key_bias,
        "mask": mask,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "return_lse": return_lse,
        "deterministic": deterministic,
    }
    return dispatch.select("attention", impl, q, k, v, **options)(q, k, v, **options)


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    layout = "B L H D" if cu_seqlens_q is None else "total H D"
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x, layout)
        checks.same(name, x, "q", q)
    lead = k.shape[:-1] if cu_seqlens_q is not None else (q.shape[0], *k.shape[1:-1])
    checks.shape("k", k, (*lead, q.shape[-1]), layout)
    checks.shape("v", v, (*k.shape[:-1], v.shape[-1]), layout)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        checks.fail("k", f"{kv_heads} heads", f"a number that divides the {heads} heads of q")
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            checks.fail("cu_seqlens_k", "a tensor without cu_seqlens_q", "both or none")
        return
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.integers(name, x, "n+1", (torch.int32, torch.int64))
        checks.on_device(name, x, "q", q)
    if cu_seqlens_k.shape != cu_seqlens_q.shape or cu_seqlens_q.shape[0] == 0:
        checks.fail(
            "cu_seqlens_k",
            f"{cu_seqlens_k.shape[0]} boundaries",
            f"as many as cu_seqlens_q ({cu_seqlens_q.shape[0]}), at least one",
        )


def _check_options(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    mask: Tensor | None,
    window: Window | None,
    softcap: float | None,
    sinks: Tensor | None,
    packed: bool,
) -> None:
    heads, kv_heads = q.shape[-2], k.shape[-2]
    checks.positive("softcap", softcap)
    if key_bias is not None:
        layout = "Hkv|1 total_k" if packed else "B Hkv|1 Lk"
        checks.floating("key_bias", key_bias, layout)
        checks.on_device("key_bias", key_bias, "q", q)
        rows = 1 if key_bias.shape[-2] == 1 else kv_heads
        checks.shape("key_bias", key_bias, (*k.shape[:-3], rows, k.shape[-3]), layout)
    if sinks is not None:
        checks.floating("sinks", sinks, "Hq")
        checks.on_device("sinks", sinks, "q", q)
        checks.shape("sinks", sinks, (heads,), "Hq")
    if window is not None and (len(window) != 2 or min(window) < -1):
        checks.fail("window", window, "(left, right), each at least -1 (unlimited)")
    if mask is not None:
        if packed:
            checks.fail("mask", "a mask with cu_seqlens", "dense tensors only")
        checks.boolean("mask", mask, "B 1|Hq Lq Lk")
        checks.on_device("mask", mask, "q", q)
        rows = 1 if mask.shape[1] == 1 else heads
        checks.shape("mask", mask, (q.shape[0], rows, q.shape[1], k.shape[1]), "B 1|Hq Lq Lk")


dispatch.register("attention", "reference", attention_reference)
