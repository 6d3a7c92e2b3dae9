"""The two ceilings of the machine, measured in the run whose figures they scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import Row, make_row
from benchmarks.timing import Clock, interleave
from stackwise.kernels import _cuda


@dataclass(frozen=True)
class Roofline:
    """Bytes per ms of a copy (read + written), operations per ms of a bf16 matrix product."""

    bandwidth: list[float]
    flops: list[float]
    copied: int
    width: int
    copy_by: str

    def rows(self, bench: str) -> list[Row]:
        copy = [value * 1e-6 for value in self.bandwidth]  # GB/s
        product = [value * 1e-9 for value in self.flops]  # TFLOP/s
        return [
            make_row(bench, "roofline", "copy", copy, metric=("bandwidth", "GB/s"),
                     x=("bytes", "bytes copied", self.copied), extra={"copy": self.copy_by}),
            make_row(bench, "roofline", "matmul", product, metric=("tflops", "TFLOP/s"),
                     x=("N", "rows and columns", self.width), extra={"dtype": "bf16"}),
        ]  # fmt: skip

    @property
    def bytes_per_ms(self) -> float:
        return sorted(self.bandwidth)[len(self.bandwidth) // 2]

    @property
    def flops_per_ms(self) -> float:
        return sorted(self.flops)[len(self.flops) // 2]


def measure(device: torch.device, clock: Clock, quick: bool = False) -> Roofline:
    """Copies 1 GiB (CPU 256 MiB) and multiplies 8192² (CPU 2048²) bf16 matrices."""
    cuda = device.type == "cuda"
    copied = 1 << (22 if quick else 30 if cuda else 28)
    width = 256 if quick else 8192 if cuda else 2048
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    built = cuda and _cuda.status()["built"]
    copy: Callable[[Tensor, Tensor], Any] = _cuda.measure_copy if built else Tensor.copy_
    left, right = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    samplers = {
        "copy": lambda: clock.sample(lambda: lambda: copy(target, source)),
        "matmul": lambda: clock.sample(lambda: lambda: left @ right),
    }
    for sampler in samplers.values():
        sampler()
    samples = interleave(samplers, seconds=1.0, least=3 if quick else 9, most=25)
    return Roofline(
        [2 * copied / sample["speed"] for sample in samples["copy"]],
        [2 * width**3 / sample["speed"] for sample in samples["matmul"]],
        copied,
        width,
        "csrc" if built else "torch",
    )
