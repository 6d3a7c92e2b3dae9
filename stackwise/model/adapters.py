"""Low-rank adapters on the linear layers of a model: LoRA, rsLoRA, DoRA.

    from stackwise.model.adapters import add_lora, merge_lora
    add_lora(model, ("q_proj", "v_proj"), rank=16, alpha=32)

Everything else in the model freezes. Hu et al., "LoRA" (2021); Kalajdzievski, "rsLoRA" (2023); Liu
et al., "DoRA" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise import kernels
from stackwise.model.quantized import HalfLinear, QuantizedLinear, dense_weight

ALL_LINEAR = "all-linear"
KINDS = (nn.Linear, HalfLinear, QuantizedLinear)
Base = nn.Linear | QuantizedLinear


class LoRALinear(nn.Module):
    """y = base(x) + scaling · B A dropout(x), the base frozen; with DoRA, of learnt magnitude.

    DoRA scales row n of W + scaling · B A to length ``magnitude[n]``; as in the paper the length
    counts as a constant in the gradient. It is computed through W Aᵀ, never from a dense W.

    Args:
        base: ``nn.Linear`` or :class:`QuantizedLinear`; its parameters freeze.
        rank: r of A (r, K) and B (N, r).
        alpha: the adapter is scaled by alpha / r, or alpha / sqrt(r) with ``rslora``.
        dropout: of the adapter's input while training.
        dtype: of A, B and magnitude; default float32.
    """

    magnitude: nn.Parameter | None
    row_norms: Tensor | None

    def __init__(
        self,
        base: Base,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_options(rank, alpha, dropout)
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        device = next(base.parameters()).device
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **options))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.register_parameter("magnitude", None)
        self.register_buffer("row_norms", None, persistent=False)
        if dora:
            self.row_norms = _row_norms(base).to(device)
            self.magnitude = nn.Parameter(self.row_norms.to(dtype, copy=True))
        self.merged = False
        self._unmerged: Any = None

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self._run(x, self.base.bias)

    def product(self, x: Tensor) -> Tensor:
        """The layer without its bias."""
        return self._run(x, None)

    def _run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.base.weight
        if isinstance(self.base, HalfLinear):
            weight = weight.to(x.dtype)
        if self.merged:
            return _product(x, weight, bias)
        inner = bias if self.magnitude is None else None
        if self.dropout and self.training:
            out = _product(x, weight, inner)
            dropped = F.dropout(x, self.dropout)
            low = F.linear(dropped, self.lora_a.to(x.dtype))
            out = out + self.scaling * F.linear(low, self.lora_b.to(x.dtype))
        else:
            out = kernels.lora_linear(
                x, weight, self.lora_a, self.lora_b, scaling=self.scaling, bias=inner
            )
        if self.magnitude is None:
            return out
        out = out * (self.magnitude.float() / self._length()).to(out.dtype)
        return out if bias is None else out + bias.to(out.dtype)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W + scaling · B A (N, K), differentiable in A and B; not for DoRA."""
        if self.magnitude is not None:
            raise ValueError("dense_weight: a DoRA layer has none; accepted: LoRA and rsLoRA")
        base = dense_weight(self.base, dtype)
        if self.merged:
            return base
        return base + self.scaling * (self.lora_b.to(dtype) @ self.lora_a.to(dtype))

    def delta(self) -> Tensor:
        """scaling · B A (N, K), float32."""
        return self.scaling * (self.lora_b.detach().float() @ self.lora_a.detach().float())

    @torch.no_grad()
    def _length(self) -> Tensor:
        """(N,) |W + scaling B A| by row, from |W|², W Aᵀ and A Aᵀ."""
        assert self.row_norms is not None
        a, b = self.lora_a.float(), self.lora_b.float()
        weight = self.base.weight
        with torch.autocast(a.device.type, enabled=False):
            dtype = weight.dtype
            cross = _product(a.to(dtype), weight, None).float().t()
            squared = self.row_norms.float().square()
            squared = squared + 2 * self.scaling * (cross * b).sum(1)
            squared = squared + self.scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
        return squared.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    @torch.no_grad()
    def merge(self) -> float:
        """Adds the adapter to the base weight; returns the relative error that rounding it costs.

        0 or a rounding of the weight's dtype for a plain base, that of requantisation for a
        quantised one. The original weight is kept for :meth:`unmerge`.
        """
        if self.merged:
            return 0.0
        base = self.base
        wanted = _dense(base.weight).float() + self.delta()
        if self.magnitude is not None:
            wanted *= (self.magnitude.float() / self._length())[:, None]
        if isinstance(base, QuantizedLinear):
            self._unmerged = base.weight.to(copy=True)
            double = base.weight.double_quantized
            base.replace_weight(kernels.quantize(wanted, base.format, double_quantization=double))
            got = base.weight.dequantize(torch.float32)
        else:
            self._unmerged = base.weight.detach().clone()
            base.weight.copy_(wanted)
            got = base.weight.detach().float()
        self.merged = True
        return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the base the bits it had before :meth:`merge`."""
        if not self.merged:
            return
        if isinstance(self.base, QuantizedLinear):
            self.base.replace_weight(self._unmerged)
        else:
            self.base.weight.copy_(self._unmerged)
        self._unmerged, self.merged = None, False

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        kind = "dora" if self.magnitude is not None else "rslora" if self.rslora else "lora"
        return f"{kind}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


def add_lora(
    model: nn.Module,
    targets: Sequence[str] | str = ALL_LINEAR,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    skip: Sequence[str] = ("lm_head", "head"),
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Wraps linear layers of ``model`` in :class:`LoRALinear` in place and freezes all the rest.

    Args:
        model: any module.
        targets: last parts of module names ("q_proj"), whole names, or "all-linear".
        skip: names that "all-linear" leaves out.
        rank, alpha, dropout, rslora, dora, dtype: see :class:`LoRALinear`.

    Returns:
        The names of the wrapped modules.

    Raises:
        ValueError: a target matches no linear layer, or the model has adapters already.
    """
    _check_options(rank, alpha, dropout)
    if any(isinstance(part, LoRALinear) for part in model.modules()):
        raise ValueError("model: has adapters already; accepted: a model without")
    linears = [n for n, part in model.named_modules() if type(part) in KINDS]
    if targets == ALL_LINEAR:
        chosen = [name for name in linears if not set(name.split(".")) & set(skip)]
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        for target in wanted:
            if not any(_matches(name, target) for name in linears):
                known = sorted({name.rpartition(".")[2] for name in linears})
                raise ValueError(
                    f"targets: got {target!r}; accepted: {ALL_LINEAR}, whole module names, or any "
                    f"of {', '.join(known)}"
                )
        chosen = [name for name in linears if any(_matches(name, t) for t in wanted)]
    if not chosen:
        raise ValueError("targets: no linear layer is left to adapt")
    model.requires_grad_(False)
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        base = getattr(owner, leaf)
        wrapped = LoRALinear(base, rank, alpha, dropout, rslora, dora, dtype)
        setattr(owner, leaf, wrapped.train(base.training))
    return chosen


