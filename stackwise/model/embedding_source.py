"""Reads the embedding matrix of a known model: one tensor of one safetensors file."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise.model.bridge_source import find_folder

# Published family names and where their weights are on the Hub.
FAMILIES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
}
_EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "embed_tokens.weight",
)
_HEAD_NAMES = ("lm_head.weight",)
OPTIONS = ("embed_tokens", "lm_head")


class EmbeddingSource:
    """The ``embed_tokens`` or ``lm_head`` matrix of a model, opened without reading its weights.

    ``family`` is a known family name, a Hub name or a local folder with safetensors weights; a
    local folder of that name comes first. A model without a matrix of its own for the head (tied
    weights) gives its embeddings for ``lm_head``. ValueError when the option is unknown, when the
    source cannot be found or reached, or when no such matrix is in it. Use as a context manager.
    """

    def __init__(self, family: str, option: str = "embed_tokens") -> None:
        if option not in OPTIONS:
            raise ValueError(f"embedding_option: got {option!r}; accepted: {', '.join(OPTIONS)}")
        self.family = family
        names = _EMBEDDING_NAMES if option == "embed_tokens" else _HEAD_NAMES + _EMBEDDING_NAMES
        self._stack = ExitStack()
        self._handle, self._name = self._open(names)
        shape = self._handle.get_slice(self._name).get_shape()
        self.rows, self.width = int(shape[0]), int(shape[1])

    def __enter__(self) -> EmbeddingSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self) -> Tensor:
        """The matrix (rows, width), float32, on the CPU."""
        return self._handle.get_tensor(self._name).to(torch.float32)

    def _open(self, names: tuple[str, ...]) -> tuple[Any, str]:
        from safetensors import SafetensorError, safe_open

        target = self.family
        if not Path(target).expanduser().is_dir():
            target = FAMILIES.get(target, target)
        folder = find_folder(target, weights=False)
        path = _weight_file(folder, target, names)
        try:
            handle = self._stack.enter_context(safe_open(str(path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        stored = set(handle.keys())
        for name in names:
            if name in stored:
                return handle, name
        self._stack.close()
        raise ValueError(f"{path} holds no embedding matrix: looked for {', '.join(names)}")


def _weight_file(folder: Path, target: str, names: tuple[str, ...]) -> Path:
    """The file of ``folder`` that holds one of ``names``; fetched alone when it is on the Hub."""
    index = folder / "model.safetensors.index.json"
    file = "model.safetensors"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        file = next((weight_map[name] for name in names if name in weight_map), "")
        if not file or Path(file).name != file:
            raise ValueError(f"{index} lists no embedding matrix: looked for {', '.join(names)}")
    if (folder / file).is_file():
        return folder / file
    if Path(target).expanduser().is_dir():
        raise ValueError(
            f"{folder} holds no {file}; only safetensors weights are read, pickled ones never"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(target, file))
    except Exception as error:  # the HTTP library's own errors differ between versions
        raise ValueError(
            f"could not fetch {file} of {target!r} from the Hub ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}). "
            "Without a network, pass a local folder that holds it"
        ) from error
