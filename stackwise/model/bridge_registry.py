"""The checkpoint families that can be read and written, one ``bridge_family_<name>.py`` each.

A family file calls :func:`register`; it is found by its name, so adding a family is adding that
file. :class:`ConfigReader` reads a ``config.json`` and collects what cannot be honoured, so that a
user sees every obstacle at once and before any weight is read.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stackwise.config.schema import ModelConfig
from stackwise.model.bridge_weights import Placement

_PREFIX = "bridge_family_"


class ConfigReader:
    """Typed access to the fields of one ``config.json``; faults accumulate until :meth:`check`."""

    def __init__(self, values: dict[str, Any], model_type: str) -> None:
        self.values = values
        self.model_type = model_type
        self.faults: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or ``default`` (the family's own in Transformers) when absent."""
        return self.values.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; absent or null means ``default``, which None makes a fault."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.faults.append(f"{name} is {value!r}, expected a positive integer")
            return 1
        return value

    def accept(self, name: str, accepted: tuple[Any, ...], default: Any) -> Any:
        """The field's value when it is one of ``accepted``, else a fault and the first of them."""
        value = self.values.get(name, default)
        if value in accepted:
            return value
        self.refuse(name, value, " or ".join(repr(choice) for choice in accepted))
        return accepted[0]

    def refuse(self, name: str, value: Any, supported: str) -> None:
        """Records that ``name: value`` is not supported and what would be."""
        self.faults.append(f"{name} is {value!r}; supported: {supported}")

    def check(self) -> None:
        """Raises ValueError listing every fault recorded so far."""
        if self.faults:
            listed = "\n".join(f"  - {fault}" for fault in self.faults)
            raise ValueError(
                f"this {self.model_type} checkpoint has settings StackWise does not support:\n"
                f"{listed}"
            )


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Transformers: its configuration and its weight names, both ways.

    ``describes``: the published models it covers, for messages.
    ``read``: config.json -> ModelConfig with every shape field set; records faults in the reader.
    ``write``: ModelConfig -> config.json fields, written so that ``read`` gives the same model
    back; a field ``write`` cannot express therefore shows as a difference, and saving is refused.
    ``placements``: which stored tensor holds which parameters.
    ``base_prefix``: prefix that checkpoints saved from the headless base model lack.
    ``ignored``: config.json -> patterns of stored names that hold no weights of the decoder.
    ``faults``: what Transformers' class refuses although ``write`` could express it.
    """

    model_type: str
    architecture: str
    describes: str
    base_prefix: str
    read: Callable[[ConfigReader], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    placements: Callable[[ModelConfig], list[Placement]]
    ignored: Callable[[dict[str, Any]], tuple[str, ...]]
    faults: Callable[[ModelConfig], list[str]] = lambda _: []


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds a family; a ``model_type`` registered twice is a ValueError."""
    if family.model_type in _FAMILIES:
        raise ValueError(f"model_type {family.model_type!r} is registered twice")
    _FAMILIES[family.model_type] = family
    return family


@functools.cache
def _load_families() -> None:
    package = importlib.import_module("stackwise.model")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith(_PREFIX):
            importlib.import_module(f"stackwise.model.{module.name}")


def families() -> dict[str, Family]:
    """Every registered family by ``model_type``."""
    _load_families()
    return _FAMILIES


def find_family(values: dict[str, Any]) -> Family:
    """The family of a ``config.json``; ValueError listing the supported ones when there is none."""
    model_type = values.get("model_type")
    known = families()
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    listed = ", ".join(f"{name} ({family.describes})" for name, family in sorted(known.items()))
    raise ValueError(f"model_type is {model_type!r}; supported: {listed}")
