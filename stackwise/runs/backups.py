"""Full-precision copies of trained blocks: save, validate, restore, reconstruct.

Block ``i`` lies in its own folder ``block_{i}/`` with ``block.safetensors`` and a manifest
``{run_id, block, timestamp, precision, shapes, files: {name: {size, sha256}}}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.runs import manifest, tensor_file
from stackwise.runs.atomic import atomic_folder
from stackwise.runs.errors import RunError

_FILE = "block.safetensors"
_BLOCK = re.compile(r"block_(\d+)")


class BlockBackups:
    """The backups of one run, in ``folder`` (``<run>/full_precision``)."""

    def __init__(self, folder: str | Path, run_id: str) -> None:
        self.path = Path(folder)
        self.run_id = run_id

    def indices(self) -> list[int]:
        """Blocks that have a backup, ascending."""
        if not self.path.is_dir():
            return []
        matches = (_BLOCK.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def folder(self, index: int) -> Path:
        """Where the backup of block ``index`` lies."""
        return self.path / f"block_{index}"

    def save(
        self, index: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> Path:
        """Writes block ``index`` atomically, replacing its earlier backup, and reads it back.

        ``metadata`` adds JSON values to the manifest. Raises :class:`RunError` when what is read
        back is not bit for bit what was given.
        """
        if index < 0:
            raise ValueError(f"index is {index}; block indices start at 0")
        if not tensors:
            raise ValueError(f"block {index} has no tensors to save")
        facts = {
            **(metadata or {}),
            "run_id": self.run_id,
            "block": index,
            "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "precision": _precision(tensors.values()),
            "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        }
        with atomic_folder(self.folder(index), tensor_file.stored_bytes(tensors)) as folder:
            digest = tensor_file.write_tensors(folder / _FILE, tensors)
            manifest.write_manifest(folder, facts, {_FILE: digest})
        self._validate(index, tensors)
        return self.folder(index)

    def restore(self, index: int) -> dict[str, Tensor]:
        """The tensors of block ``index``, on the CPU, verified against the manifest."""
        folder = self.folder(index)
        if not folder.is_dir():
            saved = ", ".join(map(str, self.indices())) or "none"
            raise RunError(f"{folder} is missing; blocks with a backup: {saved}")
        recorded = manifest.verify(folder)
        if recorded.get("block") != index:
            raise RunError(f"{folder} holds block {recorded.get('block')}, not {index}")
        tensors = tensor_file.read_tensors(folder / _FILE)
        if {name: list(tensor.shape) for name, tensor in tensors.items()} != recorded["shapes"]:
            raise RunError(f"{folder / _FILE} does not have the shapes of its manifest")
        return tensors

    def reconstruct(self, model: nn.Module, indices: Iterable[int] | None = None) -> list[int]:
        """Loads backups (all by default) into ``model.blocks`` and returns their indices.

        Everything is checked before the first block changes: a missing or damaged backup, a block
        the model does not have, other parameter names or shapes raise :class:`RunError`.
        """
        chosen = self.indices() if indices is None else sorted(indices)
        if not chosen:
            raise RunError(f"no block backups in {self.path}")
        blocks: Any = model.blocks
        loaded = {}
        for index in chosen:
            if index >= len(blocks):
                raise RunError(f"{self.folder(index)}: the model has only {len(blocks)} blocks")
            loaded[index] = self.restore(index)
            _check_fits(self.folder(index), loaded[index], blocks[index].state_dict())
        for index, tensors in loaded.items():
            blocks[index].load_state_dict(tensors)
        return chosen

    def _validate(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        stored = self.restore(index)
        for name, tensor in tensors.items():
            same = stored[name].dtype == tensor.dtype and tensor_file.tensor_bytes(
                stored[name]
            ) == tensor_file.tensor_bytes(tensor)
            if not same:
                raise RunError(
                    f"{self.folder(index) / _FILE}: {name} reads back different from what was "
                    "written; check the disk"
                )


def _precision(tensors: Iterable[Tensor]) -> str:
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    return "+".join(sorted(dtypes)) or "integer"


def _check_fits(folder: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    absent, surplus = sorted(wanted.keys() - stored), sorted(stored.keys() - wanted)
    if absent or surplus:
        raise RunError(f"{folder} does not fit the model: missing {absent}, unexpected {surplus}")
    for name, tensor in wanted.items():
        if tensor.shape != stored[name].shape or _lossy(stored[name].dtype, tensor.dtype):
            raise RunError(
                f"{folder}: {name} is {tuple(stored[name].shape)} {stored[name].dtype}, the "
                f"model's is {tuple(tensor.shape)} {tensor.dtype}"
            )


def _lossy(stored: torch.dtype, wanted: torch.dtype) -> bool:
    return torch.promote_types(stored, wanted) != wanted
