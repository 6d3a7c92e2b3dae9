"""Run folders: configuration, metrics, checkpoints, block backups and the finished model."""

from stackwise.runs.backups import BlockBackups
from stackwise.runs.checkpoints import Checkpoint
from stackwise.runs.errors import RunError
from stackwise.runs.lock import RunLock
from stackwise.runs.model import load_run_model, load_run_tokenizer, model_description
from stackwise.runs.store import RunStore

__all__ = [
    "BlockBackups",
    "Checkpoint",
    "RunError",
    "RunLock",
    "RunStore",
    "load_run_model",
    "load_run_tokenizer",
    "model_description",
]
