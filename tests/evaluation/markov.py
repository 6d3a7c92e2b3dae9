"""A Markov source with known entropy, its exact posterior as a model, and rows held in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from stackwise.data.batch import Batch

PAD, EOS, MASK = 0, 1, 2
SPECIAL = (PAD, EOS, MASK)
FIRST = len(SPECIAL)  # id of the source's first state

STATES = 4
TRANSITION = torch.tensor(
    [
        [0.70, 0.20, 0.05, 0.05],
        [0.10, 0.60, 0.25, 0.05],
        [0.05, 0.05, 0.80, 0.10],
        [0.40, 0.05, 0.05, 0.50],
    ],
    dtype=torch.float64,
)
VOCAB = FIRST + STATES


def stationary(transition: Tensor) -> Tensor:
    return torch.linalg.matrix_power(transition, 200)[0]


def entropy(p: Tensor) -> float:
    return float(-(p * p.log()).sum())


def entropy_rate(transition: Tensor = TRANSITION) -> float:
    rows = -(transition * transition.log()).sum(1)
    return float((stationary(transition) * rows).sum())


def sample_document(length: int, generator: torch.Generator) -> list[int]:
    state = int(torch.multinomial(stationary(TRANSITION), 1, generator=generator))
    states = [state]
    for _ in range(length - 1):
        state = int(torch.multinomial(TRANSITION[state], 1, generator=generator))
        states.append(state)
    return [FIRST + state for state in states]


def log_likelihood(document: Sequence[int], given_first: bool = False) -> float:
    states = [token - FIRST for token in document if token >= FIRST]
    total = 0.0 if given_first else math.log(stationary(TRANSITION)[states[0]])
    return total + sum(math.log(TRANSITION[a, b]) for a, b in itertools.pairwise(states))


class FakeTokenizer:
    vocab_size, special_ids = VOCAB, SPECIAL
    pad_id, eos_id, mask_id, bos_id = PAD, EOS, MASK, None
    mask_token = "<|mask|>"

    def encode(self, text: str) -> list[int]:
        return [FIRST + "abcd".index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("_$?abcd"[index] for index in ids)


def pack_rows(
    rows: Sequence[Sequence[Sequence[int]]], length: int, row_ids: Sequence[int] | None = None
) -> Batch:
    """A Batch from rows of documents of token ids; what is left of a row is padding."""
    ids, positions, bounds = [], [], [0]
    for row in rows:
        tail = length - sum(len(document) for document in row)
        for document in [*row, [PAD] * tail]:
            if document:
                ids += document
                positions += range(len(document))
                bounds.append(bounds[-1] + len(document))
    input_ids = torch.tensor(ids).view(len(rows), length)
    return Batch(
        input_ids=input_ids,
        maskable=~torch.isin(input_ids, torch.tensor(SPECIAL)),
        position_ids=torch.tensor(positions).view(len(rows), length),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in itertools.pairwise(bounds)),
        row_ids=torch.tensor(row_ids if row_ids is not None else range(len(rows))),
    )


class FakeRows:
    """What evaluation uses of PackedRows, over documents in memory; two bytes per token."""

    def __init__(self, rows: Sequence[Sequence[Sequence[int]]], seq_len: int) -> None:
        self.rows, self.seq_len = rows, seq_len
        tokens = [token for row in rows for document in row for token in document]
        self.n_tokens = sum(token not in SPECIAL for token in tokens)
        self.n_bytes = 2 * self.n_tokens

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, row_ids: Sequence[int]) -> Batch:
        return pack_rows([self.rows[i] for i in row_ids], self.seq_len, row_ids)

    def unigram_bits_per_byte(self, train: FakeRows) -> float:
        return 8.0 * len(train)

    @property
    def documents(self) -> list[Sequence[int]]:
        return [document for row in self.rows for document in row]


def source_rows(n_rows: int, seq_len: int = 16, seed: int = 0, eos: bool = True) -> FakeRows:
    """Rows of two or three documents of the source, some with padding behind."""
    generator = torch.Generator().manual_seed(seed)
    end = [EOS] if eos else []
    rows = []
    for i in range(n_rows):
        sizes = ((6, 5), (3, 4, 2), (9, 3))[i % 3]
        rows.append([sample_document(size, generator) + end for size in sizes])
    return FakeRows(rows, seq_len)


class PosteriorModel(nn.Module):
    """The exact conditional distribution of every token given the visible ones of its document.

    Bidirectional: p(x_i | visible tokens). Causal: p(x_{i+1} | x_1..x_i) at position i. ``shift``
    reads the bidirectional answer for token i + 1 at position i. Special tokens other than MASK
    carry no information. ``transition`` may differ from the source's: then it is a wrong model.
    """

    def __init__(self, transition: Tensor = TRANSITION, shift: bool = False, limit: int = 64):
        super().__init__()
        self.transition, self.initial, self.shift = transition, stationary(transition), shift
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.head = nn.Linear(1, VOCAB, bias=False)
        self.attention_mode = "bidirectional"
        self.config = SimpleNamespace(
            vocab_size=VOCAB, max_position_embeddings=limit, use_rope=False
        )
        self.head_rows = 0
        self.block_rows: list[tuple[int | None, int]] = []
        self.modes: list[tuple[str, bool]] = []

    def set_attention_mode(self, mode: str) -> None:
        self.attention_mode = mode

    def embed(self, input_ids: Tensor, layout) -> Tensor:
        return input_ids

    def run_blocks(self, hidden: Tensor, layout, start=0, stop=None, rows=None) -> Tensor:
        self.modes.append((self.attention_mode, self.training))
        log_p = self._log_posterior(hidden, layout.position_ids == 0)
        rows = torch.arange(hidden.numel()) if rows is None else rows
        self.block_rows.append((stop, rows.numel()))
        return log_p.flatten(0, 1)[rows]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def loss(self, hidden: Tensor, target: Tensor, *, reduction: str = "sum") -> Tensor:
        self.head_rows += target.numel()
        return nn.functional.cross_entropy(hidden, target, reduction=reduction)

    def forward(self, input_ids: Tensor, *, rows: Tensor | None = None) -> SimpleNamespace:
        first = torch.zeros_like(input_ids)
        first[:, 1:] = 1
        log_p = self.run_blocks(input_ids, SimpleNamespace(position_ids=first), rows=rows)
        return SimpleNamespace(logits=log_p)

    def _log_posterior(self, ids: Tensor, starts: Tensor) -> Tensor:
        visible = ids >= FIRST
        evidence = torch.ones(*ids.shape, STATES, dtype=torch.float64)
        evidence[visible] = nn.functional.one_hot(ids[visible] - FIRST, STATES).double()
        left, right = torch.empty_like(evidence), torch.ones_like(evidence)
        length = ids.shape[1]
        left[:, 0] = self.initial
        for i in range(1, length):
            step = (left[:, i - 1] * evidence[:, i - 1]) @ self.transition
            left[:, i] = torch.where(starts[:, i, None], self.initial, step)
        for i in range(length - 2, -1, -1):
            step = (right[:, i + 1] * evidence[:, i + 1]) @ self.transition.T
            right[:, i] = torch.where(starts[:, i + 1, None], 1.0, step)
        if self.attention_mode == "causal":
            answer = (left * evidence) @ self.transition
        else:
            answer = left * right
            if self.shift:
                answer = torch.cat([answer[:, 1:], answer[:, :1]], dim=1)
        log_p = torch.full((*ids.shape, VOCAB), float("-inf"), dtype=torch.float64)
        log_p[..., FIRST:] = (answer / answer.sum(-1, keepdim=True)).log()
        return log_p


class UniformModel(PosteriorModel):
    """Every ordinary token equally likely, whatever is visible."""

    def __init__(self, shift: bool = False):
        super().__init__(torch.full((STATES, STATES), 1 / STATES, dtype=torch.float64), shift)
