"""Examines a variant of an operation: is it right (:func:`prove`), is it faster (:func:`race`)?

Right: outputs and every gradient obey, against the definition in float64,

    max |out - ref64|  <=  2 · max |reference in the same dtype - ref64| + atol

with atol = 2 · max |(r + 0.3) - 0.3 - r| of the reference r in the same dtype (FlashAttention's
rule) + 2 units in the last place of the largest value, in memory filled with NaN; and a second run
gives the same bits. Faster: forward alone and
forward with backward, interleaved with the "torch" variant on the same inputs. The cases are those
of :mod:`oracle_cases`.
"""

from __future__ import annotations

import inspect
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .case_classes import DTYPES, case_class

# A variant is faster where four rounds in five show at least this, and its forward pass alone is
# not slower than that; noise between two runs of one variant is smaller.
MIN_SPEEDUP, MIN_FORWARD = 1.03, 0.97
# It may need this much more memory than torch.
MAX_MEMORY, MEMORY_SLACK = 1.1, 16 << 20
_ROUNDS = (5, 40)


class Maker:
    """Makes the tensors of a case on one device, in one dtype; the same ones for the same seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal, in the case's dtype where none is given."""
        x = torch.randn(*shape, generator=self.generator, device=self.device)
        return x.to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def boundaries(self, *lengths: int) -> Tensor:
        """cu_seqlens of documents of these lengths, int32."""
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).int()


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    ``build(maker)`` gives its arguments by name; those named in ``wanted`` get a gradient.
    ``race``: a size that users run, for timing, instead of a small odd one. ``function`` replaces
    the public operation where arguments are nested; it takes them by name, and ``impl``.
    """

    label: str
    build: Callable[[Maker], dict[str, Any]]
    wanted: tuple[str, ...]
    race: bool = False
    dtypes: tuple[str, ...] = tuple(DTYPES)
    repeatable: bool = True
    function: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Finding:
    """What one case showed. ``error`` is the largest error divided by its bound, in ``tensor``.

    ``skipped`` says why the variant does not cover the case; it counts neither way.
    """

    case: str
    dtype: str
    error: float = 0.0
    tensor: str = ""
    repeats: bool = True
    skipped: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= 1.0 and self.repeats


@dataclass(frozen=True)
class Contest:
    """Times of one case: per variant and pass ("forward", "full") milliseconds, one per round.

    ``memory``: peak bytes above the inputs, 0 where the device does not say.
    """

    case: str
    dtype: str
    case_class: str | None
    times: dict[str, dict[str, list[float]]]
    memory: dict[str, int]

    def speedup(self, variant: str, part: str = "full") -> tuple[float, float, float]:
        """20%, 50% and 80% quantiles over the rounds of torch's time / the variant's."""
        rounds = zip(self.times["torch"][part], self.times[variant][part], strict=True)
        return quantiles([torch_ms / ms for torch_ms, ms in rounds])

    def is_faster(self, variant: str) -> bool:
        memory = self.memory[variant] <= MAX_MEMORY * self.memory["torch"] + MEMORY_SLACK
        full, forward = self.speedup(variant), self.speedup(variant, "forward")
        return full[0] >= MIN_SPEEDUP and forward[1] >= MIN_FORWARD and memory


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20%, 50% and 80% quantiles of at least two values."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def prove(op: str, variant: str, case: Case, dtype: str, device: str) -> Finding:
    """Values, gradients and repeatability of one case."""
    arguments = case.build(Maker(device, DTYPES[dtype]))
    function = _function(op, case)
    with poisoned_memory():
        try:
            ours = _run(function, arguments, case.wanted, variant)
        except ValueError as refusal:
            if "does not cover this case" not in str(refusal):
                raise
            return Finding(case.label, dtype, skipped=str(refusal).partition(": ")[2])
        again = _run(function, arguments, case.wanted, variant) if case.repeatable else ours
    same = _run(function, arguments, case.wanted, "reference")
    exact = _run(function, _widened(arguments, torch.float64), case.wanted, "reference")
    error, tensor = worst_error(ours, same, exact)
    repeats = all(_same_bits(ours[name], again[name]) for name in ours)
    return Finding(case.label, dtype, error, tensor, repeats)


def worst_error(
    ours: Mapping[str, Tensor], same: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> tuple[float, str]:
    """The largest error / bound (the rule at the top of this file) and whose it is."""
    worst, place = 0.0, ""
    sizes = {name: _largest(truth) for name, truth in exact.items()}
    outputs = max(size for name, size in sizes.items() if name.startswith("out"))
    for name, truth in exact.items():
        out, plain = ours[name], same[name]
        if out.shape != truth.shape or out.dtype != plain.dtype:
            return float("inf"), f"{name}: {out.dtype} {tuple(out.shape)}"
        if not truth.numel():
            continue
        value = out.to(truth.dtype)
        error = (value - truth).abs().masked_fill(value == truth, 0.0)
        largest = float(error.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
        # A gradient that is zero throughout comes out as rounding errors at the outputs' scale.
        rounding = torch.finfo(plain.dtype).eps * (sizes[name] or outputs)
        rounding += _largest(plain + 0.3 - 0.3 - plain)
        bound = 2 * _largest(plain.to(truth.dtype) - truth) + 2 * rounding
        ratio = largest / bound if bound > 0 else (torch.inf if largest else 0.0)
        if ratio > worst:
            worst, place = ratio, name
    return worst, place


def _largest(x: Tensor) -> float:
    """The largest finite magnitude."""
    return float(x.abs().nan_to_num(nan=0.0, posinf=0.0).max()) if x.numel() else 0.0


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every buffer allocated inside without a value holds NaN (integers: their maximum)."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def _function(op: str, case: Case) -> Callable[..., Any]:
    return case.function or getattr(sys.modules[__package__], op)


def _widened(arguments: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.dtype.is_floating_point else x
        for name, x in arguments.items()
    }


def _run(
    function: Callable[..., Any], arguments: Mapping[str, Any], wanted: Sequence[str], variant: str
) -> dict[str, Tensor]:
    """Outputs "out0", ... and gradients "d<name>"; the incoming gradients are fixed and random."""
    leaves = {
        name: x.detach().requires_grad_() if name in wanted else x for name, x in arguments.items()
    }
    outs = _outputs(function(**leaves, impl=variant))
    results = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    incoming = _incoming(outs)
    pairs = [(out, g) for out, g in zip(outs, incoming, strict=True) if out.requires_grad]
    gradients = torch.autograd.grad(
        [out for out, _ in pairs], [leaves[name] for name in wanted], [g for _, g in pairs]
    )
    return results | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _incoming(outs: Sequence[Tensor]) -> list[Tensor]:
    """Values that every dtype holds exactly: float64 copies meet the gradients of the case."""
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(out.shape, generator=generator).bfloat16() for out in outs]
    return [g.to(out.device, out.dtype) for g, out in zip(drawn, outs, strict=True)]


def race(
    op: str, variants: Sequence[str], case: Case, dtype: str, device: str, seconds: float
) -> Contest:
    """Interleaved times of ``variants`` and "torch" within about ``seconds``.

    Raises ValueError when a variant does not give torch's values on these inputs.
    """
    names = ["torch", *(name for name in variants if name != "torch")]
    function = _function(op, case)
    sets = _input_sets(case, dtype, device)
    _gate(function, case, sets[0], names)
    runs = {(name, part): _timed(function, case, sets, name, part) for name in names for part in
            ("forward", "full")}  # fmt: skip
    memory = {name: _peak(runs[name, "full"], device) for name in names}
    counts = {key: _calls_per_sample(run, device) for key, run in runs.items()}
    times: dict[str, dict[str, list[float]]] = {n: {"forward": [], "full": []} for n in names}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < _ROUNDS[0] or (rounds < _ROUNDS[1] and time.perf_counter() < end):
        for (name, part), run in runs.items():
            times[name][part].append(_sample(run, counts[name, part], device))
        rounds += 1
    bound = _bound_arguments(op, sets[0])
    return Contest(case.label, dtype, case_class(op, (), bound), times, memory)


def _bound_arguments(op: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """In the order of the definition's signature, as the operation hands them to dispatch."""
    order = list(inspect.signature(dispatch.variant(op, "reference").function).parameters)
    return dict(sorted(arguments.items(), key=lambda item: _position(order, item[0])))


