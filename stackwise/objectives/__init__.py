"""Objectives: which tokens are hidden, which are predicted, and how the loss is normalised."""

from stackwise.objectives.base import (
    Corrupted,
    MaskSampler,
    Objective,
    predictable_tokens,
    predicting_rows,
)
from stackwise.objectives.build import build_objective
from stackwise.objectives.clm import CLMObjective
from stackwise.objectives.diffusion import DiffusionObjective
from stackwise.objectives.mlm import MLMObjective
from stackwise.objectives.schedules import MaskPlan, stage_mask_plans

__all__ = [
    "CLMObjective",
    "Corrupted",
    "DiffusionObjective",
    "MLMObjective",
    "MaskPlan",
    "MaskSampler",
    "Objective",
    "build_objective",
    "predictable_tokens",
    "predicting_rows",
    "stage_mask_plans",
]
