"""PyTorch's attentions in our layout: the plain composition, SDPA by backend, varlen, Flex."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Provider, Tensors
from benchmarks.providers import NEEDS_CUDA, skip

BACKENDS = {
    "sdpa-cudnn": "CUDNN_ATTENTION",
    "sdpa-flash": "FLASH_ATTENTION",
    "sdpa-efficient": "EFFICIENT_ATTENTION",
}


def dense_providers(causal: bool, device: torch.device) -> Iterator[Provider]:
    """For (B, L, H, D) tensors."""
    yield Provider("eager", functools.partial(composed, keep=None, causal=causal))
    yield Provider("sdpa", functools.partial(sdpa, mask=None, causal=causal))
    for name, backend in BACKENDS.items():
        if device.type != "cuda":
            yield skip(name, NEEDS_CUDA)
        else:
            yield Provider(name, _with_backend(backend, causal), peer=True)
    yield _flex(causal, None, device)


def packed_providers(tensors: Tensors, causal: bool) -> Iterator[Provider]:
    """For (total, H, D) tensors with cu_seqlens_q; the dense mask is built ahead of the clock."""
    cu_seqlens = tensors["cu_seqlens_q"]
    total, device = tensors["q"].shape[0], cu_seqlens.device
    document = torch.repeat_interleave(
        torch.arange(len(cu_seqlens) - 1, device=device), cu_seqlens.diff(), output_size=total
    )
    mask = document[:, None] == document[None, :]
    mask = mask.tril() if causal else mask
    yield Provider("eager", _packed(functools.partial(composed, keep=mask, causal=False)))
    yield Provider("sdpa", _packed(functools.partial(sdpa, mask=mask, causal=False)))
    yield _varlen(cu_seqlens, causal, device)
    flex = _flex(causal, document, device)
    yield (
        flex
        if flex.function is None
        else Provider("flex", _packed(flex.function), peer=True, compiles=True)
    )


def composed(q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None, causal: bool) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v, scores and all."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _with_backend(backend: str, causal: bool) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return sdpa(q, k, v, mask=None, causal=causal)

    return run


def _packed(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One row of all documents."""

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor) -> Tensor:
        return dense(q[None], k[None], v[None])[0]

    return run


def _varlen(cu_seqlens: Tensor, causal: bool, device: torch.device) -> Provider:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return skip("torch-varlen", str(error))
    if device.type != "cuda":
        return skip("torch-varlen", NEEDS_CUDA)
    longest = int(cu_seqlens.diff().max())
    # Releases differ in how they are told.
    named = "is_causal" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if causal:
        options = {"is_causal": True} if named else {"window_size": (-1, 0)}

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor) -> Tensor:
        return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_q, longest, longest, **options)

    return Provider("torch-varlen", run, peer=True)


def _flex(causal: bool, document: Tensor | None, device: torch.device) -> Provider:
    if device.type != "cuda":
        return skip("flex", "FlexAttention has no backward pass on a CPU")
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        return skip("flex", str(error))

    def keep(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = row >= column if causal else row >= 0
        return seen if document is None else seen & (document[row] == document[column])

    masks: dict[tuple[int, int], Any] = {}
    fused = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (q.shape[1], k.shape[1])
        if shape not in masks and (causal or document is not None):
            masks[shape] = create_block_mask(keep, None, None, *shape, device=device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = fused(q, k, v, block_mask=masks.get(shape), enable_gqa=grouped)
        return out.transpose(1, 2)

    return Provider("flex", run, peer=True, compiles=True)
