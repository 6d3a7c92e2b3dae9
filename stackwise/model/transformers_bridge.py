"""Transformers checkpoints into decoders and back.

    model = load_pretrained("name-or-folder")
    convert_to_bidirectional(model)
    save_pretrained(model, "folder")

Weights are read from safetensors files straight into the decoder, without Transformers; a folder
written here loads in Transformers with the same logits. One ``bridge_family_<name>.py`` per
checkpoint family translates its configuration and weight names.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stackwise.config.schema import ModelConfig
from stackwise.model.bridge_source import find_folder, is_run_folder, read_config_json
from stackwise.model.bridge_translate import (
    TOKEN_IDS,
    Description,
    choose_family,
    read_description,
    write_description,
)
from stackwise.model.bridge_vocabulary import resize_vocabulary
from stackwise.model.bridge_weights import (
    Placement,
    TensorFiles,
    listed,
    load_weights,
    match_names,
    save_weights,
    write_json,
)
from stackwise.model.decoder import Decoder

__all__ = [
    "convert_to_bidirectional",
    "load_pretrained",
    "read_pretrained_config",
    "resize_vocabulary",
    "save_pretrained",
    "special_token_ids",
]

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_TOKEN = "embeddings.token.weight"
_HEAD = "head.weight"
_ORIGIN = "checkpoint_origin"
_DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class _Origin:
    """What a loaded decoder remembers of its checkpoint beyond what it computes."""

    model_type: str
    token_ids: dict[str, Any] = field(default_factory=dict)


def load_pretrained(
    name_or_folder: str | os.PathLike[str],
    attention_mode: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """A checkpoint as a decoder, in evaluation mode.

    Args:
        name_or_folder: a Transformers checkpoint folder, a Hub name, or a StackWise run folder.
        attention_mode: causal or bidirectional. None: what :func:`save_pretrained` stored, causal
            for any other checkpoint.
        dtype: of the parameters, e.g. ``torch.bfloat16`` or "bfloat16". None: as stored. A
            router's balancing bias stays float32.
        device: where to put the model. None: the CPU.

    A checkpoint of a causal language model keeps its next-token shift (``model.shift``): position
    i predicts token i + 1. ValueError, before any weight is read, when the family or one of its
    settings is not supported, when a tensor is missing, unexpected or of another shape, when the
    weights are pickled only, and when a Hub name cannot be reached.
    """
    name = os.fspath(name_or_folder)
    _check_mode(attention_mode)
    wanted_dtype = _parse_dtype(dtype)
    folder = Path(name).expanduser()
    if name and is_run_folder(folder):
        from stackwise.runs import load_run_model

        model = load_run_model(folder)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device=device, dtype=wanted_dtype)
        model = model.to(device=device)
    else:
        # The configuration first: an unsupported model is refused before its weights download.
        values = read_config_json(find_folder(name, weights=False))
        description = read_description(values)
        with TensorFiles(find_folder(name, weights=True)) as files:
            model = _load(values, description, files, wanted_dtype, device)
    if attention_mode is not None:
        model.set_attention_mode(attention_mode)
    return model.eval()


def _load(
    values: dict[str, Any],
    description: Description,
    files: TensorFiles,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Decoder:
    family = description.family
    config = _settle_tie(description, files)
    placements = family.placements(config)
    ignored = (*family.ignored(values), *_tied_names(placements))
    matched = match_names(files.names(), placements, family.base_prefix, ignored)
    if dtype is None:
        stored = values.get("dtype") or values.get("torch_dtype")
        dtype = _DTYPES.get(str(stored)) or files.dtype(matched[0]) or torch.float32
    model = _build_empty(config, description.shift, dtype, device)
    tensors = _tensors(model)
    assert not _unplaced(tensors, placements), "the family leaves parameters without a value"
    load_weights(files, matched, placements, tensors)
    vars(model)[_ORIGIN] = _Origin(family.model_type, description.token_ids)
    return model


def read_pretrained_config(name_or_folder: str | os.PathLike[str]) -> ModelConfig:
    """The resolved ModelConfig of a Transformers checkpoint, without its weights.

    A Hub name downloads its JSON files only. ValueError as in :func:`load_pretrained`.
    """
    values = read_config_json(find_folder(os.fspath(name_or_folder), weights=False))
    return read_description(values).config


def save_pretrained(
    model: Decoder,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = _DEFAULT_SHARD_BYTES,
) -> None:
    """Writes ``config.json`` and safetensors weights that Transformers loads, logits unchanged.

    The Transformers class follows from what the model computes: GPT-2, LLaMA, Mistral (sliding
    window), Qwen2 (biases on q, k, v only), DeepSeek-V3 or V2 (latent attention). ``tokenizer``,
    ours or one of Transformers, is saved with it and gives the special token ids. Weights above
    ``max_shard_bytes`` are sharded. Attention mode, shift and MASK id are kept under
    ``"stackwise"``, where :func:`load_pretrained` finds them.

    Transformers' classes are causal: a warning says so when the model is bidirectional.
    ValueError when no class computes the same function (kernel attention, low-rank MLA, post-norm,
    an embedding adapter, ...), naming what differs and the format that does hold the model.
    """
    _check_decoder(model)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; accepted: a positive integer")
    origin = vars(model).get(_ORIGIN)
    family = choose_family(model.config, origin.model_type if origin else None)
    placements = family.placements(model.config)
    tensors = _tensors(model)
    if surplus := _unplaced(tensors, placements):
        raise ValueError(
            f"{family.architecture} has no place for {listed(surplus)}. Save the model in "
            "StackWise's own format instead: RunStore.save_model"
        )
    description = Description(
        family, model.config, model.attention_mode, model.shift, _token_ids(model, tokenizer)
    )
    dtype = str(model.embeddings.token.weight.dtype).removeprefix("torch.")
    fields = write_description(description, dtype)
    if model.attention_mode == "bidirectional":
        warnings.warn(
            f"the model is bidirectional, {family.architecture} is causal: in Transformers the "
            "saved folder computes something else; stackwise.load_pretrained restores the mode",
            stacklevel=2,
        )
    target = Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    save_weights(target, placements, tensors, max_shard_bytes)
    if tokenizer is not None:
        save = getattr(tokenizer, "save_pretrained", None) or tokenizer.save
        save(str(target))
    write_json(target / "config.json", fields)


def convert_to_bidirectional(model: Decoder, shift: bool | None = None) -> Decoder:
    """Switches every block to bidirectional attention, in place; returns the model.

    ``shift`` says what position i predicts from now on: True token i + 1, as the checkpoint
    learned to; False token i itself, which has to be learned anew. None keeps the model's own
    setting, True for a checkpoint of a causal language model. The objective follows
    ``model.shift`` unless ``objective.shift`` is set. ``model.set_attention_mode("causal")``
    switches back.
    """
    _check_decoder(model)
    model.set_attention_mode("bidirectional")
    if shift is not None:
        model.shift = bool(shift)
    return model


def special_token_ids(model: Decoder) -> dict[str, Any]:
    """The bos, eos, pad and mask token ids of the checkpoint ``model`` came from, those it has."""
    origin = vars(model).get(_ORIGIN)
    return dict(origin.token_ids) if origin else {}


def _check_decoder(model: Any) -> None:
    if not isinstance(model, Decoder):
        raise ValueError(
            f"model is a {type(model).__name__}; accepted: a stackwise Decoder (load_pretrained "
            "makes one from a checkpoint; unwrap one that is wrapped for training)"
        )


def _check_mode(mode: str | None) -> None:
    if mode not in (None, "causal", "bidirectional"):
        raise ValueError(f"attention_mode is {mode!r}; accepted: causal, bidirectional or None")


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype is None or dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    raise ValueError(f"dtype is {dtype!r}; accepted: None, {', '.join(_DTYPES)}")


def _settle_tie(description: Description, files: TensorFiles) -> ModelConfig:
    """Unties the head where the file holds another matrix for it, as Transformers does."""
    config = description.config
    if not config.tie_embeddings:
        return config
    family = description.family
    placement = next(p for p in family.placements(config) if _TOKEN in p.parts)
    present = set(files.names())
    spellings = (placement.stored, placement.stored.removeprefix(family.base_prefix))
    token = next((name for name in spellings if name in present), None)
    head = next((name for name in placement.aliases if name in present), None)
    if token is None or head is None or torch.equal(files.read(token), files.read(head)):
        return config
    warnings.warn(
        f"the configuration ties the head to the embeddings, but {head} differs from {token}: "
        "the head is loaded untied",
        stacklevel=4,
    )
    return dataclasses.replace(config, tie_embeddings=False)


def _tied_names(placements: list[Placement]) -> list[str]:
    """Patterns of second copies of a tied matrix, found equal by :func:`_settle_tie`."""
    return [f"^{alias}$" for placement in placements for alias in placement.aliases]


class _NoInitialization(TorchFunctionMode):
    """Leaves new parameters as allocated: the weights are the first to touch their memory, and no
    random numbers are drawn."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        module = getattr(func, "__module__", None)
        if module == "torch.nn.init" or func in (Tensor.uniform_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _build_empty(
    config: ModelConfig, shift: bool, dtype: torch.dtype, device: torch.device | str | None
) -> Decoder:
    with _NoInitialization():
        model = Decoder(config, shift=shift, initialize=False)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter, dtype=dtype, device=device or "cpu")
    return model.to(device=device)


def _tensors(model: Decoder) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, a tied matrix once."""
    tensors = model.state_dict()
    if model.config.tie_embeddings and model.head.weight is model.embeddings.token.weight:
        del tensors[_HEAD]
    return tensors


def _unplaced(tensors: Mapping[str, Tensor], placements: list[Placement]) -> list[str]:
    """Tensors of the decoder that no stored tensor holds."""
    return sorted(set(tensors).difference(*(placement.parts for placement in placements)))


def _token_ids(model: Decoder, tokenizer: Any) -> dict[str, Any]:
    """Special ids of ``tokenizer`` (ours or one of Transformers), else of the checkpoint."""
    token_ids = special_token_ids(model)
    for name in (*TOKEN_IDS, "mask_token_id"):
        for attribute in (name, name.replace("_token", "")):
            value = getattr(tokenizer, attribute, None)
            if value is not None:
                token_ids[name] = value
    return token_ids
