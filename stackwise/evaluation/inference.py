"""A model put aside from training for a while: no gradients, no dropout, a given attention mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from stackwise.model.decoder import Decoder


@contextlib.contextmanager
def inference(model: Decoder, attention_mode: str) -> Iterator[None]:
    """Evaluation mode, no gradients and ``attention_mode``; all restored on exit."""
    training, before = model.training, model.attention_mode
    model.eval()
    model.set_attention_mode(attention_mode)
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attention_mode(before)
        model.train(training)


def device_of(model: Decoder) -> torch.device:
    """Where the model's parameters are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
