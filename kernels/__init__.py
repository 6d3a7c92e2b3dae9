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
    from . import linear_cross_entropy_torch as _linear_cross_entropy_torch  # noqa: F401
    from .attention import attention
    from .attention_plan import PackedPlan, plan_packed
    from .bias_gelu import bias_gelu
    from .dispatch import available, register, use
    from .geglu import geglu
    from .layer_norm import layer_norm
    from .linear_cross_entropy import linear_cross_entropy
    from .mla_attention import mla_attention
    from .quantize import QuantizedTensor, quantize
    from .random_features import random_features, sample_features
    from .rms_norm import rms_norm
    from .rope import rope
    from .swiglu import swiglu
    from .triton_ops import register as _register_triton  # noqa: F401

    __all__ = [
        "PackedPlan",
        "QuantizedTensor",
        "attention",
        "available",
        "bias_gelu",
        "geglu",
        "layer_norm",
        "linear_cross_entropy",
        "mla_attention",
        "plan_packed",
        "quantize",
        "random_features",
        "register",
        "rms_norm",
        "rope",
        "sample_features",
        "swiglu",
        "use",
    ]
