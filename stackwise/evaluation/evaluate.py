"""``evaluate``: one set of figures for a model on a prepared split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stackwise.config import StackWiseConfig
from stackwise.evaluation.bound import (
    accuracy_totals,
    causal_totals,
    mlm_totals,
    nelbo_totals,
)
from stackwise.evaluation.documents import Documents
from stackwise.evaluation.inference import device_of, inference
from stackwise.evaluation.intervals import DocumentSums, Estimate
from stackwise.evaluation.scoring import Scorer
from stackwise.objectives import MaskPlan, MLMObjective, build_objective, predictable_tokens
from stackwise.objectives.hashing import STREAM_ROWS, hash_keys

if TYPE_CHECKING:
    from stackwise.data.batch import Batch
    from stackwise.data.rows import PackedRows
    from stackwise.data.tokenizer import Tokenizer
    from stackwise.model.decoder import Decoder


def evaluate(
    model: Decoder,
    rows: PackedRows,
    tokenizer: Tokenizer,
    config: StackWiseConfig,
    *,
    n_blocks: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    seed: int = 0,
    train_rows: PackedRows | None = None,
    mask_range: tuple[float, float] = (0.0, 1.0),
) -> dict[str, Any]:
    """Evaluates ``model`` (its first ``n_blocks`` blocks and the head) on ``rows``.

    The objective of the config decides what is measured; ``config.evaluation`` how much:

    - diffusion: the likelihood bound over mask rates (0, 1] (``bound.py``), ``is_bound`` True. With
      another ``mask_range`` the mean loss at those rates, ``is_bound`` False.
    - clm: the exact loss of every token given all before it in its document; ``exact`` True.
    - mlm: the loss of the tokens mlm selects, ``is_bound`` False: not a likelihood.

    What is counted: ordinary tokens, never padding or special ones; an EOS is visible to the
    bidirectional objectives, so their bound is given the documents' lengths. Where a token is
    predicted from the position before it (clm, shifted diffusion) a document's first token is
    conditioned on by the others but predicted from nothing: ``nats_per_token`` and
    ``perplexity_bound`` leave these ``context_tokens`` out, while ``bits_per_byte``, which covers
    the whole text, charges them the uniform code over ordinary tokens. So bits per byte compare
    across objectives and tokenizers.

    Returns ``objective``; ``nats_per_token``, ``bits_per_byte`` with ``_low`` and ``_high``, a 95%
    interval over documents (None for a single observation; ``intervals.py``);
    ``perplexity_bound`` = exp(nats per token); ``is_bound``, ``exact``; ``tokens``,
    ``context_tokens``, ``documents``, ``rows``, ``samples``; ``accuracy_at_<rate>`` with ``_low``
    and ``_high`` for every mask rate (not for clm; None where the rate masked nothing);
    ``unigram_bits_per_byte`` when ``train_rows`` are given. With ``config.evaluation.max_rows`` a
    random subset of rows, fixed by ``seed``, is used, and bytes per token are those of the whole
    split. Equal seeds give equal masks whatever the batch size.

    clm is measured with causal attention, the others with the attention the model has; training and
    attention mode are restored. ``device`` is where the model is (by default its parameters').
    Raises ValueError for arguments out of range and for rows without a token to evaluate.
    """
    _check(model, rows, config, n_blocks, mask_range)
    where = device_of(model) if device is None else torch.device(device)
    run = _Evaluation(model, rows, tokenizer, config, n_blocks, where, seed, mask_range)
    with inference(model, "causal" if run.kind == "clm" else model.attention_mode):
        for batch in run.batches(progress):
            run.add(batch)
    result = run.result()
    if train_rows is not None:
        result["unigram_bits_per_byte"] = rows.unigram_bits_per_byte(train_rows)
    return result


def _check(
    model: Decoder,
    rows: PackedRows,
    config: StackWiseConfig,
    n_blocks: int | None,
    mask_range: tuple[float, float],
) -> None:
    if n_blocks is not None and not 1 <= n_blocks <= len(model.blocks):
        raise ValueError(f"n_blocks must be 1 to {len(model.blocks)}, got {n_blocks}")
    if not 0.0 <= mask_range[0] < mask_range[1] <= 1.0:
        raise ValueError(f"mask_range must satisfy 0 <= low < high <= 1, got {mask_range}")
    if len(rows) == 0:
        raise ValueError("rows must hold at least one row, got none")
    options = config.evaluation
    for name in ("samples", "batch_size", "max_rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"evaluation.{name} must be at least 1, got {value}")
    for rate in options.mask_rates:
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"evaluation.mask_rates must lie in (0, 1], got {rate}")


class _Evaluation:
    """Sums gathered over the batches of one evaluation."""

    def __init__(
        self,
        model: Decoder,
        rows: PackedRows,
        tokenizer: Tokenizer,
        config: StackWiseConfig,
        n_blocks: int | None,
        device: torch.device,
        seed: int,
        mask_range: tuple[float, float],
    ) -> None:
        self.objective = build_objective(config, tokenizer, shift=model.shift)
        self.kind = self.objective.kind
        self.shift = self.objective.shift
        self.rows, self.tokenizer, self.options = rows, tokenizer, config.evaluation
        self.device, self.seed, self.mask_range = device, seed, mask_range
        self.mlm_plan = MaskPlan(config.objective.mlm_probability, config.objective.mlm_probability)
        self.scorer = Scorer(model, n_blocks, device, config.training.mixed_precision == "bf16")
        self.loss = DocumentSums()
        self.accuracy = {
            rate: DocumentSums() for rate in (self.options.mask_rates if self.kind != "clm" else ())
        }
        self.row_ids = self._chosen_rows()
        self.tokens = self.context_tokens = 0

    def _chosen_rows(self) -> list[int]:
        n, limit = len(self.rows), self.options.max_rows
        if limit is None or limit >= n:
            return list(range(n))
        order = hash_keys(STREAM_ROWS, self.seed, torch.arange(n)).argsort()
        return sorted(order[:limit].tolist())

    def batches(self, progress: bool) -> Iterator[Batch]:
        from tqdm import tqdm

        size = self.options.batch_size
        starts = range(0, len(self.row_ids), size)
        for start in tqdm(starts, desc="evaluate", unit="batch", disable=not progress, leave=False):
            yield self.rows.batch(self.row_ids[start : start + size]).to(self.device)

    def add(self, batch: Batch) -> None:
        tokens = predictable_tokens(batch, self.shift)
        documents = Documents.of(batch, tokens, self.seed)
        self.tokens += int(tokens.sum())
        self.context_tokens += int((batch.maskable & ~tokens).sum())
        if self.kind == "clm":
            self.loss.add(causal_totals(self.scorer, documents), documents.sizes)
            return
        if isinstance(self.objective, MLMObjective):
            totals, selected = mlm_totals(
                self.scorer, documents, self.objective, self.mlm_plan, samples=self.options.samples
            )
            self.loss.add(totals, selected)
        else:
            self.loss.add(self._nelbo(documents), documents.sizes)
        for i, (rate, sums) in enumerate(self.accuracy.items()):
            correct, masked = accuracy_totals(
                self.scorer,
                documents,
                rate,
                mask_id=self.tokenizer.mask_id,
                special_ids=self.tokenizer.special_ids,
                shift=self.shift,
                draw=self.options.samples + i,
            )
            sums.add(correct, masked)

    def _nelbo(self, documents: Documents) -> Tensor:
        return nelbo_totals(
            self.scorer,
            documents,
            mask_id=self.tokenizer.mask_id,
            shift=self.shift,
            samples=self.options.samples,
            mask_range=self.mask_range,
        )

    def result(self) -> dict[str, Any]:
        nats = self.loss.estimate()
        exact = self.kind == "clm"
        bound = self.kind == "diffusion" and self.mask_range == (0.0, 1.0)
        return {
            "objective": self.kind,
            **_entries("nats_per_token", nats),
            **_entries("bits_per_byte", self._bits_per_byte(nats)),
            "perplexity_bound": math.exp(nats.value) if nats.value < 700 else math.inf,
            "is_bound": exact or bound,
            "exact": exact,
            "tokens": self.tokens,
            "context_tokens": self.context_tokens,
            "documents": self.loss.documents,
            "rows": len(self.row_ids),
            "samples": 1 if exact else self.options.samples,
        } | {
            key: value
            for rate, sums in self.accuracy.items()
            for key, value in _entries(
                f"accuracy_at_{rate:g}", sums.estimate() if sums.tokens else None
            ).items()
        }

    def _bits_per_byte(self, nats: Estimate) -> Estimate:
        """Nats per predicted token to bits per byte of the whole text, context tokens included."""
        ordinary = self.tokenizer.vocab_size - len(set(self.tokenizer.special_ids))
        everything = self.tokens + self.context_tokens
        bits = self.rows.n_tokens / self.rows.n_bytes / math.log(2.0)
        context = self.context_tokens / everything * math.log(ordinary)
        return nats.scaled(self.tokens / everything * bits, context * bits)


def _entries(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
