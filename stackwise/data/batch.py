"""A batch of packed rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens with their document boundaries.

    ``cu_seqlens`` cuts the flattened B*L tokens; every row start is a boundary, and a row's padding
    tail is a segment of its own, so attention within segments never sees across either.
    """

    input_ids: Tensor  # (B, L) int64, uncorrupted
    maskable: Tensor  # (B, L) bool, False for padding and special tokens
    position_ids: Tensor  # (B, L) int64, restarts at 0 in each segment
    cu_seqlens: Tensor  # (n+1,) int32
    max_seqlen: int
    row_ids: Tensor  # (B,) int64, the rows' places in the prepared split

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            input_ids=function(self.input_ids),
            maskable=function(self.maskable),
            position_ids=function(self.position_ids),
            cu_seqlens=function(self.cu_seqlens),
            row_ids=function(self.row_ids),
        )