def _position(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _input_sets(case: Case, dtype: str, device: str) -> list[dict[str, Any]]:
    """Enough copies of the inputs that a GPU's cache holds no set until its next turn."""
    first = case.build(Maker(device, DTYPES[dtype]))
    if torch.device(device).type != "cuda":
        return [first]
    size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(8, 1 + 2 * cache // max(size, 1))
    return [first, *(case.build(Maker(device, DTYPES[dtype], seed)) for seed in range(1, count))]


def _gate(
    function: Callable[..., Any], case: Case, arguments: dict[str, Any], names: Sequence[str]
) -> None:
    """The error rule at this size, with torch in the next wider dtype for the truth."""
    first = next(x for x in arguments.values() if isinstance(x, Tensor))
    wider = torch.float64 if first.dtype == torch.float32 else torch.float32
    exact = _run(function, _widened(arguments, wider), case.wanted, "torch")
    same = _run(function, arguments, case.wanted, "torch")
    for name in names[1:]:
        error, tensor = worst_error(_run(function, arguments, case.wanted, name), same, exact)
        if error > 1.0:
            raise ValueError(f"{name} on {case.label}: {tensor} is {error:.3g} times its bound off")


def _timed(
    function: Callable[..., Any],
    case: Case,
    sets: Sequence[Mapping[str, Any]],
    variant: str,
    part: str,
) -> Callable[[int], None]:
    """A function that runs one pass on the i-th set of inputs, turn and turn about."""
    prepared = []
    for arguments in sets:
        leaves = {
            name: x.detach().requires_grad_() if part == "full" and name in case.wanted else x
            for name, x in arguments.items()
        }
        prepared.append((leaves, [leaves[name] for name in case.wanted]))
    if part == "forward":

        def forward(i: int) -> None:
            with torch.no_grad():
                function(**prepared[i % len(prepared)][0], impl=variant)

        return forward
    outs = _outputs(function(**prepared[0][0], impl=variant))
    incoming = [torch.randn_like(out) for out in outs if out.requires_grad]
    del outs

    def full(i: int) -> None:
        leaves, wanted = prepared[i % len(prepared)]
        results = [o for o in _outputs(function(**leaves, impl=variant)) if o.requires_grad]
        torch.autograd.grad(results, wanted, incoming)

    return full


def _sample(run: Callable[[int], None], calls: int, device: str) -> float:
    """Milliseconds per call over ``calls`` calls: the slower of host and device."""
    _synchronize(device)
    start = time.perf_counter()
    for i in range(calls):
        run(i)
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3 / calls


def _calls_per_sample(run: Callable[[int], None], device: str) -> int:
    """Calls that take about 3 ms, so that waiting for the device does not count."""
    _sample(run, 2, device)
    return max(1, min(200, round(3.0 / max(_sample(run, 3, device), 1e-3))))


def _peak(run: Callable[[int], None], device: str) -> int:
    if torch.device(device).type != "cuda":
        return 0
    run(0)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(0)
    return torch.cuda.max_memory_allocated(device) - before


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
