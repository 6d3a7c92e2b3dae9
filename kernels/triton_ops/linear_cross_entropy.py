"""Cross entropy of a linear layer's logits over the rows that carry loss, forward and backward.

Every product is the library's (cuBLAS reaches more of the peak than a product written here would,
on every part), every pass over logits one of three kernels, in place:

    rows        for each chunk of rows: logits = x Wᵀ, losses, logits → their gradient g, dx = g W
    classes     for each tile of classes: g again, for all rows, and dW = gᵀ x in one product

so that dx and dW are each one sum in float32, and the only large buffer is a chunk or a tile: about
a sixteenth of the logits. Making g again costs a fourth product, which the space of the unwritten
dW saves: the g of the first rows wait in it, in tiles of classes, each where the dW of these
classes is written once they are used up. Up to H rows (half of 8192 masked ones, 4096 wide) no
product is made twice. A float32 dW added up over chunks of rows would be as large as the logits of
2 H rows, and reading and writing it for each chunk as slow as the product itself.

"sum" and "mean" make all gradients in the forward pass; backward multiplies by the upstream scalar,
which costs nothing when it is 1. For "none", and in float16, where only the upstream factor (the
loss scale) keeps g above the smallest number, dW is left to backward and g is made again.

Nothing waits for the device: rows whose target is ignore_index stay in the products with g = 0.
Sums have one order: the same bits every time, if the library's products do.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define, unobserved
from ..linear_cross_entropy import reduce
from .launch import MULTIPROCESSORS, architecture, as_rows, ceil_div, on_device, power_of_two
from .linear_cross_entropy_kernels import (
    _logits_gradient_kernel,
    _row_losses_kernel,
    _scale_kernel,
    _segment_statistics_kernel,
)
from .linear_cross_entropy_passes import (
    Task,
    class_gradients,
    put_rows,
    row_losses,
    store,
    to_gradient,
)
from .linear_cross_entropy_plan import (
    NUM_WARPS,
    Plan,
    plan_losses,
    plan_passes,
    plan_walk,
)
from .machine_code import TRITON_TYPES, VECTOR_LOAD, VECTOR_STORE, Case

SCALE_BLOCK = 4096


def linear_cross_entropy(
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
    """See ``kernels.linear_cross_entropy``."""
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    tensors = (input, linear_weight, target, linear_bias, token_weight, rows)
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (input, linear_weight, linear_bias)
    ):
        return _LinearCrossEntropy.apply(*tensors, reduction, dtype, numbers)
    losses = _forward_op(*tensors, *numbers, False, False, False, False, False, dtype)[0]
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
        in_forward = reduction != "none" and dtype != torch.float16 and (needs[1] or needs[2])
        tensors = (input, weight, target, bias, token_weight, rows)
        ctx.call = (*numbers, reduction == "mean", in_forward, *needs, dtype)
        losses, stats, *grads = _forward_op(*tensors, *ctx.call)
        ctx.save_for_backward(*tensors, stats)
        ctx.mean, ctx.grads = reduction == "mean", grads
        return reduce(losses, _selected(target, rows) != numbers[0], reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        *tensors, stats = ctx.saved_tensors
        target, rows = tensors[2], tensors[5]
        *numbers, _, in_forward, need_x, need_w, need_b, dtype = ctx.call
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            # Backward came a second time: the first one's results were scaled in place.
            _, _, *grads = _forward_op(*tensors, *ctx.call)
        dx, dw, db = grads
        if in_forward:
            dx, dw, db = (_scaled(grad, upstream) for grad in grads)
        else:
            factor = upstream.float()
            if ctx.mean:
                factor = factor / (_selected(target, rows) != numbers[0]).sum().clamp(min=1)
            if need_x:
                dx = _scaled_rows(dx, factor, rows)
            if need_w or need_b:
                factor = factor.expand(_selected(target, rows).shape)
                needs = (need_w, need_b, dtype)
                dw, db = _backward_op(*tensors, stats, factor, *numbers, *needs)
        return (
            dx if need_x else None,
            dw if need_w else None,
            None,
            db if need_b else None,
            *(None,) * 5,
        )


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """factor · grad for a scalar tensor, in place unless a graph is being traced."""
    if not unobserved(grad, factor):
        return (grad * factor.reshape((1,) * grad.dim())).to(grad.dtype)
    if grad.numel():
        resident = 8 * MULTIPROCESSORS[architecture(grad.device)]
        programs = min(ceil_div(grad.numel(), SCALE_BLOCK), resident)
        with on_device(grad):
            _scale_kernel[(programs,)](
                grad, factor, grad.numel(), BLOCK=SCALE_BLOCK, num_warps=NUM_WARPS
            )
    return grad


def _scaled_rows(dx: Tensor, factor: Tensor, rows: Tensor | None) -> Tensor:
    """dx (N, H) times a scalar, or times one factor per selected row, in float32."""
    if factor.dim() == 0:
        return _scaled(dx, factor)
    if rows is not None:
        factor = factor.new_zeros(dx.shape[0]).index_copy_(0, rows, factor)
    if not unobserved(dx, factor):
        return (dx * factor[:, None]).to(dx.dtype)
    return dx.mul_(factor[:, None])


def _selected(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    rows: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    mean: bool,
    in_forward: bool,
    need_x: bool,
    need_w: bool,
    need_b: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted losses (R,), statistics (2, R), and gradients in their owners' shapes and dtypes.

    ``in_forward``: those of the sum, or of the mean over the rows that count. Otherwise dx is that
    of the sum, to be multiplied row by row, and dW and db are left out. What is not needed has no
    elements.
    """
    target = _selected(target, rows)
    need_w, need_b = need_w and in_forward, need_b and in_forward
    count, (classes, width) = len(target), weight.shape
    weights = _row_weights(target, token_weight, rows, ignore_index)
    factor = weights
    if mean and in_forward:
        factor = weights / (target != ignore_index).sum().clamp(min=1)
    losses, stats, dx, dw, db = _outputs(input, weight, rows, count, need_x, need_w, need_b)
    if count == 0:
        return losses, stats, dx, dw, _cast(db, bias)
    itemsize = weight.element_size() if need_w else 0
    plan = plan_passes(count, classes, width, dtype.itemsize, itemsize, architecture(input.device))
    numbers = (label_smoothing, z_loss, softcap)
    task = _task(weight, bias, target, factor, stats, numbers, plan, dtype)
    _row_pass(task, input, rows, weights, losses, (need_x, need_w, need_b), dx, dw, db)
    if need_w:
        if plan.chunks > 1:
            task.allocate(plan.tile_elements)
        class_gradients(task, _rows_of(input, rows, dtype), dw, None, stored=True)
    return losses, stats, dx, dw, _cast(db, bias)


