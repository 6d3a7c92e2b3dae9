"""Compares a variant with the definition: same values in float64, the error rule below it.

The error rule, for outputs and every gradient: max|out - exact| <= 2 max|plain - exact| + atol,
with plain the definition in the same dtype, exact the definition in float64, and atol twice the
rounding error of one operation at the size of the largest value. Scratch buffers are poisoned with
NaN before each run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stackwise.kernels import workspace

HALF_AND_SINGLE = (torch.float32, torch.bfloat16)


def run(
    fn: Callable[..., Any], tensors: Mapping[str, Tensor], wanted: tuple[str, ...], **options: Any
) -> dict[str, Tensor]:
    """Outputs "out0", ... and gradients "d<name>" of ``fn(**tensors, **options)``.

    The upstream gradients are a fixed pseudo-random function of the outputs' shapes.
    """
    leaves = {
        name: x.detach().requires_grad_() if name in wanted else x for name, x in tensors.items()
    }
    outs = fn(**leaves, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    results = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    if wanted:
        inputs = [leaves[name] for name in wanted]
        generator = torch.Generator().manual_seed(7)
        upstream = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
            for out in outs
        ]
        poison()
        pairs = [(o, g) for o, g in zip(outs, upstream, strict=True) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs])
        results |= {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    return results


def poison() -> None:
    """Fills every scratch buffer with NaN, so that reading an unwritten place shows."""
    for space in (workspace.scratch(), *workspace._spaces.values()):
        for buffer in space._buffers.values():
            buffer.fill_(float("nan"))


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in ``dtype``, values rounded to it."""
    return {n: x.to(dtype) if x.dtype.is_floating_point else x for n, x in tensors.items()}


def assert_variant(
    fn: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    wanted: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = HALF_AND_SINGLE,
    impl: str | None = "torch",
    slack: float = 1.0,
    floor: float = 0.0,
    **options: Any,
) -> None:
    """``fn(impl=impl)`` against ``fn(impl="reference")``: in float64, and in each of ``dtypes``.

    ``slack`` and ``floor`` widen the rule's bound in float32, for a PyTorch kernel that is outside
    it by itself: by a factor, and by an error where the definition gives an exact zero.
    """
    double = cast(tensors, torch.float64)
    exact = run(fn, double, wanted, impl="reference", **options)
    assert_close(
        "float64", run(fn, double, wanted, impl=impl, **options), exact, exact, relative=1e-11
    )
    for dtype in dtypes:
        low = cast(tensors, dtype)
        exact = run(fn, cast(low, torch.float64), wanted, impl="reference", **options)
        plain = run(fn, low, wanted, impl="reference", **options)
        poison()
        ours = run(fn, low, wanted, impl=impl, **options)
        assert ours.keys() == plain.keys()
        for name, value in ours.items():
            assert value.dtype == plain[name].dtype, (name, value.dtype, plain[name].dtype)
        single = (slack, floor) if dtype == torch.float32 else (1.0, 0.0)
        assert_close(str(dtype), ours, plain, exact, *single)


def assert_close(
    label: str,
    ours: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    slack: float = 1.0,
    floor: float = 0.0,
    relative: float = 0.0,
) -> None:
    """The error rule for every named tensor, or a bound relative to the largest exact value."""
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, (name, ours[name].shape, truth.shape)
        if not truth.numel():
            continue
        finite = truth.isfinite()
        atol = torch.finfo(plain[name].dtype).eps * _largest(truth[finite])
        bound = slack * (2 * _largest((plain[name].double() - truth)[finite]) + atol) + floor
        if relative:
            bound = relative * max(1.0, _largest(truth[finite]))
        same = finite | (ours[name].double() == truth)
        error = (ours[name].double() - truth).abs().where(finite, 0.0).where(same, torch.inf)
        error = error.nan_to_num(nan=torch.inf)
        worst = int(error.argmax())
        if float(error.max()) > bound:
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
            values = [float(t.flatten()[worst]) for t in (ours[name], plain[name], truth)]
            raise AssertionError(
                f"{label} {name}{list(index)}: ours {values[0]!r}, same dtype {values[1]!r}, "
                f"exact {values[2]!r}; error {float(error.max()):.3g} > bound {bound:.3g}"
            )


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
