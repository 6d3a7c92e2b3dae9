"""Training runs to compare: the same weights, batches and AdamW, with and without our operations.

A tiny GPT-2 or LLaMA of Transformers is trained in float64, the truth, and in the dtype asked for,
the eager peer; the decoder loaded from the same checkpoint is trained with our operations. The
error rule of the kernels then holds for what comes out, path included:

    |ours - float64|  <=  3 |eager - float64| + what one rounding per step adds up to.

AdamW divides by the root of the second moment: where a gradient is 0 but for rounding (key biases)
it would amplify that rounding to full steps. Its epsilon is 1e-4 here, below the real gradients.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise import load_pretrained

KINDS = ("gpt2", "llama")
VOCAB, WIDTH, LENGTH, RATE, SLACK = 61, 64, 32, 1e-3, 3.0


@dataclass
class Run:
    """Loss of every step, logits of a further batch, parameters under the decoder's names."""

    losses: Tensor
    logits: Tensor
    parameters: dict[str, Tensor]


def eager_model(kind: str) -> nn.Module:
    """Transformers' own class with random weights and nothing dropped."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
        dropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(
            GPT2Config(**common, **sizes, **dropped, attn_implementation="eager")
        )
    return LlamaForCausalLM(
        LlamaConfig(
            **common,
            hidden_size=WIDTH,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            attn_implementation="eager",
        )
    )


def batch(step: int, rows: int) -> Tensor:
    """(rows, LENGTH) tokens in arithmetic progressions, something to learn."""
    generator = torch.Generator().manual_seed(100 + step)
    start = torch.randint(VOCAB, (rows, 1), generator=generator)
    stride = torch.randint(1, 5, (rows, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % VOCAB


def _eager_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)),
                           ids[:, 1:].flatten())  # fmt: skip


def _our_loss(model: Any, ids: Tensor) -> Tensor:
    target = F.pad(ids[:, 1:], (0, 1), value=-100)
    return model.loss(model(ids).hidden, target, reduction="mean")


def _train(
    model: nn.Module,
    loss_of: Callable[[Any, Tensor], Tensor],
    dtype: torch.dtype,
    steps: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """bfloat16 is autocast over float32 parameters; the other dtypes are the parameters' own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=1e-4, weight_decay=0.01)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    losses = []
    for step in range(steps):
        with autocast:
            loss = loss_of(model, batch(step, rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    with torch.no_grad(), autocast:
        logits = model(batch(steps, rows)).logits
    return torch.stack(losses), logits.double()


def train_eager(kind: str, dtype: torch.dtype, steps: int = 32, rows: int = 4) -> Run:
    """Transformers' model; its trained parameters are read back through a checkpoint."""
    model = eager_model(kind)
    model = model.double() if dtype == torch.float64 else model
    losses, logits = _train(model, _eager_loss, dtype, steps, rows)
    trained = _load(model, next(model.parameters()).dtype)
    return Run(losses, logits, _parameters(trained))


def train_ours(kind: str, dtype: torch.dtype, steps: int = 32, rows: int = 4) -> Run:
    """The decoder from the same checkpoint, with the operations that are chosen now."""
    model = _load(eager_model(kind), torch.float32)
    losses, logits = _train(model, _our_loss, dtype, steps, rows)
    return Run(losses, logits, _parameters(model))


def _load(model: nn.Module, dtype: torch.dtype) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_pretrained(folder, attention_mode="causal", dtype=dtype)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in model.named_parameters()}


def assert_converged(ours: Run, eager: Run, exact: Run, dtype: torch.dtype) -> None:
    """The rule at the top of this file for losses, logits and every parameter.

    One rounding per step: of a loss, a mean over the tokens, whose roundings are independent; of a
    logit, once; of a parameter's gradient, a sum over the tokens, in an update of about RATE; and
    in float32 of the parameter itself. SLACK: the eager model's error is one draw too.
    """
    steps, eps = len(exact.losses), torch.finfo(dtype).eps
    roots = (exact.logits.shape[0] * exact.logits.shape[1]) ** 0.5
    _within("loss", ours.losses, eager.losses, exact.losses, eps / roots)
    _within("logits", ours.logits, eager.logits, exact.logits, eps)
    assert ours.parameters.keys() == exact.parameters.keys() == eager.parameters.keys()
    for name, truth in exact.parameters.items():
        low = dtype == torch.bfloat16
        size = RATE if low else RATE * roots + float(truth.abs().max())
        trained = (run.parameters[name] for run in (ours, eager))
        _within(name, *trained, truth, steps * eps * size / float(truth.abs().max()))


def _within(name: str, ours: Tensor, eager: Tensor, exact: Tensor, relative: float) -> None:
    error = float((ours - exact).abs().max())
    bound = SLACK * float((eager - exact).abs().max()) + relative * float(exact.abs().max())
    assert error <= bound, f"{name}: off by {error:.3g}, accepted: {bound:.3g}"
