"""Peak memory of a call beyond its inputs, in bytes.

CUDA: torch's allocator, peak minus what is allocated before the call. CPU: the allocator's events
as torch.profiler records them, summed in order; buffers that operations keep between calls are
counted too, since the call runs in a new thread on new tensors, for which nothing is kept yet.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

COUNTED_BY = {"cpu": "torch.profiler allocator events", "cuda": "torch.cuda peak allocation"}


def peak_bytes(prepare: Callable[[], Callable[[], Any]], device: torch.device) -> int:
    """Peak of ``prepare()()``: ``prepare`` makes the inputs, which do not count."""
    gc.collect()
    return _peak_cuda(prepare()) if device.type == "cuda" else _peak_cpu(prepare)


def _peak_cuda(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(prepare: Callable[[], Callable[[], Any]]) -> int:
    _start_profiler_once()
    found: list[int | BaseException] = []

    def measure() -> None:
        try:
            call = prepare()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
                result = call()
            del result
            found.append(_largest_sum(recorded))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    (value,) = found
    if isinstance(value, BaseException):
        raise value
    return value


def _largest_sum(recorded: profile) -> int:
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


@functools.cache
def _start_profiler_once() -> None:
    # The profiler wants its first start on the main thread, and logs every start otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        pass
