"""Every cross-field rule refuses what it is about and accepts the way out it names."""

from __future__ import annotations

import itertools

import pytest

from stackwise.config import ConfigError, ModelConfig, MoEConfig, StackWiseConfig, rules
from stackwise.config.loading import apply_overrides
from stackwise.config.model_rules import MODEL_RULES
from stackwise.config.training_rules import TRAINING_RULES


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(StackWiseConfig(), overrides)
    return str(caught.value)


def accepted(*overrides: str) -> StackWiseConfig:
    return apply_overrides(StackWiseConfig(), overrides)


# (faulty settings, the field and a piece of the message, settings that follow its advice)
CASES = [
    (
        "model.n_heads=5",
        "model.n_heads: 5 heads do not divide model.d_model 256",
        "model.n_heads=8",
    ),
    (
        "model.n_heads=5",
        "or any number with model.head_dim set",
        "model.n_heads=5 model.head_dim=32",
    ),
    (
        "model.n_kv_heads=3",
        "model.n_kv_heads: 3 key/value heads do not divide",
        "model.n_kv_heads=2",
    ),
    (
        "model.attention_type=mla model.n_kv_heads=2",
        "model.n_kv_heads: got 2 with mla_form: deepseek",
        "model.attention_type=mla model.n_kv_heads=2 model.mla_form=low_rank",
    ),
    (
        "model.attention_preset=mla_attention model.n_kv_heads=2",
        "model.n_kv_heads: got 2 with mla_form: deepseek",
        "model.attention_preset=mla_attention",
    ),
    ("model.head_dim=33", "model.head_dim: rotary positions rotate pairs", "model.head_dim=34"),
    ("model.head_dim=33", "or model.use_rope: false", "model.head_dim=33 model.use_rope=false"),
    (
        "model.d_model=132",
        "model.head_dim: rotary positions rotate pairs and 33",
        "model.d_model=136",
    ),
    (
        "model.attention_type=mla model.mla_rope_dim=5",
        "model.mla_rope_dim: rotary",
        "model.attention_type=mla model.mla_rope_dim=6",
    ),
    (
        "model.attention_type=mla model.mla_form=low_rank model.mla_nope_dim=5",
        "model.mla_nope_dim: rotary",
        "model.attention_type=mla model.mla_form=low_rank model.mla_nope_dim=6",
    ),
    (
        "model.attention_type=mla model.use_rope=false",
        "model.use_rope: got false; mla_form: deepseek has rotary positions",
        "model.attention_type=mla model.use_rope=false model.mla_form=low_rank",
    ),
    (
        "model.rope_scaling={rope_type: dynamic}",
        "model.rope_scaling: got rope_type 'dynamic'; accepted: default, linear, llama3, yarn",
        "model.rope_scaling={rope_type: default}",
    ),
    (
        "model.rope_scaling={rope_type: linear, factor: 0}",
        "factor is 0; rope_type linear needs a number above 0",
        "model.rope_scaling={type: linear, factor: 2}",
    ),
    (
        "model.rope_scaling={rope_type: yarn, factor: 2}",
        "original_max_position_embeddings is None",
        "model.rope_scaling={rope_type: yarn, factor: 2, original_max_position_embeddings: 64}",
    ),
    (
        "model.architecture=gpt2 model.rope_scaling={rope_type: default}",
        "model.rope_scaling: got a scaling with model.use_rope false",
        "model.architecture=gpt2",
    ),
    (
        "model.kernel_form=exact model.kernel_type=uniform",
        "model.kernel_form: got 'exact', which the uniform kernel has not; accepted: features",
        "model.kernel_type=uniform",
    ),
    (
        "model.kernel_form=linear model.kernel_type=laplacian",
        "which the laplacian kernel has not; accepted: features, exact",
        "model.kernel_form=exact model.kernel_type=laplacian model.attention_type=kernel",
    ),
    (
        "model.kernel_form=exact model.kernel_type=laplacian model.kernel_distance=l1",
        "model.kernel_distance: got 'l1' with kernel_form: exact",
        "model.kernel_type=laplacian model.kernel_distance=l1 model.attention_type=kernel",
    ),
    (
        "model.attention_type=kernel model.kernel_form=linear model.sliding_window=8",
        "model.sliding_window: got 8 with kernel_form: linear",
        "model.attention_type=kernel model.kernel_form=exact model.sliding_window=8",
    ),
    (
        "model.freeze_up_proj=true model.ffn=gelu",
        "model.freeze_up_proj: got true, but the gelu",
        "model.freeze_up_proj=true model.ffn=geglu",
    ),
    (
        "model.freeze_up_proj=true model.architecture=gpt2",
        "model.freeze_up_proj: got true, but the gelu",
        "model.freeze_up_proj=true model.architecture=gpt2 model.ffn=swiglu",
    ),
    ("model.moe.d_ff=64 model.ffn=gelu", "model.moe: experts are swiglu", "model.moe.d_ff=64"),
    (
        "model.moe.n_groups=3",
        "model.moe.n_groups: 3 groups do not divide 8",
        "model.moe.n_groups=2",
    ),
    (
        "model.moe.groups_per_token=2",
        "model.moe.groups_per_token: got 2 of 1 groups",
        "model.moe.groups_per_token=2 model.moe.n_groups=2",
    ),
    (
        "model.moe.n_groups=4 model.moe.experts_per_token=3",
        "model.moe.experts_per_token: got 3, but 1 groups hold 2 experts",
        "model.moe.n_groups=4 model.moe.experts_per_token=2",
    ),
    (
        "model.max_position_embeddings=64",
        "training.seq_len: rows of 128 tokens exceed model.max_position_embeddings 64",
        "model.max_position_embeddings=64 training.seq_len=64",
    ),
    (
        "model.tokenizer_embedding.family=gpt2",
        "model.tokenizer_embedding.family: the rows of its matrix belong to that model's tokenizer",
        "model.tokenizer_embedding.family=gpt2 data.tokenizer_path=gpt2",
    ),
    (
        "model.tokenizer_embedding.family=gpt2 data.tokenizer_path=gpt2 model.init_from=runs/a",
        "model.init_from brings its own embeddings",
        "data.tokenizer_path=gpt2 model.init_from=runs/a",
    ),
    (
        "model.tokenizer_embedding.family=gpt2 data.tokenizer_path=gpt2 model.tie_embeddings=true "
        "model.tokenizer_embedding.width=768",
        "model.tie_embeddings: the matrix of gpt2 is 768 wide and model.d_model is 256",
        "model.tokenizer_embedding.family=gpt2 data.tokenizer_path=gpt2 model.tie_embeddings=true "
        "model.tokenizer_embedding.width=256",
    ),
    (
        "data.special_mask_id=600 model.vocab_size=512",
        "data.special_mask_id: got 600 with model.vocab_size 512",
        "data.special_mask_id=511 model.vocab_size=512",
    ),
    (
        "objective.type=clm",
        "model.attention_mode: got bidirectional; clm predicts the next token",
        "objective.type=clm model.attention_mode=causal",
    ),
    (
        "objective.type=clm model.attention_mode=causal model.attention_preset=bert_style",
        "model.attention_mode: got bidirectional (set by model.attention_preset: bert_style)",
        "objective.type=clm model.attention_preset=gpt_style",
    ),
    (
        "objective.type=clm model.attention_mode=causal objective.shift=false",
        "objective.shift: got false; clm",
        "objective.type=clm model.attention_mode=causal objective.shift=true",
    ),
    (
        "objective.type=mlm model.attention_mode=causal",
        "model.attention_mode: got causal; mlm fills gaps from both sides",
        "objective.type=diffusion model.attention_mode=causal",
    ),
    (
        "objective.mask_fraction_min=0.95",
        "objective.mask_fraction_min: 0.95 is above objective.mask_fraction_max 0.9",
        "objective.mask_fraction_min=0.95 objective.mask_fraction_max=0.95",
    ),
    (
        "objective.mask_fraction_min=0 objective.mask_schedule=linear",
        "objective.mask_fraction_min: got 0 with mask_schedule: linear",
        "objective.mask_fraction_min=0 objective.mask_schedule=random",
    ),
    (
        "objective.time_step_masking=true objective.mask_schedule=cosine",
        "objective.time_step_masking: got true beside mask_schedule: cosine",
        "objective.mask_schedule=cosine",
    ),
    (
        "objective.time_step_mask_fractions=[0.1, 0.2]",
        "has 2 fractions and objective.num_time_steps is 8",
        "objective.time_step_mask_fractions=[0.1, 0.2] objective.num_time_steps=2",
    ),
    (
        "objective.time_step_mask_fractions=[0.3, 0.2] objective.num_time_steps=2",
        "accepted: fractions that ascend",
        "objective.time_step_mask_fractions=[0.2, 0.3] objective.num_time_steps=2",
    ),
    (
        "objective.time_step_mask_fractions={0: 0.15, 5: 0.5, 3: 0.6}",
        "accepted: fractions that ascend",
        "objective.time_step_mask_fractions={0: 0.15, 5: 0.5, 9: 0.9}",
    ),
    (
        "objective.time_step_mask_fractions=[0, 1.1] objective.num_time_steps=2",
        "accepted: fractions in (0, 1]",
        "objective.time_step_mask_fractions=[0.1, 1] objective.num_time_steps=2",
    ),
    ("objective.time_step_mask_fractions={-1: 0.5}", "accepted: bins 0, 1, 2", ""),
    ("objective.time_step_mask_fractions={a: 0.5}", "accepted: bins 0, 1, 2", ""),
    ("objective.time_step_mask_fractions={}", "accepted: bins 0, 1, 2", ""),
    ("objective.time_step_mask_fractions=[]", "accepted: a list, a mapping", ""),
    ("objective.time_step_mask_fractions=0.5", "accepted: a list, a mapping", ""),
    (
        "objective.time_step_masking=true objective.mask_fraction_min=0",
        "the first bin would mask nothing",
        "objective.time_step_masking=true objective.mask_fraction_min=0.01",
    ),
    (
        "objective.mlm_mask=0.8 objective.mlm_random=0.3",
        "objective.mlm_random: mlm_mask 0.8 and mlm_random 0.3 exceed 1",
        "objective.mlm_mask=0.8 objective.mlm_random=0.2",
    ),
    (
        "training.mode=blockwise training.block_size=5",
        "training.block_size: a stage of 5 blocks exceeds model.n_layers 4",
        "training.mode=end_to_end training.block_size=5",
    ),
    (
        "training.mode=fused training.block_size=2 training.total_blocks=3",
        "training.total_blocks: 3 stages of 2 need 6 blocks and model.n_layers is 4",
        "training.mode=fused training.block_size=2 training.total_blocks=2",
    ),
    (
        "training.max_steps=3",
        "training.max_steps: 3 steps leave some of the 4 stages without one",
        "training.max_steps=4",
    ),
    (
        "model.tokenizer_embedding.freeze_embeddings=true training.train_embeddings=all",
        "training.train_embeddings: got all beside",
        "model.tokenizer_embedding.freeze_embeddings=true training.train_embeddings=never",
    ),
    (
        "training.activation_cache=true training.mode=end_to_end",
        "training.activation_cache: end_to_end has no frozen prefix",
        "training.activation_cache=true",
    ),
    (
        "training.activation_cache=true training.mode=fused training.fusion_mode=trainable",
        "training.activation_cache: a trainable backbone changes at every step",
        "training.mode=fused training.fusion_mode=trainable",
    ),
    (
        "training.activation_cache=true training.mode=fused",
        "training.cache_mode: got layerwise in fused mode",
        "training.activation_cache=true training.mode=fused training.cache_mode=fusion",
    ),
    (
        "training.activation_cache=true training.train_embeddings=all",
        "training.train_embeddings: got all with activation_cache: true",
        "training.train_embeddings=all",
    ),
    (
        "training.activation_cache=true model.dropout=0.1",
        "model.dropout: got 0.1 with activation_cache: true",
        "model.dropout=0.1",
    ),
    (
        "training.activation_cache=true objective.mask_schedule=linear",
        "got true with objective.mask_schedule: linear: the masks change from stage to stage",
        "objective.mask_schedule=linear",
    ),
    (
        "training.activation_cache=true objective.time_step_masking=true",
        "got true with objective.time_step_masking: true: the masks change",
        "objective.time_step_masking=true",
    ),
    (
        "training.activation_cache=true training.cache_masks=2 objective.type=clm "
        "model.attention_mode=causal",
        "training.cache_masks: got 2 with objective.type: clm",
        "training.activation_cache=true training.cache_masks=2",
    ),
    (
        "training.quantization_enabled=true",
        "training.quantization_enabled: got true with quantization_type: fp32, which changes "
        "nothing",
        "training.quantization_enabled=true training.quantization_type=nvfp4",
    ),
    (
        "training.quantization_enabled=true training.quantization_type=nf4 "
        "training.mode=end_to_end",
        "training.quantization_enabled: got true with mode: end_to_end",
        "training.quantization_enabled=true training.quantization_type=nf4",
    ),
    (
        "training.quantization_enabled=true training.quantization_type=nf4 training.mode=fused "
        "training.fusion_mode=trainable",
        "training.quantization_enabled: got true with fusion_mode: trainable",
        "training.quantization_enabled=true training.quantization_type=nf4 training.mode=fused",
    ),
    (
        "training.qlora_enabled=true",
        "training.qlora_enabled: got true with mode: layerwise, fusion_mode: frozen",
        "training.qlora_enabled=true training.mode=fused",
    ),
    (
        "training.qlora_enabled=true training.mode=fused training.activation_cache=true "
        "training.cache_mode=fusion",
        "got true with an activation cache of the backbone",
        "training.qlora_enabled=true training.mode=fused",
    ),
    (
        "evaluation.mask_rates=[0.5, 0.5]",
        "evaluation.mask_rates: got [0.5, 0.5]; accepted: every rate once",
        "evaluation.mask_rates=[0.5]",
    ),
    ("kernels.attentoin=torch", "kernels.attentoin: no such operation", "kernels.attention=torch"),
    (
        "kernels.attention=tritn",
        "kernels.attention: got 'tritn'; accepted here: reference, torch",
        "kernels.attention=reference",
    ),
]


