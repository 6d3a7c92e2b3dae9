"""Linear cross entropy in plain PyTorch: chunks of rows, gradients in the forward pass.

Per chunk: logits = x Wᵀ, turned in place into p - onehot (float32 in cache-sized blocks), then
dx = f · (logits W) and dW += logitsᵀ (f · x) with f the rows' factors; dW accumulates in float32.
The upstream gradient of a sum or mean is one scalar, so it can be applied at the end. For "none" it
is not known in time: backward then computes the chunks again, as does a second backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch
from .library import define
from .linear_cross_entropy import reduce
from .workspace import Workspace, borrow

_BLOCK = 1 << 21  # elements of float32 softmax work that stay in a core's share of the caches
_CHUNK_BYTES = {2: 1 << 27, 4: 1 << 26, 8: 1 << 26}  # logits of one chunk, by element size
_ALIGN = 64  # oneDNN's product with transposed logits is faster with aligned rows


def linear_cross_entropy_torch(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    dtype = input.dtype if input.dtype == torch.float64 else dtype
    tensors = (input, linear_weight, target, linear_bias, token_weight, rows)
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (input, linear_weight, linear_bias)
    ):
        return _LinearCrossEntropy.apply(*tensors, reduction, dtype, numbers)
    losses = _rows_op(*tensors, None, *numbers, False, False, False, dtype)[0]
    return reduce(losses, _selected(target, rows) != ignore_index, reduction)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        token_weight: Tensor | None,
        rows: Tensor | None,
        reduction: str,
        dtype: torch.dtype,
        numbers: tuple[int, float, float, float | None],
    ) -> Tensor:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        now = needs if reduction != "none" else (False, False, False)
        tensors = (input, weight, target, bias, token_weight, rows)
        losses, *grads = _rows_op(*tensors, None, *numbers, *now, dtype)
        kept = _selected(target, rows) != numbers[0]
        count = kept.sum().clamp(min=1) if reduction == "mean" else None
        ctx.save_for_backward(*tensors, count)
        ctx.options = (numbers, dtype, needs)
        ctx.grads = None if reduction == "none" else grads
        return reduce(losses, kept, reduction)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        *tensors, count = ctx.saved_tensors
        numbers, dtype, needs = ctx.options
        factor = upstream if count is None else upstream / count
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            factor = factor.expand(_selected(tensors[2], tensors[5]).shape)
            grads = _rows_op(*tensors, factor, *numbers, *needs, dtype)[1:]
        elif torch.compiler.is_compiling():
            grads = [g * factor for g in grads]
        elif factor.device.type != "cpu" or factor != 1.0:
            for grad in grads:
                grad.mul_(factor)
        owners = (tensors[0], tensors[1], tensors[3])
        out = [
            grad.to(x.dtype) if need else None
            for grad, x, need in zip(grads, owners, needs, strict=True)
        ]
        return out[0], out[1], None, out[2], None, None, None, None, None


def _selected(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


@dataclass
class _Pass:
    """One pass over the rows that count: what every chunk needs."""

    x: Tensor  # (n, H) in the compute dtype
    weight: Tensor  # (V, H) in the compute dtype
    bias: Tensor | None  # (V,) float32 or float64
    target: Tensor  # (n,)
    factor: Tensor | None  # (n,) what each row's gradient is multiplied by; None: 1
    label_smoothing: float
    z_loss: float
    softcap: float | None


def _rows(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    rows: Tensor | None,
    upstream: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    need_x: bool,
    need_w: bool,
    need_b: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted losses (R,) and the gradients of Σ upstream · losses, in float32 or float64.

    Gradients have the shapes of input, weight and bias; one that is not needed has no elements.
    """
    high = torch.promote_types(dtype, torch.float32)
    place, index, t, factor = _counted(input, target, rows, ignore_index, weight.shape[0])
    if token_weight is not None:
        token_weight = _selected(token_weight, index).to(high)
        factor = token_weight if factor is None else factor * token_weight
    scale = factor
    if upstream is not None:
        scale = _selected(upstream, place).to(high)
        scale = scale if factor is None else scale * factor
    needs = (need_x, need_w, need_b)
    with borrow(weight) as space:
        w = weight.detach()
        if weight.dtype != dtype:
            w = space.take("weight", tuple(w.shape), w, dtype).copy_(w)
        x = _selected(input.detach(), index).to(dtype)
        b = None if bias is None else bias.detach().to(high)
        task = _Pass(x, w, b, t, scale, label_smoothing, z_loss, softcap)
        losses, dx, dw, db = _run(task, space, needs, high)
    losses = losses if factor is None else losses * factor
    if place is not None:
        size = target.shape[0] if rows is None else rows.shape[0]
        losses = losses.new_zeros(size).index_copy_(0, place, losses)
    if need_x and index is not None:
        dx = dx.new_zeros(input.shape).index_copy_(0, index, dx)
    return losses, dx, dw, db


