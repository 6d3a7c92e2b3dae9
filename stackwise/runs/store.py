"""RunStore: everything one training run keeps on disk.

``<run.dir>/<run id>/``: config.yaml (as resolved), metrics.jsonl, tokenizer/, checkpoints/step_*/,
full_precision/block_*/, and model/ once training has finished. All of it is safetensors, JSON and
YAML; nothing is ever unpickled. Every fault is a :class:`RunError`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stackwise.runs.atomic import atomic_folder, clean_temporary, storage_errors, write_bytes
from stackwise.runs.backups import BlockBackups
from stackwise.runs.checkpoints import Checkpoint, CheckpointFolder
from stackwise.runs.errors import RunError
from stackwise.runs.lock import RunLock
from stackwise.runs.metrics import MetricsLog

if TYPE_CHECKING:
    from stackwise.config import ModelConfig, StackWiseConfig

CONFIG = "config.yaml"
SUMMARY = "summary.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunStore:
    """A run folder; made by :meth:`create` or :meth:`open`."""

    def __init__(self, path: str | Path, keep_checkpoints: int = 2) -> None:
        self.path = Path(path)
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", keep_checkpoints)
        self.backups = BlockBackups(self.path / "full_precision", self.id)
        self._metrics = MetricsLog(self.path / "metrics.jsonl")

    @property
    def id(self) -> str:
        """Name of the run: that of its folder."""
        return self.path.absolute().name

    @classmethod
    def create(cls, config: StackWiseConfig, run_id: str | None = None) -> RunStore:
        """A new run folder ``config.run.dir/<id>`` that holds config.yaml.

        The id is ``run_id``, else ``config.run.id``, else date, time, mode and a random suffix.
        Raises ``ValueError`` for an id that is not a plain name, :class:`RunError` when the folder
        exists already.
        """
        chosen = run_id if run_id is not None else config.run.id
        generated = chosen is None
        while True:
            name = chosen if chosen is not None else _new_id(config.training.mode)
            if not _ID.fullmatch(name):
                raise ValueError(
                    f"run id is {name!r}; letters, digits, '.', '_' and '-' are accepted, and it "
                    "starts with a letter or digit"
                )
            path = Path(config.run.dir) / name
            try:
                with atomic_folder(path, replace=False) as folder:
                    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
            except FileExistsError as error:
                if generated:
                    continue
                raise RunError(
                    f"{path} exists already: resume that run, choose another run.id, or delete "
                    "the folder"
                ) from error
            return cls(path, config.training.keep_checkpoints)

    @classmethod
    def open(cls, path: str | Path) -> RunStore:
        """An existing run, by its folder or by its id under ``runs/``."""
        path = Path(path)
        if not path.exists() and (Path("runs") / path / CONFIG).is_file():
            path = Path("runs") / path
        if not (path / CONFIG).is_file():
            what = f"{path / CONFIG} is missing" if path.is_dir() else f"{path} is not a folder"
            raise RunError(f"no run here: {what}.{_runs_nearby(path)}")
        store = cls(path)
        store.checkpoints.keep = store.load_config().training.keep_checkpoints
        return store

    def lock(self, purpose: str = "train") -> RunLock:
        """Takes the run for this process until the returned lock is released or the process ends.

        ``with store.lock(): ...``. Raises :class:`RunError` when another process has it. What an
        earlier, killed holder left unfinished is cleaned up.
        """
        lock = RunLock(self.path).acquire(purpose)
        self.clean_temporary()
        return lock

    def clean_temporary(self) -> list[Path]:
        """Removes the unfinished files of a killed process; only for the holder of the lock."""
        return clean_temporary(self.path)

    def save_config(self, config: StackWiseConfig) -> None:
        """Replaces config.yaml, for a run continued with other settings."""
        write_bytes(self.path / CONFIG, config.to_yaml().encode())
        self.checkpoints.keep = config.training.keep_checkpoints

    def load_config(self) -> StackWiseConfig:
        """The configuration the run was started with; ``ConfigError`` when it was made invalid."""
        from stackwise.config import StackWiseConfig

        return StackWiseConfig.from_yaml(str(self.path / CONFIG))

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; NaN and infinities become null."""
        self._metrics.append(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete records, oldest first; the half-written last line of a kill is ignored."""
        return self._metrics.read()

    def truncate_metrics(self, step: int) -> int:
        """Drops the records with a ``step`` after ``step`` (on resume); returns how many."""
        return self._metrics.truncate(step)

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Path:
        """Writes ``checkpoints/step_XXXXXXXX/`` atomically and returns it.

        ``tensors`` maps a group ("model", "optimizer", "rng") to its tensors, on any device, tied,
        overlapping or strided; each group becomes ``<group>.safetensors``. ``state`` holds JSON
        values (tuples come back as lists); ``state["model"] = model_description(model)`` is what
        :func:`load_run_model` builds the model from, ``state["stage"]`` and
        ``state["stage_step"]`` (of the next step) what it finds a stage's end by. The newest
        ``training.keep_checkpoints`` stay.
        """
        return self.checkpoints.save(step, tensors, state)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None when the run has none.

        A damaged one is warned of, naming the file, and the one before is taken; :class:`RunError`
        when none is intact.
        """
        return self.checkpoints.latest()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the record of a finished run: its mode and its stages' results."""
        text = json.dumps(summary, indent=1) + "\n"
        write_bytes(self.path / SUMMARY, text.encode())

    def read_summary(self) -> dict[str, Any] | None:
        """What :meth:`write_summary` wrote; None while training has not finished."""
        path = self.path / SUMMARY
        if not path.is_file():
            return None
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary

    def save_block(
        self, index: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> Path:
        """Backs block ``index`` up in full precision and verifies the copy; see backups.py."""
        return self.backups.save(index, tensors, metadata)

    def load_block(self, index: int) -> dict[str, Tensor]:
        """The backup of block ``index``, verified, on the CPU."""
        return self.backups.restore(index)

    def save_model(
        self,
        model_state: Mapping[str, Tensor],
        model_config: ModelConfig,
        tokenizer: Any,
        extra: Mapping[str, Any],
    ) -> Path:
        """Writes the finished model to ``model/`` and, unless None, the tokenizer; see model.py."""
        from stackwise.runs.model import save_model

        if tokenizer is not None:
            self.save_tokenizer(tokenizer)
        return save_model(self.path / "model", model_state, model_config, extra)

    def save_tokenizer(self, tokenizer: Any) -> Path:
        """Writes ``tokenizer/`` (``tokenizer.save(folder)`` is what fills it)."""
        from stackwise.runs.model import save_tokenizer

        return save_tokenizer(self.path / "tokenizer", tokenizer)


def _new_id(mode: str) -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{mode}-{secrets.token_hex(2)}"


def _runs_nearby(path: Path) -> str:
    with storage_errors(path):
        folders = [folder for folder in (path, path.parent, Path("runs")) if folder.is_dir()]
        found = {str(config.parent) for folder in folders for config in folder.glob(f"*/{CONFIG}")}
    return f" Runs found: {', '.join(sorted(found)[-8:])}" if found else ""
