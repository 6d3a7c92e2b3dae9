"""Token embeddings: trained here, or taken from a known model (LexicalKernelManager)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.config import ModelConfig
from stackwise.model.embedding_source import EmbeddingSource
from stackwise.model.layout import Layout


def build_adapter(width: int, hidden: int, d_model: int) -> nn.Sequential:
    """Linear -> GELU -> Linear from ``width`` to ``d_model``."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, d_model))


@torch.no_grad()
def copy_lexicon(weight: Tensor, source: EmbeddingSource, std: float) -> None:
    """Fills ``weight`` (V, width) from ``source``.

    Rows beyond the source's vocabulary (a MASK token added to its tokenizer) are normal(0, std);
    rows of the source beyond V (padding of the matrix) are left out. ValueError when the widths
    differ.
    """
    if weight.shape[1] != source.width:
        raise ValueError(
            f"the embeddings of {source.family!r} have width {source.width}, the model expects "
            f"{weight.shape[1]}"
        )
    known = min(weight.shape[0], source.rows)
    weight[:known] = source.read()[:known].to(weight)
    weight[known:].normal_(0.0, std)


class LexicalKernelManager(nn.Module):
    """Embeddings taken from a known model, adapted to another width.

    Args:
        family: known family name (gpt2, gpt2-medium, llama-3-8b, llama-3-70b, mistral-7b), Hub
            name, or local folder with safetensors weights.
        d_model: width of the output; None takes the matrix's own.
        embedding_option: ``embed_tokens`` or ``lm_head``, the matrix that is taken.
        freeze_embeddings: keep the matrix at its values (the adapter always trains).
        adapter_hidden_dim: hidden width of the Linear-GELU-Linear adapter, which exists only
            where the widths differ; None means ``d_model``.
        vocab_size: rows of the matrix; rows that the source lacks are random, None takes its own.

    ``forward(input_ids)`` maps (...,) int64 ids to (..., d_model). ``build_head()`` gives a
    language-model head that shares the matrix. ValueError when the source is unknown, cannot be
    reached (no network) or has no such matrix.
    """

    def __init__(
        self,
        family: str,
        d_model: int | None = None,
        *,
        embedding_option: str = "embed_tokens",
        freeze_embeddings: bool = True,
        adapter_hidden_dim: int | None = None,
        vocab_size: int | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        with EmbeddingSource(family, embedding_option) as source:
            rows = source.rows if vocab_size is None else vocab_size
            self.d_model = source.width if d_model is None else d_model
            self.token = _embedding(rows, source.width)
            copy_lexicon(self.token.weight, source, init_std)
        self.token.weight.requires_grad_(not freeze_embeddings)
        self.adapter: nn.Sequential | None = None
        if source.width != self.d_model:
            self.adapter = build_adapter(
                source.width, adapter_hidden_dim or self.d_model, self.d_model
            )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token(input_ids)
        return x if self.adapter is None else self.adapter(x)

    def build_head(self) -> nn.Linear:
        """A head Linear(d_model, V) without bias whose weight is the embedding matrix itself.

        ValueError when an adapter changes the width: the matrix then does not fit the head.
        """
        if self.adapter is not None:
            raise ValueError(
                f"the matrix has width {self.token.weight.shape[1]} and the model "
                f"{self.d_model}: a shared head needs equal widths"
            )
        head = nn.Linear(self.d_model, self.token.weight.shape[0], bias=False, device="meta")
        head.weight = self.token.weight
        return head


class TokenEmbeddings(nn.Module):
    """Token embeddings, the adapter of a borrowed matrix, and learned positions.

    ``token`` (V, width), ``adapter`` (width -> d_model) where they differ, ``position``
    (max_position_embeddings, d_model) in models without rotary positions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        assert config.max_position_embeddings is not None
        source, d_model = config.tokenizer_embedding, config.d_model
        width = d_model if source.family is None or source.width is None else source.width
        self.token = nn.Embedding(config.vocab_size, width)
        self.token.weight.requires_grad_(not source.freeze_embeddings)
        self.adapter: nn.Sequential | None = None
        if width != d_model:
            self.adapter = build_adapter(width, source.adapter_hidden_dim or d_model, d_model)
        self.position: nn.Embedding | None = None
        if not config.use_rope:
            self.position = nn.Embedding(config.max_position_embeddings, d_model)
        self.dropout = config.dropout

    def forward(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """(B, L) int64 -> (B, L, d_model). ValueError for positions beyond the learned table."""
        x = self.token(input_ids)
        if self.adapter is not None:
            # The residual stream keeps the embeddings' dtype under autocast.
            x = self.adapter(x).to(x.dtype)
        if self.position is not None:
            x = x + self._positions(self.position.weight, layout)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _positions(self, table: Tensor, layout: Layout) -> Tensor:
        if layout.position_end > table.shape[0]:
            raise ValueError(
                f"positions up to {layout.position_end - 1} are beyond the learned table of "
                f"max_position_embeddings={table.shape[0]} rows"
            )
        if layout.offset is not None:
            return table[layout.offset : layout.offset + layout.length]
        return F.embedding(layout.position_ids, table)


def _embedding(rows: int, width: int) -> nn.Embedding:
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))
