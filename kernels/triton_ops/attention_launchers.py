"""Launches the attention kernels on checked tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention_backward import _attention_backward_keys_kernel, _attention_delta_kernel
from .attention_backward_queries import _attention_backward_queries_kernel
from .attention_forward import _attention_forward_kernel
from .attention_launch import (
    DELTA_ROWS,
    DELTA_WARPS,
    Form,
    Tiles,
    block,
    heads_per_section,
    plan_attention,
    split_width,
)
from .attention_schedule import Documents, documents
from .launch import architecture, ceil_div, on_device
from .reduction import column_sum


@dataclass(frozen=True)
class Problem:
    """Inputs as (B, L, H, D) views with unit stride along D, and what the kernels are told.

    ``q`` and ``k`` are pairs of the two pieces of the head dimension; the second repeats the first
    where there is none.
    """

    q: tuple[Tensor, Tensor]
    k: tuple[Tensor, Tensor]
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None
    packed: Documents | None
    form: Form
    scalars: tuple[int, int, float, float]  # left, right, scale, softcap

    @property
    def batch(self) -> int:
        return self.v.shape[0]

    @property
    def heads(self) -> int:
        """Key heads."""
        return self.v.shape[2]

    @property
    def len_q(self) -> int:
        return self.q[0].shape[1]

    @property
    def len_k(self) -> int:
        return self.v.shape[1]

    def grid(self, tiles: Tiles, queries: bool) -> tuple[int, tuple[Any, ...]]:
        """Programs, and the kernel arguments from the lengths to the cap; the schedule first."""
        left, right, _, _ = self.scalars
        if self.packed is not None:
            if queries:
                schedule = self.packed.queries(self.form.group, tiles.block_m, left, right)
            else:
                schedule = self.packed.keys(tiles.block_n, left, right)
            return len(schedule) * self.heads, (schedule, 0, 0, self.heads, 1, 1, *self.scalars)
        rows, size = (self.len_q * self.form.group, tiles.block_m)
        if not queries:
            rows, size = self.len_k, tiles.block_n
        n_tiles, programs = ceil_div(rows, size), self.batch * self.heads
        width = sum(self.form.width) + sum(self.form.v_width)
        head_bytes = self.len_k * width * self.v.element_size()
        section = heads_per_section(programs, head_bytes, self.form.right)
        lengths = (self.len_q, self.len_k, self.heads, n_tiles, section)
        return n_tiles * programs, (self.v, *lengths, *self.scalars)


def make_problem(
    q: Tensor,
    q_rope: Tensor | None,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> Problem:
    varlen = cu_seqlens_q is not None
    q_pieces, k_pieces = pieces(q, q_rope), pieces(k, k_rope)
    heads = k.shape[-2]
    width = (q_pieces[0].shape[-1], 0 if q_pieces[1] is q_pieces[0] else q_pieces[1].shape[-1])
    form = Form(
        width=width,
        v_width=split_width(v.shape[-1]),
        group=q.shape[-2] // heads,
        varlen=varlen,
        left=left >= 0,
        right=right >= 0,
        bias=key_bias is not None,
        cap=softcap > 0,
        exact=q.dtype == torch.float32,
    )
    packed = None
    if cu_seqlens_q is not None:
        packed = documents(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    bias = key_bias if key_bias is None or key_bias.dim() == 3 else key_bias[None]
    return Problem(
        q=(readable(q_pieces[0]), readable(q_pieces[1])),
        k=(readable(k_pieces[0]), readable(k_pieces[1], heads)),
        v=readable(v),
        bias=None if bias is None else _unit_stride(bias),
        sinks=None if sinks is None else sinks.contiguous(),
        packed=packed,
        form=form,
        scalars=(left, right, scale, softcap),
    )


def pieces(x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two pieces of the head dimension; the first twice where it is one."""
    if rope is not None:
        return x, rope
    first, second = split_width(x.shape[-1])
    return (x[..., :first], x[..., first:]) if second else (x, x)


