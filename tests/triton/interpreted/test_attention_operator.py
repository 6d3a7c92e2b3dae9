"""Attention as an operator in the interpreter: layouts, repeats, compilation, autocast, faults."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stackwise import kernels
from stackwise.kernels.triton_ops import attention as operator
from stackwise.kernels.triton_ops import attention_forward, attention_launchers
from tests.triton.compare import poisoned_memory
from tests.triton.interpreted.test_attention import follows_reference, inputs


def attend(*tensors: Tensor, **options: Any) -> Any:
    return kernels.attention(*tensors, impl="triton", **options)


def test_strided_inputs_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a fused projection, and (B, H, L, D) seen as (B, L, H, D)."""
    fused = torch.randn(2, 70, 4 * 64).unflatten(-1, (4, 64))
    parts = [fused[:, :, :2], fused[:, :, 2:3], fused[:, :, 3:]]
    turned = [torch.randn(2, h, 70, 64).transpose(1, 2) for h in (2, 1, 1)]
    expected = [attend(*(x.contiguous() for x in t), causal=True) for t in (parts, turned)]
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
    for tensors, same in zip((parts, turned), expected, strict=True):
        assert torch.equal(attend(*tensors, causal=True), same)


def test_strided_inputs_and_gradients_follow_the_definition() -> None:
    fused = torch.randn(2, 70, 4 * 64).unflatten(-1, (4, 64))
    follows_reference(fused[:, :, :2], fused[:, :, 2:3], fused[:, :, 3:])
    q, k, v = inputs(70, 90)
    follows_reference(q.mT.contiguous().mT, k.expand(2, -1, -1, -1)[:1], v[..., ::2])


