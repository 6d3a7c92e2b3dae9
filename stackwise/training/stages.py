"""Every training mode as a list of stages.

A stage says which blocks run, which of them train, whether embeddings and head train, where the
input comes from (tokens or cached activations), which mask fractions apply and for how long. One
loop (``loop.py``) runs them, whatever the mode:

=============  =====================================================================
layerwise      one stage per block; the blocks below are frozen
blockwise      one stage per ``block_size`` blocks; the blocks below are frozen
fused          as blockwise, with ``fusion_mode`` deciding whether the blocks below
               are frozen or train with ``backbone_lr``
end_to_end     a single stage that trains everything: the control arm
joint          a last stage of ``joint_tuning_steps`` that trains everything
=============  =====================================================================

Blocks above the current ones are absent when training starts from scratch, and present but frozen
when ``model.init_from`` brought trained weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stackwise.config import ConfigError, StackWiseConfig
from stackwise.objectives import MaskPlan, stage_mask_plans


@dataclass(frozen=True)
class Stage:
    """One entry of the schedule.

    The forward pass runs blocks ``0 .. depth``; blocks ``start .. stop`` are the current ones and
    ``trainable`` lists every block that receives updates (the current ones, and a trainable
    backbone), ``adapted`` the frozen ones whose adapters do. ``lr``, ``backbone_lr`` and
    ``head_lr`` are peak learning rates; ``steps`` counts optimiser steps.
    """

    index: int
    name: str
    kind: Literal["block", "fusion", "end_to_end", "joint"]
    start: int
    stop: int
    depth: int
    trainable: tuple[int, ...]
    train_embeddings: bool
    train_head: bool
    source: Literal["tokens", "cache"]
    plan: MaskPlan
    steps: int
    lr: float
    backbone_lr: float
    head_lr: float
    adapted: tuple[int, ...] = ()

    @property
    def frozen_prefix(self) -> int:
        """Leading blocks that run without gradient (0 when the embeddings train)."""
        learning = (*self.trainable, *self.adapted)
        return 0 if self.train_embeddings else min(learning, default=self.depth)


def stage_ranges(config: StackWiseConfig) -> list[tuple[int, int]]:
    """(start, stop) of the current blocks of every stage, the joint phase left out."""
    n_layers, mode = config.model.n_layers, config.training.mode
    if mode == "end_to_end":
        return [(0, n_layers)]
    size = 1 if mode == "layerwise" else config.training.block_size
    ranges = [(start, min(start + size, n_layers)) for start in range(0, n_layers, size)]
    return ranges[: config.training.total_blocks]


def steps_per_stage(
    config: StackWiseConfig, n_stages: int, steps_per_epoch: int | None
) -> list[int]:
    """Optimiser steps of every stage: ``max_steps`` shared out evenly, else from the epochs."""
    training = config.training
    if training.max_steps is not None:
        share, rest = divmod(training.max_steps, n_stages)
        steps = [share + (k < rest) for k in range(n_stages)]
        if share == 0:
            raise ConfigError(
                f"training.max_steps={training.max_steps} leaves some of the {n_stages} stages "
                f"without a step: give at least {n_stages}"
            )
        return steps
    if steps_per_epoch is None:
        raise ValueError(
            "steps_per_epoch is needed when training.max_steps is null: optimiser steps that one "
            "pass over the training rows takes"
        )
    return [max(1, round(training.epochs_per_layer * steps_per_epoch))] * n_stages


def build_stages(config: StackWiseConfig, steps_per_epoch: int | None = None) -> list[Stage]:
    """The schedule of ``config``.

    ``steps_per_epoch`` (optimiser steps of one pass over the training rows) is needed only when
    ``training.max_steps`` is null.
    """
    training, n_layers = config.training, config.model.n_layers
    ranges = stage_ranges(config)
    steps = steps_per_stage(config, len(ranges), steps_per_epoch)
    plans = stage_mask_plans(config.objective, len(ranges))
    fused = training.mode == "fused"
    whole = training.mode == "end_to_end"
    stages = []
    for index, (start, stop) in enumerate(ranges):
        backbone = fused and training.fusion_mode == "trainable"
        train_embeddings = _applies(training.train_embeddings, index)
        cached = (
            training.activation_cache
            and start > 0
            and not train_embeddings
            and not backbone
            and (not fused or training.cache_mode == "fusion")
        )
        block_lr = training.lr
        if fused and training.current_block_lr is not None:
            block_lr = training.current_block_lr
        stages.append(
            Stage(
                index=index,
                name=_name(start, stop, whole),
                kind="end_to_end" if whole else "fusion" if fused else "block",
                start=start,
                stop=stop,
                depth=n_layers if config.model.init_from else stop,
                trainable=tuple(range(0 if backbone else start, stop)),
                train_embeddings=train_embeddings,
                train_head=_applies(training.train_head, index),
                source="cache" if cached else "tokens",
                plan=plans[index],
                steps=steps[index],
                lr=block_lr,
                backbone_lr=training.backbone_lr,
                head_lr=block_lr if training.embedding_lr is None else training.embedding_lr,
                adapted=tuple(range(start)) if training.qlora_enabled else (),
            )
        )
    if training.joint_tuning_steps:
        stages.append(_joint_stage(config, len(stages), stages[-1].depth))
    return stages


def _joint_stage(config: StackWiseConfig, index: int, depth: int) -> Stage:
    training = config.training
    lr = training.lr / 3 if training.joint_lr is None else training.joint_lr
    return Stage(
        index=index,
        name="joint",
        kind="joint",
        start=0,
        stop=depth,
        depth=depth,
        trainable=tuple(range(depth)),
        train_embeddings=training.train_embeddings != "never",
        train_head=training.train_head != "never",
        source="tokens",
        plan=MaskPlan(config.objective.mask_fraction_min, config.objective.mask_fraction_max),
        steps=training.joint_tuning_steps,
        lr=lr,
        backbone_lr=lr,
        head_lr=lr,
    )


def _applies(when: str, index: int) -> bool:
    return when == "all" or (when == "first" and index == 0)


def _name(start: int, stop: int, whole: bool) -> str:
    if whole:
        return "end to end"
    return f"block {start}" if stop == start + 1 else f"blocks {start}-{stop - 1}"
