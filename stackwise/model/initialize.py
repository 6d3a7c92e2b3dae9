"""Initial weights: normal, with the projections into the residual stream scaled down by depth."""

from __future__ import annotations

import math

import torch
from torch import nn

from stackwise.model.moe import Router

_INTO_RESIDUAL = ("out_proj", "down_proj")


@torch.no_grad()
def initialize_weights(module: nn.Module, std: float, n_layers: int) -> None:
    """Matrices are normal(0, std), biases 0, norms 1.

    ``out_proj`` and ``down_proj`` of blocks are normal(0, std / sqrt(2 n_layers)): the 2 n_layers
    branches then add up to a stream of constant variance (Radford et al., GPT-2, 2019). Draws
    from torch's default generator in the order of the modules.
    """
    scaled = std / math.sqrt(2 * n_layers)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(
                part.weight, 0.0, scaled if name.rpartition(".")[2] in _INTO_RESIDUAL else std
            )
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, (nn.Embedding, Router)):
            nn.init.normal_(part.weight, 0.0, std)