def split(settings: str) -> list[str]:
    """Overrides separated by blanks; a blank inside brackets or braces separates nothing."""
    parts: list[str] = []
    for word in settings.split(" "):
        if parts and parts[-1].count("{") + parts[-1].count("[") > parts[-1].count("}") + parts[
            -1
        ].count("]"):
            parts[-1] += f" {word}"
        elif word:
            parts.append(word)
    return parts


@pytest.mark.parametrize(("faulty", "message", "way_out"), CASES, ids=[c[1][:50] for c in CASES])
def test_rule(faulty: str, message: str, way_out: str) -> None:
    text = refusal(*split(faulty))
    assert message in text
    assert len(text.splitlines()) == 1, "one mistake is reported once"
    accepted(*split(way_out))


def test_every_rule_has_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MODEL_RULES", ())
    for rule in (*MODEL_RULES, *TRAINING_RULES):
        monkeypatch.setattr(rules, "TRAINING_RULES", (rule,))
        assert any(fires(faulty, message) for faulty, message, _ in CASES), rule.__name__


def fires(faulty: str, message: str) -> bool:
    try:
        accepted(*split(faulty))
    except ConfigError as error:
        return message in str(error)
    return False


def test_all_faults_come_in_one_message_and_dependent_rules_stay_quiet() -> None:
    lines = refusal(
        "model.n_heads=0",
        "model.d_model=10",
        "training.lr=-1",
        "objective.type=clm",
        "kernels.nothing=torch",
    ).splitlines()
    assert lines[0].endswith("has 4 faults:")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "model.n_heads",
        "training.lr",
        "model.attention_mode",
        "kernels.nothing",
    ]


def test_shape_rules_leave_a_model_from_elsewhere_alone() -> None:
    accepted("model.init_from=runs/a", "model.n_heads=7", "model.max_position_embeddings=2")


def test_whatever_passes_can_be_built() -> None:
    """The shape rules and the model builder agree, over a grid that hits both."""
    from stackwise.model.resolve import resolve_model_config

    kinds = ("standard", "gqa", "mla", "kernel")
    moes = (None, MoEConfig(), MoEConfig(n_groups=3))
    seen, message = {True: 0, False: 0}, ""
    for kind, n_heads, n_kv, dim, rope, moe in itertools.product(
        kinds, (1, 2, 3), (None, 1, 2), (32, 33), (None, False), moes
    ):
        model = ModelConfig(
            attention_type=kind,
            n_heads=n_heads,
            n_kv_heads=n_kv,
            d_model=dim * 6,
            head_dim=dim,
            use_rope=rope,
            moe=moe,
        )
        config = StackWiseConfig(model=model)
        try:
            config.validate()
            resolve_model_config(model, 512, 128)
            seen[True] += 1
        except ConfigError as error:
            message = str(error)
            seen[False] += 1
        assert "cannot be built" not in message
    assert min(seen.values()) > 50
