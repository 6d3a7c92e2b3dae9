"""What PEFT puts around a model, known by its class names: PEFT need not be installed."""

from __future__ import annotations

from typing import Any

from torch import nn


def bases(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel; any other model itself."""
    inner: Any = model
    return inner.get_base_model() if "PeftModel" in bases(model) else model


def unwrap_saved(module: nn.Module) -> nn.Module:
    """The layer that a ModulesToSaveWrapper uses now; any other layer itself."""
    if "ModulesToSaveWrapper" not in bases(module):
        return module
    wrapper: Any = module
    active = wrapper.active_adapter
    active = active[0] if isinstance(active, (list, tuple)) else active
    if wrapper.disable_adapters or active not in wrapper.modules_to_save:
        return wrapper.original_module
    return wrapper.modules_to_save[active]


def is_adapter(module: nn.Module) -> bool:
    """Whether an adapter of PEFT adds to what this layer computes."""
    return "BaseTunerLayer" in bases(module)
