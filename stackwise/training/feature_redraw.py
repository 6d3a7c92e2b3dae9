"""Draws random features of kernel attention anew in training (``model.kernel_redraw_steps``)."""

from __future__ import annotations

import torch

from stackwise.config import StackWiseConfig
from stackwise.model.attention import Attention
from stackwise.model.decoder import Decoder
from stackwise.training.stages import Stage


@torch.no_grad()
def redraw_features(config: StackWiseConfig, model: Decoder, stage: Stage, step: int) -> None:
    """Ahead of 0-based ``step`` of ``stage``: new features in its blocks where one is due.

    A pure function of the run's seed, the stage and the step, so that a continued run repeats the
    numbers. Frozen blocks keep theirs: cached activations and later blocks depend on them.
    """
    every = config.model.kernel_redraw_steps
    if every is None or step == 0 or step % every:
        return
    for index in stage.trainable:
        attention = model.blocks[index].attention
        if isinstance(attention, Attention):
            seed = config.run.seed
            for part in (stage.index, index, step // every):
                seed = (seed * 1_000_003 + part) % 2**63
            attention.redraw_features(seed)
