"""Frozen blocks in low precision: quantised once, restored bit for bit, adapters that train."""

from __future__ import annotations

import copy
import json
import pathlib

import pytest
import torch
from torch import nn

from stackwise.model.adapters import adapters
from stackwise.model.quantized import HalfLinear, QuantizedLinear
from stackwise.runs import RunStore, load_run_model
from stackwise.training.loop import TrainingLoop
from stackwise.training.trainers import UnifiedTrainer

KINDS = ("fp16", "bf16", "fp8", "fp4", "nf4", "nvfp4", "mxfp4")


def quantized(kind: str) -> list[str]:
    return ["training.quantization_enabled=true", f"training.quantization_type={kind}"]


@pytest.fixture
def stages(monkeypatch):
    """Copies of the model as every stage trains it, and of its state after the stage."""
    taken: list[tuple[nn.Module, nn.Module]] = []
    finish = TrainingLoop._finish_stage
    enter = TrainingLoop._enter_precision

    def entering(self, stage, reporter):
        enter(self, stage, reporter)
        taken.append((copy.deepcopy(self.model), None))

    def finishing(self, stage, reporter):
        taken[-1] = (taken[-1][0], copy.deepcopy(self.model))
        finish(self, stage, reporter)

    monkeypatch.setattr(TrainingLoop, "_enter_precision", entering)
    monkeypatch.setattr(TrainingLoop, "_finish_stage", finishing)
    return taken


def forms(block: nn.Module) -> set[type]:
    linears = (nn.Linear, HalfLinear, QuantizedLinear)
    return {type(part) for part in block.modules() if type(part) in linears}


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_blocks_are_quantised_once_and_the_run_keeps_full_precision(
    kind, make_config, stages
):
    config = make_config("training.mode=layerwise", *quantized(kind))
    result = UnifiedTrainer(config).train()
    frozen_form = HalfLinear if kind in ("fp16", "bf16") else QuantizedLinear
    for index, (_, after) in enumerate(stages):
        for k in range(3):
            assert forms(after.blocks[k]) == ({frozen_form} if k < index else {nn.Linear})
    # Quantised once: the same bits in every later stage.
    first = stages[1][0].blocks[0].state_dict()
    last = stages[2][1].blocks[0].state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in first.items())
    # The model that is kept has the weights that were trained, in full precision.
    trained = {k: stages[k][1].blocks[k].state_dict() for k in range(3)}
    saved = load_run_model(result.run_path)
    for model in (result.model, saved):
        for k, block in enumerate(model.blocks):
            assert forms(block) == {nn.Linear}
            for name, tensor in block.state_dict().items():
                assert torch.equal(tensor, trained[k][name])
    errors = [r for r in RunStore.open(result.run_path).read_metrics() if "quantization_error" in r]
    assert [sorted(r["quantization_errors"]) for r in errors] == [["block_0"], ["block_1"]]
    assert all(0 < r["quantization_error"] < 0.2 for r in errors)


@pytest.mark.parametrize("kind", ["nvfp4", "bf16"])
def test_a_joint_phase_starts_from_the_full_precision_weights(kind, make_config, stages):
    config = make_config(
        "training.mode=layerwise", "training.joint_tuning_steps=2", *quantized(kind)
    )
    UnifiedTrainer(config).train()
    joint = stages[-1][0]
    for k in range(3):
        trained = stages[k][1].blocks[k].state_dict()
        assert all(torch.equal(t, trained[n]) for n, t in joint.blocks[k].state_dict().items())
        assert forms(joint.blocks[k]) == {nn.Linear}
    changed = stages[-1][1].blocks[0].state_dict()
    assert not all(torch.equal(t, changed[n]) for n, t in joint.blocks[0].state_dict().items())


def test_cached_activations_are_those_of_the_quantised_prefix(make_config):
    options = ["training.mode=layerwise", "model.dropout=0", *quantized("nvfp4")]
    cached = ["training.activation_cache=true", "training.cache_masks=1"]
    curves = []
    for extra in (cached, [*cached[1:], "training.activation_cache=false"]):
        losses: list[float] = []
        UnifiedTrainer(
            make_config(*options, *extra), on_step=lambda r, seen=losses: seen.append(r["loss"])
        ).train()
        curves.append(losses)
    # The first stage reads tokens either way; without a cache the masks are drawn afresh later.
    assert curves[0][:4] == curves[1][:4]
    assert all(torch.isfinite(torch.tensor(curve)).all() for curve in curves)


