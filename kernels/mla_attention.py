"""Multi-head latent attention of DeepSeek-V2 (2024): keys and values live in one latent per token.

    k_nope = kv_latent W_ukᵀ,  v = kv_latent W_uvᵀ                              per head
    s[i, j] = scale · (q_nope_i · k_nope_j + q_rope_i · k_rope_j),  out = softmax(s) v

k_rope is shared by all heads. v keeps its own width: it is never padded to that of q and k.
B batch, L length, H heads, r latent width, Dn, Dr, Dv widths of nope, rope and value parts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .attention import attention, attention_reference

_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(attention_reference).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


def mla_attention_reference(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    **options: Any,
) -> Any:
    """The definition; ``options`` are those of :func:`attention`."""
    q, k, v = _expand(q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv)
    return attention_reference(q, k, v, **options)


def _expand(
    q_nope: Tensor, q_rope: Tensor, kv_latent: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads = q_nope.shape[-2]
    k_nope = F.linear(kv_latent, w_uk).unflatten(-1, (heads, q_nope.shape[-1]))
    v = F.linear(kv_latent, w_uv).unflatten(-1, (heads, w_uv.shape[0] // heads))
    shared = k_rope[..., None, :].expand(*k_nope.shape[:-1], k_rope.shape[-1])
    q = torch.cat([q_nope.to(v.dtype), q_rope.to(v.dtype)], dim=-1)
    k = torch.cat([k_nope, shared.to(v.dtype)], dim=-1)
    return q, k, v


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
    impl: str | None = None,
    **options: Any,
) -> Any:
    """Latent attention (formula: top of this file), differentiable in all six tensors.

    Args:
        q_nope: (B, Lq, H, Dn), or packed (total_q, H, Dn).
        q_rope: (B, Lq, H, Dr), or packed, rotated already.
        kv_latent: (B, Lk, r), or packed (total_k, r), normalised already.
        k_rope: (B, Lk, Dr), or packed (total_k, Dr), rotated already, shared by the heads.
        w_uk: (H · Dn, r) up-projection of the keys.
        w_uv: (H · Dv, r) up-projection of the values.
        causal: as in :func:`attention`.
        scale: 1 / sqrt(Dn + Dr) when None.
        impl: None, "reference", "torch", "triton" or "cuda".
        options: the other keywords of :func:`attention`: key_bias, mask, window, cu_seqlens_q, ...

    Returns:
        (B, Lq, H, Dv), or packed (total_q, H, Dv); with return_lse also lse.

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    for name in options:
        if name not in _OPTIONS:
            checks.fail(name, "an unknown option", ", ".join(_OPTIONS))
    _check(q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv, options.get("cu_seqlens_q") is not None)
    options = {"causal": causal, "scale": scale, **options}
    tensors = (q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv)
    return dispatch.select("mla_attention", impl, *tensors, **options)(*tensors, **options)


def _check(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    packed: bool,
) -> None:
    lead = "total" if packed else "B L"
    checks.floating("q_nope", q_nope, f"{lead} H Dn")
    checks.floating("q_rope", q_rope, f"{lead} H Dr")
    checks.floating("kv_latent", kv_latent, f"{lead} r")
    checks.floating("k_rope", k_rope, f"{lead} Dr")
    checks.shape("q_rope", q_rope, (*q_nope.shape[:-1], q_rope.shape[-1]), f"{lead} H Dr")
    checks.shape("k_rope", k_rope, (*kv_latent.shape[:-1], q_rope.shape[-1]), f"{lead} Dr")
    if not packed and q_nope.shape[0] != kv_latent.shape[0]:
        got, wanted = kv_latent.shape[0], q_nope.shape[0]
        checks.fail("kv_latent", f"a batch of {got}", f"that of q_nope, {wanted}")
    heads, latent = q_nope.shape[-2], kv_latent.shape[-1]
    checks.floating("w_uk", w_uk, "H*Dn r")
    checks.shape("w_uk", w_uk, (heads * q_nope.shape[-1], latent), "H*Dn r")
    checks.floating("w_uv", w_uv, "H*Dv r")
    if heads == 0 or w_uv.shape[0] % heads:
        checks.fail("w_uv", f"{w_uv.shape[0]} rows", f"a multiple of the {heads} heads")
    checks.shape("w_uv", w_uv, (w_uv.shape[0], latent), "H*Dv r")
    for name, x in (("q_rope", q_rope), ("kv_latent", kv_latent), ("k_rope", k_rope),
                    ("w_uk", w_uk), ("w_uv", w_uv)):  # fmt: skip
        checks.on_device(name, x, "q_nope", q_nope)
        if not torch.is_autocast_enabled(q_nope.device.type):
            checks.same(name, x, "q_nope", q_nope)


def _mla_attention_torch(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    **options: Any,
) -> Any:
    q, k, v = _expand(q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv)
    return attention(q, k, v, impl="torch", **options)


dispatch.register("mla_attention", "reference", mla_attention_reference)
dispatch.register("mla_attention", "torch", _mla_attention_torch)
