"""The recipes a user would write: continue from a run, from a Transformers checkpoint folder."""

from __future__ import annotations

import pytest
import torch

from stackwise.data import prepare_data
from stackwise.evaluation import evaluate
from stackwise.model.transformers_bridge import load_pretrained, save_pretrained
from stackwise.runs import load_run_tokenizer
from stackwise.training.trainers import UnifiedTrainer

CAUSAL = ["objective.type=clm", "model.attention_mode=causal", "training.mode=end_to_end"]


def causal_perplexity(result, config) -> float:
    tokenizer = load_run_tokenizer(result.run_path)
    data = prepare_data(config, tokenizer=tokenizer, progress=False)
    scores = evaluate(result.model, data.validation, tokenizer, config, progress=False)
    return scores["perplexity_bound"]


def test_bidirectional_pretraining_helps_causal_fine_tuning(make_config):
    """The same fine-tuning budget from scratch ends with a higher causal perplexity."""
    pretrained = UnifiedTrainer(
        make_config("training.mode=end_to_end", "training.max_steps=300", "training.lr=3e-3")
    ).train()
    budget = ["training.max_steps=25", "training.lr=2e-3", *CAUSAL]
    tuned_config = make_config(*budget, f"model.init_from={pretrained.run_path}")
    tuned = UnifiedTrainer(tuned_config).train()
    scratch = UnifiedTrainer(make_config(*budget)).train()
    assert tuned.model.attention_mode == "causal"
    assert tuned.model.shift
    tuned_ppl = causal_perplexity(tuned, make_config(*budget))
    scratch_ppl = causal_perplexity(scratch, make_config(*budget))
    assert tuned_ppl < 0.97 * scratch_ppl, (tuned_ppl, scratch_ppl)


@pytest.fixture
def gpt2_folder(tmp_path, make_config) -> str:
    """A Transformers GPT-2 checkpoint folder with a tokenizer that has no MASK token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    data = prepare_data(make_config(), progress=False)
    folder = tmp_path / "gpt2"
    data.tokenizer.save(str(folder))
    config = GPT2Config(
        vocab_size=data.tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=4, n_head=2
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def test_a_transformers_checkpoint_becomes_a_diffusion_model(make_config, gpt2_folder, tmp_path):
    config = make_config(
        f"model.init_from={gpt2_folder}",
        "model.n_layers=4",
        "training.mode=fused",
        "training.block_size=2",
        "training.max_steps=8",
    )
    result = UnifiedTrainer(config).train()
    assert result.model.config.architecture == "gpt2"
    assert result.model.attention_mode == "bidirectional"
    assert [stage["depth"] for stage in result.stages] == [4, 4]
    original = load_pretrained(gpt2_folder)
    before, after = original.state_dict(), result.model.state_dict()
    assert not torch.equal(
        before["blocks.3.attention.q_proj.weight"], after["blocks.3.attention.q_proj.weight"]
    )
    save_pretrained(result.model, str(tmp_path / "exported"))
    again = load_pretrained(str(tmp_path / "exported"), attention_mode="bidirectional")
    ids = torch.randint(0, 200, (2, 16))
    torch.testing.assert_close(again(ids).logits, result.model.eval()(ids).logits)


def test_sequence_longer_than_the_checkpoints_positions_is_refused(make_config, gpt2_folder):
    from stackwise.config import ConfigError

    config = make_config(f"model.init_from={gpt2_folder}", "training.seq_len=128")
    with pytest.raises(ConfigError, match="at most 64"):
        UnifiedTrainer(config).train()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.architecture=gpt2", "training.mode=blockwise", "training.block_size=2"],
        ["model.attention_type=mla", "model.mla_kv_rank=16", "model.mla_rope_dim=8"],
        ["model.attention_type=kernel", "model.kernel_dim=16"],
        ["objective.type=mlm", "training.mixed_precision=bf16"],
        [
            "objective.weighting=inverse_t",
            "objective.count=fixed",
            "objective.time_step_masking=true",
        ],
        ["objective.mask_schedule=cosine", "training.gradient_checkpointing=true"],
        [*CAUSAL, "training.lr_schedule=wsd", "training.eval_interval=3"],
    ],
    ids=["gpt2_blockwise", "mla", "kernel", "mlm_bf16", "time_steps", "cosine_masks", "causal_wsd"],
)
def test_every_form_trains_and_lowers_its_loss(make_config, overrides):
    losses = []
    config = make_config(
        *overrides, "training.max_steps=45", "training.lr=5e-3", "training.log_interval=10"
    )
    UnifiedTrainer(config, on_step=lambda r: losses.append(r["loss"])).train()
    per_token = [sum(losses[:4]) / 4, sum(losses[-4:]) / 4]
    assert all(torch.isfinite(torch.tensor(losses)))
    if "objective.weighting=inverse_t" not in overrides and "cosine" not in str(overrides):
        assert per_token[1] < 0.9 * per_token[0], per_token