def readable(x: Tensor, heads: int | None = None) -> Tensor:
    """(B, L, H, D) with unit stride along D, one head repeated for ``heads``; copied where the
    offsets inside a tile, up to 128 rows and all heads, would not fit 32 bits."""
    x = x if x.dim() == 4 else x[None]
    x = _unit_stride(x)
    if 128 * x.stride(1) + x.shape[2] * x.stride(2) >= 1 << 31:
        x = x.contiguous()
    return x if heads is None else x.expand(-1, -1, heads, -1)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Those over batch, length and heads."""
    return [x.stride(i) for x in tensors for i in range(3)]


def _bias_arguments(problem: Problem, other: Tensor) -> tuple[Tensor, int, int]:
    if problem.bias is None:
        return other, 0, 0
    b = problem.bias
    return b, b.stride(0), b.stride(1) if b.shape[1] > 1 else 0


def launch_forward(*arguments: Any) -> None:
    """Fills ``out`` and ``lse``, the last two arguments."""
    *inputs, out, lse = arguments
    problem = make_problem(*inputs)
    tiles = plan_attention(problem.form, architecture(out.device)).forward
    programs, rest = problem.grid(tiles, True)
    bias, *bias_strides = _bias_arguments(problem, lse)
    (q, q1), (k, k1), v = problem.q, problem.k, problem.v
    with on_device(out):
        _attention_forward_kernel[(programs,)](
            *(q, q1, k, k1, v, out, lse, bias),
            lse if problem.sinks is None else problem.sinks,
            rest[0],
            *strides(q, q1, k, k1, v),
            *(*bias_strides, lse.shape[-1]),
            *rest[1:],
            **problem.form.constants,
            **tiles.constants,
            HAS_SINKS=problem.sinks is not None,
            **tiles.options,
        )


def launch_backward(dout: Tensor, dlse: Tensor | None, *arguments: Any) -> None:
    """Fills ``gradients``, the last argument; ``wanted``, before it, says which are asked for."""
    *inputs, out, lse, wanted, gradients = arguments
    q_grad, k_grad, v_grad, bias_grad, sinks_grad = wanted
    if out.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    problem = make_problem(*inputs)
    dout = readable(dout)
    with on_device(out):
        stats, partial = _launch_delta(problem, readable(out), dout, lse, dlse)
        if sinks_grad:
            gradients[6].copy_(column_sum(partial, torch.float32))
        if q_grad:
            parts = pieces(gradients[0], None if inputs[1] is None else gradients[1])
            _launch_queries(problem, dout, stats, parts)
        if k_grad or v_grad or bias_grad:
            rope = inputs[3] is not None
            _backward_keys(problem, dout, stats, rope, gradients[2:6], wanted[1:4])


def _launch_delta(
    problem: Problem, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """stats (2, ...) and the sink gradients of each tile of rows (tiles, Hq)."""
    batch, length, heads, width = out.shape
    stats = torch.empty((2, *lse.shape), dtype=torch.float32, device=lse.device)
    n_tiles = ceil_div(length, DELTA_ROWS)
    partial = torch.empty((n_tiles * batch, heads), dtype=torch.float32, device=lse.device)
    _attention_delta_kernel[(n_tiles, heads, batch)](
        *(out, dout, lse, lse if dlse is None else dlse.contiguous()),
        *(lse if problem.sinks is None else problem.sinks, stats, partial),
        *(*strides(out, dout), length, heads, lse.numel()),
        WIDTH=width,
        BLOCK_D=block(width),
        BLOCK_M=DELTA_ROWS,
        HAS_DLSE=dlse is not None,
        HAS_SINKS=problem.sinks is not None,
        num_warps=DELTA_WARPS,
    )
    return stats, partial


def _launch_queries(
    problem: Problem, dout: Tensor, stats: Tensor, outputs: tuple[Tensor, Tensor]
) -> None:
    tiles = plan_attention(problem.form, architecture(dout.device)).queries
    programs, rest = problem.grid(tiles, True)
    bias, *bias_strides = _bias_arguments(problem, stats)
    (q, q1), (k, k1), v = problem.q, problem.k, problem.v
    dq, dq1 = (x if x.dim() == 4 else x[None] for x in outputs)
    _attention_backward_queries_kernel[(programs,)](
        *(q, q1, k, k1, v, dout, stats, bias, dq, dq1, rest[0]),
        *strides(q, q1, k, k1, v, dout, dq, dq1),
        *(*bias_strides, stats.shape[-1], stats.stride(0)),
        *rest[1:],
        **problem.form.constants,
        **tiles.constants,
        **tiles.options,
    )


def _backward_keys(
    problem: Problem,
    dout: Tensor,
    stats: Tensor,
    rope: bool,
    gradients: tuple[Tensor, ...],
    wanted: tuple[bool, bool, bool],
) -> None:
    """dk, dk_rope, dv and dbias; what heads share is summed over them here, in float32."""
    dk, dk_rope, dv, dbias = gradients
    k_grad, v_grad, bias_grad = wanted
    batch, len_k, heads = problem.v.shape[:3]

    def each_head(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=stats.device)

    outputs = problem.k
    if k_grad:
        outputs = pieces(dk, dk_rope if rope else None)
    elif bias_grad:
        k, k1 = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in problem.k)
        outputs = (k, k1)
    shared = k_grad and outputs[1].shape[-2] < heads
    if shared:
        outputs = (outputs[0], each_head(batch, len_k, heads, dk_rope.shape[-1]))
    sums = each_head(batch, heads, len_k) if bias_grad else stats
    targets = (*outputs, dv if v_grad else problem.v, sums)
    plan = plan_attention(problem.form, architecture(dout.device))
    with_keys = k_grad or bias_grad
    launches = [(plan.keys, with_keys, v_grad)]
    if plan.values is not None:
        launches = [(plan.keys, with_keys, False), (plan.values, False, v_grad)]
    for tiles, with_k, with_v in launches:
        if with_k or with_v:
            _launch_keys(problem, tiles, dout, stats, targets, with_k, with_v, bias_grad and with_k)
    if shared:
        dk_rope.copy_(outputs[1].sum(2, keepdim=True).view(dk_rope.shape))
    if bias_grad:
        sums = sums if dbias.shape[-2] == heads else sums.sum(1, keepdim=True)
        dbias.copy_(sums.view(dbias.shape))


def _launch_keys(
    problem: Problem,
    tiles: Tiles,
    dout: Tensor,
    stats: Tensor,
    targets: tuple[Tensor, ...],
    k_grad: bool,
    v_grad: bool,
    bias_grad: bool,
) -> None:
    programs, rest = problem.grid(tiles, False)
    if programs == 0:
        return
    bias, *bias_strides = _bias_arguments(problem, stats)
    (q, q1), (k, k1), v = problem.q, problem.k, problem.v
    dk, dk1, dv = (x if x.dim() == 4 else x[None] for x in targets[:3])
    _attention_backward_keys_kernel[(programs,)](
        *(q, q1, k, k1, v, dout, stats, bias, dk, dk1, dv, targets[3], rest[0]),
        *strides(q, q1, k, k1, v, dout, dk, dk1, dv),
        *(*bias_strides, stats.shape[-1], problem.len_k, stats.stride(0)),
        *rest[1:],
        **problem.form.constants,
        **tiles.constants,
        K_GRAD=k_grad,
        V_GRAD=v_grad,
        BIAS_GRAD=bias_grad,
        **tiles.options,
    )
