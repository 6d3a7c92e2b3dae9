"""This package's attention under ``torch.nn.functional.scaled_dot_product_attention`` on a GPU.

PyTorch 2.13 and newer let a library stand in for the flash kernel. SDPA still decides by itself
when that kernel applies (half precision, no mask, head widths it accepts) and calls it with
(B, H, L, D) tensors; what is registered here turns such a call into ``attention`` and its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stackwise.kernels import attention, available

NAME = "stackwise"


def register_sdpa(impl: str = "triton") -> None:
    """Makes "stackwise" known to ``torch.nn.attention``, without turning it on.

    ``torch.nn.attention.activate_flash_attention_impl("stackwise")`` turns it on for this process
    and ``restore_flash_attention_impl()`` off again. CUDA tensors only: on a CPU, SDPA has no flash
    kernel to replace. Not validated on a GPU.

    Args:
        impl: variant of ``attention``: "triton" or "cuda". Another would call SDPA again.

    Raises:
        RuntimeError: this PyTorch has no such registry (2.13 has).
        ValueError: ``impl`` is not one of these; a variant that is not there raises on activation.
    """
    if impl not in ("triton", "cuda"):
        raise ValueError(f"impl: got {impl!r}; accepted: 'triton', 'cuda'")
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None:
        raise RuntimeError(
            f"register_sdpa needs torch.nn.attention.register_flash_attention_impl (PyTorch 2.13); "
            f"this is {torch.__version__}"
        )
    register(NAME, register_fn=lambda: _Active(impl))


class _Active:
    """The two kernels while they stand in for PyTorch's own."""

    def __init__(self, impl: str) -> None:
        if impl not in available()["attention"]:
            raise ValueError(
                f"impl: got {impl!r}, which does not exist for attention; available: "
                f"{', '.join(available()['attention'])}"
            )
        library = torch.library.Library("aten", "IMPL", "CUDA")
        library.impl("_scaled_dot_product_flash_attention", forward_kernel(impl), "CUDA")
        library.impl("_scaled_dot_product_flash_attention_backward", backward_kernel(impl), "CUDA")
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        self._library = None


def forward_kernel(impl: str) -> Any:
    """``aten::_scaled_dot_product_flash_attention`` by this variant."""

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        if return_debug_mask:
            raise RuntimeError("return_debug_mask: got True; accepted: False")
        _check(query, key, dropout_p, is_causal)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse = attention(q, k, v, causal=is_causal, scale=scale, return_lse=True, impl=impl)
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.zeros((), dtype=torch.uint64, device=query.device)
        debug_mask = query.new_empty(0)
        lengths = (query.shape[2], key.shape[2])
        return (out.transpose(1, 2), lse, None, None, *lengths, state, unused, debug_mask)

    return forward


def backward_kernel(impl: str) -> Any:
    """``aten::_scaled_dot_product_flash_attention_backward`` by this variant, which runs its own
    forward pass again."""

    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        _check(query, key, dropout_p, is_causal)
        deterministic = torch.are_deterministic_algorithms_enabled()
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (query, key, value)]
            q, k, v = (x.transpose(1, 2) for x in inputs)
            again = attention(
                q, k, v, causal=is_causal, scale=scale, deterministic=deterministic, impl=impl
            )
        return torch.autograd.grad(again, inputs, grad_out.transpose(1, 2))

    return backward


def _check(query: Tensor, key: Tensor, dropout_p: float, is_causal: bool) -> None:
    if dropout_p != 0.0:
        raise RuntimeError(f"dropout_p: got {dropout_p}; the stackwise flash kernel accepts 0")
    if is_causal and query.shape[2] != key.shape[2]:
        raise RuntimeError(
            f"is_causal: got {query.shape[2]} queries and {key.shape[2]} keys, which SDPA aligns "
            "to the start and this kernel to the end; accepted: as many keys as queries"
        )
