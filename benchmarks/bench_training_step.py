"""One optimiser step of masked diffusion beside Hugging Face GPT-2, at the shape of GPT-2 124M.

Both sides: bf16 autocast, SDPA, bidirectional attention, fused AdamW over every trainable
parameter, the same tokens, the same half of the rows carrying loss. Hugging Face computes its full
logits and selects the masked rows, as public mask-diffusion code does. Pairs are interleaved.

Modes of stackwise: ``end_to_end`` (all blocks); ``layerwise_cached``, one block in the middle of
the stack on cached activations, read from disk, with the head training; and the same with the head
frozen, ``layerwise_cached_frozen_head``.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Options
from benchmarks.records import Row, make_row
from stackwise.config import ModelConfig
from stackwise.model.decoder import Decoder
from stackwise.model.layout import Layout
from stackwise.model.resolve import resolve_model_config

MASKED = 0.5


@dataclass(frozen=True)
class Shape:
    """What is trained: GPT-2's shape, B rows of L tokens."""

    batch: int = 4
    length: int = 512
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    vocab: int = 50257

    @property
    def tokens(self) -> int:
        return self.batch * self.length


class Problem:
    """The batch both sides train on: masked inputs, selected rows and their targets."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape = shape
        clean = torch.randint(0, shape.vocab - 1, (shape.tokens,), generator=generator)
        chosen = torch.randperm(shape.tokens, generator=generator)[: int(shape.tokens * MASKED)]
        self.rows = chosen.sort().values
        self.targets = clean[self.rows]
        masked = clean.clone()
        masked[self.rows] = shape.vocab - 1
        self.input_ids = masked.view(shape.batch, shape.length)


def stackwise_model(shape: Shape) -> Decoder:
    """Our decoder at ``shape``, tied head as GPT-2's."""
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="gpt2",
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        tie_embeddings=True,
        attention_mode="bidirectional",
    )
    return Decoder(resolve_model_config(config, vocab_size=shape.vocab, seq_len=shape.length))


def huggingface_model(shape: Shape) -> nn.Module:
    """Transformers' GPT-2 with SDPA, its causality switched off, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.length,
        n_embd=shape.d_model,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        block.attn.is_causal = False
    return model.train()


def huggingface_loss(model: nn.Module, problem: Problem) -> Tensor:
    """Mean cross entropy of the selected rows, taken from the full logits."""
    # An all-ones 4-D mask keeps Transformers from building a causal one.
    shape = problem.shape
    keep = torch.ones(shape.batch, 1, shape.length, shape.length, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=problem.input_ids, attention_mask=keep).logits
        return F.cross_entropy(logits.view(-1, shape.vocab)[problem.rows], problem.targets)


def stackwise_loss(model: Decoder, problem: Problem, layout: Layout) -> Tensor:
    """The same loss; logits and the last block's queries exist for the selected rows only."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.run_blocks(model.embed(problem.input_ids, layout), layout, rows=problem.rows)
        return model.loss(hidden, problem.targets, reduction="mean")


