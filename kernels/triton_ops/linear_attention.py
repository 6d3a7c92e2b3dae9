"""Triton linear attention: its operations, gradients and launches. Formulas: the kernels' files.

    forward   states of chunks of keys -> their sum, or causal running sums -> outputs
    backward  the same states again, dq; then states of chunks of queries -> running sums from the
              end -> dk, dv and the bias's gradient

No L x L matrix, no atomics: gradients are the same bits every time. Dense tensors are documents of
equal length. B batch, L length, H heads, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention import softmax_scale
from ..autocast import to_autocast_dtype
from ..library import define
from ..linear_attention import EXPONENTIAL_MAPS
from .launch import architecture, ceil_div, on_device
from .linear_attention_backward import (
    _linear_key_gradients_kernel,
    _linear_query_gradients_kernel,
    _linear_query_states_kernel,
    _linear_value_gradients_kernel,
)
from .linear_attention_forward import (
    _linear_key_states_kernel,
    _linear_outputs_kernel,
    _linear_scan_kernel,
)
from .linear_attention_plan import (
    Chunks,
    LinearPlan,
    block_width,
    cut,
    most_registers,
    plan_linear,
)


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
) -> Tensor:
    """See ``kernels.linear_attention``. Tokens after the last boundary get 0 and no gradient. In a
    causal chunk of the exponential maps, keys further than e^80 apart lose digits."""
    q, k, v = to_autocast_dtype(q.device.type, q, k, v)
    cu_seqlens_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    bias = None if key_bias is None else key_bias.float()
    root = softmax_scale(q, scale) ** 0.5
    options = (feature_map, causal, root)
    return _Linear.apply(q, k, v, features, bias, cu_seqlens_q, cu_seqlens_k, *options)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, norm, row_tops = _forward_op(*arguments)
        ctx.save_for_backward(*arguments[:7], out, norm, row_tops)
        ctx.options = arguments[7:]
        ctx.mark_non_differentiable(norm, row_tops)
        return out, norm, row_tops

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
        dq, dk, dv, dbias = _backward_op(dout, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, dbias if ctx.needs_input_grad[4] else None, *(None,) * 5


@dataclass
class _Call:
    """The tensors as (tokens, H, D), the chunks of both sides, and what the kernels share."""

    q: Tensor
    k: Tensor
    v: Tensor
    features: Tensor | None
    bias: Tensor | None
    queries: Chunks
    keys: Chunks
    feature_map: str
    causal: bool
    root: float
    plan: LinearPlan

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    @property
    def n_features(self) -> int:
        return self.k.shape[2] if self.features is None else self.features.shape[1]

    @property
    def registers(self) -> int | None:
        return most_registers(self.feature_map, architecture(self.q.device))

    @property
    def weights(self) -> Tensor:
        return self.k if self.features is None else self.features

    @property
    def bias_and_stride(self) -> tuple[Tensor, int]:
        """The bias (heads or 1, tokens) and its stride over the key heads."""
        if self.bias is None:
            return self.k, 0
        return self.bias, self.bias.shape[1] if self.bias.shape[0] > 1 else 0

    @property
    def constants(self) -> dict[str, Any]:
        return _constants(
            self.plan, self.feature_map, self.q.dtype, self.k.shape[2], self.v.shape[2],
            self.n_features,
        )  # fmt: skip

    def state(self, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """Buffers (chunks, heads, m, Dv) and (chunks, heads, m)."""
        sums = (len(chunks.table), self.heads, self.n_features)
        return self.empty(*sums, self.v.shape[2]), self.empty(*sums)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)


def _constants(
    plan: LinearPlan, feature_map: str, dtype: torch.dtype, width: int, v_width: int, features: int
) -> dict[str, Any]:
    return {
        "MAP": feature_map,
        "EXPONENT": feature_map in EXPONENTIAL_MAPS,
        "HALF": dtype == torch.bfloat16,
        "WIDTH": width,
        "WIDTH_V": v_width,
        "FEATURES": features,
        "BLOCK_L": plan.rows,
        "BLOCK_D": block_width(width),
        "BLOCK_V": block_width(v_width),
        "BLOCK_F": plan.features,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "SPLIT": dtype != torch.float32,
    }


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    feature_map: str,
    causal: bool,
    root: float,
) -> _Call:
    n_features = k.shape[-1] if features is None else features.shape[0]
    arch = architecture(q.device)
    plan = plan_linear(k.shape[-1], v.shape[-1], n_features, q.dtype, arch, feature_map)
    if bias is not None:
        bias = bias.transpose(0, -2).reshape(bias.shape[-2], -1).contiguous()
    if cu_seqlens_q is None:
        queries, keys = (_dense_chunks(*x.shape[:2], plan.rows, x.device) for x in (q, k))
    else:
        queries = cut(cu_seqlens_q, q.shape[0], plan.rows)
        keys = queries
        if cu_seqlens_k is not None:
            keys = cut(cu_seqlens_k, k.shape[0], plan.rows)
    weights = None if features is None else _terms(features, q.dtype)
    tq, tk, tv = _tokens(q), _tokens(k), _tokens(v)
    return _Call(tq, tk, tv, weights, bias, queries, keys, feature_map, causal, root, plan)


def _terms(features: Tensor, dtype: torch.dtype) -> Tensor:
    """W (1, m, D) in float32, or as two terms (2, m, D) of a smaller dtype."""
    features = features.float()
    if dtype == torch.float32:
        return features[None].contiguous()
    high = features.to(dtype)
    return torch.stack([high, (features - high).to(dtype)])


@lru_cache(maxsize=64)
def _dense_chunks(batch: int, length: int, rows: int, device: torch.device) -> Chunks:
    bounds = torch.arange(0, batch * length + 1, max(length, 1), device=device)
    return cut(bounds, batch * length, rows)


def _tokens(x: Tensor) -> Tensor:
    """(tokens, H, D) with unit stride along D; a view where there is one."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.stride(2) == 1 else x.contiguous()


