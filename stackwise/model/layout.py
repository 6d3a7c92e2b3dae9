"""How the (B, L) tokens of a forward pass are arranged: documents, positions, padding.

A :class:`Layout` is built once per batch and shared by every block, so whatever is derived from it
(the plan of the packed attention, the selection of rows) is computed once and not per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stackwise.data.batch import Batch


@dataclass(frozen=True, eq=False)
class RowSelection:
    """The rows of a batch that are asked for, and how many of them each document holds.

    ``rows`` (R,) int64 ascending unique indices into the B*L tokens; ``cu_seqlens_q`` and
    ``cu_seqlens_k`` (n + 1,) int32 are the documents' boundaries among the rows and the tokens.
    """

    rows: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Arrangement of the tokens; see the constructors below.

    ``position_ids`` (B, L) int64. ``cu_seqlens`` (n + 1,) int32 boundaries of the documents over
    the flattened B*L tokens, None where every row is one document of length L. ``key_bias``
    (B, 1, keys) float32, 0 for keys that may be attended to and -inf for padding. ``position_end``
    is an upper bound of ``position_ids`` plus one. ``offset`` is set where every row's positions
    are offset, offset + 1, ...: tables of positions are then sliced instead of gathered.
    """

    batch: int
    length: int
    position_ids: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    key_bias: Tensor | None = None
    position_end: int = 0
    offset: int | None = None
    _memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def dense(
        cls,
        batch: int,
        length: int,
        device: torch.device | str | None = None,
        *,
        offset: int = 0,
        key_bias: Tensor | None = None,
    ) -> Layout:
        """Every row is one document whose first token has position ``offset``."""
        positions = torch.arange(offset, offset + length, device=device).expand(batch, length)
        return cls(batch, length, positions, None, length, key_bias, offset + length, offset)

    @classmethod
    def packed(
        cls,
        batch: int,
        length: int,
        cu_seqlens: Tensor,
        max_seqlen: int | None = None,
        position_ids: Tensor | None = None,
    ) -> Layout:
        """Documents packed into the rows, positions restarting in each unless given.

        ``cu_seqlens`` (n + 1,) rises from 0 to batch * length and has a boundary wherever a row
        ends, or documents would reach across rows. ValueError otherwise. Without ``max_seqlen``
        the longest document is read from the device, and ``position_ids`` (B, L) needs its
        largest value read.
        """
        total = batch * length
        cu_seqlens = cu_seqlens.to(torch.int32)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(
                f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}; accepted: (documents + 1,)"
            )
        lengths = cu_seqlens.diff()
        ends = bool(cu_seqlens[0] == 0) and bool(cu_seqlens[-1] == total)
        if not ends or bool((lengths < 0).any()):
            raise ValueError(
                f"cu_seqlens: got {_shorten(cu_seqlens)}; accepted: ascending from 0 to "
                f"{batch} * {length} = {total}"
            )
        row_starts = torch.arange(0, total, length, device=cu_seqlens.device, dtype=torch.int32)
        if not bool(torch.isin(row_starts, cu_seqlens).all()):
            raise ValueError(
                f"cu_seqlens: got {_shorten(cu_seqlens)}; accepted: boundaries that include every "
                f"row start (multiples of {length})"
            )
        if max_seqlen is None:
            max_seqlen = int(lengths.max())
        position_end = max_seqlen
        if position_ids is None:
            index = torch.arange(total, device=cu_seqlens.device)
            starts = torch.repeat_interleave(
                cu_seqlens[:-1].long(), lengths.long(), output_size=total
            )
            position_ids = (index - starts).view(batch, length)
        else:
            position_end = int(position_ids.max()) + 1 if total else 0
        return cls(batch, length, position_ids, cu_seqlens, max_seqlen, None, position_end)

    @classmethod
    def from_batch(cls, batch: Batch) -> Layout:
        """The layout of a packed batch, trusted as prepared."""
        rows, length = batch.input_ids.shape
        # Whole-row documents keep their boundaries, so that a row's result has the same bits
        # whichever rows share its batch.
        whole_rows = batch.cu_seqlens.numel() == rows + 1 and batch.max_seqlen == length
        return cls(
            rows,
            length,
            batch.position_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            None,
            batch.max_seqlen,
            0 if whole_rows else None,
        )

    @classmethod
    def from_attention_mask(cls, mask: Tensor, length: int | None = None) -> Layout:
        """Padded rows: ``mask`` (B, keys) is true or 1 for tokens and false or 0 for padding.

        ``length`` is the number of query tokens, the last of the keys (all of them by default;
        fewer when the first ones are in a KV cache). Positions count every key, padding included,
        as Transformers does when no position_ids are given.
        """
        if mask.dim() != 2:
            raise ValueError(
                f"attention_mask: got shape {tuple(mask.shape)}; accepted: (batch, length) with "
                "true for tokens and false for padding"
            )
        rows, keys = mask.shape
        length = keys if length is None else length
        if length > keys:
            raise ValueError(f"attention_mask: got {keys} keys; accepted: at least {length}")
        keep = mask.bool()
        bias = torch.zeros(rows, 1, keys, device=mask.device).masked_fill_(
            ~keep[:, None], float("-inf")
        )
        return cls.dense(rows, length, mask.device, offset=keys - length, key_bias=bias)

    def with_positions(self, position_ids: Tensor) -> Layout:
        """The same arrangement with other positions (B, L); reads their largest value."""
        if tuple(position_ids.shape) not in ((self.batch, self.length), (1, self.length)):
            raise ValueError(
                f"position_ids: got shape {tuple(position_ids.shape)}; accepted: "
                f"({self.batch}, {self.length})"
            )
        position_ids = position_ids.expand(self.batch, self.length)
        end = int(position_ids.max()) + 1 if position_ids.numel() else 0
        return Layout(
            self.batch,
            self.length,
            position_ids,
            self.cu_seqlens,
            self.max_seqlen,
            self.key_bias,
            end,
        )

    @property
    def tokens(self) -> int:
        """B * L."""
        return self.batch * self.length

    def boundaries(self) -> Tensor:
        """(n + 1,) int32 boundaries of the documents, one per row where nothing is packed."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens
        if "boundaries" not in self._memo:
            self._memo["boundaries"] = torch.arange(
                0,
                self.tokens + 1,
                max(self.length, 1),
                dtype=torch.int32,
                device=self.position_ids.device,
            )
        return self._memo["boundaries"]

    def select(self, rows: Tensor) -> RowSelection:
        """How ``rows`` (R,) fall into the documents; kept for the next call with the same tensor.

        The rows are trusted to pass :meth:`check_rows`.
        """
        kept = self._memo.get("selection")
        if kept is not None and kept.rows is rows:
            return kept
        boundaries = self.boundaries()
        counted = torch.searchsorted(rows, boundaries.long(), out_int32=True)
        selection = RowSelection(rows, counted, boundaries)
        self._memo["selection"] = selection
        return selection

    def check_rows(self, rows: Tensor) -> None:
        """ValueError unless ``rows`` are int64, ascending, unique and within the B*L tokens (the
        last three are checked on the CPU only, where looking costs no synchronisation)."""
        accepted = f"ascending unique int64 indices below {self.tokens}, shape (rows,)"
        if rows.dim() != 1 or rows.dtype != torch.int64:
            raise ValueError(
                f"rows: got {rows.dtype} of shape {tuple(rows.shape)}; accepted: {accepted}"
            )
        if rows.device.type != "cpu" or rows.numel() == 0:
            return
        if bool((rows.diff() <= 0).any()) or rows[0] < 0 or rows[-1] >= self.tokens:
            raise ValueError(f"rows: got {_shorten(rows)}; accepted: {accepted}")


def build_layout(
    batch: int,
    length: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
    offset: int = 0,
) -> Layout:
    """The layout of (batch, length) tokens from whichever description is given.

    ``attention_mask`` (batch, offset + length) and ``cu_seqlens`` exclude each other; ``offset``
    counts tokens in a KV cache. ValueError when the description does not fit the tokens.
    """
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError(
            "attention_mask and cu_seqlens: got both; accepted: one of them (padding of packed "
            "rows is a document of its own in cu_seqlens)"
        )
    if cu_seqlens is not None:
        return Layout.packed(batch, length, cu_seqlens, max_seqlen, position_ids)
    layout = Layout.dense(batch, length, device, offset=offset)
    if attention_mask is not None:
        expected = (batch, offset + length)
        if tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}; accepted: {expected}"
            )
        # Nothing to hide: spares the masked form of the attention where looking is free.
        if attention_mask.device.type != "cpu" or not bool(attention_mask.all()):
            layout = Layout.from_attention_mask(attention_mask, length)
    return layout if position_ids is None else layout.with_positions(position_ids)


def _shorten(values: Tensor) -> str:
    listed = values[:8].tolist()
    return f"{str(listed)[:-1]}, ...]" if values.numel() > 8 else str(listed)
