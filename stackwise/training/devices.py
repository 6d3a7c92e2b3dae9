"""Device choice, autocast and peak memory, the same calls on CPU and GPU."""

from __future__ import annotations

import contextlib
import pathlib
import resource
import sys

import torch

from stackwise.config import ConfigError


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first GPU when there is one, else the CPU; a missing device is an error."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"training.device={name!r}, but this torch ({torch.__version__}) sees no CUDA device; "
            "accepted here: auto, cpu"
        )
    return device


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast on ``device``, or a context that does nothing for ``none``."""
    if precision == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak: of the CUDA allocator, or of this process's resident set on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux, or a read-only /proc: the peak then only grows
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Peak since :func:`reset_peak_memory`, in MB (1e6 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / 1e6 if sys.platform == "darwin" else usage * 1024 / 1e6
