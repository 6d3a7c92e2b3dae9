"""What rows without loss cost: 100%, 50% and 15% of 8,192 rows, forward and backward, one run.

loss        linear_cross_entropy(rows=...): logits of the selected rows only
last_block  the decoder's last block: queries, output projection and feed-forward of the selected
            rows only, keys and values of all
both        the last block, final norm and loss together, as in a training step

The shares take turns; a ratio is that of one turn to all rows in the same turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import Options
from benchmarks.records import Row, make_row
from stackwise.config import ModelConfig
from stackwise.kernels import linear_cross_entropy
from stackwise.model.decoder import Decoder
from stackwise.model.layout import Layout
from stackwise.model.resolve import resolve_model_config

SHARES = (100, 50, 15)  # percent
BATCH, LENGTH, WIDTH, VOCABULARY = 16, 512, 512, 8192


class Problem:
    """A one-block decoder and hidden states of ``batch`` rows of ``length`` tokens."""

    def __init__(self, batch: int, length: int, width: int, classes: int, device: torch.device):
        torch.manual_seed(0)
        config = ModelConfig(
            architecture="llama", d_model=width, n_layers=1, n_heads=width // 64 or 1,
            attention_mode="bidirectional",
        )  # fmt: skip
        resolved = resolve_model_config(config, vocab_size=classes, seq_len=length)
        self.model = Decoder(resolved).to(device)
        self.layout = Layout.dense(batch, length, device)
        self.tokens = batch * length
        self.hidden = torch.randn(batch, length, width, device=device, requires_grad=True)
        self.target = torch.randint(0, classes, (self.tokens,), device=device)
        self._order = torch.randperm(self.tokens, device=device)

    def rows(self, share: int) -> Tensor:
        return self._order[: self.tokens * share // 100].sort().values

    def loss(self, rows: Tensor) -> Tensor:
        hidden = self.hidden.flatten(0, 1)
        return linear_cross_entropy(hidden, self.model.head.weight, self.target, rows=rows)

    def last_block(self, rows: Tensor) -> Tensor:
        return self.model.run_blocks(self.hidden, self.layout, rows=rows).mean()

    def both(self, rows: Tensor) -> Tensor:
        hidden = self.model.run_blocks(self.hidden, self.layout, rows=rows)
        return self.model.loss(hidden, self.target[rows], reduction="mean")

    def gradients(self, value: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [self.hidden, *self.model.parameters()]
        return torch.autograd.grad(value, inputs, allow_unused=True)


def check_selection(problem: Problem) -> None:
    """Gate: selected rows give the loss and gradients of all rows with the others weighted 0."""
    rows = problem.rows(50)
    weight = torch.zeros(problem.tokens, device=rows.device).index_fill_(0, rows, 1.0)
    everything = problem.model.run_blocks(problem.hidden, problem.layout)
    expected = problem.model.loss(everything, problem.target, token_weight=weight) / len(rows)
    actual = problem.both(rows)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    pairs = zip(problem.gradients(actual), problem.gradients(expected), strict=True)
    for ours, full in pairs:
        if full is not None:
            torch.testing.assert_close(ours, full, rtol=1e-3, atol=1e-6)


def run(options: Options) -> Iterator[Row]:
    """Rows of every part as soon as it is measured; AssertionError when the gate fails."""
    device = options.device
    check_selection(Problem(2, 24, 64, 211, device))
    shape = (2, 32, 64, 211) if options.quick else (BATCH, LENGTH, WIDTH, VOCABULARY)
    problem = Problem(*shape, device)
    clock = timing.clock_for(device, options.quick)
    rows = {share: problem.rows(share) for share in SHARES}
    extra = dict(zip(("B", "L", "H", "V"), shape, strict=True)) | {"dtype": "bf16 autocast"}
    for mode in ("loss", "last_block", "both"):
        value: Callable[[Tensor], Tensor] = getattr(problem, mode)
        samplers = {share: _sampler(clock, problem, value, rows[share]) for share in SHARES}
        for sampler in samplers.values():
            sampler()
        turns = 2 if options.quick else 5
        samples = timing.interleave(
            samplers, seconds=(options.seconds or 36.0) / 6, least=turns, most=4 * turns
        )
        times = {share: [one["speed"] for one in taken] for share, taken in samples.items()}
        for share, speed in times.items():
            ratio = [mine / all_ for mine, all_ in zip(speed, times[100], strict=True)]
            x = ("share", "rows with loss, %", share)
            for values, metric in ((speed, ("speed", "ms")), (ratio, ("ratio", "x all rows"))):
                yield make_row(
                    "masked_rows", "stackwise", mode, values, metric=metric, x=x, extra=extra
                )


def _sampler(
    clock: timing.Clock, problem: Problem, value: Callable[[Tensor], Tensor], rows: Tensor
) -> Callable[[], Any]:
    def step() -> Any:
        with torch.autocast(rows.device.type, dtype=torch.bfloat16):
            loss = value(rows)
        return problem.gradients(loss)

    return lambda: clock.sample(lambda: step)
