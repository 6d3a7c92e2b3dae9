"""A patched model in a training loop, by hand and in Transformers' Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.patching import patch

from .conftest import tokens


def rows() -> list[dict[str, Tensor]]:
    ids = tokens(8)
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_steps_equal_unpatched(kind: str, tiny: Callable[..., Any]) -> None:
    """Gradient accumulation as Trainer counts it: each half ÷ the labels of both."""
    model = tiny(kind).train()
    twin = copy.deepcopy(model)
    patch(twin)
    history = []
    for trained in (model, twin):
        losses = []
        for _ in range(8):
            trained.zero_grad()
            parts = []
            for half in tokens(4).split(2):
                part = trained(half, labels=half, num_items_in_batch=4 * 19, use_cache=False).loss
                part.backward()
                parts.append(part.detach())
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter.sub_(0.05 * parameter.grad)
            losses.append(torch.stack(parts).sum())
        history.append(torch.stack(losses))
    assert (history[0] - history[1]).abs().max() <= 2e-5
    assert history[0][-1] < history[0][0] - 0.3
    for name, value in model.state_dict().items():
        assert (value - twin.state_dict()[name]).abs().max() <= 2e-5, name


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(bf16: bool, tiny: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    logs = []
    for patched in (False, True):
        model = tiny("llama")
        handle = patch(model) if patched else None
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(patched)),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=bf16,
            save_strategy="no",
            seed=0,
        )
        trainer = Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:2])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        logs.append([*losses, trainer.evaluate()["eval_loss"]])
        if handle is not None:
            handle.revert()
            assert model.train()(input_ids=tokens(), labels=tokens()).logits is not None
    assert len(logs[0]) == 4
    assert logs[1] == pytest.approx(logs[0], abs=2e-2 if bf16 else 2e-4)
