"""What a valid configuration decides is said."""

from __future__ import annotations

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.loading import apply_overrides
from stackwise.config.notes import notes
from stackwise.config.training_rules import stage_count


def accepted(settings: str) -> StackWiseConfig:
    return apply_overrides(StackWiseConfig(), settings.split())


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ("training.mode=end_to_end", 1),
        ("training.mode=layerwise", 4),
        ("training.mode=blockwise training.block_size=3", 2),
        ("training.mode=fused training.block_size=1 training.total_blocks=2", 2),
    ],
)
def test_stage_count(overrides: str, count: int) -> None:
    assert stage_count(accepted(overrides)) == count


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (
            "model.tie_embeddings=true",
            "the head is tied to the embeddings, which train in the first",
        ),
        (
            "model.tie_embeddings=true training.activation_cache=true",
            "cached activations come from them): it is frozen after it",
        ),
        (
            "model.tie_embeddings=true training.train_embeddings=never",
            "the head is tied to embeddings that never train",
        ),
        (
            "model.tie_embeddings=true model.tokenizer_embedding.freeze_embeddings=true",
            "the head is tied to frozen embeddings",
        ),
        (
            "",
            "masks of 0.15 to 0.9 with weighting plain: the training loss is not a",
        ),
        ("objective.mask_schedule=linear", "the masks change per stage, so the frozen prefix is"),
        ("objective.time_step_masking=true", "8 time steps for 4 stages: the last 4 fractions"),
        ("training.max_steps=40", "training.warmup_steps 20: shortened to half of a stage of 10"),
        ("training.total_blocks=3", "training.total_blocks 3: blocks 3 to 3 do not train"),
        ("training.mode=blockwise training.block_size=3", "the last stage has 1 of"),
        ("training.activation_cache=true", "cached stages repeat 1 mask draw(s) per row"),
        (
            "training.activation_cache=true training.cache_dtype=bfloat16",
            "training.cache_dtype bfloat16 rounds a float32 residual stream",
        ),
        ("model.vocab_size=300", "model.vocab_size 300 is below data.tokenizer_vocab_size 512"),
        ("model.kernel_dim=32", "model.kernel_dim: 32 has no effect with attention_type: standard"),
        (
            "model.attention_type=kernel model.kernel_form=exact model.kernel_redraw_steps=50",
            "model.kernel_redraw_steps: 50 has no effect with kernel_form: exact",
        ),
        (
            "model.attention_type=kernel model.kernel_feature_map=relu",
            "model.kernel_feature_map: 'relu' has no effect with kernel_type: gaussian,",
        ),
        (
            "training.joint_lr=0.1",
            "training.joint_lr: 0.1 has no effect with joint_tuning_steps: 0",
        ),
        ("training.cache_masks=2", "training.cache_masks: 2 has no effect with"),
        ("model.attention_type=gqa model.n_kv_heads=4", "is standard attention"),
    ],
)
def test_notes_say_what_a_combination_decides(overrides: str, note: str) -> None:
    assert any(note in line for line in notes(accepted(overrides)))


def test_no_note_where_the_training_loss_is_the_bound() -> None:
    config = accepted(
        "objective.mask_fraction_min=0 objective.mask_fraction_max=1 objective.weighting=inverse_t"
    )
    assert notes(config) == []
