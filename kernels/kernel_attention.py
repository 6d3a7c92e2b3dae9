"""Attention whose weights are a kernel of the distance between query and key.

    e[i, j] = -|q_i - k_j|² / (2 σ_h²)       gaussian
    e[i, j] = -|q_i - k_j| / σ_h             laplacian, Euclidean norm
    w[i, j] = exp(e[i, j] + key_bias[j]),    out_i = Σ_j w[i, j] v_j / Σ_j w[i, j]

with j over the keys that causal, window, mask and document boundaries all allow, aligned bottom
right as in :func:`attention`. ``normalize=False`` leaves the division out: without a key bias every
weight is at most 1 then, so neither a maximum nor a rescaling is needed. The normalised gaussian is
the softmax of q·k/σ² - |k|²/(2σ²) (|q|² cancels), which is :func:`attention` with a key bias.

Distances come from |q|² + |k|² - 2 q·k in float32 at least, norms taken from the inputs as given.
What this arithmetic cannot tell from zero, a few units in the last place of |q|² + |k|², is a
distance of zero, where the laplacian's gradient is taken to be 0.

B batch, L length, H heads, D width; packed tensors are (total, H, D) with cu_seqlens (n + 1,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch
from .attention import (
    Window,
    _check_options,
    _check_tensors,
    attention,
    expand_key_bias,
    keep_matrix,
)
from .autocast import to_autocast_dtype

KERNELS = ("gaussian", "laplacian")
_UNITS = 8  # units in the last place of |q|² + |k|² below which a squared distance is 0


def kernel_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: str = "gaussian",
    bandwidth: float | Tensor = 1.0,
    normalize: bool = True,
    causal: bool = False,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    window: Window | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    """The definition; matrix products in the dtype of ``q``, distances in float32 at least."""
    options: dict[str, Any] = {
        "kernel": kernel, "bandwidth": bandwidth, "normalize": normalize,
        "causal": causal, "window": window,
    }  # fmt: skip
    if cu_seqlens_q is not None:
        bounds_q = cu_seqlens_q.tolist()
        bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
        # Without documents the empty result still belongs to the graph of q.
        outs = [q[:0, :, :1].expand(0, q.shape[1], v.shape[2])]
        for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
            bias = None if key_bias is None else key_bias[None, :, c:d]
            out = kernel_attention_reference(
                q[None, a:b], k[None, c:d], v[None, c:d], key_bias=bias, **options
            )
            outs.append(out[0])
        return torch.cat(outs)
    heads = q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    exponent = _exponent(q, k, kernel, head_bandwidths(bandwidth, heads, q)[:, None, None])
    keep = keep_matrix(q.shape[1], k.shape[1], causal, window, q.device)
    keep = torch.ones((), dtype=torch.bool, device=q.device) if keep is None else keep
    if mask is not None:
        keep = keep & mask
    if key_bias is not None:
        bias = expand_key_bias(key_bias, heads)[:, :, None, :]
        exponent = exponent + bias.to(exponent.dtype)
        keep = keep & (bias != -torch.inf)
    exponent = exponent.masked_fill(~keep, -torch.inf)
    if normalize and k.shape[1]:
        total = torch.logsumexp(exponent, dim=-1, keepdim=True)
        exponent = exponent - total.masked_fill(total == -torch.inf, 0.0)
    return torch.einsum("bhij,bjhd->bihd", torch.exp(exponent).to(v.dtype), v)


def _exponent(q: Tensor, k: Tensor, kernel: str, widths: Tensor) -> Tensor:
    """e (B, H, Lq, Lk) for q (B, Lq, H, D), k (B, Lk, H, D) and widths (H, 1, 1)."""
    high = widths.dtype
    size_q = q.to(high).square().sum(-1).transpose(1, 2)[..., :, None]
    size_k = k.to(high).square().sum(-1).transpose(1, 2)[..., None, :]
    product = torch.einsum("bihd,bjhd->bhij", q, k).to(high)
    squared = (size_q + size_k - 2 * product).clamp(min=0)
    if kernel == "gaussian":
        return -squared / (2 * widths**2)
    apart = squared > zero_distance(size_q + size_k)
    return -torch.where(apart, squared, 1).sqrt().where(apart, 0) / widths


def zero_distance(sizes: Tensor) -> Tensor:
    """Largest squared distance that counts as 0 where |q|² + |k|² is ``sizes``."""
    return _UNITS * torch.finfo(sizes.dtype).eps * sizes


def head_bandwidths(bandwidth: float | Tensor, heads: int, q: Tensor) -> Tensor:
    """(Hq,) in float32 at least, on q's device: one bandwidth per query head."""
    high = torch.promote_types(q.dtype, torch.float32)
    if not isinstance(bandwidth, Tensor):
        return torch.full((heads,), bandwidth, dtype=high, device=q.device)
    widths = bandwidth.to(high)
    return widths.repeat_interleave(heads // max(len(widths), 1))


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: str = "gaussian",
    bandwidth: float | Tensor = 1.0,
    normalize: bool = True,
    causal: bool = False,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    window: Window | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    impl: str | None = None,
) -> Any:
    """Exact kernel attention (formula: top of this file), differentiable in q, k, v, bandwidth and
    key_bias. A row that may see no key gives 0 and no gradient.

    Args:
        q: (B, Lq, Hq, Dqk), or packed (total_q, Hq, Dqk).
        k: (B, Lk, Hkv, Dqk), or packed (total_k, Hkv, Dqk); Hq is a multiple of Hkv.
        v: (B, Lk, Hkv, Dv), or packed (total_k, Hkv, Dv); Dv may differ from Dqk.
        kernel: "gaussian" or "laplacian".
        bandwidth: σ above 0, in units of the distance: a number, or one per query head (Hq,) or
            per key head (Hkv,). A tensor's values are trusted to be above 0.
        normalize: divide by the sum of the weights.
        causal, key_bias, mask, window, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            deterministic: as in :func:`attention`.
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        (B, Lq, Hq, Dv), or packed (total_q, Hq, Dv), in q's dtype (autocast's under autocast).

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist for the case.
    """
    checks.choice("kernel", kernel, KERNELS)
    _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    packed = cu_seqlens_q is not None
    _check_options(q, k, key_bias, mask, window, None, None, packed=packed)
    _check_bandwidth(bandwidth, q, k)
    if window is not None:
        window = (int(window[0]), int(window[1])) if max(window) >= 0 else None
    options = {
        "kernel": kernel,
        "bandwidth": bandwidth,
        "normalize": normalize,
        "causal": causal,
        "key_bias": key_bias,
        "mask": mask,
        "window": window,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "deterministic": deterministic,
    }
    return dispatch.select("kernel_attention", impl, q, k, v, **options)(q, k, v, **options)