def test_broadcast_gradients_are_read() -> None:
    tensors = [x.requires_grad_() for x in inputs(70, 70, 2, 1)]
    ours, reference = (
        torch.autograd.grad(kernels.attention(*tensors, impl=impl).sum(), tensors)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_offsets_beyond_31_bits() -> None:
    """Rows 4 Mi elements apart: the last ones start past element 2³¹."""
    stride, rows = (1 << 22) - 16, 600
    far = torch.empty(stride * rows, dtype=torch.float16).as_strided(
        (1, rows, 1, 64), (stride * rows, stride, 64, 1)
    )
    q, k, v = inputs(rows, rows, dtype=torch.float16)
    far[:] = k
    window = {"window": (20, 20)}
    assert torch.equal(attend(q, far, v, **window), attend(q, k, v, **window))


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (40, 0)}])
def test_repeats_have_the_same_bits(options: dict[str, Any]) -> None:
    tensors = [x.requires_grad_() for x in inputs(150, 150, 4, 2, dtype=torch.bfloat16)]
    bias = torch.randn(1, 1, 150, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)
    leaves = [*tensors, bias, sinks]
    first, second = (
        torch.autograd.grad(
            attend(*tensors, key_bias=bias, sinks=sinks, deterministic=True, **options).sum(),
            leaves,
        )
        for _ in range(2)
    )
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_only_asked_for_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone equals itself among all; what is not asked for is not launched."""
    tensors = inputs(70, 80, 2, 1)
    bias, sinks = torch.randn(1, 1, 80), torch.randn(2)
    leaves = [*tensors, bias, sinks]

    def gradients(wanted: set[int]) -> tuple[Tensor, ...]:
        parts = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(leaves)]
        out = attend(*parts[:3], key_bias=parts[3], sinks=parts[4], causal=True)
        return torch.autograd.grad(out.square().sum(), [parts[i] for i in sorted(wanted)])

    every = gradients({0, 1, 2, 3, 4})
    for i, whole in enumerate(every):
        (alone,) = gradients({i})
        assert torch.equal(alone, whole)
    monkeypatch.setattr(attention_launchers, "_launch_keys", lambda *a: pytest.fail("launched"))
    gradients({0})
    monkeypatch.setattr(attention_launchers, "_launch_queries", lambda *a: pytest.fail("launched"))
    gradients({4})


def test_either_output_may_be_unused() -> None:
    tensors = [x.requires_grad_() for x in inputs(70, 80)]
    for used in (0, 1):
        ours, reference = (
            torch.autograd.grad(
                kernels.attention(*tensors, return_lse=True, impl=impl)[used].sum(),
                tensors,
                materialize_grads=True,
            )
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_operators_are_registered_correctly() -> None:
    q, k, v = inputs(20, 30, 2, 1)
    bias, sinks = torch.randn(1, 1, 30), torch.randn(2)
    dense = (q, None, k, None, v, bias, sinks, None, None)
    cu = torch.tensor([0, 7, 20], dtype=torch.int32)
    packed = (q[0], None, k[0, :20], None, v[0, :20], None, None, cu, cu)
    options = (0.1, 0.0, -1, 0)
    for inputs_ in (dense, packed):
        out, lse = operator._forward_op(*inputs_, *options)
        torch.library.opcheck(operator._forward_op, (*inputs_, *options))
        arguments = (out, lse, *inputs_, out, lse, *options)
        has = inputs_[5] is not None
        for wanted in ((True, True, True, has, has), (False, False, True, False, False)):
            torch.library.opcheck(operator._backward_op, (*arguments, *wanted))


def test_compiles_as_one_graph_and_checkpoints() -> None:
    tensors = [x.requires_grad_() for x in inputs(20, 20, 2, 1)]
    cu = torch.tensor([0, 7, 20], dtype=torch.int32)

    def fn(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        out, lse = attend(q, k, v, causal=True, window=(9, 0), return_lse=True)
        packed = attend(out[0], k[0], v[0], cu_seqlens_q=cu)
        return packed.square().sum() + lse.sum()

    def both(call: Any) -> tuple[Tensor, ...]:
        loss = call(*tensors, cu)
        return (loss, *torch.autograd.grad(loss, tensors))

    expected = both(fn)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        torch.testing.assert_close(both(other), expected)


def test_under_autocast() -> None:
    tensors = [x.requires_grad_() for x in inputs(20, 20)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*tensors, causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(*(x.bfloat16() for x in tensors), causal=True))
    assert torch.autograd.grad(out.sum(), tensors)[0].dtype == torch.float32


def test_poisoned_memory_reaches_the_outputs() -> None:
    q, k, v = inputs(20, 20)
    with poisoned_memory():
        out, lse = operator._fake_forward(q, None, k, None, v, *(None,) * 4, 1.0, 0.0, -1, -1)
    assert out.isnan().all()
    assert lse.isnan().all()


def broken(module: ModuleType, folder: Path, right: str, wrong: str) -> ModuleType:
    """``module`` with one expression replaced."""
    source = Path(module.__file__ or "").read_text()
    assert right in source
    path = folder / "broken_attention.py"
    path.write_text(source.replace(right, wrong))
    name = f"{module.__package__}.broken_attention"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("total = total * decay + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
        ("acc * decay[:, None]", "acc"),
        ("tl.range(0, n_masked)", "tl.range(0, n_masked - 1)"),
        ('s = tl.where(m, s, float("-inf"))', "s = s"),
        ("m_row = o_row < len_q * GROUP", "m_row = o_row < len_q * GROUP - 1"),
    ],
    ids=[
        "sum not rescaled",
        "output not rescaled",
        "a block left out",
        "no mask",
        "a row unwritten",
    ],
)
def test_a_broken_kernel_is_caught(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = broken(attention_forward, tmp_path, right, wrong)
    name = "_attention_forward_kernel"
    monkeypatch.setattr(attention_launchers, name, getattr(made, name))
    q, k, v = inputs(200, 300)
    with pytest.raises(AssertionError, match="elements are out"):
        follows_reference(3 * q, k, v, causal=True)
