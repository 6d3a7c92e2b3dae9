"""``attn_implementation="stackwise"``: this package's attention in any model of Transformers.

Transformers passes (B, H, L, D) and takes (B, L, H, D) back. Everything that the call could ask for
and that is not computed here raises; nothing is dropped.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from stackwise.kernels import attention
from stackwise.kernels.autocast import to_autocast_dtype

from .masks import AttentionPattern, stackwise_mask

NAME = "stackwise"
IMPL = "stackwise_impl"  # attribute of a layer that names the variant to run

#: Keyword arguments that reach attention on their way to other parts of a model.
_NOT_FOR_ATTENTION = frozenset(
    (
        "cache_position",
        "is_first_iteration",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "shift_labels",
        "use_cache",
    )
)


def register_attention() -> None:
    """Registers "stackwise" as an attention implementation and a mask interface of Transformers.

    Importing :mod:`stackwise.patching` does so; again is harmless.

    Raises:
        RuntimeError: this version of Transformers builds its masks from other arguments.
    """
    if not supported():
        raise RuntimeError(
            "attn_implementation='stackwise' needs a version of transformers whose mask interface "
            "takes q_length and q_offset (5.23 does)"
        )
    AttentionInterface.register(NAME, stackwise_attention)
    AttentionMaskInterface.register(NAME, stackwise_mask)


def supported() -> bool:
    """Whether this version of Transformers passes what :func:`stackwise_mask` reads."""
    return {"q_length", "q_offset"} <= set(inspect.signature(masking_utils.sdpa_mask).parameters)


def stackwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | AttentionPattern | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface registered as "stackwise".

    Args:
        module: the attention layer; its ``is_causal`` (True where it has none) is the default.
        query: (B, Hq, Lq, Dqk).
        key: (B, Hkv, Lk, Dqk), Hkv divides Hq.
        value: (B, Hkv, Lk, Dv).
        attention_mask: None (causal, rows aligned to the end of the keys, or everything), what
            :func:`stackwise_mask` gives, or a tensor (B or 1, 1 or Hq, 1 or Lq, at least Lk): bool,
            True = may attend, or floating point, 0 or as good as -inf. A mask says all there is to
            say about causality and windows.
        scaling: factor on q · k; 1 / sqrt(Dqk) when None.
        sliding_window: keys that a row sees, its own included; where the mask does not say.
        softcap, s_aux: bound of the scores, and sink logits (Hq,).
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed documents of B · L tokens.
        deterministic: bit-equal gradients; also where PyTorch is told to be deterministic.

    Returns:
        (B, Lq, Hq, Dv) and None. A row that may see no key gives 0.

    Raises:
        ValueError: dropout in training, attention weights as output, or an argument that no part of
            this function reads and that may change the result.
    """
    _refuse(dropout, kwargs)
    q, k, v = to_autocast_dtype(query.device.type, query, key, value)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    options["impl"] = getattr(module, IMPL, None)
    options["deterministic"] = deterministic or torch.are_deterministic_algorithms_enabled()
    if isinstance(attention_mask, Tensor):
        if cu_seq_lens_q is not None:
            raise ValueError(
                "attention_mask: got a dense mask with cu_seq_lens_q; accepted: one of the two"
            )
        return _with_tensor(q, k, v, attention_mask, options), None
    pattern = attention_mask
    if pattern is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        pattern = AttentionPattern(_shape(q, k), bool(causal))
        if sliding_window is not None and not causal:
            raise ValueError(
                f"sliding_window: got {sliding_window} without a mask and without causality, where "
                "models do not agree on its meaning; accepted: a mask made by the model"
            )
    window = pattern.window
    if attention_mask is None and sliding_window is not None:
        window = (sliding_window - 1, -1)
    options |= {"causal": pattern.causal, "window": window}
    if cu_seq_lens_q is not None:
        if pattern.keys is not None or pattern.cu_seqlens_k is not None:
            raise ValueError(
                "attention_mask: got padding with cu_seq_lens_q; accepted: one of the two"
            )
        documents = (cu_seq_lens_q, cu_seq_lens_k)
        lengths = {"max_seqlen_q": max_length_q, "max_seqlen_k": max_length_k}
        return _packed(q, k, v, documents, options | lengths), None
    if pattern.shape != _shape(q, k):
        raise ValueError(
            f"attention_mask: got a pattern for (B, 1, Lq, Lk) = {pattern.shape}; accepted: one "
            f"for {_shape(q, k)}"
        )
    if pattern.cu_seqlens_q is not None:
        return _packed(q, k, v, (pattern.cu_seqlens_q, pattern.cu_seqlens_k), options), None
    if pattern.keys is not None:
        options["key_bias"] = _key_bias(pattern.keys)
    return attention(q, k, v, **options).contiguous(), None


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(
            f"dropout: got {dropout} in training; attn_implementation='stackwise' accepts 0: set "
            "attention_dropout (GPT-2: attn_pdrop) to 0 in the model's config"
        )
    if kwargs.pop("output_attentions", None):
        raise ValueError(
            "output_attentions: got True; attn_implementation='stackwise' never holds the "
            "attention weights: use attn_implementation='eager' for them"
        )
    strangers = [
        name
        for name, value in kwargs.items()
        if value is not None and name not in _NOT_FOR_ATTENTION
    ]
    if strangers:
        raise ValueError(
            f"{strangers[0]}: got an argument that attn_implementation='stackwise' does not know "
            "and that may change the result; use attn_implementation='sdpa' or 'eager'"
        )


