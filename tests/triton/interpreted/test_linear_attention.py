"""Linear attention in the interpreter: every map, dense and packed, with every gradient."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from stackwise.kernels.triton_ops import linear_attention as module
from stackwise.kernels.triton_ops import linear_attention_backward, linear_attention_forward
from stackwise.kernels.triton_ops.linear_attention_plan import LinearPlan, cut
from tests.triton.compare import assert_follows_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MAPS = ("favor", "elu", "relu", "exp")


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chunks for every dtype: three of them in a row of 70 tokens."""
    use_plan(monkeypatch, 32)


def use_plan(monkeypatch: pytest.MonkeyPatch, features: int) -> None:
    monkeypatch.setattr(module, "plan_linear", lambda *_: LinearPlan(32, features, 4, 1, 4))


def inputs(
    length: int, dtype: torch.dtype, heads: int = 2, kv_heads: int = 1, width: int = 20
) -> list[Tensor]:
    """q, k, v of one row; relu rows share features with the keys."""
    q, k = (torch.randn(1, length, h, width) + 0.7 for h in (heads, kv_heads))
    return [x.to(dtype) for x in (q, k, torch.randn(1, length, kv_heads, 24))]


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    impl: str = "triton",
    **options: Any,
) -> Tensor:
    if options["feature_map"] == "favor":
        options["features"] = kernels.sample_features("gaussian", q.shape[-1], 20)
    return kernels.linear_attention(q, k, v, key_bias=bias, impl=impl, **options)


