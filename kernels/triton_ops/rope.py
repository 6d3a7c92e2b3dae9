"""Rotary position embedding of queries and keys in one launch, forward and backward.

With a pair (x1, x2) of dimensions, c1 s1 and c2 s2 the table columns of its two members:

    forward   y1 = x1 c1 − x2 s1        y2 = x2 c2 + x1 s2
    backward  dx1 = dy1 c1 + dy2 s2     dx2 = dy2 c2 − dy1 s1

Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved; dimensions after R are copied. The tables
are read once for several heads. All arithmetic is float32. Inputs are read in place at any strides
over batch, length and heads, as in a fused projection; only a strided last dimension is copied.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from .launch import ceil_div, on_device, power_of_two
from .machine_code import TRITON_TYPES, VECTOR_LOAD, VECTOR_STORE, Case

# Bytes per program: with 128 threads four 16-byte vectors each. Twice that spills in float32.
TILE_BYTES = 8192
MAX_HEADS = 8

# Every token has its own table row; more of them for one head spill on sm_100.
MAX_TOKENS = 32


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """q (B, L, Hq, D), k (B, L, Hk, D) or packed (total, H, D); tables (L, R) or (B, L, R)."""
    return _Rope.apply(q, k, cos, sin, interleaved)


@dataclass(frozen=True)
class Plan:
    """A program takes ``block_tokens`` x ``block_heads`` x ``block_pairs`` pairs."""

    block_tokens: int
    block_heads: int
    block_pairs: int
    block_rest: int
    num_warps: int = 4

    @property
    def constants(self) -> dict[str, int]:
        return {
            "BLOCK_T": self.block_tokens,
            "BLOCK_H": self.block_heads,
            "BLOCK_P": self.block_pairs,
            "BLOCK_REST": self.block_rest,
        }

    def programs(self, tokens: int, heads_q: int, heads_k: int) -> int:
        head_blocks = ceil_div(heads_q, self.block_heads) + ceil_div(heads_k, self.block_heads)
        return ceil_div(tokens, self.block_tokens) * head_blocks


def plan_rope(heads: int, pairs: int, rest: int, itemsize: int) -> Plan:
    """Up to eight heads share a table row, tokens fill the tile; ``rest`` dimensions are copied."""
    block_pairs = power_of_two(pairs)
    block_heads = min(MAX_HEADS, power_of_two(heads))
    fitting = TILE_BYTES // (2 * itemsize * block_pairs * block_heads)
    block_tokens = min(MAX_TOKENS, max(1, fitting))
    return Plan(block_tokens, block_heads, block_pairs, power_of_two(rest) if rest else 0)


@triton.jit
def _rope_kernel(
    q, k, cos, sin, out_q, out_k,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh,
    stride_tb, stride_tl, stride_oq, stride_ok, stride_oh,
    n_tokens, length, heads_q, heads_k,
    PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotates BLOCK_T tokens of BLOCK_H heads of q, or, for the last programs of a token block, k.

    q (batch, length, heads_q, 2 PAIRS + REST), k likewise, tokens = batch · length; outputs are
    (token, head, dimension) with strides stride_oq or stride_ok, stride_oh, 1.
    """
    q_blocks = (heads_q - 1) // BLOCK_H + 1
    k_blocks = (heads_k - 1) // BLOCK_H + 1
    blocks = q_blocks + k_blocks
    token = (tl.program_id(0) // blocks) * BLOCK_T
    block = tl.program_id(0) % blocks
    o_token = token + tl.arange(0, BLOCK_T)[:, None, None]
    m_token = o_token < n_tokens
    i_batch = (o_token // length).to(tl.int64)
    i_position = (o_token % length).to(tl.int64)
    p_table = i_batch * stride_tb + i_position * stride_tl
    if block < q_blocks:
        o_head = block * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
        p_in = q + i_batch * stride_qb + i_position * stride_ql + o_head.to(tl.int64) * stride_qh
        p_out = out_q + o_token.to(tl.int64) * stride_oq + o_head * stride_oh
        _rotate_heads(
            p_in, p_out, cos + p_table, sin + p_table, m_token, m_token & (o_head < heads_q),
            PAIRS, REST, INTERLEAVED, BACKWARD, BLOCK_P, BLOCK_REST,
        )  # fmt: skip
    else:
        o_head = (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
        p_in = k + i_batch * stride_kb + i_position * stride_kl + o_head.to(tl.int64) * stride_kh
        p_out = out_k + o_token.to(tl.int64) * stride_ok + o_head * stride_oh
        _rotate_heads(
            p_in, p_out, cos + p_table, sin + p_table, m_token, m_token & (o_head < heads_k),
            PAIRS, REST, INTERLEAVED, BACKWARD, BLOCK_P, BLOCK_REST,
        )  # fmt: skip


@triton.jit
def _rotate_heads(
    p_in, p_out, p_cos, p_sin, m_table, m_head,
    PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """p_in, p_out (T, H, 1) first elements of heads; p_cos, p_sin (T, 1, 1) first table columns."""
    if PAIRS > 0:
        x1, x2 = _load_pairs(p_in, m_head, PAIRS, INTERLEAVED, BLOCK_P)
        c1, c2 = _load_pairs(p_cos, m_table, PAIRS, INTERLEAVED, BLOCK_P)
        s1, s2 = _load_pairs(p_sin, m_table, PAIRS, INTERLEAVED, BLOCK_P)
        if BACKWARD:
            y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
        else:
            y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
        _store_pairs(p_out, m_head, y1, y2, PAIRS, INTERLEAVED, BLOCK_P)
    if REST > 0:
        o_rest = tl.arange(0, BLOCK_REST)[None, None, :]
        m_rest = m_head & (o_rest < REST)
        rest = tl.load(p_in + 2 * PAIRS + o_rest, mask=m_rest, other=0.0)
        tl.store(p_out + 2 * PAIRS + o_rest, rest, mask=m_rest)


@triton.jit
def _load_pairs(
    pointer, mask, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr
):
    """First and second members of the pairs, float32."""
    if INTERLEAVED:
        o_both = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        both = tl.load(pointer + o_both, mask=mask & (o_both < 2 * PAIRS), other=0.0)
        shape: tl.constexpr = (both.shape[0], both.shape[1], BLOCK_P, 2)
        return tl.split(tl.reshape(both.to(tl.float32), shape))
    else:
        o_pair = tl.arange(0, BLOCK_P)[None, None, :]
        mask = mask & (o_pair < PAIRS)
        first = tl.load(pointer + o_pair, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(pointer + PAIRS + o_pair, mask=mask, other=0.0).to(tl.float32)
        return first, second


@triton.jit
def _store_pairs(
    pointer, mask, first, second,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        o_both = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        both = tl.interleave(first, second).to(pointer.dtype.element_ty)
        tl.store(pointer + o_both, both, mask=mask & (o_both < 2 * PAIRS))
    else:
        o_pair = tl.arange(0, BLOCK_P)[None, None, :]
        mask = mask & (o_pair < PAIRS)
        tl.store(pointer + o_pair, first.to(pointer.dtype.element_ty), mask=mask)
        tl.store(pointer + PAIRS + o_pair, second.to(pointer.dtype.element_ty), mask=mask)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if not q.numel() + k.numel():
        return out_q, out_k
    batched_q, batched_k = _batched(q), _batched(k)
    # One stride for both tables: they come from one computation and nearly always agree.
    cos, sin = (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())
    if cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    batch, length, heads_q, width = batched_q.shape
    heads_k, pairs = k.shape[-2], cos.shape[-1] // 2
    plan = plan_rope(heads_q, pairs, width - 2 * pairs, q.element_size())
    with on_device(q):
        _rope_kernel[(plan.programs(batch * length, heads_q, heads_k),)](
            *(batched_q, batched_k, cos, sin, out_q, out_k),
            *(*batched_q.stride()[:3], *batched_k.stride()[:3]),
            *(cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2)),
            *(heads_q * width, heads_k * width, width),
            *(batch * length, length, heads_q, heads_k),
            PAIRS=pairs,
            REST=width - 2 * pairs,
            INTERLEAVED=interleaved,
            BACKWARD=backward,
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return out_q, out_k


def _batched(x: Tensor) -> Tensor:
    """(B, L, H, D) with unit stride along D; packed tensors are a batch of one."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotate_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_rotate_op = define(
    "triton_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool backward)"
    " -> (Tensor, Tensor)",
    _rotate,
    _rotate_fake,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate_op(q, k, cos, sin, interleaved, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return (*_rotate_op(dq, dk, cos, sin, ctx.interleaved, True), None, None, None)


def machine_code_cases(arch: int) -> Iterator[Case]:
    """LLaMA's and GPT-J's head widths, many heads and one, tables of both widths.

    Every other width is a compilation of its own with these blocks or smaller ones.
    """
    # (heads, pairs, other dimensions, backward)
    shapes = (
        *((32, 32, 0, False), (32, 64, 0, False), (32, 64, 0, True)),
        *((16, 32, 192, False), (1, 32, 0, False)),
    )
    for kind in TRITON_TYPES.values():
        for table in dict.fromkeys(("fp32", kind)):
            for shape in shapes:
                for interleaved in (False, True):
                    yield _case(arch, kind, table, *shape, interleaved)


def _case(
    arch: int,
    kind: str,
    table: str,
    heads: int,
    pairs: int,
    rest: int,
    backward: bool,
    interleaved: bool,
) -> Case:
    strides = tuple(name for name in _rope_kernel.arg_names if name.startswith("stride_"))
    plan = plan_rope(heads, pairs, rest, 4 if kind == "fp32" else 2)
    return Case(
        kernel=_rope_kernel,
        arch=arch,
        signature=dict.fromkeys(("q", "k", "out_q", "out_k"), f"*{kind}")
        | dict.fromkeys(("cos", "sin"), f"*{table}")
        | dict.fromkeys((*strides, "n_tokens", "length", "heads_q", "heads_k"), "i32"),
        constants={
            "PAIRS": pairs,
            "REST": rest,
            "INTERLEAVED": interleaved,
            "BACKWARD": backward,
            **plan.constants,
        },
        num_warps=plan.num_warps,
        aligned=strides,
        expects=(VECTOR_LOAD, VECTOR_STORE),
    )
