"""Rotary position tables (Su et al., RoFormer, 2021), with Transformers' frequency scalings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stackwise import kernels
from stackwise.config import ModelConfig
from stackwise.model.layout import Layout
from stackwise.model.resolve import rope_dim

Rope = tuple[Tensor, Tensor]
"""cos and sin of the tokens' angles: (L, R), or (B, L, R) where rows differ."""

SCALINGS = ("default", "linear", "llama3", "yarn")


def inverse_frequencies(
    dim: int, theta: float, scaling: dict[str, Any] | None, max_positions: int
) -> tuple[Tensor, float]:
    """(dim / 2,) float32 angles per position, and the factor on cos and sin (yarn's).

    ``scaling`` as in Transformers: {rope_type: linear | llama3 | yarn, factor: ..., ...}.
    ValueError for another type or a missing parameter.
    """
    rope_type = _rope_type(scaling)
    if rope_type == "default":
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
        return 1.0 / theta ** (steps / dim), 1.0
    assert scaling is not None
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {k: v for k, v in scaling.items() if k != "type"}
    parameters |= {"rope_type": rope_type, "rope_theta": theta}
    holder = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=max_positions,
        rope_parameters=parameters,
    )
    try:
        with torch.device("cpu"):  # also where the decoder is being built on the meta device
            frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](holder, torch.device("cpu"))
    except KeyError as error:
        raise ValueError(
            f"model.rope_scaling of type {rope_type}: got {scaling}; missing: {error}"
        ) from error
    return frequencies, float(factor)


def latent_scale_factor(scaling: dict[str, Any] | None) -> float:
    """DeepSeek's factor on the softmax scale under yarn: (0.1 mscale_all_dim ln(factor) + 1)^2."""
    if scaling is None or _rope_type(scaling) == "default":
        return 1.0
    mscale, factor = scaling.get("mscale_all_dim", 0), scaling.get("factor", 1.0)
    if not mscale or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


def _rope_type(scaling: dict[str, Any] | None) -> str:
    rope_type = "default" if scaling is None else scaling.get("rope_type", scaling.get("type"))
    if rope_type not in SCALINGS:
        raise ValueError(
            f"model.rope_scaling: got rope_type {rope_type!r}; accepted: {', '.join(SCALINGS)}"
        )
    return rope_type


class RotaryTables:
    """cos and sin of every position, kept per device and dtype and grown on demand.

    Columns are laid out like the pairs they rotate: (i, i + R/2), or neighbours when interleaved.
    """

    def __init__(self, config: ModelConfig) -> None:
        assert config.max_position_embeddings is not None
        self.interleaved = config.rope_interleaved
        self._frequencies, self._factor = inverse_frequencies(
            rope_dim(config),
            config.rope_theta,
            config.rope_scaling,
            config.max_position_embeddings,
        )
        self._length = config.max_position_embeddings
        self._tables: dict[tuple[torch.device, torch.dtype], Rope] = {}

    def __call__(self, layout: Layout, dtype: torch.dtype) -> Rope:
        """The angles' cos and sin for ``layout``, float64 for float64 models, else float32."""
        cos, sin = self._table(
            layout.position_ids.device,
            torch.promote_types(dtype, torch.float32),
            layout.position_end,
        )
        if layout.offset is not None:
            chosen = slice(layout.offset, layout.offset + layout.length)
            return cos[chosen], sin[chosen]
        return cos[layout.position_ids], sin[layout.position_ids]

    def _table(self, device: torch.device, dtype: torch.dtype, positions: int) -> Rope:
        kept = self._tables.get((device, dtype))
        if kept is None or kept[0].shape[0] < positions:
            # Tables first built while generating are used in training later, where autograd
            # refuses tensors made in inference mode.
            with torch.inference_mode(False):
                kept = self._build(device, dtype, positions)
            self._tables[device, dtype] = kept
        return kept

    def _build(self, device: torch.device, dtype: torch.dtype, positions: int) -> Rope:
        # Grown by doubling, so that sampling one token at a time does not rebuild every step.
        if positions > self._length:
            self._length = max(positions, 2 * self._length)
        steps = torch.arange(self._length, device=device, dtype=dtype)
        angles = steps[:, None] * self._frequencies.to(device, dtype)
        if self.interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self._factor, angles.sin() * self._factor


def rotate(
    q: Tensor, k: Tensor, rope: Rope, rows: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotates q (B, L, H, D), or (R, H, D) of the selected ``rows``, and k (B, L, Hkv, D)."""
    cos, sin = rope
    if rows is None:
        return kernels.rope(q, k, cos, sin, interleaved=interleaved)
    if cos.dim() == 2:
        at = rows % cos.shape[0]
    else:
        at, cos, sin = rows, cos.flatten(0, 1), sin.flatten(0, 1)
    q, _ = kernels.rope(q, q[:, :0], cos[at], sin[at], interleaved=interleaved)
    _, k = kernels.rope(k[:, :, :0], k, *rope, interleaved=interleaved)
    return q, k
