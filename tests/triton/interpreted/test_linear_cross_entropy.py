"""linear_cross_entropy in the interpreter: values, gradients, options, layouts, what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stackwise import kernels
from stackwise.kernels.triton_ops import linear_cross_entropy as ours
from stackwise.kernels.triton_ops import linear_cross_entropy_kernels as sources
from stackwise.kernels.triton_ops import linear_cross_entropy_passes as passes
from stackwise.kernels.triton_ops import linear_cross_entropy_plan as plans
from tests.triton.compare import assert_follows_reference, assert_within, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
INPUT, WEIGHT, TARGET, BIAS, TOKEN_WEIGHT = range(5)
PACKAGE = "stackwise.kernels.triton_ops"
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 3.0}


def loss_of(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return kernels.linear_cross_entropy(
        *(input, weight, target),
        linear_bias=bias,
        token_weight=token_weight,
        rows=rows,
        **{"impl": "triton", **options},
    )


def tensors(
    n: int = 37, width: int = 24, classes: int = 101, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Input, weight, target with every fourth row ignored, bias, token weights, 0.8 n rows."""
    target = torch.randint(0, classes, (n,))
    target[3::4] = -100
    return [
        torch.randn(n, width).to(dtype),
        (torch.randn(classes, width) / width**0.5 * 2).to(dtype),
        target,
        torch.randn(classes).to(dtype),
        3 * torch.rand(n).to(dtype),
        torch.randperm(n)[: -(-n * 4 // 5)],
    ]


def with_each_loss(*arguments: Tensor | None, reduction: str = "mean", **options: Any) -> Tensor:
    """The value of each row's loss, with the gradient of their sum or mean.

    Of a single number the reference's error is 0 by luck too often to be a bound.
    """
    if reduction == "none":
        return loss_of(*arguments, reduction=reduction, **options)
    total = loss_of(*arguments, reduction=reduction, **options)
    constant = [None if t is None else t.detach() for t in arguments]
    each = loss_of(*constant, reduction="none", **options)
    counted = constant[TARGET] if len(constant) < 6 else constant[TARGET][constant[5]]
    kept = (counted != options.get("ignore_index", -100)).sum().clamp(min=1)
    torch.testing.assert_close(total.detach(), each.sum() / (kept if reduction == "mean" else 1))
    return each + (total - total.detach())


def follows_reference(*arguments: Tensor | None, constants: Any = (), **options: Any) -> None:
    reference = partial(with_each_loss, impl="reference")
    constants = (*constants, TOKEN_WEIGHT)
    assert_follows_reference(with_each_loss, reference, arguments, constants, **options)


def cut_into_pieces(patch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, tiles of 32 classes, segments of 64, one program that walks down all rows:
    every loop turns, every end is ragged.

    Of 30 or 37 rows 24 have room in the weight's gradient, which ends within the second chunk.
    """
    small = {"MIN_CHUNK_BYTES": 1, "MIN_CHUNK": 16, "MAX_CHUNK": 16, "ROW_STEP": 8}
    small |= {"CLASS_STEP": 32, "MAX_BLOCK": 64, "TILE_ELEMENTS": 1024}
    patch.setattr(plans, "MULTIPROCESSORS", {90: 1})
    small |= {"WALK_ELEMENTS": 1024, "RESIDENT": 1}
    for name, value in small.items():
        patch.setattr(plans, name, value)


@pytest.fixture(autouse=True)
def _fresh_plans() -> Iterator[None]:
    plans.plan_passes.cache_clear()
    yield
    plans.plan_passes.cache_clear()


@pytest.fixture
def _pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_pieces(monkeypatch)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once_follows_the_definition(dtype: torch.dtype, reduction: str) -> None:
    follows_reference(*tensors(dtype=dtype), reduction=reduction, **EVERYTHING)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_single_chunk_follows_the_definition(reduction: str) -> None:
    follows_reference(*tensors(dtype=torch.bfloat16), reduction=reduction, **EVERYTHING)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"z_loss": 0.1},
        {"softcap": 3.0},
        {"softcap": 300.0},
        {"label_smoothing": 1.0},
        {"ignore_index": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_option_follows_the_definition(dtype: torch.dtype, options: dict[str, Any]) -> None:
    x, weight, target, *_ = tensors(dtype=dtype)
    target[target == -100] = 7 if "ignore_index" in options else 1
    follows_reference(x, weight, target, **options)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("position", [BIAS, TOKEN_WEIGHT, 5])
def test_each_argument_alone_follows_the_definition(position: int) -> None:
    arguments: list[Tensor | None] = [*tensors(dtype=torch.bfloat16)]
    arguments[5] = arguments[5] if position == 5 else torch.arange(37)
    for other in {BIAS, TOKEN_WEIGHT} - {position}:
        arguments[other] = None
    follows_reference(*arguments, reduction="sum")


@pytest.mark.parametrize(
    ("n", "classes"), [(1, 1), (63, 2), (239, 63), (113, 113), (1, 1000), (29, 1000)]
)
def test_odd_sizes_follow_the_definition(n: int, classes: int) -> None:
    x, weight, target, *_ = tensors(n, 65, classes)
    follows_reference(x, weight, target, reduction="sum")


def test_rows_of_several_segments_follow_the_definition() -> None:
    """10,001 classes: three segments, gradients in tiles of 1024 columns with a ragged last one."""
    follows_reference(*tensors(5, 16, 10_001, torch.bfloat16), reduction="none")


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(
    "constants",
    [(WEIGHT, BIAS), (INPUT, BIAS), (INPUT, WEIGHT), (WEIGHT,)],
    ids=["input", "weight", "bias", "input+bias"],
)
def test_only_what_needs_a_gradient_gets_one(constants: Any, reduction: str) -> None:
    follows_reference(*tensors(), constants=constants, reduction=reduction)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_gradients_only_losses_are_made(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "to_gradient", lambda *_: pytest.fail("a gradient was made"))
    arguments = tensors()
    expected = loss_of(*arguments, reduction=reduction, impl="reference", **EVERYTHING)
    with poisoned_memory():
        loss = loss_of(*arguments, reduction=reduction, **EVERYTHING)
    torch.testing.assert_close(loss, expected)


def test_a_frozen_weight_costs_no_pass_over_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "class_gradients", lambda *_, **__: pytest.fail("second pass"))
    follows_reference(*tensors(), constants=(WEIGHT,), reduction="mean")


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_inputs_follow_the_definition(reduction: str) -> None:
    x, weight, target, bias, token_weight, rows = tensors()
    x = torch.randn(74, 3 * 24)[::2, 24:48]
    weight = weight.T.contiguous().T
    bias = torch.randn(101, 2)[:, 0]
    follows_reference(x, weight, target, bias, token_weight, rows, reduction=reduction)
    wide = (torch.randn(202, 48) / 3)[::2, ::2]
    follows_reference(torch.randn(24, 37).T, wide, target, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ["none selected", "all ignored", "no input"])
def test_no_rows_give_zero_loss_and_zero_gradients(case: str, reduction: str) -> None:
    x, weight, target, bias, *_ = tensors(0 if case == "no input" else 6)
    rows = torch.zeros(0, dtype=torch.int64) if case == "none selected" else None
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with poisoned_memory():
        loss = loss_of(x, weight, target.fill_(-100), bias, rows=rows, reduction=reduction)
        gradients = torch.autograd.grad(loss.sum(), leaves)
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_bits_every_time(reduction: str) -> None:
    x, weight, target, bias, *rest = tensors(dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def run() -> list[Tensor]:
        loss = loss_of(x, weight, target, bias, *rest, reduction=reduction, **EVERYTHING)
        return [loss, *torch.autograd.grad(loss.sum(), leaves)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(
    ("reduction", "dtype"),
    [("mean", torch.float32), ("mean", torch.float16), ("none", torch.bfloat16)],
    ids=str,
)
def test_a_second_backward_gives_the_same_gradients(reduction: str, dtype: torch.dtype) -> None:
    x, weight, target, bias, *rest = tensors(dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = loss_of(x, weight, target, bias, *rest, reduction=reduction).sum() * 0.37
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for again, before in zip(torch.autograd.grad(loss, leaves), first, strict=True):
        assert torch.equal(again, before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_of_the_gradient_is_refused(reduction: str) -> None:
    x, weight, target, *_ = tensors()
    x.requires_grad_()
    factor = torch.ones((), requires_grad=True)
    loss = loss_of(x, weight.requires_grad_(), target, reduction=reduction).sum() * factor
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_loss_scale_lifts_float16_gradients_above_the_smallest_number() -> None:
    """One class in 1000, mean over 60 rows: 2e-5 without the scale, of which float16 holds eight
    bits."""
    x, weight = torch.randn(60, 8).half() / 8, torch.randn(1000, 8).half() / 8
    target = torch.randint(0, 1000, (60,))
    exact = weight.double().requires_grad_()
    scale = 2.0**14
    loss_of(x.double(), exact, target, impl="reference").mul(scale).backward()
    weight.requires_grad_()
    loss_of(x, weight, target).mul(scale).backward()
    assert exact.grad is not None
    assert weight.grad is not None
    error = (weight.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 2e-3


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen weight", "trained weight"])
@pytest.mark.usefixtures("_pieces")
def test_under_autocast(frozen: bool) -> None:
    """bf16 products and a float32 loss, gradients in the parameters' float32."""
    x, weight, target, bias, token_weight, rows = tensors(60, 32, 203)
    arguments = (target, bias, token_weight, rows)

    def run(dtype: torch.dtype, impl: str) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)]
        rest = [a.to(dtype) if a.is_floating_point() else a for a in arguments]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
            loss = loss_of(*leaves, *rest, reduction="sum", impl=impl)
        trained = [t for t in leaves if t.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    exact = run(torch.float64, "reference")
    plain = run(torch.float32, "reference")
    with poisoned_memory():
        mine = run(torch.float32, "triton")
    for name, out, same, truth in zip(["loss", "dx", "dw"], mine, plain, exact, strict=False):
        assert out.dtype == torch.float32
        # Its rounding error is that of the products' dtype.
        same = same if name == "loss" else same.bfloat16()
        assert_within(name, out.to(same.dtype), same, truth)


def test_parity_with_pytorch() -> None:
    x, weight, target, bias, *_ = tensors()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    theirs = F.cross_entropy(F.linear(*leaves), target, label_smoothing=0.1)
    mine = loss_of(x, weight, target, bias, label_smoothing=0.1)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves)
    )