def _check_bandwidth(bandwidth: float | Tensor, q: Tensor, k: Tensor) -> None:
    if not isinstance(bandwidth, Tensor):
        if not 0 < bandwidth < float("inf"):
            checks.fail("bandwidth", repr(bandwidth), "a finite number above 0, or a tensor")
        return
    checks.floating("bandwidth", bandwidth, "Hq|Hkv")
    checks.on_device("bandwidth", bandwidth, "q", q)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if len(bandwidth) not in (heads, kv_heads):
        accepted = f"one per head of q ({heads}) or of k ({kv_heads})"
        checks.fail("bandwidth", f"{len(bandwidth)} values", accepted)


def normalized_gaussian(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bandwidth: float | Tensor,
    key_bias: Tensor | None,
    impl: str,
    **options: Any,
) -> Any:
    """The normalised gaussian as :func:`attention` with a key bias, for the variants that have it.

    A number goes into the scale. One bandwidth per head scales the queries, and where the heads of
    a group have their own, keys and values are repeated: a key bias belongs to a key head.
    """
    q, k, v = to_autocast_dtype(q.device.type, q, k, v)
    high = torch.promote_types(q.dtype, torch.float32)
    scale = 1.0
    if isinstance(bandwidth, Tensor):
        if len(bandwidth) != k.shape[-2]:
            group = q.shape[-2] // k.shape[-2]
            k, v = (x.repeat_interleave(group, dim=-2) for x in (k, v))
            if key_bias is not None and key_bias.shape[-2] > 1:
                key_bias = key_bias.repeat_interleave(group, dim=-2)
        inverse = bandwidth.to(high) ** -2
        per_query = inverse.repeat_interleave(q.shape[-2] // k.shape[-2])[:, None]
        q = (q.to(high) * per_query).to(q.dtype)
        inverse = inverse[:, None]
    else:
        scale = bandwidth**-2
        inverse = torch.full((1, 1), scale, dtype=high, device=q.device)
    sizes = k.to(high).square().sum(-1).transpose(-1, -2)
    bias = -0.5 * inverse * sizes
    bias = bias if key_bias is None else bias + key_bias
    return attention(q, k, v, scale=scale, key_bias=bias, impl=impl, **options)


def _through_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    options = {n: x for n, x in options.items() if n not in ("kernel", "normalize")}
    return normalized_gaussian(q, k, v, impl="triton", **options)


def _no_triton(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    if options.get("kernel", "gaussian") != "gaussian" or not options.get("normalize", True):
        return "only the normalised gaussian is attention with a key bias"
    if "triton" not in dispatch.available_names("attention"):
        return "attention has no triton variant"
    unsupported = dispatch.variant("attention", "triton").unsupported
    options = {n: x for n, x in options.items() if n not in ("kernel", "normalize", "bandwidth")}
    return None if unsupported is None else unsupported(q, k, v, scale=1.0, **options)


dispatch.register("kernel_attention", "reference", kernel_attention_reference)
dispatch.register(
    "kernel_attention",
    "triton",
    _through_attention,
    unsupported=_no_triton,
    status="not validated on a GPU",
    source="triton_ops.attention",
)
