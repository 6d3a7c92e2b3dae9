"""Keys and values of the tokens already seen, for causal sampling one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


class KVCache:
    """What every block keeps of the tokens so far, grown by doubling; for inference only.

    Blocks store what they need: rotated keys and values (B, tokens, heads, dim), their random
    features, or the latents of MLA (B, tokens, rank). ``length`` is the number of tokens that
    every block has seen; the decoder advances it after each forward pass.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, list[Tensor]] = {}

    def update(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Appends ``new`` tensors (B, L, ...) of block ``layer``; returns all tokens' tensors.

        The returned tensors (B, length + L, ...) are views that the next step overwrites.
        """
        stop = self.length + new[0].shape[1]
        kept = self._layers.get(layer)
        if kept is None or kept[0].shape[1] < stop:
            kept = self._layers[layer] = self._grown(kept, new, stop)
        if kept[0].shape[0] != new[0].shape[0]:
            raise ValueError(
                f"cache: holds a batch of {kept[0].shape[0]} rows, got {new[0].shape[0]}"
            )
        for buffer, tensor in zip(kept, new, strict=True):
            buffer[:, self.length : stop] = tensor.detach()
        return [buffer[:, :stop] for buffer in kept]

    def advance(self, tokens: int) -> None:
        """Counts ``tokens`` more as seen by every block."""
        self.length += tokens

    def _grown(self, kept: list[Tensor] | None, new: tuple[Tensor, ...], stop: int) -> list[Tensor]:
        capacity = max(_FIRST_CAPACITY, 2 * self.length, stop)
        grown = [
            torch.empty(
                (tensor.shape[0], capacity, *tensor.shape[2:]),
                dtype=tensor.dtype,
                device=tensor.device,
            )
            for tensor in new
        ]
        for buffer, old in zip(grown, kept or [], strict=False):
            buffer[:, : self.length] = old[:, : self.length]
        return grown
