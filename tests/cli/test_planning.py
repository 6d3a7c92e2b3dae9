"""What ``stackwise plan`` says, against decoders that are built and steps that are taken."""

from __future__ import annotations

import pytest
import torch

from stackwise.cli_inspect import size_text
from stackwise.config import StackWiseConfig
from stackwise.config.loading import apply_overrides
from stackwise.model.decoder import Decoder
from stackwise.model.layout import Layout
from stackwise.model.resolve import resolve_model_config
from stackwise.planning import needs_rows, plan
from stackwise.training.stages import build_stages

SHAPES = {
    "llama": [],
    "gpt2": ["model.architecture=gpt2"],
    "tied": ["model.tie_embeddings=true"],
    "gqa": ["model.attention_type=gqa"],
    "mla": ["model.attention_type=mla", "model.mla_kv_rank=48", "model.mla_q_rank=32"],
    "low rank": ["model.attention_type=mla", "model.mla_form=low_rank", "model.mla_kv_rank=48"],
    "kernel": ["model.attention_type=kernel"],
    "causal": ["model.attention_mode=causal"],
    "bf16": ["training.mixed_precision=bf16"],
    "experts": ["model.moe.n_routed_experts=4", "model.moe.d_ff=64"],
}


def config_of(*overrides: str) -> StackWiseConfig:
    small = ["model.d_model=128", "model.n_layers=3", "training.seq_len=64"]
    return apply_overrides(StackWiseConfig(), [*small, "training.max_steps=30", *overrides])


def decoder_of(config: StackWiseConfig) -> Decoder:
    torch.manual_seed(0)
    return Decoder(resolve_model_config(config.model, 512, config.training.seq_len))


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_built_decoder(shape: str) -> None:
    config = config_of(*SHAPES[shape])
    counts, model = plan(config).parameters, decoder_of(config)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    parts = counts["embeddings"] + sum(counts["blocks"]) + counts["final_norm"] + counts["head"]
    assert parts == counts["total"]
    assert counts["tied_head"] == config.model.tie_embeddings


def test_planning_builds_nothing_in_memory() -> None:
    size = ["model.d_model=8192", "model.n_heads=64", "model.n_layers=40"]
    made = plan(config_of(*size, "training.max_steps=40"))
    assert made.parameters["total"] > 30e9


def test_stages_say_what_trains_and_how_long() -> None:
    made = plan(config_of("training.mode=fused", "training.block_size=2", "training.batch_size=4"))
    first, second = made.stages
    assert first.trains == ["blocks 0-1", "embeddings", "final norm", "head"]
    assert second.trains == ["block 2", "final norm", "head"]
    counts = made.parameters
    assert second.trainable_parameters == (
        counts["blocks"][2] + counts["final_norm"] + counts["head"]
    )
    assert (first.steps, first.rows, first.tokens) == (15, 60, 60 * 64)
    assert made.to_dict()["totals"]["tokens"] == 2 * 60 * 64


def test_a_tied_head_trains_only_with_the_embeddings() -> None:
    stages = plan(config_of("model.tie_embeddings=true")).stages
    assert stages[0].trains == ["block 0", "embeddings with the tied head", "final norm"]
    assert stages[1].trains == ["block 1", "final norm"]


def test_a_trainable_backbone_and_pinned_parameters_are_counted() -> None:
    frozen = config_of("model.freeze_up_proj=true", "training.mode=end_to_end")
    free = config_of("training.mode=end_to_end")
    up_proj = decoder_of(free).get_parameter("blocks.0.feed_forward.up_proj.weight")
    counts = [plan(config).stages[0].trainable_parameters for config in (free, frozen)]
    assert counts[0] - counts[1] == 3 * up_proj.numel()
    backbone = ["training.mode=fused", "training.fusion_mode=trainable", "training.block_size=1"]
    assert plan(config_of(*backbone)).stages[2].trains[0] == "blocks 0-2"


