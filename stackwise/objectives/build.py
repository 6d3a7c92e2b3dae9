"""The objective a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stackwise.config import ConfigError, StackWiseConfig
from stackwise.objectives.base import MaskSampler, Objective
from stackwise.objectives.clm import CLMObjective
from stackwise.objectives.diffusion import DiffusionObjective
from stackwise.objectives.mlm import MLMObjective

if TYPE_CHECKING:
    from stackwise.data.tokenizer import Tokenizer


def build_objective(
    config: StackWiseConfig, tokenizer: Tokenizer, *, shift: bool | None = None
) -> Objective:
    """The objective of ``config.objective`` for this tokenizer.

    ``shift`` is what the model was built with (``Decoder.shift``); it stands in where
    ``objective.shift`` is null. Raises ``ConfigError`` when a MASK token is needed and the
    tokenizer has none, or when clm is asked for without the shift.
    """
    options = config.objective
    shifted = options.shift if options.shift is not None else shift
    if options.type == "clm":
        if options.shift is False:
            raise ConfigError("objective.shift must be true or null for objective.type clm")
        return CLMObjective(tokenizer.eos_id)
    if tokenizer.mask_id is None:
        raise ConfigError(
            f"objective.type {options.type} needs a MASK token and the tokenizer has none: "
            "set data.special_mask_id or use a tokenizer with a mask token"
        )
    sampler = MaskSampler(options.count, options.t_sampling)
    if options.type == "mlm":
        return MLMObjective(
            tokenizer.mask_id,
            tokenizer.vocab_size,
            tokenizer.special_ids,
            sampler=sampler,
            mask_share=options.mlm_mask,
            random_share=options.mlm_random,
            shift=bool(shifted),
        )
    return DiffusionObjective(
        tokenizer.mask_id,
        sampler=sampler,
        weighting=options.weighting,
        shift=bool(shifted),
    )
