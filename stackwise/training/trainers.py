"""The public trainers: they prepare data, model and run folder, and hand over to the loop.

UnifiedTrainer(StackWiseConfig.from_yaml("configs/quickstart.yaml")).train()
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stackwise import kernels
from stackwise.config import ConfigError, StackWiseConfig
from stackwise.config.loading import apply_overrides
from stackwise.config.rules import notes
from stackwise.data import PreparedData, prepare_data
from stackwise.data.tokenizer import Tokenizer
from stackwise.model.decoder import Decoder
from stackwise.model.resolve import resolve_model_config
from stackwise.plots import plot_losses
from stackwise.runs import RunError, RunStore, load_run_tokenizer, model_description
from stackwise.training.devices import resolve_device
from stackwise.training.loop import TrainingLoop

#: Fields that may change when a run is resumed: none of them changes a number that is trained.
RESUMABLE = (
    "training.device",
    "training.num_threads",
    "training.log_interval",
    "training.eval_interval",
    "training.save_interval",
    "training.keep_checkpoints",
    "training.tensorboard",
    "training.wandb",
    "training.cache_budget_gb",
    "data.num_workers",
    "data.pin_memory",
    "data.cache_dir",
)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves: its folder, the trained model, one record per stage.

    A record holds stage, name, steps, depth, tokens, seconds (cache filling included),
    cache_seconds (the cache filling alone), peak_memory_mb and validation_loss.
    """

    run_path: pathlib.Path
    model: Decoder
    stages: list[dict[str, Any]]


class UnifiedTrainer:
    """Trains in the mode that ``config.training.mode`` names.

    Args:
        config: a valid configuration; it is copied, and resolved in the copy.
        data: prepared data to use instead of preparing ``config.data``.
        on_step: called after every optimiser step with {"step": int, "loss": float}.

    Raises:
        ConfigError: when the configuration breaks a rule, with every fault listed.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        data: PreparedData | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.config = _copy(config).validate()
        self._notes = notes(self.config)
        self._data = data
        self._on_step = on_step
        self._store: RunStore | None = None

    @classmethod
    def resume(
        cls,
        run: str | pathlib.Path,
        overrides: list[str] | None = None,
        data: PreparedData | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> UnifiedTrainer:
        """A trainer that continues the run folder ``run`` from its newest intact checkpoint.

        ``overrides`` are ``section.field=value``; only fields that leave the trained numbers alone
        are accepted (``RESUMABLE``).
        """
        store = RunStore.open(run)
        config = store.load_config()
        strangers = [o for o in overrides or [] if o.split("=", 1)[0].strip() not in RESUMABLE]
        if strangers:
            raise ConfigError(
                f"cannot change {', '.join(strangers)} when resuming {run}: the run would no "
                f"longer be one run. Accepted: {', '.join(RESUMABLE)}"
            )
        trainer = cls(apply_overrides(config, overrides or []), data, on_step)
        trainer._store = store
        return trainer

    def train(self) -> TrainResult:
        """Runs (or finishes) every stage, saves the model into the run folder and returns it."""
        training = self.config.training
        kernels.use(self.config.kernels)
        if training.num_threads is not None:
            torch.set_num_threads(training.num_threads)
        device = resolve_device(training.device)
        resuming = self._store is not None
        checkpoint = self._store.latest_checkpoint() if self._store is not None else None
        data = self._data or prepare_data(self.config, tokenizer=self._tokenizer())
        model = self._build_model(data.tokenizer, from_scratch=checkpoint is None)
        model.to(device)
        store = self._store or RunStore.create(self.config)
        with store.lock():
            if resuming:
                store.truncate_metrics(0 if checkpoint is None else checkpoint.step)
                store.save_config(self.config)
            else:
                store.save_tokenizer(data.tokenizer)
                for note in self._notes:
                    print(f"note: {note}", file=sys.stderr)
            cache = self._cache_folder(store)
            loop = TrainingLoop(self.config, model, data, store, device, cache, self._on_step)
            if checkpoint is not None:
                loop.restore(checkpoint)
            results = loop.train()
            _drop_untrained_blocks(model, loop.stages[-1].depth)
            store.save_model(model.state_dict(), model.config, None, model_description(model))
            self._summarise(store, results)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(cache)
        return TrainResult(store.path, model, results)

    def _cache_folder(self, store: RunStore) -> pathlib.Path:
        """Where this run alone keeps cached activations; removed when the run is finished."""
        chosen = self.config.training.activation_cache_dir
        return (
            store.path / "activation_cache" if chosen is None else pathlib.Path(chosen) / store.id
        )

    def _summarise(self, store: RunStore, results: list[dict[str, Any]]) -> None:
        """Writes summary.json and the loss curves, loss.png, into the run folder."""
        store.write_summary({"mode": self.config.training.mode, "stages": results})
        plot_losses({store.id: store.path}, store.path / "loss.png", store.id)

    def _tokenizer(self) -> Tokenizer | None:
        """The run's own tokenizer on resume; otherwise the configuration names it."""
        if self._store is None or not (self._store.path / "tokenizer").is_dir():
            return None
        return load_run_tokenizer(self._store.path)

    def _build_model(self, tokenizer: Tokenizer, from_scratch: bool) -> Decoder:
        """The decoder, seeded; the resolved shape and shift are written into ``self.config``."""
        config = self.config
        torch.manual_seed(config.run.seed)
        if config.model.init_from is not None and from_scratch:
            model = self._initial_model(tokenizer)
            config.model = dataclasses.replace(model.config, init_from=config.model.init_from)
        else:
            config.model = resolve_model_config(
                config.model, vocab_size=tokenizer.vocab_size, seq_len=config.training.seq_len
            )
            model = Decoder(config.model, initialize=from_scratch)
        _require_vocabulary(model, tokenizer)
        if config.objective.shift is None:
            config.objective.shift = config.objective.type == "clm" or (
                config.model.init_from is not None and model.shift
            )
        model.shift = config.objective.shift
        return model

    def _initial_model(self, tokenizer: Tokenizer) -> Decoder:
        from stackwise.model.transformers_bridge import load_pretrained, resize_vocabulary

        config = self.config.model
        assert config.init_from is not None
        model = load_pretrained(config.init_from, attention_mode=config.attention_mode)
        if model.config.vocab_size is not None and tokenizer.vocab_size > model.config.vocab_size:
            resize_vocabulary(model, tokenizer.vocab_size)
        length = self.config.training.seq_len
        longest = model.config.max_position_embeddings
        if not model.config.use_rope and longest is not None and length > longest:
            raise ConfigError(
                f"training.seq_len={length}, but {config.init_from} has {longest} learned "
                f"positions; accepted: at most {longest}"
            )
        return model.float()


