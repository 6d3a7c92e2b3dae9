"""The operations beside the modules of Transformers and PyTorch that they stand in for: values and
every gradient, in float64 to rounding, in bfloat16 by the error rule with their module as the peer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise import kernels
from tests.kernels.compare import assert_close, run

IMPLS = ("reference", "torch")
Function = Callable[..., Any]


def assert_parity(
    ours: Function, theirs: Function, tensors: dict[str, Tensor], exact: torch.dtype, rtol: float
) -> None:
    """Equal within ``rtol`` in the dtype ``exact``; in bfloat16 no further from that than twice
    their own distance. Outputs, and gradients of every floating-point tensor."""
    wanted = tuple(n for n, x in tensors.items() if x.dtype.is_floating_point)
    low = {n: x.to(torch.bfloat16) if n in wanted else x for n, x in tensors.items()}
    high = {n: x.to(exact) if n in wanted else x for n, x in low.items()}
    truth = run(theirs, high, wanted)
    assert_close("exact", run(ours, high, wanted), truth, as_double(truth), relative=rtol)
    assert_close("bfloat16", run(ours, low, wanted), run(theirs, low, wanted), as_double(truth))


def as_double(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in results.items()}


@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_is_llama_rms_norm(impl: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(113, eps=1e-5)

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.rms_norm(x, weight, 1e-5, impl=impl)

    tensors = {"x": torch.randn(3, 7, 113), "weight": 1 + torch.randn(113) / 4}
    # Their statistics are float32 whatever the input, so float64 would compare their rounding.
    assert_parity(ours, theirs, tensors, torch.float32, 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_layer_norm_is_gpt2_layer_norm(impl: str) -> None:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    module = GPT2Block(GPT2Config(n_embd=48, n_head=4)).ln_1
    assert isinstance(module, torch.nn.LayerNorm)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.layer_norm(x, weight, bias, module.eps, impl=impl)

    tensors = {"x": torch.randn(3, 7, 48), "weight": torch.randn(48), "bias": torch.randn(48)}
    assert_parity(ours, theirs, tensors, torch.float64, 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_swiglu_is_the_middle_of_llama_mlp(impl: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    module = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=63))
    names = ("gate_proj", "up_proj", "down_proj")

    def theirs(x: Tensor, **weights: Tensor) -> Tensor:
        named = {f"{name}.weight": weights[name] for name in names}
        return torch.func.functional_call(module, named, (x,))

    def ours(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
        middle = kernels.swiglu(F.linear(x, gate_proj), F.linear(x, up_proj), impl=impl)
        return F.linear(middle, down_proj)

    weights = {name: torch.randn(module.get_submodule(name).weight.shape) / 5 for name in names}
    assert_parity(ours, theirs, {"x": torch.randn(3, 7, 32)} | weights, torch.float64, 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_bias_gelu_is_gpt2_gelu_after_its_bias(impl: str, approximate: str) -> None:
    from transformers.activations import GELUActivation, NewGELUActivation

    module = NewGELUActivation() if approximate == "tanh" else GELUActivation()

    def theirs(x: Tensor, bias: Tensor) -> Tensor:
        return module(x + bias)

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return kernels.bias_gelu(x, bias, approximate, impl=impl)

    tensors = {"x": 3 * torch.randn(3, 7, 63), "bias": torch.randn(63)}
    assert_parity(ours, theirs, tensors, torch.float64, 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("position_ids", [False, True], ids=["one row", "positions of each row"])
def test_rope_is_apply_rotary_pos_emb(impl: str, position_ids: bool) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    positions = torch.arange(13).expand(2, 13)
    if position_ids:
        positions = torch.stack([torch.arange(13) % 5, torch.arange(13) % 8])
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))

    def tables(q: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(q, positions)

    def theirs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, k, *tables(q), unsqueeze_dim=2)

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (t if position_ids else t[0] for t in tables(q))
        return kernels.rope(q, k, cos, sin, impl=impl)

    tensors = {"q": torch.randn(2, 13, 4, 16), "k": torch.randn(2, 13, 2, 16)}
    assert_parity(ours, theirs, tensors, torch.float64, 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_linear_cross_entropy_is_cross_entropy_of_a_linear_layer(
    impl: str, reduction: str, smoothing: float
) -> None:
    target = torch.randint(37, (63,))
    target[::9] = -100

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(
            x, weight, target, linear_bias=bias, reduction=reduction, label_smoothing=smoothing,
            impl=impl,
        )  # fmt: skip

    tensors = {"x": torch.randn(63, 24), "weight": torch.randn(37, 24), "bias": torch.randn(37)}
    wanted = tuple(tensors)
    high = {n: x.double() for n, x in tensors.items()}
    truth = run(theirs, high, wanted)
    assert_close("float64", run(ours, high, wanted), truth, truth, relative=1e-12)
    assert_close("float32", run(ours, tensors, wanted), run(theirs, tensors, wanted), truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [4, 2], ids=["own keys", "shared keys"])
def test_attention_is_eager_llama_attention(impl: str, heads: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=heads)
    module = LlamaAttention(config, layer_idx=0)
    mask = torch.full((1, 1, 9, 9), -torch.inf, dtype=torch.float64).triu_(1)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return eager_attention_forward(module, *turned, mask.to(q.dtype), scaling=0.25)[0]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, causal=True, scale=0.25, impl=impl)

    tensors = {
        "q": torch.randn(2, 9, 4, 16),
        "k": torch.randn(2, 9, heads, 16),
        "v": torch.randn(2, 9, heads, 16),
    }
    # Their softmax is float32 whatever the input.
    assert_parity(ours, theirs, tensors, torch.float32, 2e-6)
