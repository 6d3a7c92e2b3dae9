"""Attention layers: standard and grouped heads, low-rank projections, kernel forms.

B batch, L row length, H query heads, Hkv key/value heads, D model width, R selected rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from stackwise import kernels
from stackwise.config import ModelConfig
from stackwise.model.kernel_forms import kernel_form
from stackwise.model.kv_cache import KVCache
from stackwise.model.layout import Layout
from stackwise.model.rotary import Rope, rotate
from stackwise.model.rows import select_rows


class AttentionLayer(nn.Module, ABC):
    """What every attention layer shares: which rows ask, which keys they see.

    With ``rows`` and bidirectional attention, only these rows' queries are computed; with causal
    or windowed attention, where a document's rows are not interchangeable, all queries are
    computed and the rows are selected ahead of the output projection.
    """

    out_proj: nn.Linear

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.sliding_window
        self.use_rope = bool(config.use_rope)
        self.interleaved = config.rope_interleaved

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        *,
        causal: bool,
        rope: Rope | None = None,
        rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), or (R, D) for ``rows`` (R,)."""
        if self.use_rope and rope is None:
            raise ValueError("rope: got None; accepted: the (cos, sin) tables of the positions")
        early = None if causal or self.window is not None else rows
        out = self._attend(x, layout, causal, rope, early, cache)
        if rows is not None and early is None:
            out = select_rows(out, rows)
        return self.out_proj(out.flatten(-2))

    @abstractmethod
    def _attend(
        self,
        x: Tensor,
        layout: Layout,
        causal: bool,
        rope: Rope | None,
        rows: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Outputs of the heads (B, L, H, Dv), or (R, H, Dv) for ``rows``."""

    def limits(self, causal: bool) -> dict[str, Any]:
        """The ``causal`` and ``window`` arguments of the attention operation."""
        if self.window is None:
            return {"causal": causal, "window": None}
        left, right = (self.window - 1, 0) if causal else (self.window, self.window)
        return {"causal": causal, "window": (left, right)}


def arrange(
    layout: Layout, rows: Tensor | None, keys: tuple[Tensor, ...], queries: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Any]]:
    """Queries, keys and keyword arguments as the attention operation takes them for ``layout``.

    ``queries`` are (B, L, ...), or (R, ...) when ``rows`` are selected; ``keys`` are (B, L, ...).
    Both come back packed, (total, ...), wherever documents or selected rows need boundaries.
    """
    bias = layout.key_bias
    if rows is None and layout.cu_seqlens is None:
        return queries, keys, {"key_bias": bias}
    packed_bias = None if bias is None else bias.transpose(0, 1).flatten(1)
    packed_keys = tuple(key.flatten(0, 1) for key in keys)
    arguments = {"key_bias": packed_bias, "max_seqlen_k": layout.max_seqlen}
    if rows is not None:
        selection = layout.select(rows)
        arguments |= {
            "cu_seqlens_q": selection.cu_seqlens_q,
            "cu_seqlens_k": selection.cu_seqlens_k,
            "max_seqlen_q": layout.max_seqlen,
        }
        return queries, packed_keys, arguments
    arguments |= {"cu_seqlens_q": layout.cu_seqlens, "max_seqlen_q": layout.max_seqlen}
    return tuple(query.flatten(0, 1) for query in queries), packed_keys, arguments


class Attention(AttentionLayer):
    """Multi-head attention with Hkv <= H key/value heads (Ainslie et al., GQA, 2023).

    ``attention_type`` kernel puts one of the forms of kernel_forms.py in the place of the softmax;
    ``features`` (m, qk_dim) are saved with the model, ``log_bandwidth`` (Hkv,) is there when the
    bandwidth trains.
    """

    features: Tensor | None
    log_bandwidth: nn.Parameter | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.head_dim is not None
        assert config.n_kv_heads is not None
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.qk_dim, self.v_dim = self._head_dims(config)
        self._build_projections(config)
        self.out_proj = nn.Linear(
            self.n_heads * self.v_dim, config.d_model, bias=bool(config.out_bias)
        )
        self.form = kernel_form(config)
        features = None if self.form is None else self.form.draw_initial(self.qk_dim)
        self.register_buffer("features", features)
        trains = self.form is not None and self.form.bandwidth_trains
        start = torch.full((self.n_kv_heads,), math.log(config.kernel_bandwidth))
        self.register_parameter("log_bandwidth", nn.Parameter(start) if trains else None)

    def redraw_features(self, seed: int) -> None:
        """New random features, a pure function of ``seed``; no effect where there are none."""
        if self.form is not None and self.features is not None:
            self.features.copy_(self.form.draw(self.qk_dim, seed))

    def _head_dims(self, config: ModelConfig) -> tuple[int, int]:
        assert config.head_dim is not None
        return config.head_dim, config.head_dim

    def _build_projections(self, config: ModelConfig) -> None:
        bias = bool(config.qkv_bias)
        self.q_proj = nn.Linear(config.d_model, self.n_heads * self.qk_dim, bias=bias)
        self.k_proj = nn.Linear(config.d_model, self.n_kv_heads * self.qk_dim, bias=bias)
        self.v_proj = nn.Linear(config.d_model, self.n_kv_heads * self.v_dim, bias=bias)

    def _queries(self, x: Tensor) -> Tensor:
        return self.q_proj(x)

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_proj(x), self.v_proj(x)

    def _attend(
        self,
        x: Tensor,
        layout: Layout,
        causal: bool,
        rope: Rope | None,
        rows: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        asking = x if rows is None else select_rows(x, rows)
        q = self._queries(asking).unflatten(-1, (self.n_heads, self.qk_dim))
        k, v = self._keys_values(x)
        k = k.unflatten(-1, (self.n_kv_heads, self.qk_dim))
        v = v.unflatten(-1, (self.n_kv_heads, self.v_dim))
        if self.use_rope and rope is not None:
            q, k = rotate(q, k, rope, rows, self.interleaved)
        form, features = self.form, self.features
        bandwidth = None if self.log_bandwidth is None else self.log_bandwidth.exp()
        if form is not None:
            q, k, v = form.before_cache(q, k, v, features, bandwidth)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        (q,), (k, v), arguments = arrange(layout, rows, (k, v), (q,))
        arguments |= self.limits(causal)
        if form is None:
            out = kernels.attention(q, k, v, **arguments)
        else:
            out = form.attend(q, k, v, features, bandwidth, arguments)
        return out if rows is not None else out.view(*x.shape[:2], *out.shape[-2:])


class LowRankAttention(Attention):
    """Attention whose projections are products of two matrices through a latent.

    Separate latents for queries (width ``mla_q_rank``, or none), keys and values (``mla_kv_rank``),
    without norms; rotary positions, where used, turn the whole head.
    """

    def _head_dims(self, config: ModelConfig) -> tuple[int, int]:
        if config.attention_type == "kernel":
            return super()._head_dims(config)
        assert config.mla_nope_dim is not None
        assert config.mla_v_dim is not None
        return config.mla_nope_dim, config.mla_v_dim

    def _build_projections(self, config: ModelConfig) -> None:
        width, bias, rank = config.d_model, bool(config.qkv_bias), config.mla_kv_rank
        q_width = self.n_heads * self.qk_dim
        self.compressed_q = config.mla_q_rank is not None
        if config.mla_q_rank is not None:
            self.q_down_proj = nn.Linear(width, config.mla_q_rank, bias=False)
            self.q_up_proj = nn.Linear(config.mla_q_rank, q_width, bias=bias)
        else:
            self.q_proj = nn.Linear(width, q_width, bias=bias)
        self.k_down_proj = nn.Linear(width, rank, bias=False)
        self.k_up_proj = nn.Linear(rank, self.n_kv_heads * self.qk_dim, bias=bias)
        self.v_down_proj = nn.Linear(width, rank, bias=False)
        self.v_up_proj = nn.Linear(rank, self.n_kv_heads * self.v_dim, bias=bias)

    def _queries(self, x: Tensor) -> Tensor:
        return self.q_up_proj(self.q_down_proj(x)) if self.compressed_q else self.q_proj(x)

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_up_proj(self.k_down_proj(x)), self.v_up_proj(self.v_down_proj(x))


def build_attention(config: ModelConfig, layer: int) -> AttentionLayer:
    """The attention layer of block ``layer`` of a resolved configuration."""
    from stackwise.model.mla import LatentAttention

    if config.attention_type == "mla" and config.mla_form == "deepseek":
        return LatentAttention(config, layer)
    if config.attention_type == "mla" or (
        config.attention_type == "kernel" and config.kernel_low_rank
    ):
        return LowRankAttention(config, layer)
    return Attention(config, layer)
