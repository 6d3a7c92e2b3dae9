"""A quantised model as a folder: model.safetensors, and manifest.json with formats and SHA-256.

    save_quantized(model, "folder")
    model = load_quantized(LlamaForCausalLM(config), "folder")

Nothing is dequantised or pickled; a flipped bit, a truncated file, a wrong shape or an unknown
format is refused before the model changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from stackwise.kernels import QuantizedTensor
from stackwise.model.quantized import QuantizedLinear
from stackwise.runs.atomic import atomic_folder
from stackwise.runs.errors import RunError
from stackwise.runs.manifest import verify, write_manifest
from stackwise.runs.tensor_file import read_tensors, write_tensors

WEIGHTS = "model.safetensors"
_KIND = "quantized model"
Model = TypeVar("Model", bound=nn.Module)


def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Writes every tensor of ``model``, packed weights as they are; replaces ``folder`` whole."""
    quantized = _quantized_layers(model)
    if not quantized:
        raise ValueError("model: has no quantised layers; accepted: after quantize_model")
    facts = {
        "kind": _KIND,
        "weights": {name: part.weight.metadata() for name, part in quantized.items()},
    }
    with atomic_folder(folder) as temporary:
        digest = write_tensors(temporary / WEIGHTS, dict(model.state_dict()))
        write_manifest(temporary, facts, {WEIGHTS: digest})


def load_quantized(model: Model, folder: str | Path) -> Model:
    """Fills ``model``, of the same architecture in full precision, from :func:`save_quantized`.

    Its linear layers become :class:`QuantizedLinear` where the folder has them quantised. The
    model may be on the meta device: nothing is allocated twice.

    Raises:
        RunError: the folder is missing, damaged, or not a quantised model.
        ValueError: an unknown format, or tensors that do not fit the model.
    """
    folder = Path(folder)
    facts = verify(folder)
    if facts.get("kind") != _KIND:
        raise RunError(f"{folder} holds a {facts.get('kind')!r}, not a {_KIND!r}")
    tensors = read_tensors(folder / WEIGHTS)
    layers = {
        name: _layer(model, name, metadata, tensors) for name, metadata in facts["weights"].items()
    }
    inside = {f"{name}.{key}" for name, part in layers.items() for key in part.state_dict()}
    replaced = {
        f"{name}.{key}" for name in layers for key in model.get_submodule(name).state_dict()
    }
    _check_rest(model, tensors, inside, replaced)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, layer.train(getattr(owner, leaf).training))
    ties = _ties(model)
    model.load_state_dict(tensors, assign=True)
    for first, *others in ties:
        shared = model.get_parameter(first)
        for name in others:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, shared)
    return model


def _ties(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one, by group."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _layer(
    model: nn.Module, name: str, metadata: dict[str, Any], tensors: dict[str, Tensor]
) -> QuantizedLinear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"model: has no module {name}, which the folder holds") from None
    prefix = f"{name}.weight_"
    stored = {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
    weight = QuantizedTensor.from_stored(stored, metadata)
    shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
    if shape != tuple(weight.shape):
        raise ValueError(
            f"model.{name}: is {type(linear).__name__} {shape}, the folder holds "
            f"{tuple(weight.shape)}"
        )
    return QuantizedLinear(weight, tensors.get(f"{name}.bias"))


def _check_rest(
    model: nn.Module, tensors: dict[str, Tensor], inside: set[str], replaced: set[str]
) -> None:
    own = {name: t for name, t in model.state_dict().items() if name not in replaced}
    stored = {name: t for name, t in tensors.items() if name not in inside}
    for what, names in (("lacks", set(own) - set(stored)), ("has", set(stored) - set(own))):
        if names:
            raise ValueError(f"folder: {what} {', '.join(sorted(names)[:4])}, unlike the model")
    for name, tensor in stored.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}; accepted: {tuple(own[name].shape)}"
            )


def _quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: part for n, part in model.named_modules() if isinstance(part, QuantizedLinear)}


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values() if not t.is_meta)
