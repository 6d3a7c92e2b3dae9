"""The call into the library: device, stream and error code, with stand-ins for all three."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stackwise.kernels import _cuda
from stackwise.kernels.cuda_ops import launch, norms
from tests.kernels.test_host_overhead import BOUND, overhead

STREAM = 0xABC0


class OnDevice:
    """A tensor as far as the launcher looks."""

    def __init__(self, index: int) -> None:
        self.index = index

    def get_device(self) -> int:
        return self.index


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the library and the device guard saw; device 0 is current, an argument -1 fails."""
    seen: list[Any] = []

    def forward(packed: bytes) -> int:
        values = _cuda.NORM_FORWARD.unpack(packed)
        seen.append(values)
        return 700 if -1 in values else 0

    @contextmanager
    def guard(index: int) -> Iterator[None]:
        seen.append(f"device {index}")
        yield

    library = SimpleNamespace(
        sw_norm_forward=forward, sw_error_string=lambda code: f"text of {code}".encode()
    )
    monkeypatch.setattr(_cuda, "load", lambda: library)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    stream = lambda index: STREAM + index  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "device", guard)
    launch._function.cache_clear()
    yield seen
    launch._function.cache_clear()


ARGUMENTS = (*range(1, 8), 64, 0, 3, 64, 0.5, 1.0, 2, 1)


def test_it_runs_on_the_current_stream_of_the_current_device(calls: list[Any]) -> None:
    launch.run("sw_norm_forward", OnDevice(0), ARGUMENTS)
    assert calls == [(*ARGUMENTS, STREAM)]


def test_it_makes_another_device_current(calls: list[Any]) -> None:
    launch.run("sw_norm_forward", OnDevice(1), ARGUMENTS)
    assert calls == ["device 1", (*ARGUMENTS, STREAM + 1)]


def test_a_failed_launch_is_an_error_with_cudas_text(calls: list[Any]) -> None:
    wrong = (*ARGUMENTS[:9], -1, *ARGUMENTS[10:])
    with pytest.raises(_cuda.CudaLibraryError, match="CUDA error 700: text of 700"):
        launch.run("sw_norm_forward", OnDevice(0), wrong)
    assert len(calls) == 1


@pytest.mark.parametrize("norm", [norms.layer_norm, norms.rms_norm])
def test_host_time_is_near_that_of_pytorchs_layer_norm(norm: Callable[..., Any]) -> None:
    assert overhead(norm, norm is norms.layer_norm) <= BOUND
