"""Steps aside when this folder is imported as ``kernels`` instead of ``stackwise.kernels``.

Transformers probes and imports the PyPI package ``kernels``. With the repository root on
``sys.path`` this folder shadows it. ``kernels/__init__.py`` therefore begins with::

    if __name__ == "kernels":
        from kernels._name_guard import hand_over

        hand_over()
    else:
        ...
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec

_FOLDER = os.path.dirname(os.path.realpath(__file__))


def hand_over() -> None:
    """Replaces the module ``kernels`` by the PyPI package of that name.

    The package is looked for on the rest of ``sys.path`` and by the finders of editable installs.
    Where there is none the shadowing module stays, with ``__version__ = "0"``: older than any
    version Transformers accepts, so that it goes on as if nothing were installed.
    """
    shadow = sys.modules.pop("kernels")
    sys.modules.pop("kernels._name_guard", None)
    spec = _find_package()
    if spec is None or spec.loader is None:
        shadow.__dict__["__version__"] = "0"
        sys.modules["kernels"] = shadow
        return
    package = module_from_spec(spec)
    sys.modules["kernels"] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules["kernels"]
        raise


def _find_package() -> ModuleSpec | None:
    specs = [PathFinder.find_spec("kernels", [entry or os.getcwd()]) for entry in sys.path]
    others = [finder for finder in sys.meta_path if finder is not PathFinder]
    specs += [finder.find_spec("kernels", None) for finder in others]
    return next((spec for spec in specs if _is_package(spec)), None)


def _is_package(spec: ModuleSpec | None) -> bool:
    """False for a folder without ``__init__.py`` and for this folder or another checkout's."""
    if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
        return False
    folder = os.path.dirname(os.path.realpath(spec.origin))
    return folder != _FOLDER and not os.path.isfile(os.path.join(folder, "_name_guard.py"))
