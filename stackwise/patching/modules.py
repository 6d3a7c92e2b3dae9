"""What :func:`stackwise.patch` puts in the place of a module's forward.

Each function has the module as its first argument and reads the parameters that are there, so the
state dict, adapters around its linear layers and hooks stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stackwise import kernels

Forward = Callable[..., Any]


def rms_norm(weight_offset: float, impl: str | None) -> Forward:
    """RMSNorm whose epsilon is called ``variance_epsilon`` or ``eps``."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return kernels.rms_norm(
            hidden_states, self.weight, eps, impl=impl, weight_offset=weight_offset
        )

    return forward


def layer_norm(impl: str | None) -> Forward:
    def forward(self: Any, input: Tensor) -> Tensor:
        return kernels.layer_norm(input, self.weight, self.bias, self.eps, impl=impl)

    return forward


#: Activations of gated and plain feed-forward layers, by their name in a config.
_GATED = {
    "silu": (kernels.swiglu, {}),
    "swish": (kernels.swiglu, {}),
    "gelu": (kernels.geglu, {"approximate": "none"}),
    "gelu_pytorch_tanh": (kernels.geglu, {"approximate": "tanh"}),
    "gelu_new": (kernels.geglu, {"approximate": "tanh"}),
}
_PLAIN = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def gated_feed_forward(activation: str, impl: str | None) -> Forward:
    """down(act(gate(x)) · up(x)).

    Raises:
        ValueError: no operation has this activation.
    """
    operation, options = _known(activation, _GATED)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(operation(self.gate_proj(x), self.up_proj(x), impl=impl, **options))

    return forward


def plain_feed_forward(activation: str, impl: str | None) -> Forward:
    """GPT-2's dropout(c_proj(act(c_fc(x)))).

    Raises:
        ValueError: no operation has this activation.
    """
    approximate = _known(activation, _PLAIN)

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        hidden = kernels.bias_gelu(self.c_fc(hidden_states), None, approximate, impl=impl)
        return self.dropout(self.c_proj(hidden))

    return forward


def _known(activation: str, table: dict[str, Any]) -> Any:
    if activation not in table:
        raise ValueError(
            f"swiglu: got a model with the activation {activation!r}; accepted: "
            f"{', '.join(table)}, or swiglu=False"
        )
    return table[activation]


def rotary(impl: str | None) -> dict[str, Forward]:
    """The functions that attention layers of Transformers rotate queries and keys with."""

    def half_split(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        q, k = (x.transpose(1, 2) for x in (q, k))
        return tuple(x.transpose(1, 2) for x in kernels.rope(q, k, cos, sin, impl=impl))

    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return half_split(_unzip(q), _unzip(k), cos, sin)

    return {
        "apply_rotary_pos_emb": half_split,
        "apply_rotary_pos_emb_interleave": interleaved,
    }


def _unzip(x: Tensor) -> Tensor:
    """(x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...), the layout that DeepSeek caches."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def with_functions(module: nn.Module, functions: dict[str, Forward]) -> Forward | None:
    """The module's own forward, calling these functions instead of the ones of its file.

    None where its forward calls none of them.
    """
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType):
        return None
    used = {name: f for name, f in functions.items() if name in forward.__code__.co_names}
    if not used:
        return None
    # Without a name, torch.compile reads these globals and not those of the module's file.
    scope = {**forward.__globals__, **used}
    del scope["__name__"]
    twin = types.FunctionType(
        forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    return twin
