"""Mixture of experts of DeepSeek-V2 and V3: a router, routed experts, shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.config import MoEConfig
from stackwise.model.feed_forward import SwiGLUFFN


class Router(nn.Module):
    """Chooses ``experts_per_token`` experts for every token and weighs them.

    softmax (DeepSeek-V2): the largest scores among the groups with the largest score.
    sigmoid (DeepSeek-V3): experts are chosen by score plus ``correction_bias`` (a buffer that load
    balancing moves, not the gradient), groups by the sum of their two best; weights are the scores
    alone. Weights are divided by their sum when ``normalize_weights``, then scaled.
    """

    correction_bias: Tensor

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, d_model))
        nn.init.normal_(self.weight, 0.0, 0.02)
        if config.scoring == "sigmoid":
            self.register_buffer("correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> weights and expert indices, both (N, experts_per_token)."""
        config = self.config
        high = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(high), self.weight.to(high))
        if config.scoring == "sigmoid":
            scores = logits.sigmoid()
            ranking, group_members = scores + self.correction_bias.to(high), 2
        else:
            scores = logits.softmax(dim=-1)
            ranking, group_members = scores, 1
        if config.groups_per_token < config.n_groups:
            ranking = self._keep_best_groups(ranking, group_members)
        chosen = ranking.topk(config.experts_per_token, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        if config.normalize_weights:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling, chosen

    def _keep_best_groups(self, ranking: Tensor, members: int) -> Tensor:
        config = self.config
        grouped = ranking.unflatten(-1, (config.n_groups, -1))
        members = min(members, grouped.shape[-1])
        quality = grouped.topk(members, dim=-1).values.sum(dim=-1)
        best = quality.topk(config.groups_per_token, dim=-1, sorted=False).indices
        dropped = torch.ones_like(quality, dtype=torch.bool).scatter_(-1, best, False)
        return grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)


class MoEFeedForward(nn.Module):
    """y = sum of the chosen experts' weighted outputs + the shared experts' output.

    ``x`` (..., d_model). Experts are :class:`SwiGLUFFN` of width ``config.d_ff``; the shared ones
    are a single one of ``n_shared_experts`` times that width. Each expert runs once, on the tokens
    routed to it.
    """

    def __init__(self, d_model: int, config: MoEConfig, freeze_up_proj: bool = False) -> None:
        super().__init__()
        self.router = Router(d_model, config)
        self.experts = nn.ModuleList(
            SwiGLUFFN(d_model, config.d_ff, freeze_up_proj=freeze_up_proj)
            for _ in range(config.n_routed_experts)
        )
        self.shared_experts: SwiGLUFFN | None = None
        if config.n_shared_experts:
            self.shared_experts = SwiGLUFFN(
                d_model, config.n_shared_experts * config.d_ff, freeze_up_proj=freeze_up_proj
            )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens)
        # Sorted by expert: each one's tokens are a slice, and one synchronisation gives all sizes.
        order = chosen.flatten().argsort(stable=True)
        owners = order // chosen.shape[1]
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        gate = weights.flatten()[order]
        routed = tokens.new_zeros(tokens.shape)
        for expert, own, factor in zip(
            self.experts, owners.split(counts), gate.split(counts), strict=True
        ):
            if own.numel():
                out = expert(tokens[own]) * factor[:, None]
                routed = routed.index_add(0, own, out.to(routed.dtype))
        if self.shared_experts is not None:
            routed = routed + self.shared_experts(tokens)
        return routed.view(x.shape)
