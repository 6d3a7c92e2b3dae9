"""Cached activations change time and disk space, never a number."""

from __future__ import annotations

import pathlib

import pytest
import torch

from stackwise.training import activation_cache
from stackwise.training.activation_cache import StaleCacheError
from stackwise.training.loop import TrainingLoop
from stackwise.training.stage_input import StageInput
from stackwise.training.trainers import UnifiedTrainer

CACHED = ["training.mode=layerwise", "training.activation_cache=true", "training.cache_masks=2"]


def losses_and_weights(config):
    losses = []
    result = UnifiedTrainer(config, on_step=lambda r: losses.append(r["loss"])).train()
    return losses, result


def gradients(config, monkeypatch) -> list[torch.Tensor]:
    """Every gradient of every step, as the optimiser saw it before clipping."""
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters, limit):
        seen.extend(p.grad.clone() for p in parameters)
        return clip(parameters, limit)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
        UnifiedTrainer(config).train()
    return seen


def test_cached_and_recomputed_prefixes_are_bit_identical(make_config, monkeypatch):
    cached = gradients(make_config(*CACHED), monkeypatch)
    recomputed = gradients(make_config(*CACHED, "training.cache_budget_gb=1e-9"), monkeypatch)
    assert len(cached) == len(recomputed) > 100
    assert all(torch.equal(a, b) for a, b in zip(cached, recomputed, strict=True))


def test_losses_and_final_weights_are_bit_identical(make_config, capsys):
    losses, result = losses_and_weights(make_config(*CACHED))
    assert "recomputed" not in capsys.readouterr().err
    other_losses, other = losses_and_weights(make_config(*CACHED, "training.cache_budget_gb=1e-9"))
    assert losses == other_losses
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_falling_back_is_said(make_config, capsys):
    UnifiedTrainer(make_config(*CACHED, "training.cache_budget_gb=1e-9")).train()
    captured = capsys.readouterr()
    assert "recomputed" in captured.err + captured.out


def test_cached_stages_cycle_through_their_masks_and_others_do_not(make_config, monkeypatch):
    draws = {}
    step = TrainingLoop._step

    def watched(self, stage, source, optimizer, micro, bar):
        for part in micro:
            for row, ids in zip(part.batch.row_ids.tolist(), part.corrupted.input_ids, strict=True):
                draws.setdefault((stage.index, row), set()).add(tuple(ids.tolist()))
        return step(self, stage, source, optimizer, micro, bar)

    monkeypatch.setattr(TrainingLoop, "_step", watched)
    config = make_config(*CACHED, "training.max_steps=null", "training.epochs_per_layer=4")
    UnifiedTrainer(config).train()
    by_stage = [[len(v) for (s, _), v in draws.items() if s == stage] for stage in range(3)]
    assert max(by_stage[0]) == 4
    assert max(by_stage[1]) == max(by_stage[2]) == 2


def test_the_cache_is_removed_when_the_run_is_finished(make_config):
    result = UnifiedTrainer(make_config(*CACHED)).train()
    assert not (result.run_path / "activation_cache").exists()
    assert sum(stage["cache_seconds"] > 0 for stage in result.stages) == 3


class Killed(Exception):
    pass


@pytest.mark.parametrize("call", [1, 4])
def test_a_kill_in_the_middle_of_rolling_is_resumed_to_the_same_numbers(
    make_config, monkeypatch, call
):
    """Shards of one batch each: the kill leaves some rolled forward and some not."""
    monkeypatch.setattr(activation_cache, "_default_rows_per_shard", lambda spec, batch_rows: 8)
    losses, whole = losses_and_weights(make_config(*CACHED))
    calls = []
    advance = StageInput._advance

    def dying(self, *args, **kwargs):
        calls.append(self.stage.index)
        if len(calls) == call:
            raise Killed
        return advance(self, *args, **kwargs)

    config = make_config(*CACHED, "run.id=killed")
    monkeypatch.setattr(StageInput, "_advance", dying)
    with pytest.raises(Killed):
        UnifiedTrainer(config).train()
    run = pathlib.Path(config.run.dir) / "killed"
    shards = {path.read_bytes()[:400] for path in (run / "activation_cache").glob("shard_*")}
    assert len(shards) > call
    after = []
    resumed = UnifiedTrainer.resume(run, on_step=lambda r: after.append(r["loss"])).train()
    assert after == losses[-len(after) :]
    assert len(after) == 4
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_a_cache_of_other_weights_is_not_read(make_config, monkeypatch):
    """A prefix that changed behind the cache's back is recomputed, not served stale."""
    config = make_config(*CACHED, "run.id=changed")
    seen = []
    read = activation_cache.ActivationCache.prefetch

    def watched(self, requests, stage, prefix_hash, **options):
        seen.append((self.prefix_hash, prefix_hash))
        with pytest.raises(StaleCacheError):
            self.read([0], 0, stage, "0" * 64)
        return read(self, requests, stage, prefix_hash, **options)

    monkeypatch.setattr(activation_cache.ActivationCache, "prefetch", watched)
    UnifiedTrainer(config).train()
    assert len(seen) == 2
    assert all(held == wanted for held, wanted in seen)
    assert seen[0] != seen[1]
