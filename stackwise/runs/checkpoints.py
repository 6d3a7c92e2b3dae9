"""Checkpoints of a run: ``checkpoints/step_XXXXXXXX/`` folders that are whole or absent."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stackwise.runs import manifest, tensor_file
from stackwise.runs.atomic import atomic_folder, remove_folder
from stackwise.runs.errors import RunError

_STATE = "state.json"
_SUFFIX = ".safetensors"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files all had the recorded sizes and SHA-256 when it was opened."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensor groups, as given to ``save_checkpoint``."""
        return tuple(sorted(file.stem for file in self.path.glob(f"*{_SUFFIX}")))

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of group ``name``, on the CPU, after verifying the file's SHA-256."""
        if name not in self.names:
            raise RunError(f"{self.path} holds {', '.join(self.names)}; there is no {name!r} in it")
        manifest.verify(self.path, [name + _SUFFIX])
        return tensor_file.read_tensors(self.path / (name + _SUFFIX))


class CheckpointFolder:
    """The checkpoints of one run, of which the ``keep`` newest stay on disk."""

    def __init__(self, folder: str | Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint has to be kept")
        self.path = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, intact or not, ascending."""
        if not self.path.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of ``step`` lies."""
        return self.path / f"step_{step:08d}"

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Path:
        """Writes a checkpoint and returns its folder; removes those it makes superfluous.

        Superfluous are all but the ``keep`` newest, and any of a later step: they belong to a
        continuation that was abandoned by resuming from before it.
        """
        text = _encode_state(state)
        for name in tensors:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(f"tensor group {name!r}: letters, digits and _ are accepted")
        needed = sum(tensor_file.stored_bytes(group) for group in tensors.values()) + len(text)
        with atomic_folder(self.folder(step), needed) as folder:
            hashes = {
                name + _SUFFIX: tensor_file.write_tensors(folder / (name + _SUFFIX), group)
                for name, group in tensors.items()
            }
            (folder / _STATE).write_bytes(text)
            manifest.write_manifest(folder, {"step": step}, hashes)
        steps = self.steps()
        current = [other for other in steps if other <= step][-self.keep :]
        for superfluous in set(steps) - set(current):
            remove_folder(self.folder(superfluous))
        return self.folder(step)

    def open(self, step: int) -> Checkpoint:
        """Verifies every file of the checkpoint of ``step``; :class:`RunError` if one is wrong."""
        folder = self.folder(step)
        if manifest.verify(folder).get("step") != step:
            raise RunError(f"{folder / manifest.MANIFEST} belongs to another step")
        try:
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{folder / _STATE} is not readable: {error}") from error
        return Checkpoint(folder, step, state)

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint, None when there is none at all.

        A damaged one is warned of and passed over; :class:`RunError` when all are damaged.
        """
        faults = []
        for step in reversed(self.steps()):
            try:
                return self.open(step)
            except RunError as fault:
                faults.append(str(fault))
                warnings.warn(
                    f"checkpoint of step {step} is not used: {fault}; trying the one before",
                    stacklevel=2,
                )
        if not faults:
            return None
        raise RunError(
            f"no intact checkpoint in {self.path}: {'; '.join(faults)}. Restore the folder from a "
            "copy, or delete it to start the run again."
        )


def _encode_state(state: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(state), indent=1).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"state: {error}; JSON values are accepted, tensors belong in a tensor group"
        ) from error