def merge_lora(model: nn.Module) -> dict[str, float]:
    """Merges every adapter; ``{module name: relative error of the merged weight}``."""
    return {name: part.merge() for name, part in adapters(model).items()}


def unmerge_lora(model: nn.Module) -> None:
    """Undoes :func:`merge_lora`, bit for bit."""
    for part in adapters(model).values():
        part.unmerge()


def remove_lora(model: nn.Module, merge: bool = True) -> dict[str, float]:
    """Puts the base layers back, with the adapters merged in or dropped; errors as merge_lora."""
    errors = {}
    for name, part in adapters(model).items():
        if merge:
            errors[name] = part.merge()
        else:
            part.unmerge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, part.base)
    return errors


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapters of ``model`` by module name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A, B and magnitude of every adapter: what an optimiser trains."""
    return [
        parameter
        for part in adapters(model).values()
        for parameter in (part.lora_a, part.lora_b, part.magnitude)
        if parameter is not None
    ]


def _product(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    return kernels.quantized_linear(x, weight, bias)


def _dense(weight: Any) -> Tensor:
    return weight.detach() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)


def _row_norms(base: Base) -> Tensor:
    return _dense(base.weight).float().norm(dim=1)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_options(rank: int, alpha: float, dropout: float) -> None:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: got {rank!r}; accepted: an integer of at least 1")
    if not alpha > 0:
        raise ValueError(f"alpha: got {alpha!r}; accepted: a number above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout!r}; accepted: a number in [0, 1)")
