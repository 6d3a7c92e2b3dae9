"""Small decoders with every parameter away from its neutral value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stackwise.config import ModelConfig
from stackwise.model.decoder import Decoder
from stackwise.model.resolve import resolve_model_config

SIZES = {
    "vocab_size": 37,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 48,
    "mla_kv_rank": 12,
    "mla_q_rank": 10,
    "mla_nope_dim": 6,
    "mla_rope_dim": 4,
    "mla_v_dim": 10,
    "kernel_dim": 12,
}
KINDS = {
    "llama": {"architecture": "llama"},
    "gpt2": {"architecture": "gpt2"},
    "gqa": {"architecture": "llama", "attention_type": "gqa"},
    "mla": {"architecture": "llama", "attention_type": "mla", "rope_interleaved": True},
    "low_rank": {"architecture": "llama", "attention_type": "mla", "mla_form": "low_rank"},
    "kernel": {"architecture": "gpt2", "attention_type": "kernel", "n_kv_heads": 2},
    "mlgka": {"architecture": "llama", "attention_preset": "mlgka"},
    "post_norm": {"architecture": "gpt2", "norm_position": "post"},
    "window": {"architecture": "llama", "sliding_window": 3},
}


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Moves biases off 0 and norm weights off 1, where a lost term would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))


@pytest.fixture
def build_decoder() -> Callable[..., Decoder]:
    """``build_decoder(kind, seq_len=24, shift=False, **fields)``: a decoder of one of KINDS."""

    def build(
        kind: str = "llama", *, seq_len: int = 24, shift: bool = False, **fields: object
    ) -> Decoder:
        torch.manual_seed(0)
        config = ModelConfig(**(SIZES | KINDS[kind] | fields))  # type: ignore[arg-type]
        model = Decoder(resolve_model_config(config, seq_len=seq_len), shift=shift)
        randomize(model)
        return model.eval()

    return build


@pytest.fixture
def gradients() -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    """Takes a module's gradients by name and clears them."""

    def take(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        taken = {
            name: parameter.grad.clone()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }
        module.zero_grad(set_to_none=True)
        return taken

    return take
