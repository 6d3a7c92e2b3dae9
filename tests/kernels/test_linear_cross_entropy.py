"""linear_cross_entropy: chunking, selection, every option and gradient, against full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise import kernels
from stackwise.kernels import linear_cross_entropy_torch as implementation
from tests.kernels.compare import assert_close, assert_variant, cast, poison, run

FLOATS = ("input", "linear_weight", "linear_bias")


def inputs(
    n: int = 37, width: int = 24, classes: int = 101, bias: bool = True
) -> dict[str, Tensor]:
    tensors = {
        "input": torch.randn(n, width),
        "linear_weight": torch.randn(classes, width) / width**0.5 * 2,
        "target": torch.randint(0, classes, (n,)),
    }
    if bias:
        tensors["linear_bias"] = torch.randn(classes)
    return tensors


@pytest.fixture(params=["whole", "chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk, and chunks of 5 rows whose softmax and dW blocks are ragged too."""
    if request.param == "chunks":
        monkeypatch.setattr(implementation, "_chunk_rows", lambda *_: 5)
        monkeypatch.setattr(implementation, "_BLOCK", 250)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"z_loss": 0.1},
        {"softcap": 3.0},
        {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 5.0},
    ],
    ids=["plain", "smoothing", "z_loss", "softcap", "all"],
)
def test_forward_backward(reduction: str, options: dict[str, Any]) -> None:
    tensors = inputs()
    assert_variant(kernels.linear_cross_entropy, tensors, FLOATS, reduction=reduction, **options)
    tensors["target"][::4] = -100
    tensors |= {"token_weight": 3 * torch.rand(37), "rows": torch.randperm(37)[:30].sort()[0]}
    assert_variant(kernels.linear_cross_entropy, tensors, FLOATS, reduction=reduction, **options)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(
    "wanted",
    [("input",), ("linear_weight",), ("linear_bias",), ("input", "linear_bias"), ()],
    ids="+".join,
)
def test_only_what_needs_a_gradient_gets_one(wanted: tuple[str, ...], reduction: str) -> None:
    assert_variant(kernels.linear_cross_entropy, inputs(), wanted, reduction=reduction)


@pytest.mark.parametrize("n", [1, 2, 63, 239])
@pytest.mark.parametrize("classes", [1, 2, 63, 1000])
def test_odd_sizes(n: int, classes: int) -> None:
    tensors = inputs(n, 5, classes, bias=False)
    wanted = ("input", "linear_weight")
    assert_variant(kernels.linear_cross_entropy, tensors, wanted, reduction="sum")


def test_strided_views() -> None:
    tensors = inputs(bias=False)
    tensors["input"] = torch.randn(24, 74).T[::2]
    tensors["linear_weight"] = torch.randn(24, 101).T
    wanted = ("input", "linear_weight")
    assert_variant(kernels.linear_cross_entropy, tensors, wanted, reduction="sum")


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parity_with_pytorch(impl: str, reduction: str) -> None:
    tensors = cast(inputs(), torch.float64)
    tensors["target"][5:9] = 7
    leaves = [tensors[n].requires_grad_() for n in FLOATS]
    logits = F.linear(*leaves)
    options = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 7}
    theirs = F.cross_entropy(logits, tensors["target"], **options)
    ours = kernels.linear_cross_entropy(**tensors, **options, impl=impl)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_the_definition(reduction: str) -> None:
    tensors = cast(inputs(4, 3, 6), torch.float64)
    tensors["target"][1] = -100
    leaves = tuple(tensors[n].requires_grad_() for n in FLOATS)

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(
            x, w, tensors["target"], linear_bias=b, reduction=reduction, label_smoothing=0.1,
            z_loss=0.1, softcap=2.0, token_weight=torch.tensor([1.0, 2.0, 0.5, 3.0]),
            impl="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_mean_divides_by_the_rows_that_count_not_by_the_weights(impl: str) -> None:
    tensors = inputs(bias=False)
    tensors["target"][:10] = -100
    weight = torch.rand(37) * 5
    rows = torch.arange(5, 30)
    each = kernels.linear_cross_entropy(
        **tensors, token_weight=weight, rows=rows, reduction="none", impl=impl
    )
    assert each.shape == (25,)
    assert torch.equal(each[:5], torch.zeros(5))
    mean = kernels.linear_cross_entropy(**tensors, token_weight=weight, rows=rows, impl=impl)
    torch.testing.assert_close(mean, each.sum() / 20)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_give_zero_loss_and_zero_gradients(impl: str, reduction: str) -> None:
    for case in ("none selected", "all ignored", "no input"):
        tensors = inputs(0 if case == "no input" else 6)
        if case == "none selected":
            tensors["rows"] = torch.zeros(0, dtype=torch.int64)
        tensors["target"].fill_(-100)
        leaves = [tensors[n].requires_grad_() for n in FLOATS]
        loss = kernels.linear_cross_entropy(**tensors, reduction=reduction, impl=impl)
        assert torch.equal(loss, torch.zeros_like(loss))
        for grad, x in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True):
            assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_second_backward_gives_the_same_gradients(reduction: str) -> None:
    tensors = inputs()
    leaves = [tensors[n].requires_grad_() for n in FLOATS]
    loss = kernels.linear_cross_entropy(**tensors, reduction=reduction).sum() * 0.37
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    first = [g.clone() for g in first]
    poison()
    torch.testing.assert_close(list(torch.autograd.grad(loss, leaves)), first)


