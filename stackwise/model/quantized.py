"""Quantised linear layers, and a model converted to them layer by layer.

    from stackwise.model.quantized import quantize_model
    report = quantize_model(model, "nvfp4")

Works on any ``torch.nn.Module`` with ``nn.Linear`` layers (or Transformers' ``Conv1D``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from stackwise import kernels
from stackwise.kernels import QuantizedTensor
from stackwise.kernels.quantized_tensor import decode

_CHUNK = 1 << 20  # elements in flight
HEADS = ("lm_head", "head", "embed_out", "score", "classifier")


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + bias with a quantised, frozen W; a drop-in for ``nn.Linear``.

    The packed codes and the scales are parameters without gradient (``weight_data``,
    ``weight_scale``, ...), 8-bit floats held as uint8: ``state_dict``, safetensors and FSDP2 take
    them like any other, and casting the model to another dtype leaves them as they are.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"weight: got shape {tuple(weight.shape)}; accepted: (N, K)")
        self.out_features, self.in_features = weight.shape
        self.format = weight.format
        self.dtype = weight.dtype
        self._dtypes = {name: tensor.dtype for name, tensor in weight.tensors().items()}
        for name, tensor in weight.stored().items():
            self.register_parameter(f"weight_{name}", nn.Parameter(tensor, requires_grad=False))
        bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str, **options: Any) -> QuantizedLinear:
        """Of an ``nn.Linear`` or ``Conv1D``; ``options`` as in :func:`kernels.quantize`."""
        weight = linear.weight.t() if _is_conv1d(linear) else linear.weight
        return cls(kernels.quantize(weight, format, **options), linear.bias)

    @property
    def weight(self) -> QuantizedTensor:
        """The weight, sharing this module's tensors."""
        parts = {
            name: getattr(self, f"weight_{name}").detach().view(dtype)
            for name, dtype in self._dtypes.items()
        }
        return QuantizedTensor(
            self.format, (self.out_features, self.in_features), self.dtype, **parts
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return kernels.quantized_linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ, without the bias."""
        return kernels.quantized_linear(x, self.weight)

    def replace_weight(self, weight: QuantizedTensor) -> None:
        """Takes another weight of the same format and shape."""
        own = self.weight
        if (weight.format, weight.shape, weight.double_quantized) != (
            own.format, own.shape, own.double_quantized,
        ):  # fmt: skip
            raise ValueError(f"weight: got {weight!r}; accepted: like {own!r}")
        for name, tensor in weight.stored().items():
            getattr(self, f"weight_{name}").data.copy_(tensor)

    def dequantized(self) -> nn.Linear:
        """An ``nn.Linear`` with the dequantised weight."""
        bias = self.bias
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.dequantize(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
        return linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # Module.to(dtype) and friends reach every floating-point parameter; a scale keeps its own.
        own = {id(getattr(self, f"weight_{name}")) for name in self._dtypes}

        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            changed = id(tensor) in own and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if changed else moved

        super()._apply(keeping_dtype, recurse)
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        bits = self.weight.bits_per_weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, bits_per_weight={bits:.3f}"
        )


class HalfLinear(nn.Linear):
    """``nn.Linear`` whose frozen weight is stored in half precision and used in that of x."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HalfLinear:
        own = self.weight.dtype

        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            changed = tensor is self.weight and moved.dtype != own
            return tensor.to(moved.device) if changed else moved

        super()._apply(keeping_dtype, recurse)
        return self


def product(linear: Any, x: Tensor) -> Tensor:
    """x Wᵀ of a linear layer of any kind, without its bias."""
    if isinstance(linear, HalfLinear):
        return F.linear(x, linear.weight.to(x.dtype))
    return F.linear(x, linear.weight) if type(linear) is nn.Linear else linear.product(x)


def dense_weight(linear: Any, dtype: torch.dtype) -> Tensor:
    """W (N, K) of a linear layer of any kind; an adapter's part keeps its gradient."""
    if isinstance(linear, QuantizedLinear):
        return linear.weight.dequantize(dtype)
    if isinstance(linear, nn.Linear):
        return linear.weight.to(dtype) if isinstance(linear, HalfLinear) else linear.weight
    return linear.dense_weight(dtype)


@dataclass
class ConversionReport:
    """What :func:`quantize_model` did.

    ``errors``: relative RMS error of each converted weight by module name; ``skipped``: linear
    layers left as they are; bytes are those of the converted weights.
    """

    format: str
    errors: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        worst = max(self.errors.values(), default=0.0)
        return (
            f"{len(self.errors)} linear layers to {self.format}: "
            f"{self.bytes_before / 1e6:,.1f} MB to {self.bytes_after / 1e6:,.1f} MB, relative "
            f"error at most {worst:.4f}; {len(self.skipped)} left as they are"
        )


def quantize_model(
    model: nn.Module,
    format: str = "nvfp4",
    *,
    skip: Sequence[str] = HEADS,
    progress: bool | None = None,
    **options: Any,
) -> ConversionReport:
    """Replaces the linear layers of ``model`` by :class:`QuantizedLinear`, one at a time, in place.

    Each weight is freed before the next is converted, so the peak is the result and one layer.

    Args:
        model: any module; its biases, norms and embeddings stay.
        format: see :func:`kernels.quantize`, which also takes ``options``.
        skip: names of modules to leave, whole ("blocks.0.attention.q_proj") or the last part
            ("lm_head"); everything inside a skipped module is left too.
        progress: show a progress bar; None: when there is a terminal.

    Raises:
        ValueError: nothing to convert; a name in ``skip`` other than the default ones matches
            nothing; a weight is shared with another module; or expert weights are fused into one
            3-D parameter, which no linear layer holds and which would stay unquantised.
    """
    _check_skips(model, skip)
    chosen, skipped = _linears(model, skip)
    _refuse_fused_experts(model, skip)
    _refuse_shared(model, chosen)
    if not chosen:
        raise ValueError(
            f"model: got a {type(model).__name__} without a linear layer to convert "
            f"(skipped: {', '.join(skipped) or 'none'}); accepted: a model with nn.Linear layers"
        )
    report = ConversionReport(format, skipped=skipped)
    hidden = None if progress is None else not progress
    for name in tqdm(chosen, desc=f"quantising to {format}", unit="layer", disable=hidden):
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        linear = getattr(owner, leaf)
        converted = QuantizedLinear.from_linear(linear, format, **options)
        converted.train(linear.training)
        original = linear.weight.detach()
        if _is_conv1d(linear):
            original = original.t()
        report.errors[name] = _relative_error(original, converted.weight)
        report.bytes_before += original.numel() * original.element_size()
        report.bytes_after += converted.weight.nbytes
        setattr(owner, leaf, converted)
        del linear, original
    return report


def halve_model(model: nn.Module, dtype: torch.dtype) -> float:
    """Stores the weights of all linear layers in ``dtype``; the largest relative error."""
    worst = 0.0
    for part in model.modules():
        if type(part) is nn.Linear:
            exact = part.weight.detach()
            rounded = exact.to(dtype)
            norm = float(exact.float().norm())
            error = float((rounded.float() - exact.float()).norm()) / norm if norm else 0.0
            worst = max(worst, error)
            part.weight = nn.Parameter(rounded, requires_grad=False)
            part.__class__ = HalfLinear
    return worst


def dequantize_model(model: nn.Module) -> list[str]:
    """Turns quantised and half-precision layers of ``model`` back into ``nn.Linear``; their names.

    A half-precision weight becomes float32.
    """
    kinds = (QuantizedLinear, HalfLinear)
    names = [name for name, part in model.named_modules() if isinstance(part, kinds)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        part: Any = getattr(owner, leaf)
        if isinstance(part, HalfLinear):
            part.weight = nn.Parameter(part.weight.detach().float(), requires_grad=False)
            part.__class__ = nn.Linear  # type: ignore[assignment]
        else:
            setattr(owner, leaf, part.dequantized())
    return names


def _relative_error(original: Tensor, weight: QuantizedTensor) -> float:
    """|dequantised - original| / |original|, some rows at a time."""
    error = norm = 0.0
    step = max(1, _CHUNK // max(1, original.shape[1]))
    for start in range(0, original.shape[0], step):
        rows = slice(start, min(start + step, original.shape[0]))
        exact = original[rows].float()
        dense = torch.empty_like(exact)
        decode(weight, dense, rows, slice(0, original.shape[1]))
        error += float(dense.sub_(exact).square_().sum())
        norm += float(exact.square_().sum())
    return (error / norm) ** 0.5 if norm else 0.0


def _is_conv1d(module: nn.Module) -> bool:
    """Transformers' GPT-2 layer, which stores its weight as (K, N)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_skipped(name: str, skip: Sequence[str]) -> bool:
    return any(
        name == entry or name.startswith(f"{entry}.") or entry in name.split(".") for entry in skip
    )


def _linears(model: nn.Module, skip: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the linear layers to convert, and of those to skip."""
    names = [
        name
        for name, part in model.named_modules()
        if name and (type(part) is nn.Linear or _is_conv1d(part))
    ]
    chosen = [name for name in names if not _is_skipped(name, skip)]
    return chosen, [name for name in names if _is_skipped(name, skip)]


def _check_skips(model: nn.Module, skip: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters()]
    for entry in skip:
        if entry not in HEADS and not any(_is_skipped(name, (entry,)) for name in names):
            raise ValueError(f"skip: got {entry!r}, which no module is called")


def _refuse_fused_experts(model: nn.Module, skip: Sequence[str]) -> None:
    fused = [
        f"{name} {tuple(parameter.shape)}"
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and parameter.is_floating_point() and not _is_skipped(name, skip)
    ]
    if fused:
        raise ValueError(
            f"model: expert weights fused into 3-D parameters would stay unquantised: "
            f"{', '.join(fused[:4])}{', ...' if len(fused) > 4 else ''}; accepted: experts as "
            "linear layers, or these parameters named in skip"
        )


def _refuse_shared(model: nn.Module, chosen: Sequence[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in chosen:
        sharing = owners[id(model.get_submodule(name).weight)]
        if len(sharing) > 1:
            raise ValueError(
                f"model: {' and '.join(sharing)} are one tensor; accepted: weights of their own "
                f"(name {name} in skip to leave it)"
            )
