"""Cross-field rules of objective, training, cache and kernels; see ``rules.py``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from stackwise.config.fields import format_value
from stackwise.config.model_rules import attention_fields, preset_note
from stackwise.config.schema import StackWiseConfig

Fault = tuple[str, str]


def stage_count(config: StackWiseConfig) -> int:
    """Stages of the schedule, the joint phase left out."""
    training, n_layers = config.training, config.model.n_layers
    if training.mode == "end_to_end":
        return 1
    size = 1 if training.mode == "layerwise" else training.block_size
    available = -(-n_layers // size)
    return available if training.total_blocks is None else min(available, training.total_blocks)


def fixed_masks_per_stage(config: StackWiseConfig) -> str | None:
    """The setting that gives every stage mask fractions of its own, or None."""
    objective = config.objective
    if objective.type == "clm":
        return None
    if objective.time_step_masking:
        return "objective.time_step_masking: true"
    if objective.mask_schedule != "random":
        return f"objective.mask_schedule: {objective.mask_schedule}"
    return None


def clm_is_causal(config: StackWiseConfig) -> Iterator[Fault]:
    objective, mode = config.objective, attention_fields(config.model)["attention_mode"]
    preset = preset_note(config.model)
    if objective.type == "clm" and mode != "causal":
        yield (
            "model.attention_mode",
            f"got {mode}{preset}; clm predicts the next token, which bidirectional attention "
            "sees; accepted: causal, or objective.type: diffusion or mlm",
        )
    if objective.type == "clm" and objective.shift is False:
        yield ("objective.shift", "got false; clm predicts the next token; accepted: true or null")
    if objective.type == "mlm" and mode == "causal":
        yield (
            "model.attention_mode",
            f"got causal{preset}; mlm fills gaps from both sides; accepted: bidirectional, or "
            "objective.type: diffusion (any attention) or clm",
        )


def mask_range_ascends(config: StackWiseConfig) -> Iterator[Fault]:
    objective = config.objective
    low, high = objective.mask_fraction_min, objective.mask_fraction_max
    if low > high:
        yield (
            "objective.mask_fraction_min",
            f"{low:g} is above objective.mask_fraction_max {high:g}; accepted: at most {high:g}",
        )
    if objective.mask_schedule != "random" and low == 0:
        yield (
            "objective.mask_fraction_min",
            f"got 0 with mask_schedule: {objective.mask_schedule}, whose first stage would mask "
            "nothing; accepted: a value in (0, 1]",
        )


def one_mask_schedule(config: StackWiseConfig) -> Iterator[Fault]:
    objective = config.objective
    if objective.time_step_masking and objective.mask_schedule != "random":
        yield (
            "objective.time_step_masking",
            f"got true beside mask_schedule: {objective.mask_schedule}, and both fix the fraction "
            "of a stage; accepted: mask_schedule: random, or time_step_masking: false",
        )


def time_steps_are_fractions(config: StackWiseConfig) -> Iterator[Fault]:
    path, given = "objective.time_step_mask_fractions", config.objective.time_step_mask_fractions
    count = config.objective.num_time_steps
    if given is None:
        if config.objective.time_step_masking and config.objective.mask_fraction_min == 0:
            yield (path, "the first bin would mask nothing; set mask_fraction_min above 0")
        return
    if isinstance(given, dict):
        bins = list(given)
        if not bins or not all(_is_bin(key) for key in bins):
            yield (path, f"got {format_value(given)}; accepted: bins 0, 1, 2, ... as keys")
            return
        fractions = [given[key] for key in sorted(bins)]
    elif isinstance(given, list) and given:
        fractions = given
        if len(given) != count:
            yield (
                path,
                f"has {len(given)} fractions and objective.num_time_steps is {count}; accepted: "
                "one per time step",
            )
    else:
        yield (path, f"got {format_value(given)}; accepted: a list, a mapping {{bin: fraction}}")
        return
    if not all(_is_fraction(value) for value in fractions):
        yield (path, f"got {format_value(given)}; accepted: fractions in (0, 1]")
    elif any(later < earlier for earlier, later in itertools.pairwise(fractions)):
        yield (path, f"got {format_value(given)}; accepted: fractions that ascend with the bins")


def _is_bin(key: Any) -> bool:
    return isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 1_000_000


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def mlm_shares_sum_to_one(config: StackWiseConfig) -> Iterator[Fault]:
    objective = config.objective
    if objective.mlm_mask + objective.mlm_random > 1 + 1e-9:
        yield (
            "objective.mlm_random",
            f"mlm_mask {objective.mlm_mask:g} and mlm_random {objective.mlm_random:g} exceed 1 "
            "together; accepted: shares that leave the rest unchanged",
        )


def stages_fit_the_layers(config: StackWiseConfig) -> Iterator[Fault]:
    training, model = config.training, config.model
    if training.mode == "end_to_end" or model.init_from is not None:
        return
    size = 1 if training.mode == "layerwise" else training.block_size
    if size > model.n_layers:
        yield (
            "training.block_size",
            f"a stage of {size} blocks exceeds model.n_layers {model.n_layers}; accepted: at most "
            f"{model.n_layers}, or training.mode: end_to_end",
        )
        return
    available = -(-model.n_layers // size)
    if training.total_blocks is not None and training.total_blocks > available:
        yield (
            "training.total_blocks",
            f"{training.total_blocks} stages of {size} need "
            f"{training.total_blocks * size} blocks and model.n_layers is {model.n_layers}; "
            f"accepted: at most {available}, or null",
        )


def every_stage_gets_a_step(config: StackWiseConfig) -> Iterator[Fault]:
    if config.training.max_steps is None or config.model.init_from is not None:
        return
    stages = stage_count(config)
    if config.training.max_steps < stages:
        yield (
            "training.max_steps",
            f"{config.training.max_steps} steps leave some of the {stages} stages without one; "
            f"accepted: at least {stages}",
        )


def embeddings_train_or_freeze(config: StackWiseConfig) -> Iterator[Fault]:
    if (
        config.model.tokenizer_embedding.freeze_embeddings
        and config.training.train_embeddings == "all"
    ):
        yield (
            "training.train_embeddings",
            "got all beside model.tokenizer_embedding.freeze_embeddings: true; accepted: one of "
            "them (train_embeddings: never, or freeze_embeddings: false)",
        )


def cache_has_a_frozen_prefix(config: StackWiseConfig) -> Iterator[Fault]:
    training = config.training
    if not training.activation_cache:
        return
    path, off = "training.activation_cache", "activation_cache: false"
    if training.mode == "end_to_end":
        yield (path, f"end_to_end has no frozen prefix to keep; accepted: {off}, or another mode")
    elif training.mode == "fused" and training.fusion_mode == "trainable":
        yield (
            path,
            "a trainable backbone changes at every step and what is kept would be stale; "
            f"accepted: {off}, or fusion_mode: frozen",
        )
    elif training.mode == "fused" and training.cache_mode == "layerwise":
        yield (
            "training.cache_mode",
            "got layerwise in fused mode, where no stage would read the cache; accepted: fusion, "
            f"or {off}",
        )


def cache_keeps_its_prefix(config: StackWiseConfig) -> Iterator[Fault]:
    training = config.training
    if not training.activation_cache:
        return
    if training.train_embeddings == "all":
        yield (
            "training.train_embeddings",
            "got all with activation_cache: true, but cached activations come from embeddings that "
            "stand still; accepted: first or never, or activation_cache: false",
        )
    if config.model.dropout > 0:
        yield (
            "model.dropout",
            f"got {config.model.dropout:g} with activation_cache: true, which would store one draw "
            "of the prefix's dropout for good; accepted: 0, or activation_cache: false",
        )


def cache_keeps_its_masks(config: StackWiseConfig) -> Iterator[Fault]:
    if not config.training.activation_cache:
        return
    per_stage = fixed_masks_per_stage(config)
    if per_stage is not None:
        yield (
            "training.activation_cache",
            f"got true with {per_stage}: the masks change from stage to stage, so the prefix has "
            "to be recomputed; accepted: false, or objective.mask_schedule: random without time "
            "steps",
        )
    if config.objective.type == "clm" and config.training.cache_masks > 1:
        yield (
            "training.cache_masks",
            f"got {config.training.cache_masks} with objective.type: clm, which masks nothing: the "
            "same activations would be stored that often; accepted: 1",
        )


def quantization_has_frozen_blocks(config: StackWiseConfig) -> Iterator[Fault]:
    training = config.training
    if not training.quantization_enabled:
        return
    path = "training.quantization_enabled"
    if training.quantization_type == "fp32":
        yield (
            path,
            "got true with quantization_type: fp32, which changes nothing; accepted: another "
            "quantization_type, or false",
        )
    if training.mode == "end_to_end":
        yield (path, "got true with mode: end_to_end, which freezes no block; accepted: false")
    elif _backbone_trains(config) and config.model.init_from is None:
        yield (
            path,
            "got true with fusion_mode: trainable and no model.init_from: every block that runs "
            "trains; accepted: fusion_mode: frozen, or false",
        )


def adapters_have_a_backbone(config: StackWiseConfig) -> Iterator[Fault]:
    training = config.training
    if not training.qlora_enabled:
        return
    if training.mode != "fused" or _backbone_trains(config):
        yield (
            "training.qlora_enabled",
            f"got true with mode: {training.mode}, fusion_mode: {training.fusion_mode}; accepted: "
            "mode: fused with fusion_mode: frozen, whose backbone the adapters sit on",
        )
    if training.activation_cache and training.cache_mode == "fusion":
        yield (
            "training.qlora_enabled",
            "got true with an activation cache of the backbone (cache_mode: fusion), which "
            "adapters change at every step; accepted: cache_mode: layerwise, or "
            "activation_cache: false",
        )


def _backbone_trains(config: StackWiseConfig) -> bool:
    return config.training.mode == "fused" and config.training.fusion_mode == "trainable"


def mask_rates_are_distinct(config: StackWiseConfig) -> Iterator[Fault]:
    rates = config.evaluation.mask_rates
    if len(set(rates)) != len(rates):
        yield (
            "evaluation.mask_rates",
            f"got {format_value(rates)}; accepted: every rate once",
        )


def kernels_exist(config: StackWiseConfig) -> Iterator[Fault]:
    if not config.kernels:
        return
    from stackwise import kernels

    available = kernels.available()
    for operation, variant in config.kernels.items():
        path = f"kernels.{operation}"
        if operation not in available:
            yield (path, f"no such operation; accepted: {', '.join(available)}")
        elif variant not in available[operation]:
            accepted = ", ".join(available[operation])
            yield (path, f"got {format_value(variant)}; accepted here: {accepted}")


TRAINING_RULES = (
    clm_is_causal,
    mask_range_ascends,
    one_mask_schedule,
    time_steps_are_fractions,
    mlm_shares_sum_to_one,
    stages_fit_the_layers,
    every_stage_gets_a_step,
    embeddings_train_or_freeze,
    cache_has_a_frozen_prefix,
    cache_keeps_its_prefix,
    cache_keeps_its_masks,
    quantization_has_frozen_blocks,
    adapters_have_a_backbone,
    mask_rates_are_distinct,
    kernels_exist,
)