def test_two_losses_of_one_weight_do_not_share_memory() -> None:
    one, two = inputs(), inputs()
    two["linear_weight"], two["linear_bias"] = one["linear_weight"], one["linear_bias"]
    leaves = [one[n].requires_grad_() for n in FLOATS]

    def losses(impl: str) -> Tensor:
        first = kernels.linear_cross_entropy(**one, impl=impl)
        return first + 2 * kernels.linear_cross_entropy(**two, impl=impl)

    torch.testing.assert_close(
        torch.autograd.grad(losses("torch"), leaves),
        torch.autograd.grad(losses("reference"), leaves),
    )


@pytest.mark.parametrize("weight_grad", [False, True])
def test_autocast(weight_grad: bool) -> None:
    """bf16 products and a float32 loss, gradients in the parameters' float32; the error rule holds
    against the definition under autocast."""
    tensors = inputs(60, 32, 203, bias=False)
    wanted = ("input", "linear_weight") if weight_grad else ("input",)

    def fn(impl: str, **tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=tensors["input"].dtype != torch.float64):
            return kernels.linear_cross_entropy(**tensors, reduction="sum", impl=impl)

    exact = run(fn, cast(tensors, torch.float64), wanted, impl="reference")
    plain = run(fn, tensors, wanted, impl="reference")
    ours = run(fn, tensors, wanted, impl="torch")
    assert all(x.dtype == torch.float32 for x in ours.values())
    coarse = {n: x.bfloat16() if n != "out0" else x for n, x in plain.items()}
    assert_close("autocast", ours, coarse, exact)


def test_a_huge_loss_stays_finite() -> None:
    x = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = kernels.linear_cross_entropy(x, w, torch.tensor([1]))
    assert loss.item() == 2000.0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.tensor([[2.0, 0.0]]))


def test_a_confident_prediction_keeps_its_digits() -> None:
    """The difference to the largest logit comes first: lse - logit would round at 1000."""
    x = torch.tensor([[1000.0, 10.0]])
    w = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    loss = kernels.linear_cross_entropy(x, w, torch.tensor([0]))
    assert loss.item() == pytest.approx(4.5398e-05, rel=2e-3)


def test_never_holds_the_logits_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    take = implementation.Workspace.take

    def recording(self: Any, name: str, shape: tuple[int, ...], *rest: Any) -> Tensor:
        if name == "logits":
            sizes.append(shape[0])
        return take(self, name, shape, *rest)

    monkeypatch.setattr(implementation.Workspace, "take", recording)
    monkeypatch.setattr(implementation, "_CHUNK_BYTES", {2: 101 * 8 * 4, 4: 101 * 8 * 4})
    tensors = {n: x.requires_grad_(n in FLOATS) for n, x in inputs(100).items()}
    kernels.linear_cross_entropy(**tensors).backward()
    assert sum(sizes) == 100
    assert max(sizes) <= 8


def test_work_is_only_for_rows_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    inner = implementation._run

    def recording(task: Any, *rest: Any) -> Any:
        sizes.append(len(task.x))
        return inner(task, *rest)

    monkeypatch.setattr(implementation, "_run", recording)
    tensors = inputs()
    tensors["target"][:30] = -100
    kernels.linear_cross_entropy(**tensors)
    kernels.linear_cross_entropy(**tensors, rows=torch.arange(25, 33))
    assert sizes == [7, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.ones(37, 2, 24)}, r"input: got .*accepted: a tensor \(N, H\)"),
        ({"linear_weight": torch.ones(101, 23)}, r"linear_weight: got shape \(101, 23\)"),
        ({"linear_weight": torch.ones(101, 24).bfloat16()}, r"linear_weight: got torch.bfloat16"),
        ({"target": torch.ones(37)}, r"target: got float32 .*int64"),
        ({"target": torch.ones(36).long()}, r"target: got shape \(36,\)"),
        ({"target": torch.full((37,), 101)}, r"target: got 101 to 101; accepted: classes from 0"),
        ({"target": torch.full((37,), -1)}, r"target: got -1 to -1"),
        ({"rows": torch.tensor([0, 37])}, r"rows: got 0 to 37; accepted: indices from 0 to 36"),
        ({"rows": torch.tensor([True])}, r"rows: got bool"),
        ({"token_weight": torch.ones(36)}, r"token_weight: got shape \(36,\)"),
        ({"linear_bias": torch.ones(100)}, r"linear_bias: got shape \(100,\)"),
        ({"reduction": "avg"}, r"reduction: got 'avg'"),
        ({"label_smoothing": 1.5}, r"label_smoothing: got 1.5"),
        ({"softcap": -1.0}, r"softcap: got -1.0"),
        ({"impl": "cuda"}, r"impl='cuda' does not exist for linear_cross_entropy"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(**(inputs() | change))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph_and_checkpoints(reduction: str) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = inputs()
    tensors["target"][3] = -100
    leaves = [tensors[n].requires_grad_() for n in FLOATS]
    rows = torch.arange(30)

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        loss = kernels.linear_cross_entropy(
            x, w, tensors["target"], linear_bias=b, rows=rows, reduction=reduction
        )
        return (loss * 0.5).sum()

    def both(call: Callable[..., Tensor]) -> list[Tensor]:
        loss = call(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    expected = both(fn)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *a: checkpoint(fn, *a, use_reentrant=False)):
        torch.testing.assert_close(both(other), expected)


def test_registered_operation_passes_opcheck() -> None:
    tensors = inputs()
    args = (*[tensors[n] for n in ("input", "linear_weight", "target", "linear_bias")], None, None)
    numbers = (None, -100, 0.1, 0.0, None, True, True, True, torch.float32)
    operation = torch.ops.stackwise.linear_cross_entropy_rows.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operation, (*args, *numbers), test_utils=tests)
