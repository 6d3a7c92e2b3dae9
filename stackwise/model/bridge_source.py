"""Finds a checkpoint: a local folder, or a Hub name that is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_CONFIG_PATTERNS = ["*.json"]
_WEIGHT_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Sub-folders hold exports (onnx, original weights); consolidated* repeats the same weights.
_NOT_NEEDED = ["*/*", "consolidated*"]


def is_run_folder(folder: Path) -> bool:
    """Whether ``folder`` is a StackWise run (config.yaml with checkpoints or a final model), or
    the ``model`` folder of one."""
    if (folder / "model_config.json").is_file():
        return True
    return (folder / "config.yaml").is_file() and any(
        (folder / name).is_dir() for name in ("checkpoints", "model")
    )


def find_folder(name: str, weights: bool) -> Path:
    """The local folder of ``name``; a Hub name is downloaded: its JSON files, or with ``weights``
    its safetensors and tokenizer files too.

    ValueError when ``name`` is a path that does not exist or is no folder, or when the Hub cannot
    be reached or has no such model; the message names what was tried.
    """
    if not name:
        raise ValueError("the name is empty; expected a checkpoint folder or a Hub name")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{name} is a file; expected a checkpoint folder or a Hub name")
    if _looks_like_path(name):
        raise ValueError(f"the folder {name} does not exist")
    return _download(name, _WEIGHT_PATTERNS if weights else _CONFIG_PATTERNS)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=_NOT_NEEDED)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor a valid Hub name: {error}") from error
    except GatedRepoError as error:
        raise ValueError(
            f"the Hub model {name!r} is gated: accept its licence on its page, then log in with "
            "`hf auth login`, or pass a local folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name!r} here and no model {name!r} on the Hub (or it is private)"
        ) from error
    except Exception as error:  # the HTTP library's own errors differ between versions
        raise ValueError(_unreachable_message(name, error)) from error
    return Path(folder)


def _unreachable_message(name: str, error: Exception) -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    reason = str(error).strip().splitlines()
    return (
        f"could not load {name!r}: there is no folder of that name, and it could not be fetched "
        f"from {endpoint}/{name}{offline} nor found in the local Hub cache "
        f"({type(error).__name__}: {reason[0] if reason else 'no details'}). "
        "Without a network, download the model elsewhere (`hf download "
        f"{name} --local-dir FOLDER`), copy FOLDER here and pass its path"
    )


def read_config_json(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint folder. ValueError when absent or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json; expected a Transformers checkpoint folder or a "
            "StackWise run folder (config.yaml with checkpoints/ or model/)"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values
