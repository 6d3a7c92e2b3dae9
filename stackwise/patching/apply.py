"""``patch(model)``: this package's operations inside one model of Transformers, until reverted.

The forwards of single modules are replaced on the instance. No class changes, other models do not
notice, and the parameters keep their names, so checkpoints fit both ways.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from transformers import modeling_outputs
from transformers.loss.loss_utils import ForCausalLMLoss

from stackwise.kernels.dispatch import VARIANTS

from . import modules
from .adapters import is_adapter, unwrap_model, unwrap_saved
from .attention import IMPL, NAME, register_attention
from .causal_lm import MARK, causal_lm
from .families import Family, family_of, parts


class Patch:
    """A patched model, until :meth:`revert` or the end of a ``with`` block.

    Attributes:
        replaced: number of modules per option of ``stackwise.patch``.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, int] = {}
        self._forwards: list[tuple[nn.Module, types.MethodType]] = []
        self._marked: list[tuple[nn.Module, str]] = []
        self._attention: tuple[Any, str] | None = None

    def revert(self) -> None:
        """Gives the model its own forwards and attention implementation back; again is harmless.

        Where a trainer has wrapped the whole model's forward since (mixed precision of accelerate),
        its wrapper stays, around the model's own forward.

        Raises:
            RuntimeError: something else has replaced the forward of a part since: undo that first.
        """
        covered = [m for m, forward in self._forwards if vars(m).get("forward") is not forward]
        for module in covered:
            if not hasattr(module, MARK):
                raise RuntimeError(
                    f"the forward of {type(module).__name__} was replaced again after patching; "
                    "undo that before reverting"
                )
        for module, _ in self._forwards:
            if module not in covered:
                del module.forward
        for module, mark in self._marked:
            delattr(module, mark)
        if self._attention is not None:
            model, implementation = self._attention
            model.set_attn_implementation(implementation)
        self._forwards, self._marked, self._attention = [], [], None
        self.replaced = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()

    def _mark(self, module: nn.Module, mark: str, value: Any) -> None:
        setattr(module, mark, value)
        self._marked.append((module, mark))

    def _replace(self, option: str, found: list[nn.Module], forwards: list[Any]) -> None:
        for module, forward in zip(found, forwards, strict=True):
            method = types.MethodType(forward, module)
            module.forward = method
            self._forwards.append((module, method))
            if option == "linear_cross_entropy":
                self._mark(module, MARK, True)
        self.replaced[option] = len(found)


def apply(model: nn.Module, options: dict[str, bool], impl: str | None) -> Patch:
    """What :func:`stackwise.patch` does; ``options`` are its switches by name."""
    if impl is not None and impl not in VARIANTS:
        raise ValueError(f"impl: got {impl!r}; accepted: None, {', '.join(VARIANTS)}")
    model = unwrap_model(model)
    family = family_of(model)
    planned: list[tuple[str, list[nn.Module], list[Any]]] = []
    for name, find in (
        ("rope", _rope),
        ("rms_norm", _rms_norm),
        ("layer_norm", _layer_norm),
        ("swiglu", _swiglu),
        ("linear_cross_entropy", _linear_cross_entropy),
    ):
        if options[name]:
            pairs = find(model, family, impl)
            planned.append((name, [m for m, _ in pairs], [forward for _, forward in pairs]))
    for name, found, _ in planned:
        for module in found:
            if "forward" in vars(module):
                raise ValueError(
                    f"model: got one whose {type(module).__name__} has a forward of its own "
                    f"already (patched before?); accepted: revert that first, or {name}=False"
                )
    handle = Patch()
    if options["attention"]:
        _use_attention(model, family, impl, handle)
    for planned_part in planned:
        handle._replace(*planned_part)
    return handle


_Pairs = list[tuple[nn.Module, Any]]


def _rope(model: nn.Module, family: Family, impl: str | None) -> _Pairs:
    if family.rms_norm is None:
        return []
    layers = _some("rope", model, family.attention)
    functions = modules.rotary(impl)
    pairs = [(layer, modules.with_functions(layer, functions)) for layer in layers]
    if any(forward is None for _, forward in pairs):
        raise ValueError(
            f"rope: got a {family.attention} that calls none of {', '.join(functions)}; accepted: "
            "the attention layer of Transformers, or rope=False"
        )
    return pairs


def _rms_norm(model: nn.Module, family: Family, impl: str | None) -> _Pairs:
    if family.rms_norm is None:
        return []
    forward = modules.rms_norm(family.weight_offset, impl)
    return [(norm, forward) for norm in _some("rms_norm", model, family.rms_norm)]


def _layer_norm(model: nn.Module, family: Family, impl: str | None) -> _Pairs:
    if family.layer_norm is None:
        return []
    forward = modules.layer_norm(impl)
    return [(norm, forward) for norm in _some("layer_norm", model, family.layer_norm)]


def _swiglu(model: nn.Module, family: Family, impl: str | None) -> _Pairs:
    layers = _some("swiglu", model, family.feed_forward)
    activation = getattr(model.config, family.activation)
    plain = family.rms_norm is None
    build = modules.plain_feed_forward if plain else modules.gated_feed_forward
    forward = build(activation, impl)
    return [(layer, forward) for layer in layers]


def _linear_cross_entropy(model: nn.Module, family: Family, impl: str | None) -> _Pairs:
    found: list[Any] = parts(model, family.causal_lm)
    for language_model in found:
        _check_head(language_model)
    output = getattr(modeling_outputs, family.output)
    return [(language_model, causal_lm(language_model, output, impl)) for language_model in found]


def _check_head(model: Any) -> None:
    """Raises ValueError where the loss is not that of a linear layer's logits."""
    head = unwrap_saved(model.lm_head)
    if is_adapter(head) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"linear_cross_entropy: got {type(head).__name__} as lm_head, which computes more than "
            "a linear layer; accepted: torch.nn.Linear (take lm_head out of the adapter's target "
            "modules), or linear_cross_entropy=False"
        )
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(
            "linear_cross_entropy: got a model with a loss function of its own; accepted: the "
            "causal language modelling loss of Transformers, or linear_cross_entropy=False"
        )


def _some(option: str, model: nn.Module, name: str) -> list[nn.Module]:
    found = parts(model, name)
    if not found:
        raise ValueError(
            f"{option}: got a model without a module of the class {name} (another library may have "
            f"replaced it); accepted: the model as Transformers builds it, or {option}=False"
        )
    return found


def _use_attention(model: Any, family: Family, impl: str | None, handle: Patch) -> None:
    register_attention()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    handle._attention = (model, before)
    layers = parts(model, family.attention)
    if impl is not None:
        for layer in layers:
            handle._mark(layer, IMPL, impl)
    handle.replaced["attention"] = len(layers)
