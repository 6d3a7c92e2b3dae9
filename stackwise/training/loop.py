"""The one training loop: runs a list of stages, saves, resumes.

Everything random is a pure function of the run's seed and of counters kept in the checkpoint (data
order, masks), or is saved with it (dropout's generator, optimiser moments, running sums), so that a
run continued after a kill repeats the numbers of the run that was never killed.
"""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.model.decoder import Decoder
from stackwise.model.layout import Layout
from stackwise.objectives import build_objective
from stackwise.runs import Checkpoint, RunStore, model_description
from stackwise.training.devices import autocast, peak_memory_mb, reset_peak_memory
from stackwise.training.feature_redraw import redraw_features
from stackwise.training.optim import (
    build_optimizer,
    learning_rate_factor,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    set_trainable,
    trainable_roles,
)
from stackwise.training.precision import FrozenPrecision, impose
from stackwise.training.reporting import Reporter
from stackwise.training.stage_input import MicroBatch, StageInput, evaluating
from stackwise.training.stages import Stage, build_stages


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and which checkpoint is intact."""


class TrainingLoop:
    """Runs the stages of ``config`` on ``model`` and ``data``, keeping everything in ``store``.

    Cached activations go into ``cache_folder``. ``on_step(record)`` is called after every optimiser
    step with that step's exact ``loss`` (a float), for tests and notebooks.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        model: Decoder,
        data: PreparedData,
        store: RunStore,
        device: torch.device,
        cache_folder: pathlib.Path,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.cache_folder = cache_folder
        self.config, self.model, self.data, self.store = config, model, data, store
        self.device = device
        self.on_step = on_step
        self.objective = build_objective(config, data.tokenizer)
        self.pinned = model.pinned_parameters()
        self.precision = FrozenPrecision(config, model, store)
        batches = max(1, len(data.train) // config.training.batch_size)
        accumulation = config.training.gradient_accumulation_steps
        self.stages = build_stages(config, max(1, batches // accumulation))
        self.state: dict[str, Any] = {
            "stage": 0,
            "stage_step": 0,
            "global_step": 0,
            "data_fingerprint": data.train.fingerprint,
            "totals": _zero_totals(),
            "results": [],
        }
        self._continued: Checkpoint | None = None
        self._last_good: pathlib.Path | None = None
        self._started = time.perf_counter()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        if config.training.compile:
            for block in model.blocks:
                block.compile()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes up ``checkpoint``; refuses one whose training data were different."""
        state = checkpoint.state
        if state["data_fingerprint"] != self.data.train.fingerprint:
            raise TrainingError(
                f"{checkpoint.path} was trained on prepared data {state['data_fingerprint']}, but "
                f"the configuration now gives {self.data.train.fingerprint}: the corpus, the "
                "tokenizer or the packing has changed"
            )
        impose(self.model, state["model"].get("precision"))
        self.model.load_state_dict(checkpoint.load("model"))
        self.state = state
        self._continued = checkpoint
        self._last_good = checkpoint.path
        self._loss_sum.fill_(state["totals"]["loss_since_log"])
        _set_rng_state(checkpoint.load("rng"), self.device)
        if state["stage"] > 0 and state["stage_step"] == 0:
            self._back_up(self.stages[state["stage"] - 1])

    def train(self) -> list[dict[str, Any]]:
        """Runs every stage that is left; returns one result record per stage."""
        reporter = Reporter(self.config, self.store)
        try:
            for stage in self.stages[self.state["stage"] :]:
                self._run_stage(stage, reporter)
        finally:
            reporter.close()
        self.precision.finish()
        return self.state["results"]

    def _run_stage(self, stage: Stage, reporter: Reporter) -> None:
        training, state = self.config.training, self.state
        self._started = time.perf_counter()
        self._enter_precision(stage, reporter)
        reset_peak_memory(self.device)
        roles = trainable_roles(self.model, stage, self.pinned)
        set_trainable(self.model, roles)
        optimizer = build_optimizer(self.model, stage, roles, training)
        self._restore_moments(optimizer)
        source = StageInput(
            self.config,
            stage,
            self.model,
            self.data.train,
            self.objective,
            self.device,
            self.cache_folder,
        )
        state["totals"]["cache_seconds"] += source.cache_seconds
        self.model.train()
        first, accumulation = state["stage_step"], training.gradient_accumulation_steps
        batches = source.micro_batches(first * accumulation, stage.steps * accumulation)
        with tqdm(total=stage.steps, initial=first, desc=stage.name, unit="step") as bar:
            if source.cache_note:
                bar.write(f"{stage.name}: {source.cache_note}")
            for step in range(first, stage.steps):
                factor = learning_rate_factor(step, stage.steps, training)
                set_learning_rate(optimizer, factor)
                redraw_features(self.config, self.model, stage, step)
                micro = [next(batches) for _ in range(accumulation)]
                record = self._step(stage, source, optimizer, micro, bar)
                self._after_step(stage, optimizer, reporter, record, bar)
        batches.close()
        optimizer.zero_grad(set_to_none=True)
        del optimizer
        self._finish_stage(stage, reporter)

    def _enter_precision(self, stage: Stage, reporter: Reporter) -> None:
        """Quantises what freezes in ``stage`` and restores what trains; the errors are metrics."""
        errors = self.precision.enter(stage)
        if errors:
            # Of the step to come: a run resumed before it quantises, and records, again.
            reporter.log(
                {
                    "step": self.state["global_step"] + 1,
                    "stage": stage.index,
                    "stage_name": stage.name,
                    "quantization_type": self.config.training.quantization_type,
                    "quantization_error": max(errors.values()),
                    "quantization_errors": errors,
                }
            )

    def _step(
        self,
        stage: Stage,
        source: StageInput,
        optimizer: torch.optim.Optimizer,
        micro: list[MicroBatch],
        bar: tqdm,
    ) -> dict[str, Any]:
        """One optimiser step; the loss is the sum over its micro-batches ÷ all maskable tokens."""
        normalizer = max(1, sum(part.corrupted.normalizer for part in micro))
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for part in micro:
            part_loss = self._loss(stage, source, part) / normalizer
            if part_loss.requires_grad:
                part_loss.backward()
            loss += part_loss.detach()
        limit = self.config.training.max_grad_norm
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        self._finite &= torch.isfinite(loss) & torch.isfinite(norm)
        if self.device.type == "cpu":
            self._require_finite(stage)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._loss_sum += loss
        totals = self.state["totals"]
        totals["tokens"] += sum(part.batch.input_ids.numel() for part in micro)
        totals["steps_since_log"] += 1
        bar.update()
        return {"loss": loss, "grad_norm": norm, "epoch": micro[-1].epoch}

    def _loss(self, stage: Stage, source: StageInput, micro: MicroBatch) -> Tensor:
        """Summed loss of a forward pass: the frozen prefix, then the blocks that need gradient."""
        objective, training = self.config.objective, self.config.training
        first, corrupted = stage.frozen_prefix, micro.corrupted
        with autocast(self.device, training.mixed_precision):
            hidden = source.hidden(micro, first)
            selected = self.model.run_blocks(
                hidden,
                micro.layout,
                first,
                stage.depth,
                rows=corrupted.rows,
                checkpoint=training.gradient_checkpointing,
            )
            return self.model.loss(
                selected,
                corrupted.targets,
                token_weight=corrupted.weights,
                reduction="sum",
                label_smoothing=objective.label_smoothing,
                z_loss=objective.z_loss,
            )

    def _after_step(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        reporter: Reporter,
        record: dict[str, Any],
        bar: tqdm,
    ) -> None:
        training, state = self.config.training, self.state
        state["stage_step"] += 1
        state["global_step"] += 1
        if self.on_step is not None:
            self.on_step({"step": state["global_step"], "loss": float(record["loss"])})
        step, last = state["stage_step"], state["stage_step"] == stage.steps
        if step % training.log_interval == 0 or last:
            self._require_finite(stage)
            line = self._metrics(stage, optimizer, record)
            reporter.log(line)
            bar.set_postfix_str(
                f"loss {line['loss']:.4f}, {line['tokens_per_second']:.0f} tok/s, "
                f"{line['peak_memory_mb']:.0f} MB"
            )
        if training.eval_interval and step % training.eval_interval == 0 and not last:
            reporter.log(self._validation_record(stage))
        if step % training.save_interval == 0 and not last:
            self._save(stage, optimizer)

    def _metrics(
        self, stage: Stage, optimizer: torch.optim.Optimizer, record: dict[str, Any]
    ) -> dict[str, Any]:
        totals = self.state["totals"]
        steps = totals["steps_since_log"]
        loss = float(self._loss_sum) / steps
        totals["steps_since_log"] = 0
        self._loss_sum.zero_()
        seconds = self._seconds()
        return {
            "step": self.state["global_step"],
            "stage": stage.index,
            "stage_name": stage.name,
            "stage_step": self.state["stage_step"],
            "epoch": record["epoch"],
            "loss": loss,
            "grad_norm": float(record["grad_norm"]),
            "lr": {group["role"]: group["lr"] for group in optimizer.param_groups},
            "tokens": totals["tokens"],
            "seconds": round(seconds, 3),
            "tokens_per_second": totals["tokens"] / max(seconds, 1e-9),
            "peak_memory_mb": round(peak_memory_mb(self.device), 1),
        }

    def _require_finite(self, stage: Stage) -> None:
        if bool(self._finite):
            return
        kept = "none yet" if self._last_good is None else str(self._last_good)
        raise TrainingError(
            f"loss or gradient became NaN or infinite in stage {stage.index} ({stage.name}) at "
            f"step {self.state['stage_step'] + 1} of {stage.steps}; nothing was saved from it. "
            f"Last good checkpoint: {kept}. Lower training.lr, raise training.warmup_steps, or set "
            "training.max_grad_norm"
        )

    def _seconds(self) -> float:
        """Wall time of the current stage, sittings before a resume included."""
        return self.state["totals"]["seconds_before"] + time.perf_counter() - self._started

    def _save(self, stage: Stage, optimizer: torch.optim.Optimizer | None) -> None:
        self._require_finite(stage)
        totals = self.state["totals"]
        totals["loss_since_log"] = float(self._loss_sum)
        totals["seconds_before"] = self._seconds()
        self._started = time.perf_counter()
        tensors = {"model": self.model.state_dict(), "rng": _rng_state(self.device)}
        if optimizer is not None:
            tensors["optimizer"] = optimizer_tensors(optimizer)
        self.state["model"] = model_description(self.model)
        self.state["model"]["precision"] = self.precision.description()
        step = self.state["global_step"]
        self._last_good = self.store.save_checkpoint(step, tensors, self.state)

    def _restore_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Optimiser state, when the stage continues from a checkpoint inside it."""
        if self._continued is not None and self.state["stage_step"] > 0:
            load_optimizer_tensors(optimizer, self._continued.load("optimizer"))

    def _finish_stage(self, stage: Stage, reporter: Reporter) -> None:
        """Validates, checkpoints the start of the next stage, and backs up the trained blocks."""
        totals, state = self.state["totals"], self.state
        seconds = self._seconds()
        peak = peak_memory_mb(self.device)
        record = self._validation_record(stage)
        reporter.log(record)
        state["results"].append(
            {
                "stage": stage.index,
                "name": stage.name,
                "steps": stage.steps,
                "depth": stage.depth,
                "tokens": totals["tokens"],
                "seconds": seconds,
                "cache_seconds": totals["cache_seconds"],
                "peak_memory_mb": peak,
                "validation_loss": record["validation_loss"],
            }
        )
        state.update(stage=stage.index + 1, stage_step=0, totals=_zero_totals())
        self._started = time.perf_counter()
        self._save(stage, None)
        self._back_up(stage)

    def _back_up(self, stage: Stage) -> None:
        """Full-precision copies of what ``stage`` trained.

        Only once its last checkpoint stands: a run resumed from the one before still needs the
        copies from before, which its quantised blocks are restored from.
        """
        for index in stage.trainable:
            self.store.save_block(
                index, self.model.blocks[index].state_dict(), {"stage": stage.index}
            )

    @torch.no_grad()
    def _validation_record(self, stage: Stage) -> dict[str, Any]:
        """Loss of the objective on the held-out rows under masks that are the same every time."""
        rows, total, normalizer = self.data.validation, 0.0, 0
        count = min(len(rows), self.config.evaluation.max_rows or len(rows))
        size = self.config.evaluation.batch_size
        training, objective = self.config.training, self.config.objective
        with evaluating(self.model), autocast(self.device, training.mixed_precision):
            for start in range(0, count, size):
                batch = rows.batch(range(start, min(start + size, count))).to(self.device)
                corrupted = self.objective.corrupt(
                    batch, stage.plan, seed=self.config.run.seed + 1, draw=0, stratify=False
                )
                layout = Layout.from_batch(batch)
                hidden = self.model.embed(corrupted.input_ids, layout)
                hidden = self.model.run_blocks(hidden, layout, 0, stage.depth, rows=corrupted.rows)
                total += float(
                    self.model.loss(
                        hidden,
                        corrupted.targets,
                        token_weight=corrupted.weights,
                        reduction="sum",
                        label_smoothing=objective.label_smoothing,
                    )
                )
                normalizer += corrupted.normalizer
        return {
            "step": self.state["global_step"],
            "stage": stage.index,
            "stage_name": stage.name,
            "stage_step": self.state["stage_step"],
            "validation_loss": total / max(1, normalizer),
        }


def _zero_totals() -> dict[str, Any]:
    return {
        "tokens": 0,
        "seconds_before": 0.0,
        "cache_seconds": 0.0,
        "loss_since_log": 0.0,
        "steps_since_log": 0,
    }


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
