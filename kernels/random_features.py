"""Random features of shift-invariant kernels (Rahimi & Recht 2007; FAVOR+: Choromanski 2021).

For w drawn from the spectrum of a kernel κ, E[cos(w·(x - y))] = κ(x - y):

    "cos"       φ(x) = cos(Wx), unscaled                (..., m): the published random-kitchen-sink
                attention, softmax(φ(q)·φ(k) / sqrt(m)), is attention(φ(q), φ(k), v). Without the
                sines E[φ(x)·φ(y)] / m = (κ(x - y) + κ(x + y)) / 2, which is not κ(x - y)
    "cossin"    φ(x) = [cos(Wx), sin(Wx)] / sqrt(m)     (..., 2m): E[φ(x)·φ(y)] = κ(x - y)
    "positive"  φ(x) = exp(Wx - |x|²/2) / sqrt(m)       (..., m): for W ~ N(0, 1),
                E[φ(x)·φ(y)] = exp(x·y), every feature above 0

Spectra, all for bandwidth 1 (divide x by the bandwidth for another):
    gaussian    κ(d) = exp(-|d|²/2)        w ~ N(0, I)
    laplacian   κ(d) = exp(-|d|), Euclidean norm      w multivariate Cauchy: N(0, I) / |N(0, 1)|
    laplacian_l1  κ(d) = exp(-Σ |d_i|)     w_i independent Cauchy
    uniform     κ(d) = Π sin(d_i) / d_i    w_i ~ U(-1, 1)

The error of m independent features, "cossin" or "positive", falls with 1 / sqrt(m).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks, dispatch


def random_features_reference(x: Tensor, features: Tensor, kind: str = "cos") -> Tensor:
    projected = x @ features.to(x.dtype).mT
    if kind == "cos":
        return torch.cos(projected)
    norm = 1.0 / math.sqrt(max(features.shape[0], 1))
    if kind == "cossin":
        return torch.cat([torch.cos(projected), torch.sin(projected)], dim=-1) * norm
    return torch.exp(projected - 0.5 * x.square().sum(-1, keepdim=True)) * norm


def random_features(
    x: Tensor, features: Tensor, kind: str = "cos", impl: str | None = None
) -> Tensor:
    """φ(x) (formulas: top of this file), differentiable in x and features.

    Args:
        x: (..., D), for example (B, L, H, D).
        features: (m, D), from :func:`sample_features`.
        kind: "cos", "cossin" or "positive".
        impl: None, "reference", "torch", "triton" or "cuda".

    Returns:
        (..., m); "cossin": (..., 2m).

    Raises:
        ValueError: an argument is wrong, or ``impl`` does not exist.
    """
    checks.floating("x", x, "... D")
    checks.floating("features", features, "m D")
    checks.on_device("features", features, "x", x)
    checks.shape("features", features, (features.shape[0], x.shape[-1]), "m D")
    checks.choice("kind", kind, ("cos", "cossin", "positive"))
    return dispatch.select("random_features", impl, x, features, kind)(x, features, kind)


def sample_features(
    kernel: str, dim: int, m: int, orthogonal: bool = True, seed: int = 0
) -> Tensor:
    """Draws the frequencies W of :func:`random_features` (spectra: top of this file).

    Args:
        kernel: "gaussian", "laplacian", "laplacian_l1" or "uniform". (A linear kernel is its own
            feature map.)
        dim: D, the width of the inputs.
        m: number of frequencies.
        orthogonal: rows are orthogonal within blocks of ``dim`` (lower variance, still unbiased).
            The spectra of the L1 laplacian and of the uniform kernel have no rotation symmetry:
            their rows are always independent.
        seed: of the draw; the same on every machine and device.

    Returns:
        (m, dim) float32 on the CPU.

    Raises:
        ValueError: an unknown kernel, or a size below 1.
    """
    checks.choice("kernel", kernel, ("gaussian", "laplacian", "laplacian_l1", "uniform"))
    for name, value in (("dim", dim), ("m", m)):
        if value < 1:
            checks.fail(name, value, "an integer of at least 1")
    generator = torch.Generator().manual_seed(seed)
    if kernel in ("uniform", "laplacian_l1"):
        rows = torch.rand(m, dim, generator=generator, dtype=torch.float64) * 2 - 1
        # The quantile function of the Cauchy distribution at (1 + rows) / 2.
        return (rows if kernel == "uniform" else torch.tan(torch.pi / 2 * rows)).float()
    rows = torch.randn(m, dim, generator=generator, dtype=torch.float64)
    if orthogonal:
        lengths = rows.norm(dim=-1, keepdim=True)
        blocks = []
        for _ in range(0, m, dim):
            square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
            basis, upper = torch.linalg.qr(square)
            blocks.append(basis * torch.sign(torch.diagonal(upper)))
        rows = torch.cat([b.mT for b in blocks])[:m] * lengths
    if kernel == "laplacian":
        rows = rows / torch.randn(m, 1, generator=generator, dtype=torch.float64).abs()
    return rows.float()


def _random_features_torch(x: Tensor, features: Tensor, kind: str = "cos") -> Tensor:
    return random_features_reference(x, features, kind)


dispatch.register("random_features", "reference", random_features_reference)
dispatch.register("random_features", "torch", _random_features_torch)
