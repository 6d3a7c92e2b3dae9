"""The class of a case: the cases that one verdict about speed speaks for.

A class is a short text, "bf16 large width<=1024": the dtype of the first tensor, its size, and what
else decides the speed of the operation. Verdicts (evidence.json, the cache of ``stackwise tune``)
are kept per class, and a call is looked up by its own. A class that nothing raced has no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Up to 2^16 elements a launch costs more than the work; above 2^24 nothing stays in a cache.
_SIZES = ((1 << 16, "tiny"), (1 << 20, "small"), (1 << 24, "medium"))


def case_class(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The class of ``op(*args, **kwargs)``; None where no verdict can exist.

    That is: the first argument is no tensor of DTYPES, or its last dimension is no multiple of 16
    bytes, so that no vector access is possible.
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(first, Tensor) or first.dtype not in _NAMES:
        return None
    if first.dim() == 0 or first.shape[-1] * first.element_size() % 16:
        return None
    head = f"{_NAMES[first.dtype]} {_size(first.numel(), _SIZES, 'large')}"
    detail = _DETAILS[op](*args, **kwargs) if op in _DETAILS else ""
    return f"{head} {detail}" if detail else head


def _size(n: int, limits: tuple[tuple[int, str], ...], beyond: str) -> str:
    for limit, name in limits:
        if n <= limit:
            return name
    return beyond


def _width(x: Tensor) -> str:
    return _size(x.shape[-1], ((1024, "width<=1024"), (4096, "width<=4096")), "width>4096")


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float = 0.0, residual: Tensor | None = None, **_: Any
) -> str:
    return _width(x) if residual is None else f"{_width(x)} residual"


def _layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> str:
    return _width(x) if residual is None else f"{_width(x)} residual"


def _rope(*_: Any, interleaved: bool = False, **__: Any) -> str:
    return "interleaved" if interleaved else "half-split"


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    **_: Any,
) -> str:
    selected = input.shape[0] if rows is None else rows.shape[0]
    limits = ((1 << 24, "logits<=2^24"), (1 << 28, "logits<=2^28"))
    return _size(selected * linear_weight.shape[0], limits, "logits>2^28")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    **_: Any,
) -> str:
    parts = [_length(k, cu_seqlens_q), f"heads {_head(q)}/{_head(v)}"]
    parts += ["packed"] if cu_seqlens_q is not None else []
    parts += ["causal"] if causal else []
    options = {"key_bias": key_bias, "mask": mask, "window": window, "softcap": softcap}
    options |= {"sinks": sinks, "lse": return_lse or None}
    options |= {"deterministic": deterministic or None}
    parts += [name for name, value in options.items() if value is not None]
    return " ".join(parts)


def _kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: str = "gaussian",
    bandwidth: Any = 1.0,
    normalize: bool = True,
    **options: Any,
) -> str:
    name = kernel if normalize else f"{kernel} unnormalised"
    return f"{name} {_attention(q, k, v, **options)}"


def _linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "favor",
    features: Tensor | None = None,
    **options: Any,
) -> str:
    return f"{feature_map} {_attention(q, k, v, **options)}"


def _linear(x: Tensor, weight: Any, *_: Any, **__: Any) -> str:
    return _weight(weight)


def _swiglu_mlp(x: Tensor, w_gate: Any, *_: Any, lora: Any = None, **__: Any) -> str:
    return _weight(w_gate) if lora is None else f"{_weight(w_gate)} lora"


def _weight(weight: Any) -> str:
    """ "4096x4096 nvfp4": the shape in powers of two, and the format of a quantised weight."""
    shape = "x".join(str(1 << max(n - 1, 0).bit_length()) for n in weight.shape[-2:])
    return f"{shape} {'dense' if isinstance(weight, Tensor) else weight.format}"


def _mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> str:
    parts = [_length(k_rope[..., None, :], cu_seqlens_q), f"heads {_head(q_nope)}"]
    parts += ["packed"] if cu_seqlens_q is not None else []
    parts += ["causal"] if causal else []
    return " ".join([*parts, *(name for name, value in options.items() if value)])


def _length(k: Tensor, cu_seqlens: Tensor | None) -> str:
    """Of the keys of one row; of all documents when packed, whose lengths only the GPU knows."""
    limits = ((512, "length<=512"), (2048, "length<=2048"), (8192, "length<=8192"))
    return _size(k.shape[-3], limits, "length>8192")


def _head(x: Tensor) -> int:
    return next((width for width in (32, 64, 96, 128, 192, 256) if x.shape[-1] <= width), 512)


_DETAILS: dict[str, Callable[..., str]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "linear_cross_entropy": _linear_cross_entropy,
    "attention": _attention,
    "mla_attention": _mla_attention,
    "kernel_attention": _kernel_attention,
    "linear_attention": _linear_attention,
    "quantized_linear": _linear,
    "lora_linear": _linear,
    "swiglu_mlp": _swiglu_mlp,
}