def _shape(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return (q.shape[0], 1, q.shape[1], k.shape[1])


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: tuple[Tensor, Tensor | None],
    options: dict[str, Any],
) -> Tensor:
    """(B, L, H, D) as B · L tokens of documents."""
    out = attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
        cu_seqlens_q=documents[0], cu_seqlens_k=documents[1], **options,
    )  # fmt: skip
    return out.view(*q.shape[:3], v.shape[3])


def _with_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    if mask.dim() != 4 or mask.shape[3] < k.shape[1]:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}; accepted: (B or 1, 1 or Hq, 1 or Lq, "
            f"at least Lk) with B, Hq, Lq, Lk = {q.shape[0]}, {q.shape[2]}, {q.shape[1]}, "
            f"{k.shape[1]}"
        )
    mask = mask[..., : k.shape[1]]
    mask = mask if mask.dtype == torch.bool else _as_bool(mask)
    mask = mask.expand(q.shape[0], mask.shape[1], mask.shape[2], k.shape[1])
    if mask.shape[1] == 1 and mask.shape[2] == 1:
        options["key_bias"] = _key_bias(mask[:, 0, 0])
    else:
        options["mask"] = mask.expand(-1, -1, q.shape[1], -1)
    return attention(q, k, v, **options).contiguous()


def _as_bool(mask: Tensor) -> Tensor:
    """A floating-point mask that only hides."""
    if not mask.is_floating_point():
        raise ValueError(
            f"attention_mask: got {mask.dtype}; accepted: bool, True = may attend, or floating "
            "point that is added to the scores"
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            f"attention_mask: got {mask.dtype} under torch.compile, where its values cannot be "
            "checked; accepted: bool, True = may attend"
        )
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool(((mask != 0) & ~hidden).any()):
        raise ValueError(
            "attention_mask: got finite biases; accepted: a mask of 0 and the dtype's lowest "
            "value (or -inf)"
        )
    return ~hidden


def _key_bias(keys: Tensor) -> Tensor:
    """(B, Lk) bool to (B, 1, Lk) float32, 0 and -inf."""
    bias = torch.zeros(keys.shape, device=keys.device)
    return bias.masked_fill(~keys, -torch.inf)[:, None]
