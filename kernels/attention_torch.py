"""Which plain PyTorch computes a case of attention.

On a CPU: attention_cpu_ops.py (tiles in bf16, PyTorch's flash kernel in float32). On a GPU: SDPA.
Softcap, sinks, lse and a key_bias that wants a gradient: the composition, on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .attention import Window, expand_key_bias, keep_matrix, softmax_scale
from .attention_composed import composed_attention, open_hidden_rows, scaled_dot_product
from .attention_cpu_ops import dense_attention, packed_attention, uses_tiles
from .attention_packed import grouped_attention
from .autocast import to_autocast_dtype


def attention_torch(
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
) -> Any:
    q, k, v = to_autocast_dtype(q.device.type, q, k, v)
    scale = softmax_scale(q, scale)
    plain = softcap is None and sinks is None and not return_lse
    if cu_seqlens_q is not None:
        documents = (cu_seqlens_q, None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k)
        if plain and key_bias is None and q.device.type == "cpu":
            return packed_attention(q, k, v, *documents, causal, window, scale)
        return grouped_attention(
            q, k, v, *documents, causal=causal, scale=scale, window=window,
            key_bias=key_bias, softcap=softcap, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    bias = None if key_bias is None else expand_key_bias(key_bias, q.shape[2])[:, :, None, :]
    learned = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if plain and not learned and 0 not in (q.numel(), k.numel(), v.numel()):
        return _dense(q, k, v, causal, scale, bias, mask, window)
    keep = keep_matrix(q.shape[1], k.shape[1], causal, window, q.device)
    if mask is not None:
        keep = mask if keep is None else keep & mask
    out, lse = composed_attention(q, k, v, keep, bias, scale, softcap, sinks)
    return (out, lse) if return_lse else out


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    bias: Tensor | None,
    mask: Tensor | None,
    window: Window | None,
) -> Tensor:
    lq, lk = q.shape[1], k.shape[1]
    unmasked = bias is None and mask is None and window is None
    tiles = q.device.type == "cpu" and uses_tiles(q, v)
    if unmasked and (tiles or not causal or lq == lk):
        if tiles:
            return dense_attention(q, k, v, None, causal, scale)
        return scaled_dot_product(q, k, v, None, causal, scale)
    keep = keep_matrix(lq, lk, causal, window, q.device)
    if mask is not None:
        keep = mask if keep is None else keep & mask
    if bias is not None:
        bias = bias.detach().to(q.dtype)
        bias = bias if keep is None else bias.masked_fill(~keep, -torch.inf)
    mask = keep if bias is None else bias
    if not tiles:
        return scaled_dot_product(q, k, v, mask, False, scale)
    assert mask is not None
    mask, hidden = open_hidden_rows(mask)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    out = dense_attention(q, k, v, mask, causal and lq <= lk, scale)
    return out.masked_fill(hidden.transpose(1, 2), 0.0)


dispatch.register("attention", "torch", attention_torch)
