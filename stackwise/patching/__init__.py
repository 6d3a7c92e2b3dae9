"""This package's operations in other people's models and trainers.

Three ways, from the smallest change to the largest: ``attn_implementation="stackwise"`` in any
model of Transformers (importing this package registers it), :func:`patch` for the other operations
in one model, and :func:`register_sdpa` for PyTorch's own attention function.
"""

from stackwise.swapping import patch

from .apply import Patch
from .attention import register_attention, supported
from .sdpa import register_sdpa

if supported():
    register_attention()

__all__ = ["Patch", "patch", "register_attention", "register_sdpa"]
