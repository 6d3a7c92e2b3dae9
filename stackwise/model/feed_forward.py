"""Dense feed-forward layers: gated (SwiGLU, GeGLU) and plain (tanh-GELU)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stackwise import kernels
from stackwise.config import ModelConfig
from stackwise.model.adapters import LoRALinear
from stackwise.model.quantized import QuantizedLinear, product


class SwiGLUFFN(nn.Module):
    """y = down(SiLU(gate(x)) * up(x)), as in LLaMA (Shazeer, "GLU Variants", 2020).

    ``x`` (..., d_model) -> (..., d_model). With ``freeze_up_proj`` the up projection keeps its
    random initial value: it takes no gradient, and its input-side gradient is all that flows.
    """

    def __init__(
        self, d_model: int, d_ff: int, bias: bool = False, freeze_up_proj: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.freeze_up_proj = freeze_up_proj
        if freeze_up_proj:
            self.up_proj.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        operands = fused_operands(self.gate_proj, self.up_proj, self.down_proj)
        if operands is not None:
            return kernels.swiglu_mlp(x, **operands)
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class GegluFFN(SwiGLUFFN):
    """y = down(GELU(gate(x)) * up(x)) (Shazeer, "GLU Variants", 2020), GELU exact."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.geglu(self.gate_proj(x), self.up_proj(x)))


class GeluFFN(nn.Module):
    """y = down(GELU_tanh(up(x))), the feed-forward of GPT-2; ``x`` (..., d_model)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        up = product(self.up_proj, x)
        return self.down_proj(kernels.bias_gelu(up, self.up_proj.bias, approximate="tanh"))


def fused_operands(gate: nn.Module, up: nn.Module, down: nn.Module) -> dict[str, Any] | None:
    """Arguments of ``kernels.swiglu_mlp`` for three quantised or adapted layers.

    None where it cannot take them: plain layers, biases, dropout in training, DoRA, a merged
    adapter, adapters of different scaling.
    """
    layers = {"gate": gate, "up": up, "down": down}
    weights: dict[str, Any] = {}
    lora, scalings = {}, set()
    for name, layer in layers.items():
        base = layer.base if isinstance(layer, LoRALinear) else layer
        if not isinstance(base, QuantizedLinear) or base.bias is not None:
            return None
        if isinstance(layer, LoRALinear):
            if layer.merged or layer.magnitude is not None or (layer.dropout and layer.training):
                return None
            lora[name] = (layer.lora_a, layer.lora_b)
            scalings.add(layer.scaling)
        weights[f"w_{name}"] = base.weight
    if len(scalings) > 1:
        return None
    return {**weights, "lora": lora or None, "scaling": scalings.pop() if scalings else 1.0}


def build_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """The feed-forward of block ``layer`` of a resolved configuration."""
    from stackwise.model.moe import MoEFeedForward

    if config.moe is not None and layer >= config.moe.first_dense_layers:
        return MoEFeedForward(config.d_model, config.moe, config.freeze_up_proj)
    assert config.d_ff is not None
    bias = bool(config.ffn_bias)
    if config.ffn == "gelu":
        return GeluFFN(config.d_model, config.d_ff, bias)
    gated = SwiGLUFFN if config.ffn == "swiglu" else GegluFFN
    return gated(config.d_model, config.d_ff, bias, config.freeze_up_proj)
