"""swiglu_mlp: values and gradients with every mix of weights and adapters, and what it keeps."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import quantize
from tests.kernels.compare import assert_variant

NAMES = ("gate", "up", "down")


def weights(k: int, f: int) -> dict[str, Tensor]:
    return {
        "w_gate": torch.randn(f, k) / k**0.5,
        "w_up": torch.randn(f, k) / k**0.5,
        "w_down": torch.randn(k, f) / f**0.5,
    }


def adapters(k: int, f: int, r: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    sizes = {"gate": (k, f), "up": (k, f), "down": (f, k)}
    made = {}
    for name in names:
        inner, outer = sizes[name]
        made[f"{name}_a"] = torch.randn(r, inner) / inner**0.5
        made[f"{name}_b"] = torch.randn(outer, r) / r**0.5
    return made


def call(x: Tensor, impl: str | None, quantized: dict[str, Any], **tensors: Tensor) -> Tensor:
    matrices = {
        name: tensors[name] if name in tensors else quantized[name]
        for name in ("w_gate", "w_up", "w_down")
    }
    lora = {n: (tensors[f"{n}_a"], tensors[f"{n}_b"]) for n in NAMES if f"{n}_a" in tensors}
    return kernels.swiglu_mlp(x, **matrices, lora=lora or None, scaling=0.6, impl=impl)


@pytest.mark.parametrize("names", [(), ("down",), ("gate", "up"), NAMES])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 70, 33), (63, 100, 129)])
def test_quantised_weights(shape: tuple[int, int, int], names: tuple[str, ...]) -> None:
    m, k, f = shape
    formats = itertools.cycle(["nvfp4", "nf4", "fp8_row"])
    quantized = {name: quantize(w, next(formats)) for name, w in weights(k, f).items()}
    tensors = {"x": torch.randn(m, k)} | adapters(k, f, 3, names)
    assert_variant(call, tensors, tuple(tensors), quantized=quantized)
    assert_variant(call, tensors, ("x",), quantized=quantized)
    for name in names:
        assert_variant(call, tensors, (f"{name}_a",), quantized=quantized)
        assert_variant(call, tensors, (f"{name}_b",), quantized=quantized)


@pytest.mark.parametrize("names", [(), ("up",), NAMES])
def test_trainable_weights(names: tuple[str, ...]) -> None:
    tensors = {"x": torch.randn(2, 9, 48)} | weights(48, 80) | adapters(48, 80, 2, names)
    assert_variant(call, tensors, tuple(tensors), quantized={})
    for wanted in (("w_down",), ("w_gate",), ("w_up", "x")):
        assert_variant(call, tensors, wanted, quantized={})


def test_a_mix_of_plain_and_quantised() -> None:
    matrices = weights(48, 80)
    quantized = {"w_up": quantize(matrices.pop("w_up"), "mxfp4")}
    tensors = {"x": torch.randn(5, 48)} | matrices
    assert_variant(call, tensors, tuple(tensors), quantized=quantized)


def test_empty_batch() -> None:
    tensors = {"x": torch.randn(0, 48)} | weights(48, 80) | adapters(48, 80, 2, NAMES)
    assert_variant(call, tensors, tuple(tensors), quantized={})


def test_gradcheck() -> None:
    matrices = {name: quantize(w.double(), "nvfp4") for name, w in weights(12, 20).items()}
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    lora = {n: t.double().requires_grad_() for n, t in adapters(12, 20, 2, NAMES).items()}
    for impl in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda x, *values, impl=impl: call(
                x, impl, matrices, **dict(zip(lora, values, strict=True))
            ),
            (x, *lora.values()),
        )


def test_keeps_at_most_55_percent_of_the_unfused_activations() -> None:
    """LLaMA-3 8B's proportions: F = 3.5 K."""
    k, f, m = 64, 224, 50
    quantized = {name: quantize(w, "nvfp4") for name, w in weights(k, f).items()}
    tensors = {n: t.requires_grad_() for n, t in adapters(k, f, 2, NAMES).items()}
    x = torch.randn(m, k, requires_grad=True)

    def kept(impl: str) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape[:1] == (m,):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = call(x, impl, quantized, **tensors)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept("torch") <= 0.55 * kept("reference")


def test_compiles_whole() -> None:
    quantized = {name: quantize(w, "nf4") for name, w in weights(32, 48).items()}
    x = torch.randn(5, 32, requires_grad=True)
    lora = {n: t.requires_grad_() for n, t in adapters(32, 48, 2, ("gate", "down")).items()}

    def loss(x: Tensor) -> Tensor:
        return call(x, None, quantized, **lora).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = (x, *lora.values())
    for ours, plain in zip(
        torch.autograd.grad(compiled(x), leaves),
        torch.autograd.grad(loss(x), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_up": torch.ones(9, 4)}, "w_up: got shape (9, 4); accepted: that of w_gate: (8, 4)"),
        ({"w_down": torch.ones(4, 9)}, "w_down: got shape (4, 9)"),
        ({"lora": {"side": (torch.ones(1, 4), torch.ones(8, 1))}}, "lora: got 'side'"),
        (
            {"lora": {"down": (torch.ones(1, 4), torch.ones(4, 1))}},
            "lora['down'][0]: got shape (1, 4)",
        ),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 4),
        "w_gate": torch.ones(8, 4),
        "w_up": torch.ones(8, 4),
        "w_down": torch.ones(4, 8),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.swiglu_mlp(**(arguments | changes))
