"""Drawing tokens from logits: temperature, top-k, top-p, Gumbel noise in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stackwise.objectives.hashing import STREAM_SAMPLE, hash_int


class TokenSampler:
    """Draws tokens for S samples that have a random stream each.

    Sample i of a seed is the same however many samples are drawn beside it. ``temperature`` 0 is
    greedy. ``banned`` ids are never drawn.
    """

    def __init__(
        self,
        n_samples: int,
        *,
        seed: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        banned: Sequence[int],
        device: torch.device,
    ) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.banned = torch.tensor(sorted(set(banned)), dtype=torch.int64, device=device)
        self._streams = [
            torch.Generator(device).manual_seed(hash_int(STREAM_SAMPLE, seed, i))
            for i in range(n_samples)
        ]

    def draw(self, logits: Tensor) -> Tensor:
        """One token per position, (S, R) int64, from ``logits`` (S, R, V).

        Gumbel-max in float64: argmax(logits / temperature - log(-log u)) is an exact draw from the
        softmax. In float32 the noise's tail is cut off and the draw is colder than asked for
        (arXiv 2409.02908).
        """
        logits = self.allowed(logits).double()
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = keep_top_p(keep_top_k(logits / self.temperature, self.top_k), self.top_p)
        exponential = torch.stack(
            [
                torch.empty_like(part).exponential_(generator=stream)
                for part, stream in zip(logits, self._streams, strict=True)
            ]
        )
        return (logits - exponential.log()).argmax(-1)

    def confidence(self, logits: Tensor) -> Tensor:
        """Largest log-probability of every position, (S, R), among the tokens that may be drawn."""
        return self.allowed(logits).float().log_softmax(-1).amax(-1)

    def allowed(self, logits: Tensor) -> Tensor:
        """``logits`` with -inf at the banned ids."""
        return logits.index_fill(-1, self.banned, float("-inf"))


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """-inf for all but the k largest logits of the last dimension (ties with the k-th stay)."""
    if k is None or k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Tensor, p: float | None) -> Tensor:
    """-inf outside the smallest set of most likely tokens whose probability reaches p.

    The most likely token always stays (nucleus sampling, arXiv 1904.09751).
    """
    if p is None or p >= 1.0:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    ordered = ordered.masked_fill(before >= p, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, index, ordered)
