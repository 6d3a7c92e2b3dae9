"""A tiny GPT-2 and a tiny LLaMA trained through the Triton variants end where eager ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stackwise import kernels
from stackwise.kernels.triton_ops import norms
from tests.kernels import convergence
from tests.kernels.convergence import assert_converged, train_eager, train_ours


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operation that has a Triton variant uses it; a GPU of few programs, which the
    interpreter runs one after the other."""
    monkeypatch.setattr(norms, "_multiprocessors", lambda device: 2)
    variants = kernels.available()
    kernels.use({op: "triton" for op in variants if "triton" in variants[op]})
    yield
    kernels.use({})


@pytest.mark.parametrize("steps", [3, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", convergence.KINDS)
def test_ends_where_eager_ends(kind: str, steps: int) -> None:
    exact, eager = (train_eager(kind, d, steps, 1) for d in (torch.float64, torch.float32))
    ours = train_ours(kind, torch.float32, steps, 1)
    assert_converged(ours, eager, exact, torch.float32)
