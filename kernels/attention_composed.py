"""Attention from PyTorch's own parts, differentiable by autograd: SDPA, and a plain composition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """SDPA on (B, L, H, D); ``mask`` bool, or float to add, broadcasts to (B, Hq, Lq, Lk)."""
    hidden = None
    if mask is not None and q.device.type != "cpu":
        # GPU kernels differ in what a fully masked row gives, and with a mask none groups heads.
        mask, hidden = open_hidden_rows(mask)
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (k, v))
    # A comparison of symbolic sizes is no bool, which SDPA wants; a branch on it is one.
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        **grouped,
    )
    out = out.transpose(1, 2)
    return out if hidden is None else out.masked_fill(hidden.transpose(1, 2), 0.0)


def open_hidden_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask (..., Lq, Lk), bool or float, with its fully masked rows opened, and which these
    were: (B or 1, Hq or 1, Lq or 1, 1)."""
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    if mask.dtype == torch.bool:
        hidden = ~mask.any(-1, keepdim=True)
        return mask | hidden, hidden
    hidden = (mask == -torch.inf).all(-1, keepdim=True)
    return mask.masked_fill(hidden, 0.0), hidden


def composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Matrix products in q's dtype around a float32 softmax; (B, Lq, Hq, Dv) and lse (B, Hq, Lq).

    ``keep`` bool and ``bias`` broadcast to (B, Hq, Lq, Lk). Query heads that share a key head are
    stacked as rows, so that keys and values are not repeated.
    """
    b, lq, heads, _ = q.shape
    lk, kv_heads = k.shape[1], k.shape[2]
    rows = q.unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (rows * scale) @ k.permute(0, 2, 3, 1)
    high = torch.promote_types(q.dtype, torch.float32)
    scores = scores.reshape(b, heads, lq, lk).to(high)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(high)
        seen = bias != -torch.inf
        keep = seen if keep is None else keep & seen
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1) if lk else scores.new_full((b, heads, lq), -torch.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(high)[:, None])
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(scores - finite[..., None]).to(v.dtype)
    out = weights.reshape(b, kv_heads, heads // kv_heads * lq, lk) @ v.transpose(1, 2)
    return out.reshape(b, heads, lq, v.shape[3]).transpose(1, 2), lse


def composed_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`composed_attention`, from its inputs alone.

    With weights w, sink's weight w_0, capped scores t = tanh(scale q·k / softcap), dw = grad vᵀ and
    δ = Σ_j w dw - grad_lse:

        ds = w (dw - δ),  dbias = Σ_i ds,  dsink = -Σ w_0 δ,  dv = wᵀ grad,
        dq = scale · (ds (1 - t²)) k,  dk = scale · (ds (1 - t²))ᵀ q

    Returns:
        dq, dk, dv like q, k, v; dbias (B, Hq, Lk) and dsinks (Hq,) in float32 or float64.
    """
    b, lq, heads, _ = q.shape
    lk, kv_heads = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    high = torch.promote_types(q.dtype, torch.float32)

    def stacked(x: Tensor) -> Tensor:
        return x.unflatten(2, (kv_heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    rows, up = stacked(q), stacked(grad)
    scores = ((rows * scale) @ k.permute(0, 2, 3, 1)).reshape(b, heads, lq, lk).to(high)
    slope = None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped.square()
    if bias is not None:
        scores = scores + bias.to(high)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1) if lk else scores.new_full((b, heads, lq), -torch.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(high)[:, None])
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(scores - finite[..., None])
    dweights = (up @ v.permute(0, 2, 3, 1)).reshape(b, heads, lq, lk).to(high)
    delta = (weights * dweights).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(high)
    dscores = weights * (dweights - delta[..., None])
    dsinks = scores.new_zeros(heads)
    if sinks is not None:
        dsinks = -(torch.exp(sinks.to(high)[:, None] - lse) * delta).sum((0, 2))
    dbias = dscores.sum(2)
    if slope is not None:
        dscores = dscores * slope

    def by_key_head(x: Tensor) -> Tensor:
        return x.to(q.dtype).reshape(b, kv_heads, groups * lq, lk)

    ds, weights = by_key_head(dscores), by_key_head(weights)
    dq = (ds @ k.transpose(1, 2)).mul_(scale).reshape(b, heads, lq, -1).transpose(1, 2)
    dk = (ds.mT @ rows).mul_(scale).transpose(1, 2)
    return dq, dk, (weights.mT @ up).transpose(1, 2), dbias, dsinks