def test_a_huge_loss_stays_finite() -> None:
    x = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = loss_of(x, weight, torch.tensor([1]))
    assert loss.item() == 2000.0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.tensor([[2.0, 0.0]]))


def test_a_confident_prediction_keeps_its_digits() -> None:
    """The difference to the largest logit comes first: lse - logit would round at 1000."""
    x = torch.tensor([[1000.0, 10.0]])
    weight = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    assert loss_of(x, weight, torch.tensor([0])).item() == pytest.approx(4.5398e-05, rel=2e-3)


@pytest.mark.usefixtures("_pieces")
def test_classes_forbidden_by_an_infinite_bias_take_no_part() -> None:
    """Classes 0 to 69 are a whole segment and more."""
    x, weight, target, bias, *_ = tensors()
    target[:] = 70 + target % 31
    x.requires_grad_()
    allowed = loss_of(x, weight[70:], target - 70, bias[70:], impl="reference")
    expected = torch.autograd.grad(allowed, x)[0]
    loss = loss_of(x, weight, target, torch.where(torch.arange(101) < 70, -torch.inf, bias))
    torch.testing.assert_close(loss, allowed)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_a_target_that_is_no_class_shows() -> None:
    x, weight, target, *_ = tensors()
    target[5] = 101
    losses = loss_of(x, weight, target, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_walks_over_every_element_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "SCALE_BLOCK", 64)
    monkeypatch.setitem(ours.MULTIPROCESSORS, 90, 1)
    x = torch.randn(1001).to(dtype)
    assert torch.equal(ours._scaled(x.clone(), torch.tensor(3.0)), (x.float() * 3).to(dtype))
    assert torch.equal(ours._scaled(x.clone(), torch.tensor(1.0)), x)
    assert ours._scaled(x[:0], torch.tensor(3.0)).shape == (0,)


