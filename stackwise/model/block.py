"""One decoder block, and MLGKALayer, the same as a drop-in for (B, L, D) tensors."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.config import ModelConfig
from stackwise.model.attention import build_attention
from stackwise.model.feed_forward import build_feed_forward
from stackwise.model.initialize import initialize_weights
from stackwise.model.kv_cache import KVCache
from stackwise.model.layout import Layout, build_layout
from stackwise.model.norms import autocast_dtype, build_norm
from stackwise.model.resolve import resolve_model_config
from stackwise.model.rotary import Rope, RotaryTables
from stackwise.model.rows import select_rows


class Block(nn.Module):
    """Attention and feed-forward with residuals and norms.

        pre:   h = x + attention(norm(x)),   y = h + feed_forward(norm(h))
        post:  h = norm(x + attention(x)),   y = norm(h + feed_forward(h))

    The residual stream keeps the dtype of ``x``; the branches run in autocast's.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        assert config.norm is not None
        assert config.norm_eps is not None
        self.attention_norm = build_norm(config.norm, config.d_model, config.norm_eps)
        self.attention = build_attention(config, layer)
        self.feed_forward_norm = build_norm(config.norm, config.d_model, config.norm_eps)
        self.feed_forward = build_feed_forward(config, layer)
        self.post_norm = config.norm_position == "post"
        self.dropout = config.dropout

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
        """(B, L, D) -> (B, L, D), or (R, D) for ``rows`` (R,) int64 ascending, unique.

        All tokens give keys and values; with ``rows`` only these get queries, output projection,
        residual and feed-forward. ``rope`` are the tables of the positions (models with rotary
        positions), ``cache`` the keys and values of earlier tokens.
        """
        compute = autocast_dtype(x)
        branch = (x if self.post_norm else self.attention_norm(x)).to(compute)
        branch = self.attention(branch, layout, causal=causal, rope=rope, rows=rows, cache=cache)
        residual = x if rows is None else select_rows(x, rows)
        if self.post_norm:
            hidden, _ = self.attention_norm(self._drop(branch), residual)
            hidden, _ = self.feed_forward_norm(
                self._drop(self.feed_forward(hidden.to(compute))), hidden
            )
            return hidden
        normed, hidden = self.feed_forward_norm(self._drop(branch), residual)
        return hidden + self._drop(self.feed_forward(normed.to(compute)))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch


class MLGKALayer(Block):
    """A complete layer for (B, L, D) tensors: grouped kernel attention and SwiGLU.

    Args:
        d_model: width D.
        d_ff: hidden width of the SwiGLU feed-forward.
        n_heads: query heads; must divide d_model.
        n_kv_heads: key/value heads, a divisor of n_heads; None means n_heads.
        kernel_type: gaussian, laplacian, uniform (random features) or linear (plain dot product).
        kernel_dim: number of random features.
        attention_mode: bidirectional or causal; see :meth:`set_attention_mode`.
        freeze_up_proj: keep the up projection at its random initial value.
        dropout: on both branches.
        use_rope: rotary positions on queries and keys; without, positions are the caller's matter.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of both RMSNorms (pre-norm).

    ValueError when the sizes do not fit or the kernel is unknown.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        kernel_type: str = "gaussian",
        kernel_dim: int = 64,
        attention_mode: str = "bidirectional",
        freeze_up_proj: bool = True,
        *,
        dropout: float = 0.0,
        use_rope: bool = False,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        config = resolve_model_config(
            ModelConfig(
                vocab_size=1,
                d_model=d_model,
                d_ff=d_ff,
                n_layers=1,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                attention_type="kernel",
                kernel_type=kernel_type,  # type: ignore[arg-type]
                kernel_dim=kernel_dim,
                freeze_up_proj=freeze_up_proj,
                dropout=dropout,
                use_rope=use_rope,
                rope_theta=rope_theta,
                norm_eps=norm_eps,
            ),
            seq_len=1,
        )
        super().__init__(config)
        self.set_attention_mode(attention_mode)
        self.rotary = RotaryTables(config) if use_rope else None
        initialize_weights(self, config.init_std, n_layers=1)

    def set_attention_mode(self, mode: str) -> None:
        """Switches between ``bidirectional`` and ``causal``; ValueError for anything else."""
        self.attention_mode = check_attention_mode(mode)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D).

        ``attention_mask`` (B, L) is true for tokens and false for padding; it never changes the
        attention mode. ``cu_seqlens`` (n + 1,) are boundaries of packed documents over the B*L
        tokens. ValueError when both are given.
        """
        layout = build_layout(
            x.shape[0], x.shape[1], x.device, attention_mask, cu_seqlens, max_seqlen
        )
        rope = None if self.rotary is None else self.rotary(layout, x.dtype)
        return super().forward(x, layout, causal=self.attention_mode == "causal", rope=rope)


def check_attention_mode(mode: str) -> str:
    """``mode`` itself; ValueError unless it is bidirectional or causal."""
    if mode not in ("bidirectional", "causal"):
        raise ValueError(f"attention_mode: got {mode!r}; accepted: bidirectional, causal")
    return mode
