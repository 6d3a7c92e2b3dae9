"""The words of a bench: what is measured (cases), who is measured (providers), the work counted."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
MODES = ("forward", "backward", "full")


@dataclass(frozen=True)
class Options:
    """How a bench runs; the command line of ``stackwise bench``.

    ``seconds`` bounds one bench: what does not fit is left out, with a note. ``resume`` takes over
    what an interrupted run of the same bench has measured. ``folder`` replaces results/<device>.
    """

    peers: bool = False
    quick: bool = False
    seconds: float | None = None
    resume: bool = False
    folder: pathlib.Path | None = None
    note: Callable[[str], None] = field(default=print, repr=False, compare=False)
    measured: frozenset[tuple[str, float]] = frozenset()  # (series, x) of cases to leave out

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OutOfTime(Exception):
    """``Options.seconds`` are over; the message says what was left out."""


@dataclass(frozen=True)
class Work:
    """The fewest bytes a pass must move, and its floating-point operations."""

    bytes_forward: float
    bytes_backward: float
    flops_forward: float = 0.0
    flops_backward: float = 0.0

    def of(self, mode: str) -> tuple[float, float]:
        """(bytes, operations) of a mode."""
        forward, backward = (mode != "backward"), (mode != "forward")
        return (
            forward * self.bytes_forward + backward * self.bytes_backward,
            forward * self.flops_forward + backward * self.flops_backward,
        )


@dataclass(frozen=True)
class Case:
    """One input of an operation.

    ``x`` is (name, label, value) of the axis along which the cases of a ``series`` lie. ``make``
    draws the tensors, passed by name; ``wanted`` names those that get a gradient; ``options`` are
    the operation's own. ``gate`` draws smaller tensors for the correctness gate where the float64
    reference of the measured size would not fit.
    """

    series: str
    x: tuple[str, str, float]
    dtype: torch.dtype
    shape: dict[str, Any]
    make: Callable[[torch.device], Tensors]
    wanted: tuple[str, ...]
    work: Work
    options: dict[str, Any] = field(default_factory=dict)
    gate: Callable[[torch.device], Tensors] | None = None

    @property
    def extra(self) -> dict[str, Any]:
        """What the CSV says about the case beside x."""
        return {"series": self.series, "dtype": short(self.dtype), **self.shape, **self.options}


@dataclass(frozen=True)
class Provider:
    """Somebody's implementation of a case, called with its tensors by name; or why there is none.

    ``peer``: runs with ``--peers`` only. ``compiles``: its first call takes seconds.
    ``overwrites``: writes into its inputs or incoming gradients, which are restored between calls.
    """

    name: str
    function: Callable[..., Any] | None
    skipped: str = ""
    peer: bool = False
    compiles: bool = False
    overwrites: bool = False

    @property
    def ours(self) -> bool:
        return self.name.startswith("stackwise")


@dataclass(frozen=True)
class Bench:
    """An operation with its cases, the definition it is held to, and its providers.

    ``slack`` widens the gate's bound in float32, where PyTorch's own kernels are outside it.
    """

    name: str
    cases: Callable[[Options], Sequence[Case]]
    reference: Callable[..., Any]
    providers: Callable[[Case, Tensors], Iterable[Provider]]
    slack: float = 1.0


def short(dtype: torch.dtype) -> str:
    """bf16, fp16, fp32 or fp64."""
    return {"bfloat16": "bf16"}.get(name := str(dtype).removeprefix("torch."), f"fp{name[5:]}")


def random(seed: int, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function of a shape (and a scale) that draws normal tensors, the same for equal seeds."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return values.mul_(scale).add_(shift).to(dtype)

    return draw


def size(dtype: torch.dtype, *shape: int) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
