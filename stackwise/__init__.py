"""StackWise: train GPT-2/LLaMA-style decoders block by block, on custom kernels.

Public names load on first use, so that ``import stackwise`` stays as cheap as ``import torch``.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from typing import Any

__version__ = "0.1.0"

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class _CheckoutKernels(MetaPathFinder):
    """Finds ``stackwise.kernels`` in a checkout, where it lies beside this package.

    It comes before the finders of editable installs, so that a checkout never runs on the kernels
    of another one.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "stackwise.kernels":
            return None
        folder = os.path.join(_ROOT, "kernels")
        init = os.path.join(folder, "__init__.py")
        return spec_from_file_location(fullname, init, submodule_search_locations=[folder])


if not os.path.isdir(os.path.join(_ROOT, "stackwise", "kernels")):
    sys.meta_path.insert(0, _CheckoutKernels())

_PUBLIC = {
    "StackWiseConfig": "stackwise.config",
    "ConfigError": "stackwise.config",
    "UnifiedTrainer": "stackwise.training.trainers",
    "BlockTrainer": "stackwise.training.trainers",
    "FusionTrainer": "stackwise.training.trainers",
    "Decoder": "stackwise.model.decoder",
    "MLGKALayer": "stackwise.model.block",
    "SwiGLUFFN": "stackwise.model.feed_forward",
    "LexicalKernelManager": "stackwise.model.embeddings",
    "load_pretrained": "stackwise.model.transformers_bridge",
    "save_pretrained": "stackwise.model.transformers_bridge",
    "convert_to_bidirectional": "stackwise.model.transformers_bridge",
    "read_pretrained_config": "stackwise.model.transformers_bridge",
    "resize_vocabulary": "stackwise.model.bridge_vocabulary",
    "patch": "stackwise.swapping",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("stackwise.kernels")
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'stackwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, "kernels"})