def test_offsets_beyond_31_bits() -> None:
    """600 rows, 4 Mi elements apart: the last ones start past element 2³¹."""
    stride, rows, classes = 1 << 22, 600, 63
    x, weight, target, *_ = tensors(rows, 8, classes)
    plan = plans.plan_passes(rows, classes, 8, 4, 4, 90)
    far = torch.empty(stride * rows, dtype=torch.float32).as_strided((rows, classes), (stride, 1))
    near = F.linear(x, weight)
    far.copy_(near)
    stats = torch.stack([near.amax(1), (near - near.amax(1, keepdim=True)).exp().sum(1)])
    options = (0.0, 0.0, None, plan, torch.empty(0))
    task = passes.Task(weight, None, target, torch.rand(rows), stats, *options)
    for logits in (far, near):
        passes.to_gradient(task, logits, slice(0, rows), 0, None)
    assert torch.equal(far, near)
    expected = F.linear(x, weight).softmax(1) - F.one_hot(target.clamp(min=0), classes)
    torch.testing.assert_close(near[:3], task.factor[:3, None] * expected[:3])


def test_nothing_waits_for_the_device() -> None:
    """No operation whose result's size or value the host must know."""

    class NoWait(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
            assert not any(name in str(func) for name in waiting), func
            return func(*args, **(kwargs or {}))

    x, weight, target, bias, token_weight, rows = tensors()
    call = (x, weight, target, bias, token_weight, rows, -100, 0.1, 0.1, 3.0)
    dtype = torch.float32
    with NoWait():
        losses, stats, *_ = ours._forward(*call, True, True, True, True, True, dtype)
        ours.reduce(losses, target.index_select(0, rows) != -100, "mean")
        upstream = torch.ones_like(losses)
        ours._backward(*call[:6], stats, upstream, *call[6:], True, True, dtype)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph_and_checkpoints(reduction: str) -> None:
    x, weight, target, bias, token_weight, rows = tensors()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss = loss_of(x, weight, target, bias, token_weight, rows, reduction=reduction)
        return (loss * 0.5).sum()

    def both(call: Any) -> list[Tensor]:
        loss = call(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    expected = both(fn)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        torch.testing.assert_close(both(other), expected)


def test_operators_are_registered_correctly() -> None:
    x, weight, target, bias, token_weight, rows = tensors(dtype=torch.bfloat16)
    call = (x, weight, target, bias, token_weight, rows, -100, 0.1, 0.0, None)
    every = (True, True, True, True, True, torch.bfloat16)
    for options in (every, (False, *every[1:]), (True, False, *every[2:])):
        torch.library.opcheck(ours._forward_op, (*call, *options))
    _, stats, *_ = ours._forward_op(*call, *every)
    upstream = torch.rand(len(rows))
    arguments = (*call[:6], stats, upstream, *call[6:], True, True, torch.bfloat16)
    torch.library.opcheck(ours._backward_op, arguments)


def broken(folder: Path, module: ModuleType, right: str, wrong: str) -> ModuleType:
    """The module with one expression replaced."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(right) == 1
    path = folder / "broken.py"
    path.write_text(source.replace(right, wrong).replace("from .", f"from {PACKAGE}."))
    spec = importlib.util.spec_from_file_location("broken", path)
    assert spec is not None
    assert spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules["broken"] = result
    spec.loader.exec_module(result)
    return result


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("inside = (tl.arange(0, BLOCK_C) < left)", "inside = (tl.arange(0, BLOCK_C) >= 0)"),
        ('base = tl.where(top == float("-inf"), 0.0, top)', "base = top + 1.0"),
        ("m_row = row < n_rows\n    m =", "m_row = row < n_rows - 1\n    m ="),
        ("(target - first - column)", "(target - column)"),
        ("b_sum += g", "b_sum = g"),
    ],
    ids=[
        "padding counted as classes",
        "statistics about another number than the largest",
        "last row unwritten",
        "classes counted from the tile",
        "only the last block of rows summed",
    ],
)
def test_a_broken_kernel_is_caught(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = broken(tmp_path, sources, right, wrong)
    for name in ("_segment_statistics", "_row_losses", "_logits_gradient"):
        monkeypatch.setattr(passes, f"{name}_kernel", getattr(replaced, f"{name}_kernel"))
    with pytest.raises(AssertionError):
        follows_reference(*tensors(140), reduction="none", **EVERYTHING)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("stop = min(at.stop, task.plan.stored_rows)", "stop = min(at.stop, 8)"),
        ("slice(done, rows), at.start", "slice(0, rows - done), at.start"),
        ("dx[at] = part", "dx[:len(part)] = part"),
    ],
    ids=["stored rows missing", "targets of other rows", "chunks overwritten"],
)
def test_a_broken_pass_is_caught(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = broken(tmp_path, passes, right, wrong)
    for name in ("Task", "row_losses", "to_gradient", "put_rows", "store", "class_gradients"):
        monkeypatch.setattr(ours, name, getattr(replaced, name))
    x, weight, target, *_ = tensors(dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        follows_reference(x, weight, target, reduction="sum")


def test_wrong_arguments_are_named() -> None:
    x, weight, target, *_ = tensors()
    with pytest.raises(ValueError, match=r"dtype torch\.float64; accepted: float32"):
        loss_of(x.double(), weight.double(), target)
    with pytest.raises(ValueError, match=r"linear_weight: got shape \(101, 23\)"):
        loss_of(x, weight[:, :23], target)
