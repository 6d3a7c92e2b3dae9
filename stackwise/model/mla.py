"""Multi-head latent attention of DeepSeek-V2 (2024)."""

from __future__ import annotations

from torch import Tensor, nn

from stackwise import kernels
from stackwise.config import ModelConfig
from stackwise.model.attention import AttentionLayer, arrange
from stackwise.model.kv_cache import KVCache
from stackwise.model.layout import Layout
from stackwise.model.norms import StackwiseRMSNorm
from stackwise.model.quantized import dense_weight
from stackwise.model.rotary import Rope, latent_scale_factor, rotate
from stackwise.model.rows import select_rows

# DeepSeek's latent norms have this epsilon whatever that of the block norms is.
_LATENT_EPS = 1e-6


class LatentAttention(AttentionLayer):
    """Keys and values of all heads from one normalised latent, positions in a part of their own.

        c = norm(W_dkv x), k_rope = rope(W_kr x)      shared by the heads
        q = W_q x, or W_uq norm(W_dq x);  q = [q_nope, rope(q_rope)] per head
        k = [W_uk c, k_rope], v = W_uv c;  out = W_o softmax(scale q . k) v

    ``kv_down_proj`` stacks W_dkv (mla_kv_rank rows) on W_kr (mla_rope_dim rows). The scale is
    1 / sqrt(mla_nope_dim + mla_rope_dim), times DeepSeek's mscale squared under yarn.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.mla_nope_dim is not None
        assert config.mla_v_dim is not None
        self.n_heads, self.rank = config.n_heads, config.mla_kv_rank
        self.nope_dim, self.rope_dim = config.mla_nope_dim, config.mla_rope_dim
        self.v_dim = config.mla_v_dim
        qk_dim = self.nope_dim + self.rope_dim
        self.scale = qk_dim**-0.5 * latent_scale_factor(config.rope_scaling)
        width, bias = config.d_model, bool(config.qkv_bias)
        self.compressed_q = config.mla_q_rank is not None
        if config.mla_q_rank is not None:
            self.q_down_proj = nn.Linear(width, config.mla_q_rank, bias=bias)
            self.q_norm = StackwiseRMSNorm(config.mla_q_rank, _LATENT_EPS)
            self.q_up_proj = nn.Linear(config.mla_q_rank, self.n_heads * qk_dim, bias=False)
        else:
            self.q_proj = nn.Linear(width, self.n_heads * qk_dim, bias=False)
        self.kv_down_proj = nn.Linear(width, self.rank + self.rope_dim, bias=bias)
        self.kv_norm = StackwiseRMSNorm(self.rank, _LATENT_EPS)
        self.k_up_proj = nn.Linear(self.rank, self.n_heads * self.nope_dim, bias=False)
        self.v_up_proj = nn.Linear(self.rank, self.n_heads * self.v_dim, bias=False)
        self.out_proj = nn.Linear(self.n_heads * self.v_dim, width, bias=bool(config.out_bias))

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
        q = (
            self.q_up_proj(self.q_norm(self.q_down_proj(asking)))
            if self.compressed_q
            else (self.q_proj(asking))
        )
        q = q.unflatten(-1, (self.n_heads, self.nope_dim + self.rope_dim))
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        latent, k_rope = self.kv_down_proj(x).split([self.rank, self.rope_dim], dim=-1)
        latent, k_rope = self.kv_norm(latent), k_rope.unsqueeze(-2)
        assert rope is not None
        q_rope, k_rope = rotate(q_rope, k_rope, rope, rows, self.interleaved)
        k_rope = k_rope.squeeze(-2)
        if cache is not None:
            latent, k_rope = cache.update(self.layer, latent, k_rope)
        queries, keys, arguments = arrange(layout, rows, (latent, k_rope), (q_nope, q_rope))
        out = kernels.mla_attention(
            *queries,
            *keys,
            dense_weight(self.k_up_proj, latent.dtype),
            dense_weight(self.v_up_proj, latent.dtype),
            scale=self.scale,
            **self.limits(causal),
            **arguments,
        )
        return out if rows is not None else out.view(*x.shape[:2], *out.shape[-2:])