class BlockTrainer:
    """Layer-wise and block-wise training; ``training.block_size`` 1 is layer-wise."""

    def __init__(self, config: StackWiseConfig, data: PreparedData | None = None) -> None:
        self._config, self._data = _copy(config), data

    def train_blocks(self) -> TrainResult:
        """Trains block after block on the frozen blocks below; see :class:`UnifiedTrainer`."""
        training = self._config.training
        if training.mode not in ("layerwise", "blockwise"):
            training.mode = "layerwise" if training.block_size == 1 else "blockwise"
        return UnifiedTrainer(self._config, self._data).train()


class FusionTrainer:
    """Fusion training: the current blocks on a frozen or a trainable backbone."""

    def __init__(self, config: StackWiseConfig, data: PreparedData | None = None) -> None:
        self._config, self._data = _copy(config), data

    def train_with_frozen_backbone(self) -> TrainResult:
        """Blocks below the current ones keep their weights."""
        return self._train("frozen")

    def train_with_trainable_backbone(self) -> TrainResult:
        """Blocks below the current ones train with ``training.backbone_lr``."""
        return self._train("trainable")

    def _train(self, fusion_mode: str) -> TrainResult:
        self._config.training.mode = "fused"
        self._config.training.fusion_mode = fusion_mode  # type: ignore[assignment]
        return UnifiedTrainer(self._config, self._data).train()


def _drop_untrained_blocks(model: Decoder, depth: int) -> None:
    """Leaves out blocks that no stage has run (``training.total_blocks`` stopped the growth)."""
    model.blocks = model.blocks[:depth]
    model.config.n_layers = depth


def _copy(config: StackWiseConfig) -> StackWiseConfig:
    from stackwise.config.loading import from_dict, to_dict

    return from_dict(to_dict(config))


def _require_vocabulary(model: Decoder, tokenizer: Tokenizer) -> None:
    size = model.config.vocab_size
    if size is not None and tokenizer.vocab_size > size:
        raise RunError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {size}: leave "
            "model.vocab_size null, or give a tokenizer that fits"
        )
