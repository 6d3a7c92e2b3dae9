"""Cross entropy of a linear layer's logits, over selected rows, without the (rows, vocab) logits.

    l = x Wᵀ + b,  l = softcap · tanh(l / softcap) where there is one,  lse = log Σ_v exp(l_v)
    loss_r = token_weight_r · ((1 - s)(lse - l_target) + s (lse - mean_v l_v) + z_loss · lse²)

s is label_smoothing. Rows whose target is ignore_index give 0 and no gradient.
N rows of input, R selected rows, H width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch


def linear_cross_entropy_reference(
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
    """The definition, with full logits; the loss is float32 (float64 for float64 inputs)."""
    if rows is not None:
        input, target = input[rows], target[rows]
        token_weight = None if token_weight is None else token_weight[rows]
    logits = F.linear(input, linear_weight, linear_bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = target != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, target.masked_fill(~kept, 0)[:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * picked - label_smoothing * logits.mean(-1)
    loss = loss + z_loss * lse.square()
    if token_weight is not None:
        loss = loss * token_weight.to(loss.dtype)
    return reduce(loss.masked_fill(~kept, 0.0), kept, reduction)


def reduce(loss: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """(R,) losses, 0 where not kept, to the result; the mean of no rows is 0."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / kept.sum().clamp(min=1) if reduction == "mean" else total


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
    impl: str | None = None,
) -> Tensor:
    """Cross entropy of ``F.linear(input, linear_weight, linear_bias)`` (formula: top of this file).

    Differentiable in input, linear_weight and linear_bias; no work is done for one that needs no
    gradient. Gradients of "sum" and "mean" are computed during the forward pass.

    Args:
        input: (N, H).
        linear_weight: (V, H).
        target: (N,) int64 class indices.
        linear_bias: (V,).
        token_weight: (N,) factor on each row's loss; no gradient.
        rows: (R,) unique int64 indices into input, target and token_weight; None: every row.
        ignore_index: target value of rows that do not count.
        reduction: "mean" (over the rows that count, 0 when there is none; never divided by the
            weights), "sum" or "none".
        label_smoothing: in [0, 1].
        z_loss: factor on lse².
        softcap: bounds the logits to (-softcap, softcap).
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        float32 (float64 for float64 inputs) scalar, or (R,) for "none".

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    _check(input, linear_weight, target, linear_bias, token_weight, rows)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.positive("softcap", softcap)
    if not 0.0 <= label_smoothing <= 1.0:
        checks.fail("label_smoothing", label_smoothing, "a number in [0, 1]")
    options = {
        "linear_bias": linear_bias,
        "token_weight": token_weight,
        "rows": rows,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
    }
    tensors = (input, linear_weight, target)
    return dispatch.select("linear_cross_entropy", impl, *tensors, **options)(*tensors, **options)


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    token_weight: Tensor | None,
    rows: Tensor | None,
) -> None:
    checks.floating("input", input, "N H")
    checks.floating("linear_weight", linear_weight, "V H")
    checks.shape("linear_weight", linear_weight, (linear_weight.shape[0], input.shape[1]), "V H")
    if linear_weight.shape[0] == 0:
        checks.fail("linear_weight", "0 classes", "at least one")
    checks.integers("target", target, "N", (torch.int64,))
    checks.shape("target", target, input.shape[:1], "N")
    if linear_bias is not None:
        checks.floating("linear_bias", linear_bias, "V")
        checks.shape("linear_bias", linear_bias, linear_weight.shape[:1], "V")
    if token_weight is not None:
        checks.floating("token_weight", token_weight, "N")
        checks.shape("token_weight", token_weight, input.shape[:1], "N")
    if rows is not None:
        checks.integers("rows", rows, "R", (torch.int64,))
    for name, x in (("linear_weight", linear_weight), ("target", target), ("rows", rows),
                    ("linear_bias", linear_bias), ("token_weight", token_weight)):  # fmt: skip
        if x is not None:
            checks.on_device(name, x, "input", input)
    if not torch.is_autocast_enabled(input.device.type):
        checks.same("linear_weight", linear_weight, "input", input)


dispatch.register("linear_cross_entropy", "reference", linear_cross_entropy_reference)