def optimiser_step(
    parameters: list[nn.Parameter], loss: Callable[[], Tensor]
) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def layerwise_step(
    shape: Shape, problem: Problem, folder: pathlib.Path, train_head: bool
) -> Callable[[], float]:
    """A one-block stage in the middle of the stack that reads its input from disk every step."""
    model = stackwise_model(shape)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    layout = Layout.dense(shape.batch, shape.length, torch.device("cpu"))
    index = shape.n_layers // 2
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        prefix = model.run_blocks(model.embed(problem.input_ids, layout), layout, 0, index)
    file = folder / f"hidden_{train_head}.bin"
    file.write_bytes(prefix.contiguous().numpy().tobytes())
    size = prefix.numel()
    model.requires_grad_(False)
    trained = [model.blocks[index], *([model.final_norm, model.head] if train_head else [])]
    parameters = [p.requires_grad_(True) for part in trained for p in part.parameters()]

    def loss() -> Tensor:
        stored = torch.from_file(str(file), shared=False, size=size, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.run_blocks(
                stored.view(prefix.shape), layout, index, index + 1, rows=problem.rows
            )
            return model.loss(hidden, problem.targets, reduction="mean")

    return optimiser_step(parameters, loss)


def check_same_loss(shape: Shape, problem: Problem) -> None:
    """Gate: with the same weights both sides give the same loss and gradients (float32)."""
    from stackwise.model.transformers_bridge import load_pretrained

    with tempfile.TemporaryDirectory() as folder:
        theirs = huggingface_model(shape)
        theirs.save_pretrained(folder)
        ours = load_pretrained(folder, attention_mode="bidirectional")
    layout = Layout.dense(shape.batch, shape.length, torch.device("cpu"))
    keep = torch.ones(shape.batch, 1, shape.length, shape.length, dtype=torch.bool)
    logits = theirs(input_ids=problem.input_ids, attention_mask=keep).logits
    expected = F.cross_entropy(logits.view(-1, shape.vocab)[problem.rows], problem.targets)
    hidden = ours.run_blocks(ours.embed(problem.input_ids, layout), layout, rows=problem.rows)
    actual = ours.loss(hidden, problem.targets, reduction="mean")
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.embeddings.token.weight.grad, theirs.transformer.wte.weight.grad, rtol=1e-3, atol=1e-6
    )


def run(options: Options) -> list[Row]:
    """Times one step of every mode, interleaved; tokens/s. At least three rounds, then while
    ``options.seconds`` last."""
    small = Shape(batch=2, length=32, d_model=64, n_layers=2, n_heads=2, vocab=211)
    check_same_loss(small, Problem(small))
    shape = Shape(n_layers=2) if options.quick else Shape()
    problem = Problem(shape)
    pairs = 2 if options.quick else 12
    with tempfile.TemporaryDirectory() as folder:
        steps = _steps(shape, problem, pathlib.Path(folder))
        for step in steps.values():
            step()
        times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
        begun = time.perf_counter()
        for done in range(pairs):
            spent = time.perf_counter() - begun
            if options.seconds is not None and done >= 3 and spent > options.seconds:
                break
            for key, step in steps.items():
                start = time.perf_counter()
                step()
                times[key].append(time.perf_counter() - start)
    return [
        row
        for (provider, mode), seconds in times.items()
        for row in _rows(shape, provider, mode, seconds, times["huggingface", "end_to_end"])
    ]


def _steps(
    shape: Shape, problem: Problem, folder: pathlib.Path
) -> dict[tuple[str, str], Callable[[], float]]:
    theirs, ours = huggingface_model(shape), stackwise_model(shape)
    layout = Layout.dense(shape.batch, shape.length, torch.device("cpu"))
    return {
        ("huggingface", "end_to_end"): optimiser_step(
            list(theirs.parameters()), lambda: huggingface_loss(theirs, problem)
        ),
        ("stackwise", "end_to_end"): optimiser_step(
            list(ours.parameters()), lambda: stackwise_loss(ours, problem, layout)
        ),
        ("stackwise", "layerwise_cached"): layerwise_step(shape, problem, folder, True),
        ("stackwise", "layerwise_cached_frozen_head"): layerwise_step(
            shape, problem, folder, False
        ),
    }


def _rows(
    shape: Shape, provider: str, mode: str, seconds: list[float], peer: list[float]
) -> list[Row]:
    x = ("d_model", "width of the residual stream", shape.d_model)
    extra: dict[str, Any] = {
        "batch": shape.batch,
        "length": shape.length,
        "layers": shape.n_layers,
        "vocab": shape.vocab,
        "masked": MASKED,
        "precision": "bf16 autocast",
        "pairs": len(seconds),
    }
    speed = [shape.tokens / value for value in seconds]
    ratio = [theirs / ours for theirs, ours in zip(peer, seconds, strict=True)]
    name = "training_step"
    return [
        make_row(name, provider, mode, speed, metric=("speed", "tokens/s"), x=x, extra=extra),
        make_row(name, provider, mode, ratio, metric=("ratio", "x huggingface"), x=x, extra=extra),
    ]
