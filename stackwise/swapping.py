"""``patch`` under its public name; Transformers is imported when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from stackwise.patching import Patch


def patch(
    model: nn.Module,
    *,
    rope: bool = True,
    rms_norm: bool = True,
    layer_norm: bool = True,
    swiglu: bool = True,
    linear_cross_entropy: bool = True,
    attention: bool = True,
    impl: str | None = None,
) -> Patch:
    """Replaces parts of a model of Transformers by operations of ``stackwise.kernels``, in place.

    Families: LLaMA, Mistral, Qwen2, Qwen3, Gemma-2, DeepSeek-V3 and GPT-2, with or without PEFT
    around them. An option that a family has no part for (``rope`` of GPT-2) does nothing. Patch
    before the model goes to a trainer.

    With ``linear_cross_entropy`` a forward with labels in training computes its loss without the
    logits, which are None in its outputs; ``skip_logits=True`` or ``False`` says otherwise for one
    call. The mean over no label is 0 here, and NaN in Transformers.

    Args:
        model: changed in place.
        rope: rotary embedding of queries and keys.
        rms_norm, layer_norm: the norms.
        swiglu: the feed-forward layers' activation: SwiGLU, GEGLU or GPT-2's GELU.
        linear_cross_entropy: the loss of a causal language model.
        attention: sets ``attn_implementation="stackwise"``.
        impl: variant of every operation: None, "reference", "torch", "triton" or "cuda".

    Returns:
        A handle with ``revert()``, which is a context manager too.

    Raises:
        ValueError: an unknown family, a part that is not what the family has (another library may
            have replaced it), a model that is patched already, an adapter around ``lm_head``, an
            own loss function or an activation that no operation has. The model is unchanged then.
    """
    from stackwise.patching.apply import apply

    options = {
        "rope": rope,
        "rms_norm": rms_norm,
        "layer_norm": layer_norm,
        "swiglu": swiglu,
        "linear_cross_entropy": linear_cross_entropy,
        "attention": attention,
    }
    return apply(model, options, impl)
