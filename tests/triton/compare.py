"""The error rule for a kernel, its outputs and every gradient, against its reference in float64.

    max |out − ref64|  ≤  2 · max |reference in the same dtype − ref64| + atol

with atol = 2 · max |(r + 0.3) − 0.3 − r| of the reference r in the same dtype, a rounding error at
the values' own scale (FlashAttention's rule). Memory that the operations allocate holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every buffer allocated inside without a value holds NaN (integers: their maximum)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_within(name: str, out: Tensor, same: Tensor, exact: Tensor, floor: float = 0.0) -> None:
    """The error rule for one tensor; ``same`` is the reference in its dtype, ``exact`` in float64.
    An error up to ``floor`` always passes.

    The message shows the worst element: its index, the three values, the error and its bound.
    """
    assert out.shape == exact.shape, f"{name}: shape {out.shape}, expected {exact.shape}"
    assert out.dtype == same.dtype, f"{name}: dtype {out.dtype}, expected {same.dtype}"
    if out.numel() == 0:
        return
    error = (out.double() - exact).abs()
    error = torch.where(out.double() == exact, torch.zeros_like(error), error)
    error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    rounding = 2 * (same + 0.3 - 0.3 - same).abs().max().double()
    bound = (2 * (same.double() - exact).abs().max() + rounding).clamp(min=floor)
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    values = [float(t.flatten()[worst]) for t in (out, same, exact)]
    assert error.flatten()[worst] <= bound, (
        f"{name}{list(index)}: got {values[0]!r}, reference in {same.dtype} {values[1]!r}, "
        f"in float64 {values[2]!r}: error {float(error.flatten()[worst]):.3g} "
        f"> {float(bound):.3g}; {int((error > bound).sum())} of {error.numel()} elements are out"
    )


def assert_follows_reference(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    constants: Sequence[int] = (),
    floor: float = 0.0,
    **options: Any,
) -> None:
    """Outputs and gradients of ``function(*tensors, **options)`` obey the error rule.

    The tensors' strides are kept for ``function``; those at the positions in ``constants`` get no
    gradient, nor do integer tensors. The incoming gradients are random.
    """
    fixed = set(constants)
    with poisoned_memory():
        ours = _run(function, tensors, fixed, None, options)
    same = _run(reference, tensors, fixed, None, options)
    exact = _run(reference, tensors, fixed, torch.float64, options)
    assert ours.keys() == same.keys()
    for name in exact:
        assert_within(name, ours[name], same[name], exact[name], floor)


def _run(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    constants: set[int],
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    inputs: list[Any] = []
    leaves: dict[str, Tensor] = {}
    for position, tensor in enumerate(tensors):
        if tensor is None or not tensor.dtype.is_floating_point:
            inputs.append(tensor)
            continue
        # detach keeps the strides, to(float64) need not.
        leaf = tensor.detach() if dtype is None else tensor.detach().to(dtype)
        if position not in constants:
            leaf = leaf.requires_grad_()
            leaves[f"gradient of argument {position} "] = leaf
        inputs.append(leaf)
    result = function(*inputs, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(7)
    incoming = [
        torch.randn(out.shape, generator=generator).to(tensors[0].dtype).to(out.dtype)
        for out in outputs
    ]
    named = {f"output {i} ": out.detach() for i, out in enumerate(outputs)}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    return named | dict(zip(leaves, gradients, strict=True))