def test_epochs_and_cache_come_from_the_number_of_rows() -> None:
    config = config_of(
        "training.max_steps=null",
        "training.epochs_per_layer=2",
        "training.batch_size=4",
        "training.gradient_accumulation_steps=2",
        "training.activation_cache=true",
        "training.cache_masks=2",
    )
    assert needs_rows(config)
    with pytest.raises(ValueError, match="number of training rows"):
        plan(config)
    with pytest.raises(ValueError, match="n_rows is 0"):
        plan(config, 0)
    made = plan(config, 100)
    assert [stage.steps for stage in made.stages] == [24, 24, 24]
    assert [stage.source for stage in made.stages] == ["tokens", "cache", "cache"]
    slots = 100 * 2 * 64 * 128 * 4
    assert slots < made.disk.activation_cache < 2.2 * slots
    config.training.cache_budget_gb = 1e-6
    assert plan(config, 100).disk.activation_cache == 0


def test_the_vocabulary_and_its_origin() -> None:
    assert plan(config_of("model.vocab_size=300")).vocab_size == 300
    made = plan(config_of("data.tokenizer_vocab_size=400", "data.special_mask_id=450"))
    assert made.vocab_size == 451
    assert made.vocab_source == "data.tokenizer_vocab_size, not yet trained"


def kept_for_backward(config: StackWiseConfig) -> int:
    """Bytes that one forward pass of the blocks keeps, and of bf16 copies of weights."""
    model, training = decoder_of(config).train(), config.training
    tokens = training.batch_size * training.seq_len
    rows = torch.randperm(tokens)[: int(0.525 * tokens)].sort().values
    layout = Layout.dense(training.batch_size, training.seq_len, torch.device("cpu"))
    shape = (training.batch_size, training.seq_len)
    hidden = model.embed(torch.zeros(shape, dtype=torch.int64), layout).detach()
    owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=training.mixed_precision == "bf16")
    with bf16, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.run_blocks(hidden, layout, rows=rows, checkpoint=training.gradient_checkpointing)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "tied"])
def test_activations_are_estimated_within_15_percent(shape: str) -> None:
    config = config_of(*SHAPES[shape], "training.mode=end_to_end", "training.batch_size=8")
    made = plan(config)
    memory = made.stages[0].memory
    copies = memory.weights - 4 * made.parameters["total"]
    measured = kept_for_backward(config)
    assert 0.85 < (memory.activations + copies) / measured < 1.15


def test_checkpointing_keeps_the_residual_stream_and_one_block() -> None:
    usual = config_of("training.mode=end_to_end")
    saving = config_of("training.mode=end_to_end", "training.gradient_checkpointing=true")
    stream = 3 * 4 * 128 * 8 * 64
    activations = plan(saving).stages[0].memory.activations
    assert stream < activations < plan(usual).stages[0].memory.activations
    assert kept_for_backward(saving) >= stream


def test_optimiser_and_gradients_follow_what_trains() -> None:
    stage = plan(config_of()).stages[1]
    assert stage.memory.gradients == 4 * stage.trainable_parameters
    assert stage.memory.optimizer == 8 * stage.trainable_parameters


def test_the_stages_are_the_trainer_s_own() -> None:
    config = config_of("training.joint_tuning_steps=5", "objective.mask_schedule=linear")
    made, own = plan(config).stages, build_stages(config)
    assert [(s.name, s.steps, s.mask_fractions, s.lr) for s in made] == [
        (s.name, s.steps, (s.plan.low, s.plan.high), s.lr) for s in own
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (13_900_000, "13.9 MB"), (3.3e12, "3.3 TB")],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert size_text(size) == text


def test_quantised_blocks_and_adapters_are_planned() -> None:
    options = [
        "training.mode=fused", "training.block_size=2", "training.max_steps=8",
        "model.vocab_size=1000", "model.d_model=64", "model.n_layers=4", "model.n_heads=2",
        "training.seq_len=32", "training.quantization_type=nvfp4",
    ]  # fmt: skip
    unquantised, frozen, adapted = (
        plan(apply_overrides(StackWiseConfig(), [*options, *extra]), 100)
        for extra in (
            [],
            ["training.quantization_enabled=true"],
            ["training.quantization_enabled=true", "training.qlora_enabled=true"],
        )
    )
    last = [planned.stages[-1] for planned in (unquantised, frozen, adapted)]
    linear = sum(unquantised.parameters["blocks"][:2]) * 0.99
    saved = last[0].memory.weights - last[1].memory.weights
    assert 0.97 * linear * 3.4375 < saved < linear * 1.02 * 3.4375
    assert "adapters of blocks 0-1" in last[2].trains
    assert last[2].trainable_parameters > last[1].trainable_parameters
    assert unquantised.stages[0].memory.weights == frozen.stages[0].memory.weights
