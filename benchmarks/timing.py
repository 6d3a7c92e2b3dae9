"""Clocks. A sample is one call of one provider; samples of all providers are interleaved.

CPU: perf_counter around the call, and the processor time that it took, by which a busy machine
shows. CUDA: device time between two events, with a delay queued ahead so that the host has enqueued
everything before the device starts (launches of kernels under 100 µs are hidden as in a training
step); and wall time of a call up to the end of its work. Before every sample the cache is flushed
by reading a buffer of twice its size.
"""

from __future__ import annotations

import random as python_random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Provider, Tensors
from benchmarks.gate import as_tuple, gradients_for

Sample = dict[str, float]  # ms: {"speed": of the device, "wall": until done, "cpu": of processors}


class Workload:
    """A provider on the tensors of a case, ready to be called again and again.

    ``shared`` tensors are read by every provider; one that overwrites gets copies of its own,
    restored before each call. ``incoming`` gradients of the outputs are drawn unless given, for
    which the provider runs once.
    """

    def __init__(
        self, provider: Provider, case: Case, shared: Tensors, incoming: list[Tensor] | None = None
    ) -> None:
        assert provider.function is not None
        self._function = provider.function
        own = {n: x.clone() for n, x in shared.items()} if provider.overwrites else shared
        self._leaves = {
            n: x.detach().requires_grad_() if n in case.wanted else x for n, x in own.items()
        }
        self._wanted = [self._leaves[name] for name in case.wanted]
        if incoming is None:
            outs = self.forward()
            incoming = gradients_for(outs, [out.dtype for out in outs])
        self.incoming = incoming
        self._restore: list[tuple[Tensor, Tensor]] = []
        if provider.overwrites:
            self._restore = [(self._leaves[n], x) for n, x in shared.items()]
            self._restore += [(g, g.clone()) for g in self.incoming]

    def forward(self) -> tuple[Tensor, ...]:
        return as_tuple(self._function(**self._leaves))

    def backward(self, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outs, self._wanted, self.incoming)

    def prepare(self, mode: str) -> Callable[[], Any]:
        """The call to time; "backward" gets a fresh forward pass, which is not timed."""
        with torch.no_grad():
            for tensor, pristine in self._restore:
                tensor.copy_(pristine)
        if mode == "forward":
            return self.forward
        if mode == "backward":
            outs = self.forward()
            return lambda: self.backward(outs)
        return lambda: self.backward(self.forward())


class CpuClock:
    """Wall time, and processor time of all threads."""

    def __init__(self, flush: bool = True) -> None:
        self._buffer = torch.ones(2 * _last_level_cache() // 4 if flush else 0)

    def sample(self, prepare: Callable[[], Callable[[], Any]]) -> Sample:
        call = prepare()
        self._buffer.sum()
        start, worked = time.perf_counter(), time.process_time()
        result = call()
        elapsed, worked = time.perf_counter() - start, time.process_time() - worked
        del result
        return {"speed": 1e3 * elapsed, "cpu": 1e3 * worked}


class CudaClock:
    """Device time behind a queued delay, and wall time."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        cache = getattr(properties, "L2_cache_size", 0) or 128 << 20
        self._buffer = torch.ones(2 * cache // 4, device="cuda")
        self._cycles_per_ms = self._calibrate()

    def sample(self, prepare: Callable[[], Callable[[], Any]]) -> Sample:
        call = prepare()
        self._buffer.sum()
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        enqueued = time.perf_counter() - start
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
        del result, call
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call = prepare()
        # The delay covers the enqueueing of the flush, the events and the call; a call that waits
        # for the device itself is not helped by more than that.
        torch.cuda._sleep(int(self._cycles_per_ms * min(20.0, 0.2 + 1.5e3 * enqueued)))
        self._buffer.sum()
        before.record()
        result = call()
        after.record()
        torch.cuda.synchronize()
        del result
        return {"speed": before.elapsed_time(after), "wall": 1e3 * wall}

    def _calibrate(self) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):
            before.record()
            torch.cuda._sleep(10_000_000)
            after.record()
            torch.cuda.synchronize()
        return 1e7 / before.elapsed_time(after)


Clock = CpuClock | CudaClock


def clock_for(device: torch.device, quick: bool = False) -> Clock:
    return CudaClock() if device.type == "cuda" else CpuClock(flush=not quick)


def interleave(
    samplers: Mapping[str, Callable[[], Sample]], *, seconds: float, least: int, most: int
) -> dict[str, list[Sample]]:
    """Rounds of one sample each, in an order that changes from round to round.

    At least ``least`` rounds, then more until ``seconds`` are over or ``most`` are done.
    """
    shuffle = python_random.Random(0).shuffle
    order = list(samplers)
    samples: dict[str, list[Sample]] = {name: [] for name in order}
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return samples


def _last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0; 32 MiB where the system does not say."""
    sizes = [1 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes) if len(sizes) > 1 else 32 << 20
