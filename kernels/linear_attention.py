"""Attention without the L x L matrix: weights that are products of features.

    w[i, j] = φ(q_i) · φ(k_j) exp(key_bias[j]),    out_i = Σ_j w[i, j] v_j / Σ_j w[i, j]
            = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)

with j over the row's document, up to the row's own position when causal (aligned bottom right as in
:func:`attention`). The second line is what the variants compute: O(L) time and memory. Maps:

    "favor"  exp(W x' - |x'|²/2), x' = sqrt(scale) x, W the (m, Dqk) ``features``: with rows from
             N(0, I) the mean of w over W is m exp(scale q·k), softmax attention (FAVOR+,
             Choromanski 2021)
    "exp"    exp(x)
    "elu"    elu(x) + 1 (Katharopoulos 2020)
    "relu"   max(x, 0)

Constant factors of φ(q_i) cancel, those of φ(k_j) that all j share as well. The two exponential
maps subtract running maxima, per row of q and per feature of k, so that no exponent overflows and
every denominator is at least 1 in its own unit. A row whose weights are all 0 (relu) gives 0.

B batch, L length, H heads, D width, m features; packed tensors are (total, H, D).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .attention import _check_options, _check_tensors, expand_key_bias, keep_matrix, softmax_scale

FEATURE_MAPS = ("favor", "elu", "relu", "exp")
EXPONENTIAL_MAPS = ("favor", "exp")


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "favor",
    features: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    """The definition as its L x L matrix, products in the dtype of ``q``, features in float32."""
    options: dict[str, Any] = {
        "feature_map": feature_map, "features": features, "causal": causal, "scale": scale,
    }  # fmt: skip
    if cu_seqlens_q is not None:
        bounds_q = cu_seqlens_q.tolist()
        bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
        # Without documents the empty result still belongs to the graph of q.
        outs = [q[:0, :, :1].expand(0, q.shape[1], v.shape[2])]
        for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
            bias = None if key_bias is None else key_bias[None, :, c:d]
            out = linear_attention_reference(
                q[None, a:b], k[None, c:d], v[None, c:d], key_bias=bias, **options
            )
            outs.append(out[0])
        return torch.cat(outs)
    if 0 in (q.numel(), k.numel(), v.numel()):
        return q.sum(-1, keepdim=True).expand(*q.shape[:3], v.shape[3]) * 0
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    root = softmax_scale(q, scale) ** 0.5
    phi_q, phi_k = (map_features(x, feature_map, features, root) for x in (q, k))
    if feature_map in EXPONENTIAL_MAPS:
        # One factor per query and one per head for all keys: they cancel.
        phi_q = torch.exp(phi_q - phi_q.detach().amax(-1, keepdim=True))
        phi_k = torch.exp(phi_k - phi_k.detach().amax((1, 3), keepdim=True))
    weights = torch.einsum("bihm,bjhm->bhij", phi_q.to(q.dtype), phi_k.to(q.dtype))
    if key_bias is not None:
        factor = torch.exp(expand_key_bias(key_bias, q.shape[2]))[:, :, None, :]
        weights = weights * factor.to(weights.dtype)
    keep = keep_matrix(q.shape[1], k.shape[1], causal, None, q.device)
    if keep is not None:
        weights = weights.masked_fill(~keep, 0.0)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def map_features(x: Tensor, feature_map: str, features: Tensor | None, root: float) -> Tensor:
    """φ(x), or its logarithm for the exponential maps, (..., m) in float32 at least.

    ``root`` is the square root of the scale.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "relu":
        return F.relu(x)
    if feature_map == "exp":
        return x
    assert features is not None
    x = x * root
    return x @ features.to(x.dtype).mT - 0.5 * x.square().sum(-1, keepdim=True)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "favor",
    features: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    impl: str | None = None,
) -> Any:
    """Linear attention (formula: top of this file), differentiable in q, k, v, features and
    key_bias. Its weights sum to one.

    Args:
        q: (B, Lq, Hq, Dqk), or packed (total_q, Hq, Dqk).
        k: (B, Lk, Hkv, Dqk), or packed (total_k, Hkv, Dqk); Hq is a multiple of Hkv.
        v: (B, Lk, Hkv, Dv), or packed (total_k, Hkv, Dv); Dv may differ from Dqk.
        feature_map: "favor", "elu", "relu" or "exp".
        features: (m, Dqk) for "favor", from ``sample_features("gaussian", Dqk, m)``; else None.
        causal: row i sees keys up to i + Lk - Lq, in each document when packed.
        scale: factor on q · k that "favor" stands for; 1 / sqrt(Dqk) when None. "favor" only.
        key_bias: float32 (B, Hkv or 1, Lk), packed (Hkv or 1, total_k), the logarithm of a factor
            on a key's weights; -inf hides the key. With scale 1 / σ² and -|k|² / (2σ²), "favor"
            stands for the normalised gaussian kernel.
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 document boundaries of packed tensors, from 0 to
            the total; cu_seqlens_k defaults to cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: longest document, where the caller knows it.
        deterministic: bit-equal gradients from run to run (every variant on a CPU is).
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        (B, Lq, Hq, Dv), or packed (total_q, Hq, Dv), in q's dtype (autocast's under autocast).

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist for the case.
    """
    checks.choice("feature_map", feature_map, FEATURE_MAPS)
    _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    packed = cu_seqlens_q is not None
    _check_options(q, k, key_bias, None, None, None, None, packed=packed)
    _check_map(q, feature_map, features, scale)
    options = {
        "feature_map": feature_map,
        "features": features,
        "causal": causal,
        "scale": scale,
        "key_bias": key_bias,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "deterministic": deterministic,
    }
    return dispatch.select("linear_attention", impl, q, k, v, **options)(q, k, v, **options)


def _check_map(q: Tensor, feature_map: str, features: Tensor | None, scale: float | None) -> None:
    if feature_map != "favor":
        for name, value in (("features", features), ("scale", scale)):
            if value is not None:
                checks.fail(name, f"a value with feature_map={feature_map!r}", "None, or 'favor'")
        return
    if features is None:
        checks.fail("features", None, "a tensor (m, Dqk) for feature_map='favor'")
    checks.floating("features", features, "m Dqk")
    checks.on_device("features", features, "q", q)
    if features.shape[0] == 0 or features.shape[1] != q.shape[-1]:
        accepted = f"(m, Dqk), m at least 1 and Dqk = {q.shape[-1]}"
        checks.fail("features", f"shape {tuple(features.shape)}", accepted)
    if scale is not None and not 0 < scale < float("inf"):
        checks.fail("scale", repr(scale), "a finite number above 0, or None")


dispatch.register("linear_attention", "reference", linear_attention_reference)
