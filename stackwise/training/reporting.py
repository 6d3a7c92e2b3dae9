"""Where training metrics go: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

from typing import Any

from stackwise.config import ConfigError, StackWiseConfig
from stackwise.runs import RunStore


class Reporter:
    """Writes one record per call; ``record["step"]`` is the optimiser step over all stages."""

    def __init__(self, config: StackWiseConfig, store: RunStore) -> None:
        self._store = store
        self._tensorboard = _tensorboard(store) if config.training.tensorboard else None
        self._wandb = _wandb(config, store) if config.training.wandb else None

    def log(self, record: dict[str, Any]) -> None:
        """Appends ``record`` to metrics.jsonl and mirrors its numbers."""
        self._store.log_metrics(record)
        numbers = {
            key: value
            for key, value in record.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        step = int(numbers.pop("step", 0))
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flushes and closes the mirrors."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard(store: RunStore) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "training.tensorboard is true, but the package tensorboard is not installed: "
            "pip install tensorboard, or set it to false"
        ) from error
    return SummaryWriter(str(store.path / "tensorboard"))


def _wandb(config: StackWiseConfig, store: RunStore) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "training.wandb is true, but the package wandb is not installed: "
            "pip install wandb, or set it to false"
        ) from error
    from stackwise.config.loading import to_dict

    return wandb.init(
        project="stackwise",
        id=store.id,
        dir=str(store.path),
        resume="allow",
        config=to_dict(config),
    )
