"""The residual stream that enters a stage: recomputed from tokens, or read from the cache.

Both give the same numbers. A stage that may read the cache draws its masks from ``cache_masks``
repeating draws even when the cache does not fit on disk, so that falling back to recomputation
changes time and disk space, never the losses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stackwise.config import StackWiseConfig
from stackwise.data.batch import Batch
from stackwise.data.rows import PackedRows
from stackwise.data.sampler import RowSampler, iterate_batches
from stackwise.model.decoder import Decoder
from stackwise.model.layout import Layout
from stackwise.objectives import Corrupted, Objective
from stackwise.training.activation_cache import (
    ActivationCache,
    CacheSpec,
    StaleCacheError,
    parameters_hash,
)
from stackwise.training.devices import autocast
from stackwise.training.stages import Stage


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One forward pass: masked tokens, their layout, and what enters block ``first``."""

    batch: Batch
    corrupted: Corrupted
    layout: Layout
    epoch: int
    cached: Tensor | None


class StageInput:
    """Serves the micro-batches of one stage; fills or rolls the activation cache first."""

    def __init__(
        self,
        config: StackWiseConfig,
        stage: Stage,
        model: Decoder,
        rows: PackedRows,
        objective: Objective,
        device: torch.device,
        cache_folder: pathlib.Path,
    ) -> None:
        self.config, self.stage, self.model = config, stage, model
        self.rows, self.objective, self.device = rows, objective, device
        self.sampler = RowSampler(
            len(rows),
            config.training.batch_size,
            seed=config.run.seed * 1_000_003 + stage.index,
            shuffle=config.data.shuffle,
        )
        self.cache: ActivationCache | None = None
        self.cache_note: str | None = None
        self._prefix_hash = ""
        started = time.perf_counter()
        if stage.source == "cache":
            self._open_cache(cache_folder)
        self.cache_seconds = time.perf_counter() - started

    def micro_batches(self, start: int, stop: int) -> Generator[MicroBatch, None, None]:
        """Micro-batches ``start .. stop`` of the stage's endless sequence."""
        training, data = self.config.training, self.config.data
        batches = iterate_batches(
            self.rows, self.sampler, start, stop, data.num_workers, data.pin_memory
        )
        cached: Iterator[Tensor | None] = _nones()
        if self.cache is not None:
            cached = self.cache.prefetch(
                ((rows, epoch % training.cache_masks) for rows, epoch in self._order(start, stop)),
                stage=self.stage.start,
                prefix_hash=self._prefix_hash,
                pin_memory=self.device.type == "cuda",
            )
        with contextlib.closing(batches), contextlib.closing(cached):  # type: ignore[type-var]
            for (_, epoch, batch), hidden in zip(batches, cached, strict=False):
                batch = batch.to(self.device, non_blocking=True)
                yield MicroBatch(
                    batch,
                    self._corrupt(batch, epoch),
                    Layout.from_batch(batch),
                    epoch,
                    None if hidden is None else hidden.to(self.device, non_blocking=True),
                )

    def hidden(self, micro: MicroBatch, first: int) -> Tensor:
        """The residual stream (B, L, D) that enters block ``first``.

        Gradients flow into the embeddings when they train; everything else before ``first`` is
        frozen and runs without gradient and without dropout.
        """
        if micro.cached is not None:
            return micro.cached
        if self.stage.train_embeddings:
            return self.model.embed(micro.corrupted.input_ids, micro.layout)
        return self._prefix(micro.corrupted.input_ids, micro.layout, first)

    def _corrupt(self, batch: Batch, epoch: int) -> Corrupted:
        cached = self.stage.source == "cache"
        draw = epoch % self.config.training.cache_masks if cached else _fresh(self.stage, epoch)
        return self.objective.corrupt(
            batch, self.stage.plan, seed=self.config.run.seed, draw=draw, stratify=not cached
        )

    def _order(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, int]]:
        return (self.sampler.batch_rows(index) for index in range(start, stop))

    @torch.no_grad()
    def _prefix(self, input_ids: Tensor, layout: Layout, stop: int) -> Tensor:
        with evaluating(self.model), autocast(self.device, self.config.training.mixed_precision):
            return self.model.run_blocks(self.model.embed(input_ids, layout), layout, 0, stop)

    def _open_cache(self, folder: pathlib.Path) -> None:
        training = self.config.training
        spec = CacheSpec(
            n_rows=len(self.rows),
            n_masks=training.cache_masks,
            seq_len=self.rows.seq_len,
            d_model=self.model.config.d_model,
            dtype=_cache_dtype(training.cache_dtype, self.model),
            data_fingerprint=self.rows.fingerprint,
            mask_seed=self.config.run.seed,
            mask_low=self.stage.plan.low,
            mask_high=self.stage.plan.high,
            attention_mode=self.model.attention_mode,
            extra=_cache_key(self.config),
        )
        fits, reason = ActivationCache.fits(
            spec, folder, training.cache_budget_gb, batch_rows=training.batch_size
        )
        if not fits:
            self.cache_note = f"activation cache off, the prefix is recomputed: {reason}"
            return
        self._prefix_hash = prefix_hash(self.model, self.stage.start)
        self.cache = ActivationCache(folder, spec, batch_rows=training.batch_size)
        self._bring_to_stage(self.cache)

    def _bring_to_stage(self, cache: ActivationCache) -> None:
        """Rolls the cache from the boundary it holds to this stage's, or fills it from tokens.

        A shard that cannot be rolled (missing, or left at a third boundary) is filled.
        """
        start = self.stage.start
        held = cache.boundaries() - {(start, self._prefix_hash)}
        progress = tqdm(total=None, unit="row", desc=f"cache to block {start}", leave=False)
        with progress:
            for boundary, its_hash in held:
                if boundary >= start or its_hash != prefix_hash(self.model, boundary):
                    continue
                advance = functools.partial(self._advance, since=boundary)
                with contextlib.suppress(StaleCacheError):
                    cache.roll(boundary, its_hash, start, self._prefix_hash, advance, progress)
            cache.fill(start, self._prefix_hash, self._produce, progress)

    def _produce(self, slots: np.ndarray) -> Tensor:
        """Residual stream of cache slots: (n, 2) pairs of row and mask draw, all of one draw."""
        batch = self.rows.batch(slots[:, 0]).to(self.device)
        masked = self.objective.corrupt(
            batch,
            self.stage.plan,
            seed=self.config.run.seed,
            draw=int(slots[0, 1]),
            stratify=False,
        )
        return self._prefix(masked.input_ids, Layout.from_batch(batch), self.stage.start)

    @torch.no_grad()
    def _advance(self, slots: np.ndarray, hidden: Tensor, since: int) -> Tensor:
        layout = Layout.from_batch(self.rows.batch(slots[:, 0]).to(self.device))
        with evaluating(self.model), autocast(self.device, self.config.training.mixed_precision):
            return self.model.run_blocks(hidden.to(self.device), layout, since, self.stage.start)


@contextlib.contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Runs the body with ``model`` in eval mode and puts the mode back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def prefix_hash(model: Decoder, stop: int) -> str:
    """SHA-256 of everything that blocks ``0 .. stop`` compute from: embeddings and blocks."""
    state = model.state_dict()
    return parameters_hash(
        {
            name: tensor
            for name, tensor in state.items()
            if name.startswith("embeddings.")
            or (name.startswith("blocks.") and int(name.split(".")[1]) < stop)
        }
    )


def _cache_key(config: StackWiseConfig) -> str:
    objective = config.objective
    return "|".join(
        str(value)
        for value in (
            objective.type,
            objective.count,
            objective.t_sampling,
            objective.mlm_probability,
            objective.mlm_mask,
            objective.mlm_random,
            objective.shift,
            config.training.mixed_precision,
        )
    )


def _cache_dtype(name: str, model: Decoder) -> torch.dtype:
    """``auto`` is the residual stream's dtype, which autocast leaves at the embeddings'."""
    return model.embeddings.token.weight.dtype if name == "auto" else getattr(torch, name)


def _fresh(stage: Stage, epoch: int) -> int:
    return (stage.index << 24) + epoch


def _nones() -> Iterator[Any]:
    while True:
        yield None
