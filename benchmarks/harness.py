"""Runs a bench: providers, gate, clocks, memory, rows. ``bench_<op>.py`` says what, this says how.

Per case, the providers that pass the gate are timed in interleaved rounds, mode by mode:

forward    with gradients enabled, as in training: what is saved for backward is part of it
backward   gradients of a fresh forward pass, which is not timed
full       both, in one timed call
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from benchmarks import gate, memory, roofline, timing
from benchmarks.cases import MODES, Bench, Case, Options, OutOfTime, Provider, Tensors
from benchmarks.records import Row, make_row

LEAST, MOST = 7, 40  # rounds of a mode
SECONDS = 0.25  # per provider and mode, once LEAST rounds are done
SLOW_FIRST_CALL = 2.0  # seconds after which a first call is worth a line


def run(bench: Bench, options: Options) -> Iterator[Row]:
    """The rows of ``bench``, those of a mode as soon as it is measured.

    First the roofline, then per case a "gate" row for each provider (its largest error over the
    bound, not above 1 when it passed) and the figures of each mode. OutOfTime when cases are left
    after ``options.seconds``; a case that has begun is finished.
    """
    device = options.device
    clock = timing.clock_for(device, options.quick)
    started = time.perf_counter()
    roof = roofline.measure(device, clock, options.quick)
    yield from roof.rows(bench.name)
    cases = list(bench.cases(options))
    left = [case for case in cases if (case.series, case.x[2]) not in options.measured]
    for done, case in enumerate(left):
        if options.seconds is not None and time.perf_counter() - started > options.seconds:
            raise OutOfTime(f"{len(left) - done} of {len(cases)} cases not measured")
        yield from _Measurement(bench, case, options, clock, roof).rows()
        if not options.quick:
            torch.compiler.reset()  # compiled code of one case is of no use to the next


class _Measurement:
    """One case, from its tensors to its rows."""

    def __init__(
        self,
        bench: Bench,
        case: Case,
        options: Options,
        clock: timing.Clock,
        roof: roofline.Roofline,
    ) -> None:
        self.bench, self.case, self.options = bench, case, options
        self.clock, self.roof = clock, roof
        self.label = f"{bench.name} {case.series} {case.x[0]}={case.x[2]}"

    def rows(self) -> Iterator[Row]:
        tensors = self.case.make(self.options.device)
        providers = list(self._usable(self.bench.providers(self.case, tensors)))
        correct = gate.Gate(self.bench, self.case, self.options.device)
        passed: dict[str, tuple[Provider, timing.Workload]] = {}
        for provider in providers:
            start = time.perf_counter()
            verdict = correct.judge(provider)
            first = time.perf_counter() - start
            if provider.compiles or first > SLOW_FIRST_CALL:
                self.options.note(f"{self.label}: {provider.name} first call {first:.1f} s")
            if verdict.admits(provider):
                try:
                    passed[provider.name] = provider, self._warmed_up(provider, tensors)
                except Exception as error:  # too large for a provider, as often as not
                    verdict = gate.Verdict(float("inf"), f"{type(error).__name__}: {error}")
            if not verdict.admits(provider):
                self.options.note(f"{self.label}: {provider.name} failed: {verdict.reason}")
            elif verdict.ratio > 1:
                self.options.note(
                    f"{self.label}: {provider.name} timed outside the error rule: {verdict.reason}"
                )
            yield self._row(
                provider.name, "gate", [verdict.ratio], ("correctness", "error / bound")
            )
        del correct
        for mode in MODES if passed else ():
            yield from self._mode_rows(mode, passed)

    def _usable(self, providers: Iterable[Provider]) -> Iterator[Provider]:
        for provider in providers:
            if provider.peer and not self.options.peers:
                continue
            reason = provider.skipped
            if not reason and provider.compiles and self.options.quick:
                reason = "--quick leaves out what compiles for seconds"
            if reason:
                self.options.note(f"{self.label}: {provider.name} skipped: {reason}")
            else:
                yield provider

    def _warmed_up(self, provider: Provider, tensors: Tensors) -> timing.Workload:
        workload = timing.Workload(provider, self.case, tensors)
        workload.prepare("full")()
        return workload

    def _mode_rows(
        self, mode: str, passed: dict[str, tuple[Provider, timing.Workload]]
    ) -> Iterator[Row]:
        samplers: dict[str, Callable[[], timing.Sample]] = {
            name: lambda w=workload: self.clock.sample(lambda: w.prepare(mode))
            for name, (_, workload) in passed.items()
        }  # fmt: skip
        quick = self.options.quick
        seconds = 0.0 if quick else SECONDS * len(samplers)
        samples = timing.interleave(
            samplers, seconds=seconds, least=3 if quick else LEAST, most=3 if quick else MOST
        )
        moved, computed = self.case.work.of(mode)
        for name, taken in samples.items():
            speed = [sample["speed"] for sample in taken]
            yield self._row(name, mode, speed, ("speed", "ms"))
            for other in taken[0].keys() - {"speed"}:
                yield self._row(name, mode, [s[other] for s in taken], (other, "ms"))
            if moved:
                rate = [moved / ms for ms in speed]
                share = [100 * value / self.roof.bytes_per_ms for value in rate]
                yield self._row(name, mode, [1e-6 * r for r in rate], ("bandwidth", "GB/s"))
                yield self._row(name, mode, share, ("bandwidth", "% of copy"))
            if computed:
                rate = [computed / ms for ms in speed]
                share = [100 * value / self.roof.flops_per_ms for value in rate]
                yield self._row(name, mode, [1e-9 * r for r in rate], ("tflops", "TFLOP/s"))
                yield self._row(name, mode, share, ("tflops", "% of bf16 matmul"))
            if mode != "backward":
                try:
                    yield self._memory_row(mode, *passed[name])
                except torch.OutOfMemoryError:
                    self.options.note(f"{self.label}: {name} memory not counted: none left for it")

    def _memory_row(self, mode: str, provider: Provider, workload: timing.Workload) -> Row:
        device = self.options.device

        def prepare() -> Callable[[], Any]:
            # New tensors: buffers kept for the old ones would hide from the count.
            fresh = timing.Workload(
                provider, self.case, self.case.make(device), incoming=workload.incoming
            )
            return fresh.prepare(mode)

        used = memory.peak_bytes(prepare, device) / 1e6
        counted = {"counted_by": memory.COUNTED_BY[device.type]}
        return self._row(provider.name, mode, [used], ("memory", "MB"), counted)

    def _row(
        self,
        provider: str,
        mode: str,
        values: list[float],
        metric: tuple[str, str],
        more: dict[str, Any] | None = None,
    ) -> Row:
        return make_row(
            self.bench.name,
            provider,
            mode,
            values,
            metric=metric,
            x=self.case.x,
            extra={**self.case.extra, **(more or {})},
        )
