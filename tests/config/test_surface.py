"""The YAML keys users rely on: frozen, documented, and reachable from the reference's names."""

from __future__ import annotations

from pathlib import Path

import pytest

from stackwise.config import ConfigError
from stackwise.config.docs import render
from stackwise.config.fields import all_fields
from stackwise.config.loading import load_text
from stackwise.config.renamed import new_names

SURFACE = Path(__file__).with_name("surface.txt")

# The published field table, section by section.
REFERENCE = {
    "model": """vocab_size d_model n_layers n_heads n_kv_heads d_ff attention_type attention_mode
        mla_rq mla_rkv kernel_type kernel_dim dropout tie_embeddings use_rope rope_theta
        mask_fraction_min mask_fraction_max special_mask_id tokenizer_embedding.family
        tokenizer_embedding.embedding_option tokenizer_embedding.freeze_embeddings
        tokenizer_embedding.adapter_hidden_dim""",
    "training": """lr weight_decay betas batch_size seq_len max_steps device gradient_checkpointing
        mixed_precision activation_cache_dir cache_mode mask_schedule_type epochs_per_layer
        fine_tune_mode mode block_size fusion_mode run_id total_blocks joint_tuning_steps
        qlora_enabled qlora_rank qlora_alpha qlora_dropout qlora_lr current_block_lr
        quantization_enabled quantization_type time_step_masking num_time_steps
        time_step_mask_fractions log_interval save_interval checkpoint_dir""",
    "data": """dataset_path use_dummy_data num_samples tokenizer_path max_length padding num_workers
        pin_memory shuffle""",
}


def test_keys_are_those_committed() -> None:
    """A new or renamed key belongs in surface.txt: edit it together with docs/configuration.md."""
    assert sorted(all_fields()) == SURFACE.read_text().split()


def test_the_committed_page_is_the_generated_one(repository: Path) -> None:
    committed = (repository / "docs" / "configuration.md").read_text()
    assert committed == render(), "python -m stackwise.config.docs > docs/configuration.md"


@pytest.mark.parametrize(
    "path", [f"{section}.{name}" for section, names in REFERENCE.items() for name in names.split()]
)
def test_every_published_field_is_here_or_answered(path: str) -> None:
    if path in all_fields():
        return
    replacement, _ = new_names()[path]
    assert replacement in all_fields()
    section, name = path.split(".", 1)
    with pytest.raises(ConfigError) as caught:
        load_text(f"{section}: {{{name}: 1}}")
    assert f"{path} (line 1): " in str(caught.value)
    assert replacement in str(caught.value)


def test_every_replacement_exists_and_hides_no_field() -> None:
    for old, (new, _) in new_names().items():
        assert new in all_fields(), old
        assert old not in all_fields(), old


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("training: {mixed_precision: true}", "write bf16"),
        ("training: {mixed_precision: false}", "write none"),
        ("model: {attention_type: mha}", "write standard"),
        ("data: {packing: right}", "write none"),
        (
            "model: {architecture: {n_stacks: 2, blocks_per_stack: 4}}",
            "model.architecture.blocks_per_stack (line 1): replaced by training.block_size",
        ),
        ("training: {progressive: {enabled: true}}", "training.progressive (line 1): replaced by"),
    ],
)
def test_published_values_are_answered_with_ours(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    assert hint in str(caught.value)


def test_every_field_says_what_it_is() -> None:
    for path, spec in all_fields().items():
        assert spec.help.endswith("."), path
        assert 5 < len(spec.help) < 300, path
