"""Triton variants of the operations (Triton 3.6 to 3.9), registered as ``impl="triton"``.

Importing this package does not import Triton: :func:`registration.register` names the module of a
variant, which is imported when the variant first runs. None is a default anywhere yet, since none
has been measured on a GPU. A new operation: a module here with the kernels, the launch plan, the
``torch.library`` operations, the ``autograd.Function`` and ``machine_code_cases``; a ``register``
line below; its name in ``machine_code.MODULES``; tests in ``tests/triton/interpreted``.
"""

import importlib
from types import ModuleType

from .attention_launch import mla_not_covered, not_covered
from .linear_attention_plan import not_covered as linear_not_covered
from .linear_cross_entropy_plan import old_torch
from .norm_plan import too_wide
from .registration import register


def __getattr__(name: str) -> ModuleType:
    """Imports a module of this package when it is first asked for."""
    path = f"{__name__}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as missing:
        if missing.name != path:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


register("swiglu", "gated:swiglu")
register("geglu", "gated:geglu")
register("bias_gelu", "bias_gelu:bias_gelu")
register("rope", "rope:rope")
register("rms_norm", "norms:rms_norm", unsupported=too_wide)
register("layer_norm", "norms:layer_norm", unsupported=too_wide)
register("linear_cross_entropy", "linear_cross_entropy:linear_cross_entropy", unsupported=old_torch)
register("attention", "attention:attention", unsupported=not_covered)
register("quantized_linear", "quantized_matmul:quantized_linear")
register("lora_linear", "quantized_matmul:lora_linear")
register("swiglu_mlp", "quantized_matmul:swiglu_mlp")
register("linear_attention", "linear_attention:linear_attention", unsupported=linear_not_covered)
register("mla_attention", "mla_attention:mla_attention", unsupported=mla_not_covered)