def _counted(
    input: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int, classes: int
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Which rows are computed: their place among the selected rows and their index into the input
    (None: all), their targets, and a factor of 0 for the ones that do not count (None: all do).

    On a CPU the others are left out; elsewhere that would wait for the device.
    """
    if input.device.type != "cpu":
        t = _selected(target, rows)
        kept = t != ignore_index
        return None, rows, t.masked_fill(~kept, 0), kept.float()
    if rows is not None and rows.numel() and (rows.min() < 0 or rows.max() >= len(target)):
        checks.fail("rows", f"{rows.min()} to {rows.max()}", f"indices from 0 to {len(target) - 1}")
    t = _selected(target, rows)
    kept = t != ignore_index
    place = None if bool(kept.all()) else kept.nonzero()[:, 0]
    t = _selected(t, place)
    if t.numel() and (t.min() < 0 or t.max() >= classes):
        accepted = f"classes from 0 to {classes - 1}, or ignore_index = {ignore_index}"
        checks.fail("target", f"{t.min()} to {t.max()}", accepted)
    index = rows if place is None else (place if rows is None else rows.index_select(0, place))
    return place, index, t, None


def _run(
    task: _Pass, space: Workspace, needs: tuple[bool, bool, bool], high: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (n,), dx (n, H), dw (V, H) and db (V,); the ones not needed are empty."""
    need_x, need_w, need_b = needs
    (n, width), classes = task.x.shape, task.weight.shape[0]
    losses = task.x.new_empty(n, dtype=high)
    dx = task.x.new_empty((n, width) if need_x else 0, dtype=high)
    dw = task.x.new_empty((classes, width) if need_w else 0, dtype=high)
    db = task.x.new_zeros(classes if need_b else 0, dtype=high)
    if n == 0 and need_w:
        dw.zero_()
    chunk = _chunk_rows(n, task.x, classes, any(needs))
    stride = classes if task.x.dtype == high else -(-classes // _ALIGN) * _ALIGN
    for start in range(0, n, chunk):
        at = slice(start, min(start + chunk, n))
        x = task.x[at]
        buffer = space.take("logits", (len(x), stride), x, x.dtype)
        buffer[:, classes:] = 0
        logits = buffer[:, :classes]
        torch.mm(x, task.weight.t(), out=logits)
        losses[at] = _to_dlogits(task, at, logits, db, space, any(needs))
        factor = None if task.factor is None else task.factor[at, None]
        if need_x:
            part = torch.mm(logits, task.weight)
            dx[at] = part if factor is None else part * factor
        if need_w:
            x = x if factor is None else (x * factor).to(x.dtype)
            _accumulate(dw, buffer, x, start == 0, space)
    return losses, dx, dw, db


def _chunk_rows(n: int, x: Tensor, classes: int, gradients: bool) -> int:
    """Rows per chunk, all chunks about equal.

    bf16 on a CPU: adding up a (V, H) dW costs as much as a chunk's product, so chunks are large.
    float32 adds within the product, and its softmax is fastest on a chunk that stays in cache.
    """
    budget = _CHUNK_BYTES[x.element_size() if gradients else 4]
    if x.device.type != "cpu":
        budget = 1 << 29
    rows = max(1, budget // (classes * x.element_size()))
    return -(-n // -(-n // rows)) if n else 1


def _to_dlogits(
    task: _Pass, at: slice, logits: Tensor, db: Tensor, space: Workspace, gradients: bool
) -> Tensor:
    """The chunk's losses; logits become d loss / d logits in place, and db gets its share."""
    rows, classes = logits.shape
    high = torch.promote_types(logits.dtype, torch.float32)
    block = max(1, _BLOCK // classes) if logits.device.type == "cpu" else rows
    losses = []
    for start in range(0, rows, block):
        raw = logits[start : start + block]
        part = slice(at.start + start, at.start + start + len(raw))
        work = raw
        if raw.dtype != high:
            work = space.take("block", (len(raw), classes), raw, high).copy_(raw)
        losses.append(_block_losses(task, part, work, gradients))
        if db.numel():
            db += (work if task.factor is None else work * task.factor[part, None]).sum(0)
        if gradients and work is not raw:
            raw.copy_(work)
    return torch.cat(losses)


def _block_losses(task: _Pass, part: slice, work: Tensor, gradients: bool) -> Tensor:
    """Losses of the rows ``part``; their logits in ``work`` become gradients."""
    target, smoothing = task.target[part, None], task.label_smoothing
    if task.bias is not None:
        work.add_(task.bias)
    slope = None
    if task.softcap is not None:
        work.div_(task.softcap).tanh_()
        slope = 1 - work.square()
        work.mul_(task.softcap)
    top = work.amax(1)
    # Differences to the largest logit first: subtracting lse would round at its magnitude.
    above = (1 - smoothing) * (top - work.gather(1, target)[:, 0])
    if smoothing:
        above += smoothing * (top - work.mean(1))
    _softmax_(work)
    log_sum = -work.amax(1).log_()
    loss = above + log_sum
    lse = top + log_sum
    if task.z_loss:
        loss += task.z_loss * lse.square()
    if gradients:
        if task.z_loss:
            work.mul_((1 + 2 * task.z_loss * lse)[:, None])
        if smoothing:
            work.sub_(smoothing / work.shape[1])
        work.scatter_add_(1, target, work.new_full(target.shape, smoothing - 1))
        if slope is not None:
            work.mul_(slope)
    return loss


def _softmax_(x: Tensor) -> None:
    if x.device.type == "cpu":
        torch.ops.aten._softmax.out(x, 1, False, out=x)
    else:
        x.copy_(torch.softmax(x, 1))


def _accumulate(dw: Tensor, dlogits: Tensor, x: Tensor, first: bool, space: Workspace) -> None:
    """dw += dlogitsᵀ x; dlogits may have padding columns, dw (V, H) has none."""
    classes, width = dw.shape
    if x.dtype == dw.dtype:
        torch.addmm(dw, dlogits[:, :classes].t(), x, beta=0.0 if first else 1.0, out=dw)
        return
    part = space.take("dw", (dlogits.shape[1], width), x, x.dtype)
    torch.mm(dlogits.t(), x, out=part)
    if first:
        dw.copy_(part[:classes])
    elif dw.device.type != "cpu":
        dw.add_(part[:classes])
    else:
        # The CPU's mixed-dtype add converts all of part into memory first.
        step = max(1, _BLOCK // width)
        for start in range(0, classes, step):
            rows = slice(start, min(start + step, classes))
            wide = space.take("dw block", (rows.stop - start, width), x, dw.dtype)
            dw[rows].add_(wide.copy_(part[rows]))


def _rows_fake(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    rows: Tensor | None,
    upstream: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    need_x: bool,
    need_w: bool,
    need_b: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    high = torch.promote_types(dtype, torch.float32)
    return (
        input.new_empty(target.shape[0] if rows is None else rows.shape[0], dtype=high),
        input.new_empty(input.shape if need_x else 0, dtype=high),
        input.new_empty(weight.shape if need_w else 0, dtype=high),
        input.new_empty(weight.shape[0] if need_b else 0, dtype=high),
    )


_rows_op = define(
    "linear_cross_entropy_rows(Tensor input, Tensor weight, Tensor target, Tensor? bias, "
    "Tensor? token_weight, Tensor? rows, Tensor? upstream, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, bool need_x, bool need_w, bool need_b, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _rows,
    _rows_fake,
)
dispatch.register("linear_cross_entropy", "torch", linear_cross_entropy_torch)
