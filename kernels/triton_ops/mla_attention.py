"""Triton variant of mla_attention: the attention kernels on two pieces of the head dimension.

    s[i, j] = scale · (q_nope_i · k_nope_j + q_rope_i · k_rope_j),  k_nope = kv_latent W_ukᵀ

The kernels read q_nope, q_rope, k_nope and k_rope where they are: nothing is concatenated, k_rope
is never repeated for the heads, v keeps its width. The gradient of k_rope is summed over the heads
in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..autocast import to_autocast_dtype
from .attention import split_attention


def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mask: None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Any:
    """q_nope (B, L, H, Dn), q_rope (B, L, H, Dr), kv_latent (B, L, r), k_rope (B, L, Dr), w_uk
    (H · Dn, r), w_uv (H · Dv, r); packed without B. See ``kernels.mla_attention``."""
    heads = q_nope.shape[-2]
    if scale is None:
        scale = 1 / math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])
    k = F.linear(kv_latent, w_uk).unflatten(-1, (heads, q_nope.shape[-1]))
    v = F.linear(kv_latent, w_uv).unflatten(-1, (heads, w_uv.shape[0] // heads))
    q, q_rope, k, k_rope, v = to_autocast_dtype(q_nope.device.type, q_nope, q_rope, k, k_rope, v)
    out, lse = split_attention(
        q,
        q_rope,
        k,
        k_rope.unsqueeze(-2),
        v,
        causal=causal,
        scale=scale,
        key_bias=key_bias,
        window=window,
        softcap=softcap,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    return (out, lse * math.log(2)) if return_lse else out
