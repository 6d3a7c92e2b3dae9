"""The whole decoder: loss, head, initial weights, dtypes, recomputation, frozen parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from stackwise.config import MoEConfig
from stackwise.model.decoder import Decoder
from stackwise.model.layout import Layout

KINDS = ("llama", "gpt2", "gqa", "mla", "low_rank", "kernel", "post_norm", "window")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_of_the_logits(build_decoder, gradients, smoothing) -> None:
    model = build_decoder("llama").double()
    ids, targets = torch.randint(0, 37, (2, 2, 24))
    weight = torch.rand(2, 24, dtype=torch.float64)
    rows = torch.tensor([1, 5, 30])
    logits = model(ids).logits.flatten(0, 1)[rows]
    each = F.cross_entropy(
        logits, targets.flatten()[rows], reduction="none", label_smoothing=smoothing
    )
    expected = (each * weight.flatten()[rows]).sum()
    expected.backward()
    wanted = gradients(model)

    layout = Layout.dense(2, 24)
    options = {
        "token_weight": weight.flatten()[rows],
        "label_smoothing": smoothing,
    }
    hidden = model.run_blocks(model.embed(ids, layout), layout)
    selected_late = model.loss(hidden, targets.flatten()[rows], rows=rows, **options)
    hidden = model.run_blocks(model.embed(ids, layout), layout, rows=rows)
    selected_early = model.loss(hidden, targets.flatten()[rows], **options)
    for loss in (selected_late, selected_early):
        assert abs(loss - expected) <= 1e-12 * abs(expected)
    selected_early.backward()
    for name, value in gradients(model).items():
        assert (value - wanted[name]).abs().max() <= 1e-12, name


def test_z_loss_and_reductions(build_decoder) -> None:
    model = build_decoder("llama").double()
    hidden = torch.randn(6, 32, dtype=torch.float64)
    targets = torch.tensor([3, -100, 5, 0, 36, 1])
    logits = model.logits(hidden)
    each = F.cross_entropy(logits, targets, reduction="none")
    each = each + 0.01 * logits.logsumexp(-1).square() * (targets != -100)
    none = model.loss(hidden, targets, reduction="none", z_loss=0.01)
    assert (none - each).abs().max() <= 1e-12
    mean = model.loss(hidden, targets, reduction="mean", z_loss=0.01)
    assert abs(mean - each.sum() / 5) <= 1e-12 * abs(mean)


def test_tied_head_is_the_embedding_matrix(build_decoder, gradients) -> None:
    tied = build_decoder("gpt2", tie_embeddings=True)
    untied = build_decoder("gpt2")
    assert tied.head.weight is tied.embeddings.token.weight
    assert untied.num_parameters - tied.num_parameters == 37 * 32
    assert tied.pinned_parameters() == frozenset()
    ids = torch.randint(0, 37, (1, 8))
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(tied.state_dict()[name])
    for model in (tied, untied):
        model(ids).logits.square().sum().backward()
    sides, joint = gradients(untied), gradients(tied)
    summed = sides["head.weight"] + sides["embeddings.token.weight"]
    error = (joint["embeddings.token.weight"] - summed).abs().max()
    assert error <= 1e-5 * summed.abs().max()


def test_parameter_names_are_stable(build_decoder) -> None:
    names = {name for name, _ in build_decoder("gpt2", n_layers=1).named_parameters()}
    both = ("weight", "bias")
    expected = {"embeddings.token.weight", "embeddings.position.weight", "head.weight"}
    expected |= {f"final_norm.{kind}" for kind in both}
    for module in (
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj",
        "attention_norm", "feed_forward.up_proj", "feed_forward.down_proj", "feed_forward_norm",
    ):  # fmt: skip
        expected |= {f"blocks.0.{module}.{kind}" for kind in both}
    assert names == expected
    llama = {name for name, _ in build_decoder("llama", n_layers=1).named_parameters()}
    assert "blocks.0.feed_forward.gate_proj.weight" in llama
    assert not any(name.endswith("bias") or "position" in name for name in llama)


class TestInitialWeights:
    def model(self, seed: int, **fields: object) -> Decoder:
        from stackwise.config import ModelConfig
        from stackwise.model.resolve import resolve_model_config

        defaults = {"vocab_size": 512, "d_model": 128, "n_layers": 8, "architecture": "gpt2"}
        torch.manual_seed(seed)
        config = ModelConfig(**(defaults | fields))  # type: ignore[arg-type]
        return Decoder(resolve_model_config(config, seq_len=128))

    def test_scale_of_every_matrix(self) -> None:
        model = self.model(0, init_std=0.03)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                assert parameter.eq(1.0 if "norm.weight" in name else 0.0).all(), name
                continue
            into_stream = name.endswith(("out_proj.weight", "down_proj.weight"))
            expected = 0.03 / math.sqrt(16) if into_stream else 0.03
            assert math.isclose(parameter.std().item(), expected, rel_tol=0.05), name

    def test_seed_decides_everything(self) -> None:
        first, same, other = self.model(0), self.model(0), self.model(1)
        for name, value in first.state_dict().items():
            assert torch.equal(value, same.state_dict()[name])
            if value.dim() > 1:
                assert not torch.equal(value, other.state_dict()[name]), name

    def test_experts_are_initialised_like_a_dense_layer(self) -> None:
        moe = MoEConfig(n_routed_experts=4, d_ff=64, first_dense_layers=1)
        model = self.model(0, moe=moe, ffn="swiglu", n_layers=2)
        experts = model.blocks[1].feed_forward.experts
        assert math.isclose(experts[3].down_proj.weight.std().item(), 0.02 / 2, rel_tol=0.1)
        assert math.isclose(experts[0].up_proj.weight.std().item(), 0.02, rel_tol=0.1)
        assert not hasattr(model.blocks[0].feed_forward, "experts")


@pytest.mark.parametrize("kind", KINDS)
def test_float64_works_throughout_and_agrees_with_float32(build_decoder, kind) -> None:
    model = build_decoder(kind)
    ids = torch.randint(0, 37, (2, 24))
    boundaries = torch.tensor([0, 5, 24, 48])
    single = model(ids, cu_seqlens=boundaries).logits
    double = model.double()(ids, cu_seqlens=boundaries).logits
    assert double.dtype == torch.float64
    mask = torch.ones(2, 24)
    mask[1, 20:] = 0
    assert model(ids, attention_mask=mask).logits.isfinite().all()
    assert (single - double).abs().max() <= 2e-5 * double.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_the_residual_stream_in_float32(build_decoder, kind) -> None:
    model = build_decoder(kind)
    ids = torch.randint(0, 37, (2, 24))
    exact = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids)
    assert output.hidden.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    assert (output.hidden - exact.hidden).abs().max() <= 0.05 * exact.hidden.abs().max()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mla"])
def test_recomputation_changes_no_gradient(build_decoder, gradients, kind) -> None:
    model = build_decoder(kind, dropout=0.2).train()
    ids, targets = torch.randint(0, 37, (2, 2, 24))
    layout, rows = Layout.dense(2, 24), torch.arange(0, 48, 3)
    taken = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        hidden = model.embed(ids, layout)
        hidden = model.run_blocks(hidden, layout, rows=rows, checkpoint=checkpoint)
        model.loss(hidden, targets.flatten()[rows]).backward()
        taken.append(gradients(model))
    assert taken[0].keys() == taken[1].keys()
    for name, value in taken[0].items():
        assert torch.equal(value, taken[1][name]), name


def test_blocks_run_in_parts_as_in_one_go(build_decoder) -> None:
    model = build_decoder("llama", n_layers=3)
    layout = Layout.dense(2, 24)
    x = model.embed(torch.randint(0, 37, (2, 24)), layout)
    parts = model.run_blocks(model.run_blocks(x, layout, 0, 1), layout, 1)
    assert torch.equal(parts, model.run_blocks(x, layout))
    assert torch.equal(model.run_blocks(x, layout, 2, 2), x)
    with pytest.raises(ValueError, match="start, stop: got 2, 4"):
        model.run_blocks(x, layout, 2, 4)


@pytest.mark.parametrize("ffn", ["swiglu", "geglu"])
def test_frozen_up_projection_takes_no_gradient(build_decoder, gradients, ffn) -> None:
    model = build_decoder("llama", ffn=ffn, freeze_up_proj=True)
    names = frozenset(f"blocks.{i}.feed_forward.up_proj.weight" for i in range(2))
    assert model.pinned_parameters() == names
    assert model.blocks[0].feed_forward.up_proj.weight.std() > 0.01
    model(torch.randint(0, 37, (1, 8))).logits.square().sum().backward()
    assert not names & gradients(model).keys()
    assert build_decoder("llama").pinned_parameters() == frozenset()


def test_dropout_acts_in_training_only(build_decoder) -> None:
    model = build_decoder("gpt2", dropout=0.5)
    ids = torch.randint(0, 37, (1, 8))
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_positions_beyond_the_learned_table_are_refused(build_decoder) -> None:
    model = build_decoder("gpt2", seq_len=8)
    model(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"positions up to 8 .* max_position_embeddings=8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_rotary_tables_grow_beyond_the_configured_length(build_decoder) -> None:
    short, long = build_decoder("llama", seq_len=4), build_decoder("llama", seq_len=64)
    ids = torch.randint(0, 37, (1, 30))
    assert torch.equal(short(ids).logits, long(ids).logits)


def test_shift_is_kept_by_the_decoder(build_decoder) -> None:
    assert build_decoder("llama", shift=True).shift is True
    assert build_decoder("llama").shift is False


def test_the_decoder_owns_its_configuration(build_decoder) -> None:
    model = build_decoder("llama")
    config = model.config
    other = Decoder(config)
    other.set_attention_mode("causal")
    assert config.attention_mode == "bidirectional"
    assert model.attention_mode == "bidirectional"
    assert other.config.attention_mode == "causal"


def test_a_batch_without_targets_has_no_loss_and_no_gradient(build_decoder, gradients) -> None:
    model = build_decoder("gpt2")
    layout, none = Layout.dense(1, 8), torch.empty(0, dtype=torch.int64)
    hidden = model.embed(torch.zeros(1, 8, dtype=torch.int64), layout)
    loss = model.loss(model.run_blocks(hidden, layout, rows=none), none)
    loss.backward()
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(model).values())


def test_a_model_trains_after_generating_in_inference_mode(build_decoder) -> None:
    model = build_decoder("llama")
    ids = torch.randint(0, 37, (1, 8))
    with torch.inference_mode():
        before = model(ids).logits
    logits = model(ids).logits
    logits.sum().backward()
    assert torch.equal(before, logits)


def test_a_layout_excludes_its_own_description(build_decoder) -> None:
    model = build_decoder("llama")
    ids = torch.randint(0, 37, (1, 8))
    assert torch.equal(model(ids, layout=Layout.dense(1, 8)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="layout: got one beside attention_mask"):
        model(ids, layout=Layout.dense(1, 8), attention_mask=torch.ones(1, 8))


def test_blocks_compile_without_graph_breaks(build_decoder) -> None:
    model = build_decoder("llama", n_layers=1)
    layout = Layout.dense(2, 8)
    x = torch.randn(2, 8, 32)
    rope = model.rotary(layout, x.dtype)
    compiled = torch.compile(model.blocks[0], backend="aot_eager", fullgraph=True)
    result = compiled(x, layout, causal=True, rope=rope)
    expected = model.blocks[0](x, layout, causal=True, rope=rope)
    assert (result - expected).abs().max() <= 1e-6


def test_rotary_blocks_refuse_to_run_without_positions(build_decoder) -> None:
    with pytest.raises(ValueError, match="rope: got None"):
        build_decoder("llama").blocks[0](torch.randn(1, 8, 32), Layout.dense(1, 8), causal=True)