def _row_pass(
    task: Task,
    input: Tensor,
    rows: Tensor | None,
    weights: Tensor,
    losses: Tensor,
    needs: tuple[bool, bool, bool],
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
) -> None:
    """Losses, dx and db, and what is kept for dw, chunk by chunk."""
    task.allocate(task.plan.chunk_elements)
    need_x, need_w, need_b = needs
    count = len(losses)
    for start in range(0, count, task.plan.chunk_rows):
        at = slice(start, min(start + task.plan.chunk_rows, count))
        source, chosen = (input[at], None) if rows is None else (input, rows[at])
        x = _rows_of(source, chosen, task.scratch.dtype)
        logits = row_losses(task, x, at, weights, losses)
        if any(needs):
            to_gradient(task, logits, at, 0, db if need_b else None)
        if need_x:
            put_rows(dx, logits, task.weight, at, rows)
        if need_w:
            store(task, logits, at, dw)


def _backward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    rows: Tensor | None,
    stats: Tensor,
    upstream: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    need_w: bool,
    need_b: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dW and db of Σ upstream · losses, from the forward pass's statistics; upstream (R,)."""
    target = _selected(target, rows)
    count, (classes, width) = len(target), weight.shape
    *_, dw, db = _outputs(input, weight, rows, count, False, need_w, need_b)
    if count == 0:
        return dw, _cast(db, bias)
    factor = _row_weights(target, token_weight, rows, ignore_index).mul_(upstream)
    plan = plan_passes(count, classes, width, dtype.itemsize, 0, architecture(input.device))
    numbers = (label_smoothing, z_loss, softcap)
    task = _task(weight, bias, target, factor, stats, numbers, plan, dtype)
    task.allocate(plan.tile_elements)
    x = _rows_of(input, rows, dtype)
    class_gradients(task, x, dw if need_w else None, db if need_b else None, stored=False)
    return dw, _cast(db, bias)


