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
    "laplacian_l1": lambda d: torch.exp(-d.abs().sum(-1)),
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


def slope_and_interval(errors: Tensor, sizes: tuple[int, ...]) -> tuple[float, float, float]:
    """Slope of log root mean square error over log m, and its 99% bootstrap interval.

    ``errors`` (sizes, draws): squared errors of independent draws.
    """
    x = torch.tensor(sizes, dtype=torch.float64).log()
    x = (x - x.mean()) / (x - x.mean()).square().sum()
    generator = torch.Generator().manual_seed(0)
    draws = errors.shape[1]
    again = torch.randint(draws, (2000, draws), generator=generator)
    means = errors[:, again].mean(-1)
    slopes = (0.5 * means.log() * x[:, None]).sum(0)
    low, high = torch.quantile(slopes, torch.tensor([0.005, 0.995], dtype=torch.float64)).tolist()
    return float((0.5 * errors.mean(1).log() * x).sum()), low, high


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kernel", [*KERNELS, "positive"])
def test_the_error_falls_with_the_root_of_the_number_of_features(
    kernel: str, orthogonal: bool
) -> None:
    sizes, draws = (32, 128, 512, 2048), 150
    generator = torch.Generator().manual_seed(3)
    # Positive features of long vectors have heavy tails: no 150 draws would show their rate.
    size = 4 if kernel == "positive" else 2
    x, y = torch.randn(2, 25, 4, generator=generator, dtype=torch.float64) / size
    truth = torch.exp((x * y).sum(-1)) if kernel == "positive" else KERNELS[kernel](x - y)
    kind, spectrum = ("positive", "gaussian") if kernel == "positive" else ("cossin", kernel)
    errors = torch.empty(len(sizes), draws, dtype=torch.float64)
    for i, m in enumerate(sizes):
        for draw in range(draws):
            w = kernels.sample_features(spectrum, 4, m, orthogonal, seed=draw * 7919 + m)
            phi = [kernels.random_features(t, w, kind) for t in (x, y)]
            errors[i, draw] = ((phi[0] * phi[1]).sum(-1) - truth).square().mean()
    slope, low, high = slope_and_interval(errors, sizes)
    assert low <= -0.5 <= high, (slope, low, high)
    assert high - low <= 0.12, (slope, low, high)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_cosines_alone_converge_to_their_formula_and_not_to_the_kernel(kernel: str) -> None:
    m = 1 << 16
    w = kernels.sample_features(kernel, 4, m, orthogonal=False, seed=4)
    x, y = torch.randn(20, 4) / 2, torch.randn(20, 4) / 2
    phi = [kernels.random_features(t, w, "cos") for t in (x, y)]
    mean = (phi[0] * phi[1]).mean(-1)
    formula = (KERNELS[kernel](x - y) + KERNELS[kernel](x + y)) / 2
    assert (mean - formula).abs().max() < 5 / m**0.5
    assert (mean - KERNELS[kernel](x - y)).abs().max() > 0.05


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


def test_entries_of_the_l1_spectrum_are_cauchy_and_independent() -> None:
    w = kernels.sample_features("laplacian_l1", 16, 4000).double()
    quantiles = torch.quantile(w.flatten(), torch.tensor([0.25, 0.5, 0.75]).double())
    torch.testing.assert_close(quantiles, torch.tensor([-1.0, 0, 1]).double(), rtol=0, atol=0.03)
    # Rows of the Euclidean one share their denominator: large entries come together.
    large = {}
    for kernel in ("laplacian_l1", "laplacian"):
        w = kernels.sample_features(kernel, 16, 4000).abs() > 10
        large[kernel] = float((w[:, 0] & w[:, 1]).float().mean())
    assert large["laplacian_l1"] < 0.01
    assert large["laplacian"] > 0.02


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
