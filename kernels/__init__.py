"""Fused operations for transformer training: ``from stackwise import kernels``.

Every operation has one definition (``impl="reference"``) and faster variants; ``impl=None`` takes
the fastest one that is known to be right for the case. Shapes follow FlashAttention's users:
(batch, length, heads, head_dim), or packed (total, heads, head_dim) with ``cu_seqlens``.
"""

if __name__ == "kernels":
    from kernels._name_guard import hand_over

    hand_over()
else:
    # Imported for the variants that they register.
    from . import attention_torch as _attention_torch  # noqa: F401
    from . import cuda_ops as _cuda_ops  # noqa: F401
    from . import kernel_attention_torch as _kernel_attention_torch  # noqa: F401
    from . import linear_attention_torch as _linear_attention_torch  # noqa: F401
    from . import linear_cross_entropy_torch as _linear_cross_entropy_torch  # noqa: F401
    from . import lora_linear_torch as _lora_linear_torch  # noqa: F401
    from . import swiglu_mlp_torch as _swiglu_mlp_torch  # noqa: F401
    from .attention import attention
    from .attention_plan import PackedPlan, plan_packed
    from .bias_gelu import bias_gelu
    from .dispatch import available, register, use
    from .geglu import geglu
    from .kernel_attention import kernel_attention
    from .layer_norm import layer_norm
    from .linear_attention import linear_attention
    from .linear_cross_entropy import linear_cross_entropy
    from .lora_linear import lora_linear
    from .mla_attention import mla_attention
    from .quantize import quantize
    from .quantized_linear import quantized_linear
    from .quantized_tensor import QuantizedTensor
    from .random_features import random_features, sample_features
    from .rms_norm import rms_norm
    from .rope import rope
    from .swiglu import swiglu
    from .swiglu_mlp import swiglu_mlp
    from .triton_ops import register as _register_triton  # noqa: F401

    __all__ = [
        "PackedPlan",
        "QuantizedTensor",
        "attention",
        "available",
        "bias_gelu",
        "geglu",
        "kernel_attention",
        "layer_norm",
        "linear_attention",
        "linear_cross_entropy",
        "lora_linear",
        "mla_attention",
        "plan_packed",
        "quantize",
        "quantized_linear",
        "random_features",
        "register",
        "rms_norm",
        "rope",
        "sample_features",
        "swiglu",
        "swiglu_mlp",
        "use",
    ]
