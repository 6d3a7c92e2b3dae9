"""The decoder: embeddings, blocks, final norm, head."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from stackwise import kernels
from stackwise.config import ConfigError, ModelConfig
from stackwise.model.block import Block, check_attention_mode
from stackwise.model.embedding_source import EmbeddingSource
from stackwise.model.embeddings import TokenEmbeddings, copy_lexicon
from stackwise.model.feed_forward import SwiGLUFFN
from stackwise.model.initialize import initialize_weights
from stackwise.model.kv_cache import KVCache
from stackwise.model.layout import Layout, build_layout
from stackwise.model.norms import autocast_dtype, build_norm
from stackwise.model.rotary import Rope, RotaryTables
from stackwise.model.rows import select_rows


class DecoderOutput(NamedTuple):
    """``logits`` (B, L, V) and ``hidden`` (B, L, D) ahead of the final norm; (R, ...) for rows."""

    logits: Tensor
    hidden: Tensor


class Decoder(nn.Module):
    """A GPT-2/LLaMA-style decoder whose attention is bidirectional or causal, switchable.

    Args:
        config: after ``resolve_model_config``: no null shape fields (ConfigError otherwise).
        shift: position i predicts token i + 1 instead of itself; saved with the model.
        initialize: draw initial weights (from torch's default generator) and load a borrowed
            embedding matrix; False leaves PyTorch's defaults, for weights loaded right after.

    B batch, L row length, D width, V vocabulary, R selected rows.
    """

    def __init__(
        self, config: ModelConfig, *, shift: bool = False, initialize: bool = True
    ) -> None:
        super().__init__()
        _check_resolved(config)
        self.config = copy.deepcopy(config)
        self.shift = shift
        assert config.vocab_size is not None
        assert config.norm is not None
        assert config.norm_eps is not None
        self.embeddings = TokenEmbeddings(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = build_norm(config.norm, config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embeddings.token.weight
        self.rotary = RotaryTables(config) if config.use_rope else None
        if initialize:
            self._initialize()

    def _initialize(self) -> None:
        config = self.config
        initialize_weights(self, config.init_std, config.n_layers)
        source = config.tokenizer_embedding
        if source.family is not None:
            with EmbeddingSource(source.family, source.embedding_option) as lexicon:
                copy_lexicon(self.embeddings.token.weight, lexicon, config.init_std)

    @property
    def attention_mode(self) -> str:
        """``bidirectional`` or ``causal``."""
        return self.config.attention_mode

    def set_attention_mode(self, mode: str) -> None:
        """Switches every block at once, at any time; ValueError for an unknown mode."""
        self.config.attention_mode = check_attention_mode(mode)  # type: ignore[assignment]

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied matrix counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def pinned_parameters(self) -> frozenset[str]:
        """Names of the parameters that never train: frozen up projections and embeddings."""
        pinned = {
            f"{name}.up_proj.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, SwiGLUFFN) and module.freeze_up_proj
            for parameter, _ in module.up_proj.named_parameters()
        }
        if self.config.tokenizer_embedding.freeze_embeddings:
            pinned.add("embeddings.token.weight")
        return frozenset(pinned)

    def embed(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """(B, L) int64 -> (B, L, D)."""
        return self.embeddings(input_ids, layout)

    def run_blocks(
        self,
        hidden: Tensor,
        layout: Layout,
        start: int = 0,
        stop: int | None = None,
        rows: Tensor | None = None,
        checkpoint: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Blocks ``start`` to ``stop`` (all by default): (B, L, D) -> (B, L, D).

        With ``rows`` (R,), flattened B*L int64 indices, ascending and unique, the result is (R, D)
        and the last block computes only what these rows need. ``checkpoint`` recomputes every
        block's activations in the backward pass instead of keeping them. ``cache`` holds the keys
        and values of earlier tokens (causal, dense rows).
        """
        stop = len(self.blocks) if stop is None else stop
        if not 0 <= start <= stop <= len(self.blocks):
            raise ValueError(
                f"start, stop: got {start}, {stop}; accepted: 0 <= start <= stop <= "
                f"{len(self.blocks)}"
            )
        if rows is not None:
            layout.check_rows(rows)
        rope = self._rope(layout, hidden.dtype) if start < stop else None
        causal = self.attention_mode == "causal"
        for index in range(start, stop):
            arguments: dict[str, Any] = {
                "causal": causal,
                "rope": rope,
                "rows": rows if index == stop - 1 else None,
                "cache": cache,
            }
            block = self.blocks[index]
            if checkpoint and torch.is_grad_enabled():
                hidden = recompute_in_backward(
                    block, hidden, layout, use_reentrant=False, **arguments
                )
            else:
                hidden = block(hidden, layout, **arguments)
        return select_rows(hidden, rows) if rows is not None and start == stop else hidden

    def _rope(self, layout: Layout, dtype: torch.dtype) -> Rope | None:
        return None if self.rotary is None else self.rotary(layout, dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: (..., D) -> (..., V)."""
        return self.head(self.final_norm(hidden))

    def loss(
        self,
        hidden: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        rows: Tensor | None = None,
        reduction: str = "sum",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Cross entropy of the logits of ``hidden``, which are never built in full.

        ``hidden`` is (N, D), already selected, or (B, L, D), of which ``rows`` (R,) are taken when
        given; ``target`` and ``token_weight`` have one entry per row that is left. Targets of -100
        do not count. ``reduction`` is sum, mean or none.
        """
        if rows is not None:
            hidden = select_rows(hidden, rows)
        hidden = hidden.flatten(0, -2)
        normed = self.final_norm(hidden).to(autocast_dtype(hidden))
        return kernels.linear_cross_entropy(
            normed,
            self.head.weight,
            target.flatten(),
            token_weight=None if token_weight is None else token_weight.flatten(),
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        position_ids: Tensor | None = None,
        rows: Tensor | None = None,
        layout: Layout | None = None,
        cache: KVCache | None = None,
    ) -> DecoderOutput:
        """(B, L) int64 ids -> logits (B, L, V), or (R, V) for ``rows`` (R,).

        ``attention_mask`` (B, L) hides padding (false or 0) and leaves the attention mode as it
        is; ``cu_seqlens`` (n + 1,) are the boundaries of packed documents over the B*L tokens, one
        at every row start; ``layout`` stands in for all of these. ``cache`` continues causal rows
        (attention_mask then covers the cached tokens too). ValueError for contradictions.
        """
        batch, length = input_ids.shape
        described = (attention_mask, cu_seqlens, max_seqlen, position_ids)
        if layout is None:
            offset = 0 if cache is None else cache.length
            layout = build_layout(batch, length, input_ids.device, *described, offset=offset)
        elif any(value is not None for value in described):
            raise ValueError(
                "layout: got one beside attention_mask, cu_seqlens, max_seqlen or position_ids; "
                "accepted: the layout or these"
            )
        if cache is not None:
            self._check_cache(layout)
        hidden = self.run_blocks(self.embed(input_ids, layout), layout, rows=rows, cache=cache)
        if cache is not None:
            cache.advance(length)
        return DecoderOutput(self.logits(hidden), hidden)

    def _check_cache(self, layout: Layout) -> None:
        if self.attention_mode != "causal":
            raise ValueError("cache: got one in bidirectional mode; accepted: causal attention")
        if layout.cu_seqlens is not None:
            raise ValueError("cache: got one with cu_seqlens; accepted: one document per row")


def _check_resolved(config: ModelConfig) -> None:
    names = (
        "vocab_size", "n_kv_heads", "head_dim", "d_ff", "mla_nope_dim", "mla_v_dim", "use_rope",
        "max_position_embeddings", "norm", "norm_eps", "ffn", "qkv_bias", "out_bias", "ffn_bias",
    )  # fmt: skip
    missing = [name for name in names if getattr(config, name) is None]
    if missing or config.attention_preset is not None:
        raise ConfigError(
            f"the model section is not resolved ({', '.join(missing) or 'attention_preset'}): "
            "call resolve_model_config first"
        )
    source = config.tokenizer_embedding
    if config.tie_embeddings and source.family is not None and source.width != config.d_model:
        raise ConfigError(
            f"model.tie_embeddings: got true with embeddings of width {source.width} for "
            f"model.d_model={config.d_model}; accepted: equal widths, or an untied head"
        )