def _outputs(
    input: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    count: int,
    need_x: bool,
    need_w: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics, dx, dw and db (float32, zeros) to be filled; zeros where nothing is."""
    losses = input.new_empty(count, dtype=torch.float32)
    stats = input.new_empty((2, count), dtype=torch.float32)
    whole = rows is None and count
    dx = input.new_empty(input.shape if need_x else 0)
    dw = weight.new_empty(weight.shape if need_w else 0)
    db = weight.new_zeros(weight.shape[0] if need_b else 0, dtype=torch.float32)
    return losses, stats, dx if whole else dx.zero_(), dw if count else dw.zero_(), db


def _task(
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    stats: Tensor,
    numbers: tuple[float, float, float | None],
    plan: Plan,
    dtype: torch.dtype,
) -> Task:
    weight = weight.detach().to(dtype)
    if 1 not in weight.stride():
        weight = weight.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    scratch = torch.empty(0, dtype=dtype, device=weight.device)
    return Task(weight, bias, target, factor, stats, *numbers, plan, scratch)


def _row_weights(
    target: Tensor, token_weight: Tensor | None, rows: Tensor | None, ignore_index: int
) -> Tensor:
    """(R,) float32: the weight of each row's loss, 0 where it does not count."""
    kept = target != ignore_index
    if token_weight is None:
        return kept.float()
    return _selected(token_weight.detach(), rows).float().mul_(kept)


def _rows_of(input: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows as (R, H) in ``dtype`` with unit stride along H, a view where one exists."""
    return as_rows(_selected(input.detach(), rows).to(dtype))


def _cast(db: Tensor, bias: Tensor | None) -> Tensor:
    return db if bias is None else db.to(bias.dtype)


def _forward_fake(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    rows: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    mean: bool,
    in_forward: bool,
    need_x: bool,
    need_w: bool,
    need_b: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = target.shape[0] if rows is None else rows.shape[0]
    dw, db = _backward_shapes(weight, bias, need_w and in_forward, need_b and in_forward)
    return (
        input.new_empty(count, dtype=torch.float32),
        input.new_empty((2, count), dtype=torch.float32),
        input.new_empty(input.shape if need_x else 0),
        dw,
        db,
    )


def _backward_fake(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    rows: Tensor | None,
    stats: Tensor,
    upstream: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    need_w: bool,
    need_b: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _backward_shapes(weight, bias, need_w, need_b)


def _backward_shapes(
    weight: Tensor, bias: Tensor | None, need_w: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if bias is None else bias.dtype
    dw = weight.new_empty(weight.shape if need_w else 0)
    return dw, weight.new_empty(weight.shape[0] if need_b else 0, dtype=dtype)


_TENSORS = (
    "Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? token_weight, Tensor? rows"
)
_NUMBERS = "int ignore_index, float label_smoothing, float z_loss, float? softcap"
_forward_op = define(
    f"triton_linear_cross_entropy_forward({_TENSORS}, {_NUMBERS}, bool mean, bool in_forward, "
    "bool need_x, bool need_w, bool need_b, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    f"triton_linear_cross_entropy_backward({_TENSORS}, Tensor stats, Tensor upstream, {_NUMBERS}, "
    "bool need_w, bool need_b, ScalarType dtype) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def machine_code_cases(arch: int) -> Iterator[Case]:
    """Every tile of the plans: few and many classes, each switch and a few together.

    float16 differs from bfloat16 only in conversions.
    """
    for dtype, classes in product((torch.float32, torch.bfloat16), (64, 1 << 17)):
        plan = plan_passes(8192, classes, 4096, dtype.itemsize, dtype.itemsize, arch)
        kind = TRITON_TYPES[dtype]
        for bias, softcap in ((False, False), (False, True), (True, True)):
            switches = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap}
            yield _statistics_case(arch, kind, plan, switches)
            yield _losses_case(arch, kind, plan, switches)
            yield _gradient_case(arch, kind, plan, switches | {"BIAS_GRAD": bias})
    for kind in TRITON_TYPES.values():
        yield Case(
            kernel=_scale_kernel,
            arch=arch,
            signature={"p_x": f"*{kind}", "p_factor": "*fp32", "n_elements": "i32"},
            constants={"BLOCK": SCALE_BLOCK},
            num_warps=NUM_WARPS,
            aligned=("n_elements",),
            expects=(VECTOR_LOAD, VECTOR_STORE),
        )


_SIZES = ("stride", "n_rows", "n_columns", "segments", "first", "classes", "walk")
_FLOATS = ("smoothing", "z_loss", "softcap")


def _case(
    kernel: Any,
    arch: int,
    kind: str,
    constants: dict[str, Any],
    num_warps: int,
    expects: tuple[str, ...],
) -> Case:
    """The types of all arguments by their names; a missing bias or partial sum is None."""
    absent = {} if constants["HAS_BIAS"] else {"p_bias": None}
    if not constants.get("BIAS_GRAD", True):
        absent["p_partial"] = None
    pointers = {"p_logits": f"*{kind}", "p_bias": f"*{kind}", "p_target": "*i64"}
    floats = ("p_partial", "p_weight", "p_factor", "p_loss", "p_max", "p_total")
    types = (
        pointers
        | dict.fromkeys(floats, "*fp32")
        | dict.fromkeys(_SIZES, "i32")
        | dict.fromkeys(_FLOATS, "fp32")
    )
    return Case(
        kernel=kernel,
        arch=arch,
        signature={name: types[name] for name in kernel.arg_names if name in types},
        constants=constants | absent,
        num_warps=num_warps,
        aligned=tuple(name for name in ("stride", "n_columns") if name in kernel.arg_names),
        expects=expects,
    )


def _statistics_case(arch: int, kind: str, plan: Plan, switches: dict[str, Any]) -> Case:
    tiles = {"BLOCK_R": plan_losses(plan)[0], "BLOCK_C": plan.segment}
    expects = (VECTOR_LOAD,)
    return _case(_segment_statistics_kernel, arch, kind, switches | tiles, NUM_WARPS, expects)


def _losses_case(arch: int, kind: str, plan: Plan, switches: dict[str, Any]) -> Case:
    tiles = {"BLOCK_R": plan_losses(plan)[1], "BLOCK_S": power_of_two(plan.segments)}
    return _case(_row_losses_kernel, arch, kind, switches | tiles, 1, (r"STG\.E",))


def _gradient_case(arch: int, kind: str, plan: Plan, switches: dict[str, Any]) -> Case:
    walk = plan_walk(plan.chunk_rows, plan.classes, switches["BIAS_GRAD"], arch)
    tiles = {"BLOCK_R": walk.block_rows, "BLOCK_C": walk.block_columns}
    expects = (VECTOR_LOAD, VECTOR_STORE)
    return _case(_logits_gradient_kernel, arch, kind, switches | tiles, NUM_WARPS, expects)
