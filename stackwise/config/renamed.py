"""Keys of the published reference system that are called differently here, or are gone.

Fields that moved name their old key in their own metadata (``schema.py``). This table holds the
rest: keys whose meaning became another setting, and the second names the reference's files used.
"""

from __future__ import annotations

import functools

from stackwise.config.fields import all_fields

REPLACED = {
    "model.architecture.n_stacks": (
        "training.block_size",
        "a stack is a stage of training.block_size blocks",
    ),
    "model.architecture.blocks_per_stack": ("training.block_size", "blocks per stage"),
    "training.learning_rate": ("training.lr", "one name for the learning rate"),
    "training.min_mask_fraction": ("objective.mask_fraction_min", "one name for the range"),
    "training.max_mask_fraction": ("objective.mask_fraction_max", "one name for the range"),
    "training.mask_token_id": ("data.special_mask_id", "one name for the MASK id"),
    "training.layerwise_training": ("training.mode", "write training.mode: layerwise"),
    "training.fusion_enabled": ("training.mode", "write training.mode: fused"),
    "training.training_architecture": (
        "training.mode",
        "blockwise, stackwise and rackwise are the modes layerwise, blockwise and end_to_end",
    ),
    "training.save_activations": ("training.activation_cache", "true keeps them on disk"),
    "training.fusion_evaluation": (
        "training.eval_interval",
        "every stage is evaluated at its end, and every eval_interval steps",
    ),
    "training.save_fused_checkpoints": (
        "training.save_interval",
        "every mode saves checkpoints",
    ),
    "training.progressive": (
        "training.mode",
        "growing block by block is training.mode: layerwise, blockwise or fused",
    ),
    "data.use_dummy_data": (
        "data.dataset_path",
        "there is no dummy data; builtin is a corpus of real prose",
    ),
    "data.max_length": ("training.seq_len", "rows and sequences have one length"),
}

VALUE_HINTS = {
    ("model.attention_type", "mha"): "standard",
    ("training.mixed_precision", True): "bf16",
    ("training.mixed_precision", False): "none",
    ("data.packing", "right"): "none (rows are padded on the right)",
    ("data.packing", True): "none",
    ("data.packing", False): "concatenate",
}


@functools.cache
def new_names() -> dict[str, tuple[str, str]]:
    """Old dotted key -> (new dotted key, a word of explanation, possibly empty)."""
    moved = {spec.renamed: (path, "") for path, spec in all_fields().items() if spec.renamed}
    return moved | REPLACED
