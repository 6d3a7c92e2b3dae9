"""Precision of the frozen blocks: quantised once, restored from disk when they train again.

    training.quantization_enabled, quantization_type    the linear layers of every frozen block
    training.qlora_enabled                              adapters on the frozen backbone of fusion

A block's full-precision weights are on disk only (``full_precision/block_*`` of the run) from the
moment it freezes. When it becomes trainable it is read back bit for bit, with its adapter added;
when it freezes again it is quantised again and the error of that is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stackwise.config import StackWiseConfig, TrainingConfig
from stackwise.model.adapters import adapters, add_lora, remove_lora
from stackwise.model.decoder import Decoder
from stackwise.model.quantized import (
    HalfLinear,
    QuantizedLinear,
    dequantize_model,
    halve_model,
    quantize_model,
)
from stackwise.runs import RunStore
from stackwise.training.stages import Stage

# Formats by the names of training.quantization_type; fp32 leaves the weights as they are.
FORMATS = {
    "fp8": "fp8_row",
    "fp4": "nvfp4",
    "nf4": "nf4",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
}
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class FrozenPrecision:
    """Keeps the blocks of ``model`` in the precision that each stage wants."""

    def __init__(self, config: StackWiseConfig, model: Decoder, store: RunStore) -> None:
        self.training, self.model, self.store = config.training, model, store
        self.active = config.training.quantization_enabled or config.training.qlora_enabled

    def enter(self, stage: Stage) -> dict[str, float]:
        """Brings every block into the state that ``stage`` wants.

        Returns the largest relative error of each block that was quantised now, by "block_<i>".
        """
        errors: dict[str, float] = {}
        if not self.active:
            return errors
        for index in range(stage.depth):
            if index in stage.trainable:
                self._thaw(index)
            elif not _is_frozen_form(self.model.blocks[index]):
                errors |= self._freeze(index)
            if index in stage.adapted and not adapters(self.model.blocks[index]):
                add_adapters(self.model.blocks[index], self.training)
        return errors

    def finish(self) -> None:
        """Puts full precision back everywhere, adapters merged in: the model to keep."""
        if self.active:
            for index in range(len(self.model.blocks)):
                self._thaw(index)

    def description(self) -> dict[str, Any] | None:
        """What :func:`impose` needs to give another model the same layers; None when plain."""
        return describe(self.model, self.training) if self.active else None

    def _freeze(self, index: int) -> dict[str, float]:
        block = self.model.blocks[index]
        if not self.training.quantization_enabled:
            return {}
        if not self._has_backup(index):
            self.store.save_block(index, block.state_dict(), {"stage": None})
        error = convert(block, self.training.quantization_type)
        return {f"block_{index}": error}

    def _thaw(self, index: int) -> None:
        block = self.model.blocks[index]
        if not _is_frozen_form(block) and not adapters(block):
            return
        deltas = {name: part.delta() for name, part in adapters(block).items()}
        remove_lora(block, merge=False)
        frozen_form = _is_frozen_form(block)
        dequantize_model(block)
        if frozen_form:
            block.load_state_dict(self.store.load_block(index))
        with torch.no_grad():
            for name, delta in deltas.items():
                weight: Any = block.get_submodule(name).weight
                weight += delta.to(weight)

    def _has_backup(self, index: int) -> bool:
        return index in self.store.backups.indices()


def convert(block: nn.Module, kind: str) -> float:
    """Puts the linear layers of ``block`` into ``kind``, a quantization_type; the largest error."""
    if kind in HALVES:
        return halve_model(block, HALVES[kind])
    report = quantize_model(block, FORMATS[kind], skip=(), progress=False)
    return max(report.errors.values())


def add_adapters(block: nn.Module, training: TrainingConfig) -> None:
    """QLoRA adapters on every linear layer of ``block``."""
    add_lora(
        block,
        rank=training.qlora_rank,
        alpha=training.qlora_alpha,
        dropout=training.qlora_dropout,
        skip=(),
    )


def describe(model: Decoder, training: TrainingConfig) -> dict[str, Any]:
    """Which blocks are frozen in which form, and which carry adapters, as JSON types."""
    return {
        "kind": training.quantization_type,
        "frozen": [i for i, block in enumerate(model.blocks) if _is_frozen_form(block)],
        "adapted": [i for i, block in enumerate(model.blocks) if adapters(block)],
        "rank": training.qlora_rank,
        "alpha": training.qlora_alpha,
        "dropout": training.qlora_dropout,
    }


def impose(model: Decoder, description: dict[str, Any] | None) -> None:
    """Gives ``model`` the layers of ``description``, ready for the state dict saved with it."""
    if description is None:
        return
    for index in description["frozen"]:
        if not _is_frozen_form(model.blocks[index]):
            convert(model.blocks[index], description["kind"])
    for index in description["adapted"]:
        add_lora(
            model.blocks[index],
            rank=description["rank"],
            alpha=description["alpha"],
            dropout=description["dropout"],
            skip=(),
        )


def _is_frozen_form(block: nn.Module) -> bool:
    return any(isinstance(part, QuantizedLinear | HalfLinear) for part in block.modules())
