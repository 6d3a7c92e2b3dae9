"""32 training steps with our operations end where Transformers' eager models end: the same loss,
logits and parameters, in float32 and under bfloat16 autocast."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import dispatch
from tests.kernels import convergence
from tests.kernels.convergence import Run, assert_converged, train_ours

DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def eager(kind: str, dtype: torch.dtype) -> Run:
    return convergence.train_eager(kind, dtype)


@pytest.fixture(autouse=True)
def _default_choice() -> Iterator[None]:
    yield
    kernels.use({})


@pytest.mark.parametrize("impl", ["default", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", convergence.KINDS)
def test_ends_where_eager_ends(kind: str, dtype: torch.dtype, impl: str) -> None:
    if impl == "reference":
        kernels.use(dict.fromkeys(kernels.available(), "reference"))
    exact = eager(kind, torch.float64)
    assert exact.losses[-1] < 0.8 * exact.losses[0], "nothing was learned, nothing is compared"
    assert_converged(train_ours(kind, dtype), eager(kind, dtype), exact, dtype)


@pytest.mark.parametrize(("kind", "op"), [("gpt2", "layer_norm"), ("llama", "rms_norm")])
def test_a_gradient_that_is_a_thousandth_off_is_caught(
    kind: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = dispatch._registry[op]["torch"].function

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return 1.001 * grad

    def wrong(x: Tensor, *arguments: object, **options: object) -> object:
        return right(Off.apply(x), *arguments, **options)

    monkeypatch.setattr(dispatch, "_registry", {k: dict(v) for k, v in dispatch._registry.items()})
    dispatch.register(op, "torch", wrong)
    dtype = torch.float32
    with pytest.raises(AssertionError, match=r"off by .*, accepted"):
        assert_converged(
            train_ours(kind, dtype), eager(kind, dtype), eager(kind, torch.float64), dtype
        )
