"""The model as evaluation sees it: losses and predictions at chosen rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stackwise.model.layout import Layout

if TYPE_CHECKING:
    from stackwise.data.batch import Batch
    from stackwise.model.decoder import Decoder

# Logits held at once when predictions are read off, in elements (256 MB of float32).
_LOGIT_BUDGET = 1 << 26


class Scorer:
    """Runs the first ``n_blocks`` blocks and the head on selected rows only.

    Legend: B rows, L row length, R selected flattened positions, D width, V vocabulary.
    """

    def __init__(
        self, model: Decoder, n_blocks: int | None, device: torch.device, autocast: bool
    ) -> None:
        self.model = model
        self.n_blocks = n_blocks
        self.device = device
        self.autocast = autocast

    def hidden(self, batch: Batch, input_ids: Tensor, rows: Tensor) -> Tensor:
        """(R, D) hidden states of ``rows`` (R,) when the batch reads ``input_ids`` (B, L)."""
        layout = Layout.from_batch(batch)
        with self._precision():
            states = self.model.embed(input_ids, layout)
            return self.model.run_blocks(states, layout, stop=self.n_blocks, rows=rows)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of every row in nats, (R,) float64."""
        with self._precision():
            return self.model.loss(hidden, targets, reduction="none").double()

    def predictions(self, hidden: Tensor, banned: Tensor) -> Tensor:
        """Most likely token of every row, (R,) int64, among all but ``banned`` ids."""
        vocabulary = self.model.head.weight.shape[0]
        chunks = []
        for part in hidden.split(max(_LOGIT_BUDGET // vocabulary, 1)):
            with self._precision():
                logits = self.model.logits(part)
            chunks.append(logits.index_fill(-1, banned, float("-inf")).argmax(-1))
        return torch.cat(chunks) if chunks else banned.new_empty(0)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
