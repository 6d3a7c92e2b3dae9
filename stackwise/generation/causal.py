"""Sampling from a causal model, token after token."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stackwise.generation.sampling import TokenSampler
from stackwise.model.kv_cache import KVCache

if TYPE_CHECKING:
    from stackwise.model.decoder import Decoder


def continue_tokens(
    model: Decoder,
    input_ids: Tensor,
    sampler: TokenSampler,
    *,
    max_new_tokens: int,
    eos_id: int | None,
) -> list[list[int]]:
    """Up to ``max_new_tokens`` new tokens after ``input_ids`` (S, L), L >= 1, for each sample.

    A sample ends before its first EOS. Keys and values of earlier tokens are kept where the model
    takes a ``cache``; otherwise every step reads the whole text again.
    """
    new = input_ids[:, :0]
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    reader = _Reader(model)
    while new.shape[1] < max_new_tokens and not bool(finished.all()):
        token = sampler.draw(reader.last_logits(torch.cat([input_ids, new], 1)))  # (S, 1)
        new = torch.cat([new, token], dim=1)
        if eos_id is not None:
            finished |= token[:, 0] == eos_id
    rows = new.tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


class _Reader:
    """Logits after the last token of a text that grows from call to call."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.seen = model, 0
        self.options: dict[str, Any] = {}
        if "cache" in inspect.signature(model.forward).parameters:
            self.options["cache"] = KVCache()

    def last_logits(self, ids: Tensor) -> Tensor:
        """(S, 1, V) from all tokens so far, ``ids`` (S, L)."""
        if self.options:
            ids, self.seen = ids[:, self.seen :], ids.shape[1]
        samples, length = ids.shape
        last = torch.arange(1, samples + 1, device=ids.device) * length - 1
        return self.model(ids, rows=last, **self.options).logits[:, None]