@pytest.mark.parametrize("feed_forward", ["swiglu", "gelu"])
@pytest.mark.parametrize("attention", ["standard", "mla"])
def test_qlora_trains_adapters_on_the_frozen_backbone(attention, feed_forward, make_config, stages):
    config = make_config(
        "training.mode=fused", "training.block_size=1", "training.qlora_enabled=true",
        "training.qlora_rank=2", "training.qlora_dropout=0", "training.backbone_lr=1e-2",
        f"model.attention_type={attention}", f"model.ffn={feed_forward}",
        *quantized("nvfp4"),
    )  # fmt: skip
    result = UnifiedTrainer(config).train()
    for index, (before, after) in enumerate(stages):
        for k in range(3):
            assert bool(adapters(before.blocks[k])) is (k < index)
        trained = dict(after.named_parameters())
        for name, parameter in before.named_parameters():
            inside = name.startswith("blocks.") and int(name.split(".")[1]) < index
            if not inside:
                continue
            learns = name.endswith(("lora_a", "lora_b"))
            # A first step moves B alone: B starts at zero, so A has no gradient yet.
            if name.endswith("lora_b"):
                assert not torch.equal(parameter, trained[name]), name
            elif not learns:
                assert torch.equal(parameter, trained[name]), name
    # Merged in the end: full-precision weights plus what the adapters learnt.
    last = stages[-1][1]
    for k in (0, 1):
        parts = adapters(last.blocks[k])
        backup = RunStore.open(result.run_path).load_block(k)
        for name, part in parts.items():
            expected = backup[f"{name}.weight"] + part.delta()
            assert torch.equal(result.model.blocks[k].get_submodule(name).weight, expected)
    assert not adapters(result.model)


def test_a_pretrained_backbone_is_quantised_before_it_ever_trains(make_config, stages):
    pretrained = UnifiedTrainer(make_config("training.mode=end_to_end")).train()
    stages.clear()
    config = make_config(
        "training.mode=layerwise", f"model.init_from={pretrained.run_path}", *quantized("nf4")
    )
    result = UnifiedTrainer(config).train()
    before = stages[0][0]
    assert forms(before.blocks[0]) == {nn.Linear}
    assert forms(before.blocks[1]) == forms(before.blocks[2]) == {QuantizedLinear}
    start = pretrained.model.blocks[2].state_dict()
    thawed = stages[2][0].blocks[2].state_dict()
    assert all(torch.equal(thawed[name], tensor) for name, tensor in start.items())
    assert forms(result.model.blocks[1]) == {nn.Linear}


@pytest.mark.parametrize("stop", [3, 6, 9])
@pytest.mark.parametrize("mode", ["layerwise", "qlora"])
def test_a_stopped_run_continues_with_the_same_numbers(mode, stop, make_config):
    options = ["training.mode=layerwise", "training.joint_tuning_steps=2"]
    if mode == "qlora":
        options = [
            "training.mode=fused", "training.block_size=1", "training.qlora_enabled=true",
            "training.qlora_rank=2", "training.backbone_lr=1e-2",
        ]  # fmt: skip
    options += quantized("nvfp4")

    def numbers(run) -> list[tuple]:
        kept = ("step", "stage", "loss", "validation_loss", "grad_norm", "quantization_error")
        return [tuple(r.get(k) for k in kept) for r in RunStore.open(run).read_metrics()]

    whole = UnifiedTrainer(make_config(*options)).train()

    class Stop(Exception):
        pass

    def interrupt(record):
        if record["step"] == stop:
            raise Stop

    config = make_config(*options)
    trainer = UnifiedTrainer(config, on_step=interrupt)
    with pytest.raises(Stop):
        trainer.train()
    runs = sorted(whole.run_path.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    (stopped,) = [path for path in runs if path != whole.run_path]
    resumed = UnifiedTrainer.resume(stopped).train()
    assert numbers(stopped) == numbers(whole.run_path)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_run_stopped_between_the_last_step_and_the_checkpoint_of_a_stage(
    make_config, monkeypatch
):
    """The joint phase trains restored blocks: resumed, it must restore what they were before."""
    options = ["training.mode=layerwise", "training.joint_tuning_steps=2", *quantized("nvfp4")]
    options.append("training.save_interval=100")
    whole = UnifiedTrainer(make_config(*options)).train()
    save = RunStore.save_checkpoint

    class Stop(Exception):
        pass

    def stopping(self, step, tensors, state):
        if state["stage"] == 4:
            raise Stop
        return save(self, step, tensors, state)

    monkeypatch.setattr(RunStore, "save_checkpoint", stopping)
    with pytest.raises(Stop):
        UnifiedTrainer(make_config(*options)).train()
    monkeypatch.undo()
    (stopped,) = [path for path in whole.run_path.parent.iterdir() if path != whole.run_path]
    resumed = UnifiedTrainer.resume(stopped).train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    for index in range(3):
        first, again = (RunStore.open(run).load_block(index) for run in (whole.run_path, stopped))
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_backups_missing_after_a_checkpoint_are_made_up_for(make_config, monkeypatch):
    options = ["training.mode=layerwise", *quantized("nvfp4")]
    back_up = TrainingLoop._back_up

    class Stop(Exception):
        pass

    def stopping(self, stage):
        if stage.index == 1:
            raise Stop
        back_up(self, stage)

    monkeypatch.setattr(TrainingLoop, "_back_up", stopping)
    with pytest.raises(Stop):
        UnifiedTrainer(make_config(*options)).train()
    monkeypatch.undo()
    (stopped,) = _runs(make_config(*options))
    UnifiedTrainer.resume(stopped).train()
    manifest = json.loads((stopped / "full_precision/block_1/manifest.json").read_text())
    assert manifest["stage"] == 1


def _runs(config) -> list[pathlib.Path]:
    return [path for path in pathlib.Path(config.run.dir).iterdir() if path.is_dir()]
