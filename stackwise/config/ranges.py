"""Accepted ranges of single fields, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stackwise.config.fields import format_value

# The 256 bytes and the three special tokens of a byte-level BPE trained here.
MIN_TOKENIZER_SIZE = 259


@dataclass(frozen=True)
class Range:
    """An interval; infinite ends are open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: Any) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return bool(above and below)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low}" if self.open_low else f"at least {self.low}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{self.low}, {self.high}{right}"


COUNT = Range(1)
NATURAL = Range(0)
POSITIVE = Range(0, open_low=True)
FRACTION = Range(0, 1)
NONZERO_FRACTION = Range(0, 1, open_low=True)
INNER_FRACTION = Range(0, 1, open_low=True, open_high=True)
BELOW_ONE = Range(0, 1, open_high=True)

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "model.d_model",
            "model.n_layers",
            "model.n_heads",
            "model.n_kv_heads",
            "model.head_dim",
            "model.d_ff",
            "model.sliding_window",
            "model.mla_q_rank",
            "model.mla_kv_rank",
            "model.mla_nope_dim",
            "model.mla_rope_dim",
            "model.mla_v_dim",
            "model.kernel_dim",
            "model.kernel_redraw_steps",
            "model.max_position_embeddings",
            "model.tokenizer_embedding.width",
            "model.tokenizer_embedding.adapter_hidden_dim",
            "model.moe.n_routed_experts",
            "model.moe.experts_per_token",
            "model.moe.d_ff",
            "model.moe.n_groups",
            "model.moe.groups_per_token",
            "objective.num_time_steps",
            "training.block_size",
            "training.total_blocks",
            "training.max_steps",
            "training.batch_size",
            "training.gradient_accumulation_steps",
            "training.cache_masks",
            "training.qlora_rank",
            "training.num_threads",
            "training.log_interval",
            "training.eval_interval",
            "training.save_interval",
            "training.keep_checkpoints",
            "data.shard_tokens",
            "evaluation.samples",
            "evaluation.batch_size",
            "evaluation.max_rows",
            "generation.steps",
            "generation.block_length",
            "generation.top_k",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "model.moe.n_shared_experts",
            "model.moe.first_dense_layers",
            "objective.z_loss",
            "training.joint_tuning_steps",
            "training.weight_decay",
            "training.warmup_steps",
            "data.special_mask_id",
            "data.num_workers",
            "generation.max_new_tokens",
            "generation.temperature",
        ),
        NATURAL,
    ),
    **dict.fromkeys(
        (
            "model.kernel_bandwidth",
            "model.norm_eps",
            "model.init_std",
            "model.moe.routed_scaling",
            "training.epochs_per_layer",
            "training.lr",
            "training.current_block_lr",
            "training.backbone_lr",
            "training.embedding_lr",
            "training.joint_lr",
            "training.adam_eps",
            "training.max_grad_norm",
            "training.cache_budget_gb",
            "training.qlora_alpha",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(
        ("model.dropout", "objective.label_smoothing", "training.qlora_dropout"), BELOW_ONE
    ),
    **dict.fromkeys(
        (
            "objective.mask_fraction_min",
            "objective.mlm_mask",
            "objective.mlm_random",
            "training.min_lr_ratio",
        ),
        FRACTION,
    ),
    **dict.fromkeys(
        (
            "objective.mask_fraction_max",
            "objective.mlm_probability",
            "training.decay_fraction",
            "generation.top_p",
        ),
        NONZERO_FRACTION,
    ),
    "run.seed": Range(0, 2**31 - 1),
    "model.vocab_size": Range(2),
    "model.rope_theta": Range(1, open_low=True),
    "training.betas": BELOW_ONE,
    "training.seq_len": Range(2),
    "data.num_samples": Range(2),
    "data.validation_fraction": INNER_FRACTION,
    "data.tokenizer_vocab_size": Range(MIN_TOKENIZER_SIZE),
    "evaluation.mask_rates": NONZERO_FRACTION,
}

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DEVICE = re.compile(r"auto|cpu|cuda(?::[0-9]{1,3})?")


def _not_empty(text: str) -> bool:
    return bool(text.strip())


TEXTS: dict[str, tuple[Callable[[str], object], str]] = {
    "run.id": (
        _PLAIN_NAME.fullmatch,
        "a name of letters, digits, '.', '_' and '-' that starts with a letter or digit",
    ),
    "training.device": (_DEVICE.fullmatch, "auto, cpu, cuda or cuda:N"),
    **dict.fromkeys(
        (
            "run.dir",
            "model.init_from",
            "model.tokenizer_embedding.family",
            "training.activation_cache_dir",
            "data.dataset_path",
            "data.dataset_config",
            "data.dataset_split",
            "data.text_field",
            "data.tokenizer_path",
            "data.cache_dir",
        ),
        (_not_empty, "a text that is not empty"),
    ),
}


def range_fault(path: str, value: Any) -> str | None:
    """What is wrong with ``value`` for the field at ``path`` taken alone, or None."""
    if value is None:
        return None
    if path in TEXTS:
        accepts, accepted = TEXTS[path]
        return None if accepts(value) else f"got {format_value(value)}; accepted: {accepted}"
    if path not in RANGES:
        return None
    bad = next((item for item in _items(value) if item not in RANGES[path]), None)
    if bad is None:
        return None
    return f"got {format_value(value)}; accepted: {_noun(value)} {RANGES[path]}"


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        yield from value
    else:
        yield value


def _noun(value: Any) -> str:
    return "values" if isinstance(value, tuple) else "a value"
