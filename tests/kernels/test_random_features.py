"""random_features and sample_features: spectra, unbiased estimates, reproducible draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stackwise import kernels
from tests.kernels.compare import assert_variant

KINDS = ("cos", "cossin", "positive")


@pytest.mark.parametrize("kind", KINDS)
def test_forward_backward(kind: str) -> None:
    tensors = {"x": torch.randn(2, 17, 3, 8) / 2, "features": torch.randn(33, 8)}
    assert_variant(kernels.random_features, tensors, ("x", "features"), kind=kind)
    assert_variant(kernels.random_features, {n: x[:1] for n, x in tensors.items()}, (), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_definition(kind: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    call = lambda x, w: kernels.random_features(x, w, kind, impl="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, w))


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda d: torch.exp(-d.square().sum(-1) / 2),
    "laplacian": lambda d: torch.exp(-d.norm(dim=-1)),
    "uniform": lambda d: torch.sinc(d / torch.pi).prod(-1),
}


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_cossin_features_estimate_their_kernel(kernel: str, orthogonal: bool) -> None:
    m = 1 << 16
    w = kernels.sample_features(kernel, 4, m, orthogonal=orthogonal, seed=1)
    x, y = torch.randn(20, 4) / 2, torch.randn(20, 4) / 2
    phi = [kernels.random_features(t, w, "cossin") for t in (x, y)]
    # Each cosine has a variance below 1: five standard errors of the mean of m of them.
    error = (phi[0] * phi[1]).sum(-1) - KERNELS[kernel](x - y)
    assert error.abs().max() < 5 / m**0.5


@pytest.mark.parametrize("orthogonal", [False, True])
def test_positive_features_estimate_the_softmax_kernel(orthogonal: bool) -> None:
    w = kernels.sample_features("gaussian", 4, 1 << 16, orthogonal=orthogonal, seed=2)
    x, y = torch.randn(20, 4) / 2, torch.randn(20, 4) / 2
    phi = [kernels.random_features(t, w, "positive") for t in (x, y)]
    assert (phi[0] > 0).all()
    torch.testing.assert_close(
        (phi[0] * phi[1]).sum(-1), torch.exp((x * y).sum(-1)), rtol=0.05, atol=0.02
    )


def test_orthogonal_rows_in_blocks_lower_the_error() -> None:
    w = kernels.sample_features("gaussian", 8, 20, orthogonal=True)
    for block in w.split(8):
        gram = block @ block.T
        off_diagonal = gram - torch.diag(gram.diagonal())
        assert off_diagonal.abs().max() < 1e-4 * gram.diagonal().max()
    assert not torch.allclose(w.norm(dim=-1), w.norm(dim=-1).mean().expand(20), rtol=0.01)
    x, y = torch.randn(200, 8) / 3, torch.randn(200, 8) / 3
    errors = []
    for orthogonal in (False, True):
        total = 0.0
        for seed in range(20):
            w = kernels.sample_features("gaussian", 8, 16, orthogonal, seed)
            phi = [kernels.random_features(t, w, "cossin") for t in (x, y)]
            error = (phi[0] * phi[1]).sum(-1) - KERNELS["gaussian"](x - y)
            total += float(error.square().mean())
        errors.append(total)
    assert errors[1] < 0.8 * errors[0]


def test_uniform_entries_lie_between_minus_one_and_one() -> None:
    w = kernels.sample_features("uniform", 16, 4000)
    assert w.abs().max() <= 1
    assert abs(float(w.mean())) < 0.01
    assert float(w.var()) == pytest.approx(1 / 3, rel=0.03)


def test_the_published_attention_is_attention_on_cosine_features() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 8, dtype=torch.float64).unbind(0)
    w = kernels.sample_features("gaussian", 8, 64)
    fq, fk = (kernels.random_features(x, w, "cos") for x in (q, k))
    ours = kernels.attention(fq, fk, v)
    features = [torch.cos(torch.einsum("blhd,md->blhm", x, w.double())) for x in (q, k)]
    scores = torch.einsum("blhm,bkhm->bhlk", *features) / 64**0.5
    expected = torch.einsum("bhlk,bkhd->blhd", scores.softmax(-1), v)
    torch.testing.assert_close(ours, expected)


def test_draws_are_reproducible_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first = kernels.sample_features("laplacian", 5, 7, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, kernels.sample_features("laplacian", 5, 7, seed=3))
    assert not torch.equal(first, kernels.sample_features("laplacian", 5, 7, seed=4))
    assert first.shape == (7, 5)
    assert first.dtype == torch.float32


def test_zero_sizes() -> None:
    w = kernels.sample_features("gaussian", 4, 6)
    for kind, width in (("cos", 6), ("cossin", 12), ("positive", 6)):
        assert kernels.random_features(torch.zeros(0, 4), w, kind).shape == (0, width)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: kernels.random_features(x, w[:, :3]), r"features: got shape \(6, 3\)"),
        (lambda x, w: kernels.random_features(x, w, "sin"), r"kind: got 'sin'; accepted: 'cos'"),
        (lambda x, w: kernels.random_features(x.long(), w), r"x: got int64"),
        (lambda x, w: kernels.sample_features("linear", 4, 6), r"kernel: got 'linear'"),
        (lambda x, w: kernels.sample_features("gaussian", 4, 0), r"m: got 0"),
        (lambda x, w: kernels.random_features(x, w, impl="cuda"), r"impl='cuda' does not exist"),
    ],
)
def test_bad_arguments_are_named(call: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 4), torch.randn(6, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind: str) -> None:
    x, w = torch.randn(3, 4), torch.randn(6, 4)
    fn = torch.compile(
        lambda x, w: kernels.random_features(x, w, kind), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(fn(x, w), kernels.random_features(x, w, kind))