def follows_reference(*tensors: Tensor | None, function: Any = linear, **options: Any) -> None:
    """A state adds up the keys in another order than a row of scores, hence the floor."""
    q = tensors[0]
    assert q is not None
    floor = 1e-5 if q.dtype == torch.float32 else 0.0
    reference = partial(function, impl="reference")
    assert_follows_reference(function, reference, tensors, floor=floor, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_favor_follows_the_definition(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float32:
        use_plan(monkeypatch, 16)  # two blocks of the 20 features
    follows_reference(*inputs(70, dtype), feature_map="favor", causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bidirectional_favor_follows_the_definition(dtype: torch.dtype) -> None:
    follows_reference(*inputs(39, dtype), feature_map="favor", causal=False)


@pytest.mark.parametrize("name", ["elu", "relu", "exp"])
def test_other_maps_follow_the_definition(name: str) -> None:
    dtype = {"elu": torch.bfloat16, "relu": torch.float32, "exp": torch.float16}[name]
    for causal in (False, True):
        follows_reference(*inputs(39, dtype, 1), feature_map=name, causal=causal)


@pytest.mark.parametrize("name", ["favor", "elu"])
def test_key_bias_and_hidden_keys(name: str) -> None:
    bias = torch.randn(1, 1, 39)
    follows_reference(*inputs(39, torch.float32, 1), bias, feature_map=name, causal=True)
    bias[..., :3] = -torch.inf
    bias[..., 20:25] = -torch.inf
    tensors, hidden = inputs(39, torch.float32, 1), partial(linear, bias=bias)
    follows_reference(*tensors, function=hidden, feature_map=name, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents(causal: bool) -> None:
    cu = torch.tensor([0, 3, 3, 40, 41, 50], dtype=torch.int32)
    q, k, v = (x[0] for x in inputs(50, torch.float32, heads=1, kv_heads=1))
    bias = torch.randn(1, 50)
    options: dict[str, Any] = {"feature_map": "favor", "causal": causal, "cu_seqlens_q": cu}
    follows_reference(q, k, v, bias, **options)
    if not causal:
        few = torch.tensor([0, 2, 5, 5, 9, 20], dtype=torch.int32)
        options |= {"cu_seqlens_q": few, "cu_seqlens_k": cu}
        follows_reference(q[:20], k, v, **options)


def test_strided_views_and_batches() -> None:
    fused = torch.randn(2, 34, 4, 16)
    q, k, v = fused[:, :, :2], fused[:, :, 2:3], fused.flip(1)[:, :, 3:]
    follows_reference(q, k, v, feature_map="elu", causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_exponents_far_beyond_float32(causal: bool) -> None:
    """Along the row they rise and fall by hundreds, inside a chunk by less than e^80."""
    q, k, v = inputs(70, torch.float32)
    size = 6 * torch.linspace(0, 6, 70).sin().view(1, 70, 1, 1)
    q, k = q * size, k * size
    exact = kernels.linear_attention(
        q.double(), k.double(), v.double(), feature_map="exp", causal=causal, impl="torch"
    )
    ours = linear(q, k, v, feature_map="exp", causal=causal)
    assert (ours - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_gradients_are_the_same_bits_every_time() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(39, torch.bfloat16))
    runs = []
    for _ in range(2):
        out = linear(q, k, v, feature_map="elu", causal=True)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, int]) -> None:
    q = torch.randn(1, shape[0], 2, 8, requires_grad=True)
    k, v = (torch.randn(1, shape[1], 1, 8, requires_grad=True) for _ in range(2))
    out = linear(q, k, v, feature_map="elu", causal=False)
    assert torch.equal(out, torch.zeros(1, shape[0], 2, 8))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not any(g.any() for g in grads)


def test_chunks_cover_the_documents() -> None:
    for bounds in ([0, 5], [0, 0, 64, 65, 65, 200], [0, 32, 64]):
        total = bounds[-1] + 3
        chunks = cut(torch.tensor(bounds), total, 32)
        covered = torch.zeros(total, dtype=torch.int64)
        for i, (document, start, count) in enumerate(chunks.table.tolist()):
            if document < 0:
                continue
            assert bounds[document] <= start < start + count <= bounds[document + 1]
            first, number = chunks.documents[document].tolist()
            assert first <= i < first + number
            covered[start : start + count] += 1
        assert covered[: bounds[-1]].eq(1).all()
        assert covered[bounds[-1] :].eq(0).all()


def test_what_is_not_covered_is_said() -> None:
    q, k, v = inputs(9, torch.float32)
    w = torch.randn(5, 20)
    call = partial(kernels.linear_attention, impl="triton", features=w)
    with pytest.raises(ValueError, match="head dimension 65; accepted: up to 64 in"):
        kernels.linear_attention(*3 * [torch.randn(1, 4, 1, 65)], feature_map="elu", impl="triton")
    with pytest.raises(ValueError, match="causal with 3 queries and 9 keys"):
        call(q[:, :3], k, v, causal=True)
    with pytest.raises(ValueError, match="features want a gradient"):
        call(q, k, v, features=w.requires_grad_())
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        call(q.double(), k.double(), v.double(), features=w.detach())


def test_operators_are_registered_correctly() -> None:
    q, k, v = inputs(9, torch.float32)
    arguments = (q, k, v, None, torch.randn(1, 1, 9), None, None, "elu", True, 0.5)
    torch.library.opcheck(module._forward_op, arguments)
    out, norm, tops = module._forward_op(*arguments)
    torch.library.opcheck(
        module._backward_op, (out, *arguments[:7], out, norm, tops, *arguments[7:])
    )


def test_compiles_as_one_graph() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(9, torch.float32))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear(q, k, v, feature_map="exp", causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    torch.testing.assert_close(ours, torch.autograd.grad(loss(q, k, v), (q, k, v)))


def test_the_normalised_gaussian_runs_through_triton_attention() -> None:
    q, k = torch.randn(1, 20, 4, 16), torch.randn(1, 20, 2, 16)
    v, bandwidth = torch.randn(1, 20, 2, 16), torch.rand(4) + 1

    def gaussian(q: Tensor, k: Tensor, v: Tensor, bandwidth: Tensor, impl: str) -> Tensor:
        return kernels.kernel_attention(q, k, v, bandwidth=bandwidth, causal=True, impl=impl)

    assert_follows_reference(
        partial(gaussian, impl="triton"), partial(gaussian, impl="reference"),
        (q, k, v, bandwidth),
    )  # fmt: skip


def broken(folder: Path, source: ModuleType, right: str, wrong: str) -> ModuleType:
    """The kernels of ``source`` with one expression replaced."""
    text = Path(str(source.__file__)).read_text()
    assert right in text
    path = folder / f"broken_{source.__name__.rpartition('.')[2]}.py"
    path.write_text(
        text.replace(right, wrong).replace("from .", "from stackwise.kernels.triton_ops.")
    )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(
    ("source", "kernel", "right", "wrong"),
    [
        (linear_attention_forward, "_linear_scan_kernel", "b_state *= factor[:, None]",
         "b_state *= 1.0"),
        (linear_attention_forward, "_linear_outputs_kernel", "o_row[:, None] >= o_row[None, :]",
         "o_row[:, None] > o_row[None, :]"),
        (linear_attention_backward, "_linear_key_gradients_kernel", "+ b_sums[None, :]", "+ 0.0"),
    ],
    ids=["state not rescaled", "own key hidden", "normaliser's gradient lost"],
)  # fmt: skip
def test_a_broken_kernel_is_caught(
    source: ModuleType, kernel: str, right: str, wrong: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wrong_kernels = broken(tmp_path, source, right, wrong)
    monkeypatch.setattr(module, kernel, getattr(wrong_kernels, kernel))
    with pytest.raises(AssertionError, match="elements are out"):
        follows_reference(*inputs(70, torch.float32, 1), feature_map="exp", causal=True)
