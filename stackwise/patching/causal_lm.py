"""A causal language model's forward whose training loss needs no logits.

    loss = linear_cross_entropy(hidden, head.weight, labels shifted by one)

over the rows whose label is not ``ignore_index``; summed and divided by ``num_items_in_batch``
where the trainer passes it (gradient accumulation), else their mean, 0 when there is none.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from stackwise import kernels

from .adapters import unwrap_saved

#: Attribute of a model whose loss is fused. A wrapper around the forward may outlive the patch.
MARK = "stackwise_fused_loss"


def causal_lm(model: nn.Module, output: type, impl: str | None) -> Callable[..., Any]:
    """A forward for ``model`` that also takes ``skip_logits``.

    With labels, and ``skip_logits`` true (None: in training), the outputs have ``logits=None`` and
    everything else that they had; otherwise the model's own forward runs, as it does when the model
    is no longer marked (MARK). ``output`` is the class of its outputs.
    """
    original = type(model).forward
    names = list(inspect.signature(original).parameters)[1:]
    fields = {field.name for field in dataclasses.fields(output)}

    def forward(self: Any, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        kwargs |= dict(zip(names, args, strict=False))
        labels, keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        possible = labels is not None and isinstance(keep, int) and keep == 0
        if skip_logits and not possible:
            raise ValueError(
                "skip_logits: got True; accepted: with labels and without logits_to_keep"
            )
        wanted = self.training if skip_logits is None else skip_logits
        if not (possible and wanted and hasattr(self, MARK)):
            return original(self, **kwargs)
        kwargs.pop("logits_to_keep", None)
        return without_logits(self, **kwargs)

    @can_return_tuple
    def without_logits(
        self: Any,
        labels: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Any:
        base = getattr(self, self.base_model_prefix)
        outputs = base(**kwargs, return_dict=True)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hidden, head = outputs.last_hidden_state, unwrap_saved(self.lm_head)
        loss = kernels.linear_cross_entropy(
            hidden.flatten(0, -2),
            head.weight,
            shift_labels.flatten().to(hidden.device),
            linear_bias=head.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            softcap=getattr(self.config, "final_logit_softcapping", None),
            impl=impl,
        )
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        rest = {name: value for name, value in outputs.items() if name in fields}
        return output(loss=loss, logits=None, **rest)

    forward.__wrapped__ = original  # type: ignore[attr-defined]
    return forward
