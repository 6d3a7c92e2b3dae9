"""Adapters in PEFT's folder format: adapter_config.json beside adapter_model.safetensors.

Names are ``base_model.model.<module>.lora_A.weight`` (r, K), ``....lora_B.weight`` (N, r) and, for
DoRA, ``....lora_magnitude_vector`` (N,).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stackwise.model.adapters import KINDS, LoRALinear, adapters
from stackwise.model.quantized import QuantizedLinear
from stackwise.runs.atomic import write_bytes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "magnitude",
}

# Settings of PEFT's LoRA that change what an adapter computes and have no counterpart here.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "layer_replication", "lora_bias", "megatron_config",
    "modules_to_save", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora",
)  # fmt: skip


def save_adapter(model: nn.Module, folder: str | Path, base_model: str | None = None) -> None:
    """Writes the adapters of ``model`` so that ``PeftModel.from_pretrained`` loads them.

    Args:
        model: with adapters (:func:`stackwise.model.adapters.add_lora`), not merged.
        folder: made if it is missing.
        base_model: name or folder of the model they belong to, for the config.

    Raises:
        ValueError: the model has no adapters, they are merged, or differ in more than rank and
            alpha.
    """
    found = adapters(model)
    if not found:
        raise ValueError("model: has no adapters to save")
    merged = [name for name, part in found.items() if part.merged]
    if merged:
        raise ValueError(f"model: the adapter of {merged[0]} is merged; accepted: after unmerge")
    kinds = {(part.rslora, part.magnitude is not None, part.dropout) for part in found.values()}
    if len(kinds) > 1:
        raise ValueError("model: adapters differ in rslora, dora or dropout; accepted: one kind")
    ((rslora, dora, dropout),) = kinds
    first = next(iter(found.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(found),
        "rank_pattern": {n: p.rank for n, p in found.items() if p.rank != first.rank},
        "alpha_pattern": {n: p.alpha for n, p in found.items() if p.alpha != first.alpha},
    }
    tensors = {
        f"{_PREFIX}{name}.{theirs}": getattr(part, ours).detach().cpu().contiguous()
        for name, part in found.items()
        for theirs, ours in _PARTS.items()
        if getattr(part, ours) is not None
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_bytes(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_adapter(
    model: nn.Module, folder: str | Path, names: Mapping[str, str] | None = None
) -> list[str]:
    """Puts a PEFT LoRA adapter on ``model``; the base freezes. Returns the adapted module names.

    Args:
        model: without adapters; its linear layers may be quantised.
        folder: with adapter_config.json and adapter_model.safetensors.
        names: module names of the adapter to those of ``model``, where they differ.

    Raises:
        ValueError: a file is missing or broken, the adapter is no LoRA or uses a setting that is
            not supported, or it does not fit the model. The model is unchanged then.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    if any(isinstance(part, LoRALinear) for part in model.modules()):
        raise ValueError("model: has adapters already; accepted: a model without")
    grouped = _grouped(_read_weights(folder / WEIGHTS))
    made: dict[str, LoRALinear] = {}
    for theirs, tensors in grouped.items():
        name = (names or {}).get(theirs, theirs)
        try:
            base = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"model: has no module {name}, which the adapter changes") from None
        made[name] = _build(name, base, tensors, config, theirs)
    model.requires_grad_(False)
    for name, part in made.items():
        parent, _, leaf = name.rpartition(".")
        part.train(part.base.training)
        part.base.requires_grad_(False)
        setattr(model.get_submodule(parent), leaf, part)
    return list(made)


def _build(
    name: str, base: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any], theirs: str
) -> LoRALinear:
    if type(base) not in KINDS:
        raise ValueError(
            f"model.{name}: got a {type(base).__name__}; accepted: nn.Linear or QuantizedLinear"
        )
    assert isinstance(base, nn.Linear | QuantizedLinear)
    missing = {"lora_a", "lora_b"} - set(tensors)
    if missing:
        raise ValueError(f"{name}: the adapter lacks {', '.join(sorted(missing))}")
    rank = tensors["lora_a"].shape[0]
    shapes: dict[str, tuple[int, ...]] = {
        "lora_a": (rank, base.in_features),
        "lora_b": (base.out_features, rank),
        "magnitude": (base.out_features,),
    }
    for part, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[part]:
            raise ValueError(f"{name}.{part}: got {tuple(tensor.shape)}; accepted: {shapes[part]}")
    declared = _pattern(config.get("rank_pattern"), theirs, config["r"])
    if declared != rank:
        raise ValueError(f"{name}: the config says rank {declared}, the weights have {rank}")
    alpha = _pattern(config.get("alpha_pattern"), theirs, config["lora_alpha"])
    dora = bool(config.get("use_dora"))
    if dora != ("magnitude" in tensors):
        raise ValueError(f"{name}: use_dora is {dora}, but the weights say otherwise")
    training = [p.requires_grad for p in base.parameters()]
    made = LoRALinear(
        *(base, rank, float(alpha), float(config.get("lora_dropout", 0.0))),
        rslora=bool(config.get("use_rslora")),
        dora=dora,
        dtype=tensors["lora_a"].dtype,
    )
    for parameter, flag in zip(base.parameters(), training, strict=True):
        parameter.requires_grad_(flag)
    with torch.no_grad():
        for part, tensor in tensors.items():
            getattr(made, part).copy_(tensor)
    return made


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"folder: {file} is missing; accepted: a folder that PEFT wrote")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{file}: got peft_type {kind!r}; accepted: 'LORA'")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{file}: {key} = {config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias = {config['bias']!r} is not supported; accepted: 'none'")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise ValueError(f"{file}: {key} is {config.get(key)!r}; accepted: a number")
    return config


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"folder: {file} is missing; accepted: a folder with {WEIGHTS}")
    try:
        return load_file(file)
    except Exception as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error


def _grouped(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By module, under our names of the parts."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for theirs, ours in _PARTS.items():
            if key.startswith(_PREFIX) and key.endswith(f".{theirs}"):
                module = key.removeprefix(_PREFIX).removesuffix(f".{theirs}")
                grouped.setdefault(module, {})[ours] = tensor
                break
        else:
            accepted = ", ".join(f"{_PREFIX}*.{theirs}" for theirs in _PARTS)
            raise ValueError(f"adapter tensor {key} is not supported; accepted: {accepted}")
    return grouped


def _pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the last parts of a name, or all of it."""
    for pattern, value in (patterns or {}).items():
        if name == pattern or name.endswith(f".{pattern}"):
            return value
    return default
