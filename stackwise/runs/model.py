"""The model and tokenizer of a run folder: ``model/`` when training finished, else a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stackwise.runs import manifest, tensor_file
from stackwise.runs.atomic import atomic_folder
from stackwise.runs.checkpoints import Checkpoint, CheckpointFolder
from stackwise.runs.errors import RunError

if TYPE_CHECKING:
    from stackwise.config import ModelConfig
    from stackwise.model.decoder import Decoder

_WEIGHTS = "model.safetensors"
_DESCRIPTION = "model_config.json"


def model_description(model: Decoder) -> dict[str, Any]:
    """What is needed to build ``model`` again, in JSON types: its resolved config and its modes."""
    return {
        "config": dataclasses.asdict(model.config),
        "shift": bool(model.shift),
        "attention_mode": model.attention_mode,
    }


def save_model(
    folder: str | Path,
    model_state: Mapping[str, Tensor],
    model_config: ModelConfig,
    extra: Mapping[str, Any],
) -> Path:
    """Writes ``model.safetensors``, ``model_config.json`` and a manifest to ``folder``, atomically.

    ``model_config`` is the resolved one. ``extra`` needs ``shift`` (position i predicts token
    i + 1); ``attention_mode`` defaults to the config's; other JSON values are kept with them.
    """
    if "shift" not in extra:
        raise ValueError("extra has no 'shift'; it says whether position i predicts token i + 1")
    description = {
        "attention_mode": model_config.attention_mode,
        **extra,
        "config": dataclasses.asdict(model_config),
    }
    text = json.dumps(description, indent=1) + "\n"
    with atomic_folder(folder, tensor_file.stored_bytes(model_state)) as temporary:
        digest = tensor_file.write_tensors(temporary / _WEIGHTS, model_state)
        (temporary / _DESCRIPTION).write_text(text, encoding="utf-8")
        manifest.write_manifest(temporary, {}, {_WEIGHTS: digest})
    return Path(folder)


def save_tokenizer(folder: str | Path, tokenizer: Any) -> Path:
    """Writes whatever ``tokenizer.save(folder)`` writes, with a manifest, atomically."""
    with atomic_folder(folder) as temporary:
        tokenizer.save(str(temporary))
        manifest.write_manifest(temporary, {})
    return Path(folder)


def load_run_model(path: str | Path, stage: int | None = None) -> Decoder:
    """The decoder of the run folder ``path``, on the CPU, in the dtypes it was saved in.

    The finished model; while there is none, the newest intact checkpoint, with a warning. With
    ``stage``, the model at the end of that stage (from 0), if its checkpoint is still kept.
    ``path`` may also be a run id under ``runs/``, or a ``model`` folder itself. Raises
    :class:`RunError` when there is nothing to load or it is damaged.
    """
    path = _run_folder(path)
    folder = path if (path / _DESCRIPTION).is_file() else path / "model"
    if stage is None and folder.is_dir():
        manifest.verify(folder)
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        return _build(folder, description, tensor_file.read_tensors(folder / _WEIGHTS))
    checkpoint = _latest(path) if stage is None else _end_of_stage(path, stage)
    if "model" not in checkpoint.state:
        raise RunError(f"{checkpoint.path} does not describe its model; it cannot be rebuilt")
    return _build(checkpoint.path, checkpoint.state["model"], checkpoint.load("model"))


def load_run_tokenizer(path: str | Path) -> Any:
    """The tokenizer of the run folder ``path``, verified where it has a manifest."""
    from stackwise.data.tokenizer import load_tokenizer

    folder = _run_folder(path) / "tokenizer"
    if not folder.is_dir():
        raise RunError(f"{folder} is missing: not a run folder, or its training never started")
    if (folder / manifest.MANIFEST).is_file():
        manifest.verify(folder)
    return load_tokenizer(str(folder))


def _run_folder(path: str | Path) -> Path:
    from stackwise.runs.store import RunStore

    return Path(path) if Path(path).is_dir() else RunStore.open(path).path


def _latest(run: Path) -> Checkpoint:
    checkpoint = CheckpointFolder(run / "checkpoints", keep=1).latest()
    if checkpoint is None:
        raise RunError(f"{run} has neither a finished model nor a checkpoint")
    warnings.warn(
        f"training of {run} has not finished; using its checkpoint of step {checkpoint.step}",
        stacklevel=3,
    )
    return checkpoint


def _end_of_stage(run: Path, stage: int) -> Checkpoint:
    # A stage ends with a checkpoint of the next one before its first step.
    checkpoints = CheckpointFolder(run / "checkpoints", keep=1)
    ends = {}
    for step in checkpoints.steps():
        checkpoint = checkpoints.open(step)
        if checkpoint.state.get("stage_step") == 0 and "stage" in checkpoint.state:
            ends[checkpoint.state["stage"] - 1] = checkpoint
    if stage not in ends:
        kept = ", ".join(map(str, ends)) or "none"
        raise RunError(
            f"{run} keeps no checkpoint of the end of stage {stage}; it keeps those of: {kept} "
            "(training.keep_checkpoints)"
        )
    return ends[stage]


def _build(source: Path, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> Decoder:
    from stackwise.model.decoder import Decoder

    model = Decoder(_model_config(source, description["config"]), initialize=False)
    model.shift = bool(description["shift"])
    model.set_attention_mode(description["attention_mode"])
    if description.get("precision") is not None:
        from stackwise.training.precision import impose

        impose(model, description["precision"])
    wanted = model.state_dict(keep_vars=True)
    absent, surplus = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    shapes = sorted(n for n in wanted.keys() & tensors if wanted[n].shape != tensors[n].shape)
    if absent or surplus or shapes:
        raise RunError(
            f"{source} does not fit the model it describes: missing {absent}, unexpected "
            f"{surplus}, other shapes {shapes}"
        )
    for name, tensor in tensors.items():
        wanted[name].data = wanted[name].data.to(tensor.dtype)
    model.load_state_dict(tensors)
    return model


def _model_config(source: Path, fields: Mapping[str, Any]) -> ModelConfig:
    from stackwise.config import ModelConfig, MoEConfig, TokenizerEmbeddingConfig

    values = dict(fields)
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if values.keys() - known:
        raise RunError(
            f"{source} was written by another version: its model configuration has the unknown "
            f"fields {sorted(values.keys() - known)}"
        )
    try:
        if values.get("moe") is not None:
            values["moe"] = MoEConfig(**values["moe"])
        if values.get("tokenizer_embedding") is not None:
            values["tokenizer_embedding"] = TokenizerEmbeddingConfig(
                **values["tokenizer_embedding"]
            )
    except TypeError as error:
        raise RunError(f"{source} was written by another version: {error}") from error
    return ModelConfig(**values)
