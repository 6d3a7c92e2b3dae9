"""The benches under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

One test per provider, case and mode of every operation; its history, comparisons and histograms are
pytest-benchmark's. extra_info holds what its own clock cannot see: the median of device events and
the peak memory. A provider outside the error rule fails. ``--full-size`` takes the sizes of
``stackwise bench``; the small ones of ``--quick`` are the default.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import memory, runner, timing
from benchmarks.cases import MODES, Bench, Case, Options, Provider
from benchmarks.gate import Gate

ROUNDS = 5


def benches() -> Iterator[Bench]:
    for name in runner.names():
        module = importlib.import_module(f"benchmarks.bench_{name.replace('-', '_')}")
        if hasattr(module, "BENCH"):
            yield module.BENCH


def entries(options: Options) -> Iterator[Any]:
    """(bench, case, provider) of everything that can run here."""
    for bench in benches():
        for case in bench.cases(options):
            for provider in bench.providers(case, case.make(options.device)):
                if provider.function is not None and not (options.quick and provider.compiles):
                    name = f"{bench.name}-{case.series}-{case.x[2]}-{provider.name}"
                    yield pytest.param(bench, case, provider, id=name.replace(" ", ""))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = Options(peers=True, quick=not metafunc.config.getoption("--full-size", False))
    metafunc.parametrize(("bench", "case", "provider"), entries(options))


@pytest.mark.parametrize("mode", MODES)
def test_provider(benchmark: Any, bench: Bench, case: Case, provider: Provider, mode: str) -> None:
    device = Options().device
    verdict = Gate(bench, case, device).judge(provider)
    if not verdict.admits(provider):
        pytest.fail(f"outside the error rule: {verdict.reason}")
    workload = timing.Workload(provider, case, case.make(device))
    clock = timing.clock_for(device, quick=True)
    samples = [clock.sample(lambda: workload.prepare(mode)) for _ in range(ROUNDS)]
    speeds = sorted(sample["speed"] for sample in samples)
    benchmark.group = f"{bench.name} {case.series} {case.x[0]}={case.x[2]} {mode}"
    benchmark.extra_info["device_ms_median"] = speeds[ROUNDS // 2]
    benchmark.extra_info["error_over_bound"] = verdict.ratio
    benchmark.extra_info["peak_bytes"] = memory.peak_bytes(
        lambda: timing.Workload(
            provider, case, case.make(device), incoming=workload.incoming
        ).prepare("forward" if mode == "forward" else "full"),
        device,
    )

    def synchronised(call: Any) -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(
        synchronised, setup=lambda: ((workload.prepare(mode),), {}), rounds=ROUNDS, warmup_rounds=1
    )
