"""What trains in a stage, and how: parameter selection, AdamW groups, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stackwise.config import TrainingConfig
from stackwise.model.decoder import Decoder
from stackwise.training.stages import Stage

ROLES = ("current", "backbone", "shared")


def trainable_roles(
    model: Decoder, stage: Stage, pinned: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Role of every parameter that trains in ``stage``: current, backbone or shared.

    Adapters of a frozen backbone are of its role. ``shared`` are embeddings, final norm and head.
    ``pinned`` names parameters that never train (frozen embeddings, a frozen up projection). A tied
    head is the embedding matrix and follows it: training it alone would change the input that a
    frozen or cached prefix was computed from.
    """
    roles: dict[str, str] = {}
    for name, _ in model.named_parameters():
        if name in pinned:
            continue
        part = name.split(".", 1)[0]
        if part == "blocks":
            index = int(name.split(".")[1])
            if index in stage.trainable:
                current = stage.start <= index < stage.stop
                roles[name] = "current" if current else "backbone"
            elif index in stage.adapted and name.rpartition(".")[2] in ("lora_a", "lora_b"):
                roles[name] = "backbone"
        elif part == "embeddings":
            if stage.train_embeddings:
                roles[name] = "shared"
        elif stage.train_head:
            roles[name] = "shared"
    return roles


def set_trainable(model: Decoder, roles: dict[str, str]) -> None:
    """Switches gradients on for exactly the named parameters and frees all others' gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in roles)
        if name not in roles:
            parameter.grad = None


def build_optimizer(
    model: Decoder, stage: Stage, roles: dict[str, str], config: TrainingConfig
) -> torch.optim.AdamW:
    """AdamW with one group per role and decay; every group carries its ``peak_lr`` and ``names``.

    Matrices decay; vectors and embedding tables do not.
    """
    peak = {"current": stage.lr, "backbone": stage.backbone_lr, "shared": stage.head_lr}
    members: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if name in roles:
            decays = parameter.ndim >= 2 and name not in (
                "embeddings.token.weight",
                "embeddings.position.weight",
            )
            members.setdefault((roles[name], decays), []).append((name, parameter))
    groups = [
        {
            "params": [parameter for _, parameter in members[role, decays]],
            "names": [name for name, _ in members[role, decays]],
            "role": role,
            "peak_lr": peak[role],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for role in ROLES
        for decays in (True, False)
        if (role, decays) in members
    ]
    return torch.optim.AdamW(
        groups, lr=stage.lr, betas=config.betas, eps=config.adam_eps, fused=True
    )


def learning_rate_factor(step: int, steps: int, config: TrainingConfig) -> float:
    """Learning rate of 0-based ``step`` of ``steps`` over its peak: linear warm-up, then the shape.

    The warm-up takes at most half of a short stage.
    """
    warmup = min(config.warmup_steps, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    floor = config.min_lr_ratio
    progress = (step - warmup) / max(1, steps - warmup)
    if config.lr_schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "linear":
        return 1 - (1 - floor) * progress
    if config.lr_schedule == "wsd":
        decay = max(config.decay_fraction, 1e-9)
        return 1 - (1 - floor) * max(0.0, (progress - (1 - decay)) / decay)
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def _named_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser state as named tensors: ``<entry>/<parameter>``."""
    return {
        f"{entry}/{name}": value
        for name, parameter in _named_states(optimizer)
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores what :func:`optimizer_tensors` returned; every tensor must find its parameter."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        entry, name = key.split("/", 1)
        by_name.setdefault(name, {})[entry] = value
    known = dict(_named_states(optimizer))
    strangers = sorted(set(by_name) - set(known))
    if strangers:
        raise ValueError(f"optimiser state names parameters that do not train here: {strangers}")
    for name, state in by_name.items():
        parameter = known[name]
        optimizer.state[parameter] = {
            entry: value.to(parameter.device, copy=True) for entry, value in state.items()
        }