def _is_empty(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None) -> bool:
    documents = 1 if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    return 0 in (q.numel(), k.numel(), v.numel(), documents)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, norm, row_tops = _new_outputs(q, v, rest[4])
    if _is_empty(q, k, v, rest[2]):
        return out.zero_(), norm.zero_(), row_tops.zero_()
    call = _prepare(q, k, v, *rest)
    if rest[2] is not None:
        out.zero_()
    plan, heads, group = call.plan, call.heads, q.shape[-2] // k.shape[-2]
    bias, s_bias = call.bias_and_stride
    with on_device(q):
        state, sums, tops = _key_states(call)
        _linear_outputs_kernel[(len(call.queries.table) * heads * group,)](
            *(call.q, call.k, call.v, call.weights, bias, state, sums, tops),
            *(out, norm, row_tops, call.queries.table),
            *(call.q.stride(0), call.q.stride(1), call.k.stride(0), call.k.stride(1)),
            *(call.v.stride(0), call.v.stride(1), s_bias, heads, len(call.q), call.root),
            CAUSAL=call.causal,
            HAS_BIAS=call.bias is not None,
            GROUP=group,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
            maxnreg=call.registers,
            **call.constants,
        )
    return out, norm, row_tops


def _key_states(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """S, z and the unit of their features: before each chunk if causal, else of each document."""
    state, sums = call.state(call.keys)
    tops = torch.empty_like(sums)
    plan, bias = call.plan, call.bias_and_stride
    blocks = ceil_div(call.n_features, plan.features)
    _linear_key_states_kernel[(len(call.keys.table) * call.heads * blocks,)](
        *(call.k, call.v, call.weights, bias[0], state, sums, tops, call.keys.table),
        *(call.k.stride(0), call.k.stride(1), call.v.stride(0), call.v.stride(1)),
        *(bias[1], call.heads, call.root),
        HAS_BIAS=call.bias is not None,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        maxnreg=call.registers,
        **call.constants,
    )
    return _scan(call, call.keys, state, sums, tops, reverse=False)


def _scan(
    call: _Call, chunks: Chunks, state: Tensor, sums: Tensor, tops: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the states, one per chunk if causal, else per document, and their units: ``tops``
    are those of the chunks, or for a reverse scan the units of the forward one."""
    plan, documents = call.plan, len(chunks.documents)
    leading = len(chunks.table) if call.causal else documents
    total_sums = call.empty(leading, *sums.shape[1:])
    dtype = torch.bfloat16 if call.q.dtype == torch.bfloat16 else torch.float32
    total = torch.empty((leading, *state.shape[1:]), dtype=dtype, device=state.device)
    running = tops if reverse else torch.empty_like(total_sums)
    rows = ceil_div(call.n_features, plan.scan_features)
    columns = ceil_div(call.v.shape[2], plan.scan_columns)
    _linear_scan_kernel[(documents * call.heads * rows * columns,)](
        *(state, sums, tops, running, total, total_sums, chunks.documents, call.heads),
        CAUSAL=call.causal,
        REVERSE=reverse,
        EXPONENT=call.feature_map in EXPONENTIAL_MAPS,
        WIDTH_V=call.v.shape[2],
        FEATURES=call.n_features,
        BLOCK_F=plan.scan_features,
        BLOCK_V=plan.scan_columns,
        num_warps=plan.scan_warps,
    )
    return total, total_sums, running


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    norm: Tensor,
    row_tops: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = torch.empty if cu_seqlens_q is None else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if _is_empty(q, k, v, cu_seqlens_q):
        dbias = q.new_empty(0) if bias is None else torch.zeros_like(bias)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    call = _prepare(q, k, v, features, bias, cu_seqlens_q, cu_seqlens_k, *options)
    up, plan, heads, group = _tokens(dout), call.plan, call.heads, q.shape[-2] // k.shape[-2]
    launch: dict[str, Any] = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    launch["maxnreg"] = call.registers
    constants = {"CAUSAL": call.causal, "GROUP": group, **call.constants}
    inputs = (call.q, call.k, call.v, call.weights, call.bias_and_stride[0])
    rows = (up, out, norm, row_tops)
    strides = (
        *(call.q.stride(0), call.q.stride(1), call.k.stride(0), call.k.stride(1)),
        *(call.v.stride(0), call.v.stride(1), call.bias_and_stride[1], *up.stride()[:2]),
        *(heads, len(call.q)),
    )
    with_bias = {"HAS_BIAS": call.bias is not None}
    with on_device(q):
        state, sums, tops = _key_states(call)
        _linear_query_gradients_kernel[(len(call.queries.table) * heads * group,)](
            *(*inputs, state, sums, tops, *rows, dq, call.queries.table, *strides, call.root),
            **with_bias,
            **constants,
            **launch,
        )
        back, back_sums = call.state(call.queries)
        blocks = ceil_div(call.n_features, plan.features)
        _linear_query_states_kernel[(len(call.queries.table) * heads * blocks,)](
            *(call.q, call.weights, tops, *rows, back, back_sums, call.queries.table),
            *(*strides[:2], *strides[7:], call.root),
            **constants,
            **launch,
        )
        back, back_sums, _ = _scan(call, call.queries, back, back_sums, tops, reverse=True)
        dbias = new((heads, len(call.k)), dtype=torch.float32, device=q.device)
        _linear_key_gradients_kernel[(len(call.keys.table) * heads,)](
            *(*inputs, back, back_sums, tops, *rows, dk, dbias, call.keys.table),
            *(*strides, len(call.k), call.root),
            **with_bias,
            **constants,
            **launch,
        )
        _linear_value_gradients_kernel[(len(call.keys.table) * heads,)](
            *(call.q, call.k, *inputs[3:], back, tops, *rows, dv, call.keys.table),
            *(*strides[:4], *strides[6:], call.root),
            **with_bias,
            **constants,
            **launch | {"num_warps": plan.value_warps},
        )
    return dq, dk, dv, q.new_empty(0) if bias is None else _bias_gradient(dbias, bias)


def _bias_gradient(dbias: Tensor, bias: Tensor) -> Tensor:
    """(heads, tokens) to the shape of the bias (B, heads or 1, L) or (heads or 1, tokens)."""
    if bias.shape[-2] == 1:
        dbias = dbias.sum(0, keepdim=True)
    if bias.dim() == 3:
        dbias = dbias.unflatten(1, (bias.shape[0], -1)).transpose(0, 1)
    return dbias.contiguous()


def _new_outputs(q: Tensor, v: Tensor, feature_map: str) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows = (q.shape[-2], q.shape[:-2].numel())
    tops = rows if feature_map in EXPONENTIAL_MAPS else (0,)
    return out, q.new_empty(rows, dtype=torch.float32), q.new_empty(tops, dtype=torch.float32)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(q, v, rest[4])


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, features: Any, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dbias


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? features, Tensor? bias, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k"
)
_OPTIONS = "str feature_map, bool causal, float root"
_forward_op = define(
    f"triton_linear_attention({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_op = define(
    f"triton_linear_attention_backward(Tensor dout, {_INPUTS}, Tensor out, Tensor norm, "
    f"Tensor row_tops, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
