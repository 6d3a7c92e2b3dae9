"""One or more sample calls of every operation, for what must hold for all of them.

A new operation or a new ``torch.library`` operation without a sample fails test_opcheck.py. The
interpreter's tests run the same samples through the Triton variants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stackwise import kernels

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """``call(**tensors)`` is one call of ``op``; ``tensors`` draws its arguments.

    ``constants`` get no gradient (nor do integers), ``dynamic`` gives the dimensions that
    may change from call to call: {argument: (dimension, ...)}.
    """

    op: str
    name: str
    tensors: Callable[[], Tensors]
    options: dict[str, Any] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    dynamic: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def call(self, impl: str | None = None, **tensors: Any) -> Any:
        return getattr(kernels, self.op)(**tensors, **self.options, impl=impl)

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensors:
        """The arguments, floating-point ones in ``dtype``; leaves that require a gradient where one
        is wanted."""
        torch.manual_seed(0)
        drawn = {}
        for name, x in self.tensors().items():
            if x.dtype.is_floating_point:
                # A key bias is float32 beside half-precision tensors.
                wide = torch.promote_types(dtype, torch.float32)
                x = x.to(wide if name == "key_bias" else dtype)
                x = x.requires_grad_(name not in self.constants)
            drawn[name] = x
        return drawn

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def results(call: Callable[..., Any], tensors: Tensors) -> Tensors:
    """Outputs and gradients of ``call(**tensors)`` by name; upstream gradients are a fixed
    function of the outputs' shapes, above 0 so that no sum over rows cancels, and exact in every
    dtype."""
    outs = call(**tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    leaves = {n: x for n, x in tensors.items() if x.requires_grad}
    loss = torch.zeros((), dtype=torch.float64)
    for place, out in enumerate(outs):
        up = torch.linspace(0.5, 1.5 + place, out.numel()).bfloat16().double().view(out.shape)
        loss = loss + (out.double().masked_fill(out == -torch.inf, 0.0) * up).sum()
    # Without documents a definition does not touch the keys.
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    return named | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def _dense(
    heads: int = 4, kv_heads: int = 4, lq: int = 7, lk: int = 7, v_width: int = 16
) -> Tensors:
    return {
        "q": torch.randn(2, lq, heads, 16),
        "k": torch.randn(2, lk, kv_heads, 16),
        "v": torch.randn(2, lk, kv_heads, v_width),
    }


def _packed(lengths: tuple[int, ...] = (5, 17, 3), v_width: int = 16) -> Tensors:
    total = sum(lengths)
    return {
        "q": torch.randn(total, 4, 16),
        "k": torch.randn(total, 2, 16),
        "v": torch.randn(total, 2, v_width),
        "cu_seqlens_q": torch.tensor([0, *lengths]).cumsum(0).int(),
    }


def _mla() -> Tensors:
    return {
        "q_nope": torch.randn(2, 7, 4, 8),
        "q_rope": torch.randn(2, 7, 4, 4),
        "kv_latent": torch.randn(2, 7, 6),
        "k_rope": torch.randn(2, 7, 4),
        "w_uk": torch.randn(32, 6),
        "w_uv": torch.randn(20, 6),
    }


def _mla_packed() -> Tensors:
    flat = {n: x.flatten(0, 1) if n[:2] != "w_" else x for n, x in _mla().items()}
    return flat | {"cu_seqlens_q": torch.tensor([0, 5, 5, 14], dtype=torch.int32)}


def _norm(*names: str) -> Callable[[], Tensors]:
    shapes = {"x": (3, 5, 16), "residual": (3, 5, 16), "weight": (16,), "bias": (16,)}
    return lambda: {name: torch.randn(shapes[name]) for name in ("x", "weight", *names)}


def _rope(rows: bool = False, packed: bool = False) -> Tensors:
    lead = (2, 7) if rows else (7,)
    angles = torch.randn(*lead, 3).repeat_interleave(2, -1)
    tensors = {
        "q": torch.randn(2, 7, 4, 8),
        "k": torch.randn(2, 7, 2, 8),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    return {n: x.flatten(0, 1) for n, x in tensors.items()} if packed else tensors


def _loss(*names: str) -> Callable[[], Tensors]:
    def draw() -> Tensors:
        target = torch.randint(11, (9,))
        target[2] = -100
        extras = {
            "linear_bias": torch.randn(11),
            "token_weight": torch.rand(9),
            "rows": torch.tensor([1, 2, 7, 4]),
        }
        tensors = {"input": torch.randn(9, 8), "linear_weight": torch.randn(11, 8)}
        return tensors | {"target": target} | {name: extras[name] for name in names}

    return draw


def _pair(first: str, second: str) -> Callable[[], Tensors]:
    return lambda: {first: torch.randn(5, 16), second: torch.randn(5, 16)}


def _bias_gelu() -> Tensors:
    return {"x": torch.randn(5, 16), "bias": torch.randn(16)}


def _features() -> Tensors:
    return {"x": torch.randn(2, 5, 3, 8) / 2, "features": torch.randn(6, 8)}


def _linear(*names: str, width: int = 128) -> Callable[[], Tensors]:
    shapes = {
        "x": (2, 5, width),
        "weight": (24, width),
        "bias": (24,),
        "lora_a": (4, width),
        "lora_b": (24, 4),
        "w_gate": (24, width),
        "w_up": (24, width),
        "w_down": (width, 24),
    }
    return lambda: {name: torch.randn(shapes[name]) for name in ("x", *names)}


def _quantized(rows: int = 24, columns: int = 128) -> kernels.QuantizedTensor:
    generator = torch.Generator().manual_seed(1)
    return kernels.quantize(torch.randn(rows, columns, generator=generator), "nf4")


_LENGTHS = {"q": (0, 1), "k": (0, 1), "v": (0, 1)}
_ROWS = {"x": (1,), "residual": (1,)}
_TABLES = ("cos", "sin")
_TOKENS = {"input": (0,), "target": (0,)}
_POSITIONS = {"q": (1,), "k": (1,), "cos": (0,), "sin": (0,)}

CASES = (
    Case("attention", "dense", _dense, dynamic=_LENGTHS),
    Case("attention", "gqa", lambda: _dense(4, 2, 5, 9), {"causal": True}, dynamic=_LENGTHS),
    Case("attention", "v-width", lambda: _dense(v_width=24), {"causal": True}),
    Case("attention", "window", lambda: _dense(4, 2), {"window": (2, 1)}, dynamic=_LENGTHS),
    Case("attention", "bias", lambda: _dense(4, 2) | {"key_bias": torch.randn(2, 2, 7)}),
    Case(
        "attention",
        "constant-bias",
        lambda: _dense(4, 2) | {"key_bias": torch.randn(2, 1, 7)},
        constants=("key_bias",),
    ),
    Case("attention", "mask", lambda: _dense() | {"mask": torch.rand(2, 1, 7, 7) > 0.4}),
    Case(
        "attention",
        "softcap-sinks-lse",
        lambda: _dense(4, 2) | {"sinks": torch.randn(4)},
        {"softcap": 2.0, "return_lse": True},
    ),
    Case("attention", "packed", _packed, {"causal": True}, dynamic={n: (0,) for n in "qkv"}),
    Case("attention", "packed-v-width", lambda: _packed(v_width=24), {"window": (3, 2)}),
    Case(
        "attention",
        "packed-bias-sinks-lse",
        lambda: _packed() | {"sinks": torch.randn(4), "key_bias": torch.randn(2, 25)},
        {"causal": True, "return_lse": True},
        dynamic={n: (0,) for n in "qkv"} | {"key_bias": (1,)},
    ),
    Case("attention", "packed-softcap", _packed, {"softcap": 1.5, "window": (3, 2)}),
    Case("mla_attention", "dense", _mla, {"causal": True}),
    Case("mla_attention", "packed", _mla_packed),
    Case("rms_norm", "plain", _norm(), dynamic=_ROWS),
    Case("rms_norm", "residual", _norm("residual"), {"weight_offset": 1.0}, dynamic=_ROWS),
    Case("layer_norm", "plain", _norm("bias"), dynamic=_ROWS),
    Case("layer_norm", "no-bias", _norm()),
    Case("layer_norm", "residual", _norm("bias", "residual"), dynamic=_ROWS),
    Case("rope", "half-split", _rope, constants=_TABLES, dynamic=_POSITIONS),
    Case("rope", "interleaved", _rope, {"interleaved": True}, _TABLES),
    Case("rope", "position-ids", lambda: _rope(rows=True), {}, _TABLES),
    Case("rope", "packed", lambda: _rope(rows=True, packed=True), {"interleaved": True}, _TABLES),
    Case("swiglu", "plain", _pair("gate", "up"), dynamic={"gate": (0,), "up": (0,)}),
    Case("geglu", "erf", _pair("gate", "up"), dynamic={"gate": (0,), "up": (0,)}),
    Case("geglu", "tanh", _pair("gate", "up"), {"approximate": "tanh"}),
    Case("bias_gelu", "tanh", _bias_gelu, dynamic={"x": (0,)}),
    Case("bias_gelu", "erf", _bias_gelu, {"approximate": "none"}),
    Case(
        "linear_cross_entropy",
        "mean",
        _loss("linear_bias", "rows", "token_weight"),
        {"z_loss": 1e-3, "label_smoothing": 0.1},
        ("token_weight",),
    ),
    Case("linear_cross_entropy", "sum", _loss(), {"reduction": "sum"}, dynamic=_TOKENS),
    Case("linear_cross_entropy", "none", _loss("rows"), {"reduction": "none", "softcap": 3.0}),
    Case("random_features", "cos", _features, dynamic={"x": (0, 1)}),
    Case("random_features", "cossin", _features, {"kind": "cossin"}),
    Case("random_features", "positive", _features, {"kind": "positive"}),
    Case("kernel_attention", "gaussian", _dense, {"causal": True}, dynamic=_LENGTHS),
    Case(
        "kernel_attention",
        "laplacian-bandwidth",
        lambda: _dense(4, 2) | {"bandwidth": 1 + torch.rand(4)},
        {"kernel": "laplacian", "window": (2, 1)},
    ),
    Case("kernel_attention", "packed", _packed, {"normalize": False}),
    Case("linear_attention", "elu", lambda: _dense(4, 2), {"feature_map": "elu"}),
    Case(
        "linear_attention",
        "favor-causal",
        lambda: _dense() | {"features": torch.randn(12, 16)},
        {"causal": True},
        constants=("features",),
    ),
    Case("lora_linear", "dense", _linear("weight", "lora_a", "lora_b", "bias"), {"scaling": 0.5}),
    Case("lora_linear", "nf4", _linear("lora_a", "lora_b"), {"weight": _quantized()}),
    Case("quantized_linear", "nf4", _linear("bias"), {"weight": _quantized()}),
    Case("swiglu_mlp", "dense", _linear("w_gate", "w_up", "w_down")),
    Case(
        "swiglu_mlp",
        "nf4",
        _linear(),
        {"w_gate": _quantized(64), "w_up": _quantized(64), "w_down": _quantized(128, 64)},
    ),
)
