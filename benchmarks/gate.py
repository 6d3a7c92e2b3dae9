"""Nothing is timed before it is right: every provider against the float64 definition.

    max |out - exact|  <=  2 max |plain - exact| + eps max |exact|

for outputs and every gradient, with exact the definition in float64, plain the definition in the
case's dtype and eps that dtype's. A peer whose output has a narrower dtype than the definition's is
held to plain rounded to it.

Ours pass or fail. Peers up to PEERS times the bound are timed with a note, since PyTorch's own
F.layer_norm is among them on a CPU; what is further off fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Bench, Case, Provider, Tensors, random

PEERS = 10.0


@dataclass(frozen=True)
class Verdict:
    """``ratio`` is the largest error over its bound: at most 1 within the rule."""

    ratio: float
    reason: str = ""

    def admits(self, provider: Provider) -> bool:
        """Whether ``provider`` may be timed."""
        return self.ratio <= (1.0 if provider.ours else PEERS)


class Gate:
    """The exact values of one case, and the bounds that its dtype earns."""

    def __init__(self, bench: Bench, case: Case, device: torch.device) -> None:
        self._case = case
        self._slack = bench.slack if case.dtype == torch.float32 else 1.0
        self._tensors = (case.gate or case.make)(device)

        def definition(**tensors: Tensor) -> Any:
            return bench.reference(**tensors, **case.options)

        double = {
            name: x.double() if x.dtype.is_floating_point else x
            for name, x in self._tensors.items()
        }
        self._plain = evaluate(definition, self._tensors, case.wanted)
        self._exact = evaluate(definition, double, case.wanted, like=self._plain)

    def judge(self, provider: Provider) -> Verdict:
        """Runs ``provider`` on tensors of its own, ours into buffers that hold NaN."""
        assert provider.function is not None
        own = {name: x.clone() for name, x in self._tensors.items()}
        try:
            with _poisoned(provider.ours):
                found = evaluate(provider.function, own, self._case.wanted)
        except Exception as error:  # whatever a peer raises is a verdict on the peer
            return Verdict(float("inf"), f"{type(error).__name__}: {_first_line(error)}")
        return compare(found, self._plain, self._exact, self._slack)


def evaluate(
    function: Callable[..., Any],
    tensors: Tensors,
    wanted: tuple[str, ...],
    like: Tensors | None = None,
) -> Tensors:
    """Outputs "out0", ... and gradients "d<name>" for random incoming gradients, 1 for a scalar.

    The incoming gradients have the values of the dtype of ``like``'s outputs, or of the own ones.
    """
    leaves = {n: x.detach().requires_grad_() if n in wanted else x for n, x in tensors.items()}
    outs = as_tuple(function(**leaves))
    named = {f"out{i}": out.detach().clone() for i, out in enumerate(outs)}
    dtypes = [(like or named)[name].dtype for name in named]
    incoming = [
        g.to(out.dtype)
        for g, out in zip(gradients_for(outs, dtypes), outs, strict=True)
    ]  # fmt: skip
    grads = torch.autograd.grad(outs, [leaves[name] for name in wanted], incoming)
    return named | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def gradients_for(outs: tuple[Tensor, ...], dtypes: list[torch.dtype]) -> list[Tensor]:
    """What flows into ``outs`` from above: normal values rounded to ``dtypes``, 1 for a scalar."""
    draws = [random(17 + i, out.device, dtypes[i]) for i, out in enumerate(outs)]
    return [
        draw(*out.shape) if out.dim() else torch.ones((), dtype=dtype, device=out.device)
        for draw, out, dtype in zip(draws, outs, dtypes, strict=True)
    ]


def compare(found: Tensors, plain: Tensors, exact: Tensors, slack: float = 1.0) -> Verdict:
    """The error rule for every named tensor; the reason names the worst one when it fails."""
    worst = Verdict(0.0)
    for name, truth in exact.items():
        if found[name].shape != truth.shape:
            return Verdict(
                float("inf"), f"{name}: shape {tuple(found[name].shape)}, not {tuple(truth.shape)}"
            )
        if not truth.numel():
            continue
        same = plain[name].to(found[name].dtype)
        rounding = torch.finfo(same.dtype).eps * float(truth.abs().max())
        bound = slack * (2 * float((same.double() - truth).abs().max()) + rounding)
        error = (found[name].double() - truth).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        largest = float(error.max())
        ratio = largest / bound if bound else (float("inf") if largest else 0.0)
        if ratio > worst.ratio:
            worst = Verdict(ratio, f"{name}: error {largest:.3g}, bound {bound:.3g}")
    return worst


def as_tuple(outs: Any) -> tuple[Tensor, ...]:
    return tuple(outs) if isinstance(outs, (tuple, list)) else (outs,)


@contextmanager
def _poisoned(active: bool) -> Iterator[None]:
    if not active:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:160]
