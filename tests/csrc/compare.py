"""Inputs of the norms and the call that both the emulator and a GPU make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stackwise.kernels.cuda_ops import norms
from stackwise.kernels.layer_norm import layer_norm_reference
from stackwise.kernels.rms_norm import rms_norm_reference
from tests.triton.compare import assert_follows_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = ("fp32", "bf16", "fp16")


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape).to(device, dtype)


def check_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, **o: Any) -> None:
    """Outputs and every gradient obey the error rule."""

    def call(function: Any) -> Any:
        return lambda x, weight, residual, **o: function(x, weight, 1e-5, residual, **o)

    run, reference = call(norms.rms_norm), call(rms_norm_reference)
    assert_follows_reference(run, reference, (x, weight, residual), **o)


def check_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    """Outputs and every gradient obey the error rule."""

    def call(function: Any) -> Any:
        return lambda x, weight, bias, residual: function(x, weight, bias, 1e-5, residual)

    run, reference = call(norms.layer_norm), call(layer_norm_reference)
    assert_follows_reference(run, reference, (x, weight, bias, residual))
