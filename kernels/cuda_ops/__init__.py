"""CUDA C++ variants of the operations, registered as ``impl="cuda"``.

The kernels are in csrc/, compiled into one library at installation (:mod:`_cuda`). Without it the
variants are still listed, and asking for one says how to build it. None is a default anywhere yet,
since none has been measured on a GPU. A new operation: bodies and a host entry in csrc/, its record
in :mod:`_cuda`, a module here, a ``register`` line below, tests in ``tests/csrc``.
"""

import importlib
from types import ModuleType

# Imported first, so that definitions come before variants wherever these are listed.
from .. import layer_norm as _layer_norm  # noqa: F401
from .. import rms_norm as _rms_norm  # noqa: F401
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


register("rms_norm", "norms:rms_norm")
register("layer_norm", "norms:layer_norm")
