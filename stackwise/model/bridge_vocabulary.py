"""Growing the vocabulary of a decoder, for tokens its checkpoint does not know (MASK)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stackwise.model.decoder import Decoder


@torch.no_grad()
def resize_vocabulary(model: Decoder, new_size: int) -> Decoder:
    """Grows embeddings and head to ``new_size`` rows, in place; returns the model.

    A new row is the mean of the old ones (Hewitt, "Initializing new word embeddings", 2021), so
    a new token starts with a probability no larger than the average token's. A tied head stays
    tied. The parameters are new objects: build optimisers afterwards. ValueError when
    ``new_size`` is below the present size, which would drop trained tokens.
    """
    old_size = model.embeddings.token.weight.shape[0]
    if new_size < old_size:
        raise ValueError(f"new_size is {new_size}; accepted: at least the present {old_size}")
    if new_size == old_size:
        return model
    tied = model.head.weight is model.embeddings.token.weight
    model.embeddings.token.weight = _grown(model.embeddings.token.weight, new_size)
    model.head.weight = (
        model.embeddings.token.weight if tied else _grown(model.head.weight, new_size)
    )
    model.embeddings.token.num_embeddings = new_size
    model.head.out_features = new_size
    model.config.vocab_size = new_size
    return model


def _grown(weight: Tensor, rows: int) -> nn.Parameter:
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    added = mean.expand(rows - weight.shape[0], -1)
    return nn.Parameter(torch.cat([weight, added]), requires_grad=weight.requires_grad)
