"""Every rule a configuration must keep, checked together.

A rule is a function in ``*_rules.py`` that reads fields and yields ``(field, message)``. A rule
that reads a field already found faulty is left out, so that one mistake is reported once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

from stackwise.config.coerce import Faults
from stackwise.config.errors import ConfigError
from stackwise.config.fields import all_fields
from stackwise.config.loading import normalize, raise_faults
from stackwise.config.model_rules import MODEL_RULES
from stackwise.config.notes import notes
from stackwise.config.ranges import range_fault
from stackwise.config.schema import StackWiseConfig
from stackwise.config.training_rules import TRAINING_RULES

Fault = tuple[str, str]
Rule = Callable[[StackWiseConfig], Iterator[Fault]]


def check(config: StackWiseConfig) -> None:
    """Raises ``ConfigError`` listing every fault of ``config``.

    Values are brought to their declared types in place first, as when a file is read.
    """
    faults = Faults()
    normalize(config, faults)
    collect_faults(config, faults)
    raise_faults(faults, "configuration")


def collect_faults(config: StackWiseConfig, faults: Faults) -> None:
    """Adds the faults of ranges and cross-field rules to those of types and keys."""
    for path in all_fields():
        fault = None if _hidden(path, faults) else range_fault(path, value_at(config, path))
        if fault is not None:
            faults.add(path, fault)
    view = cast(StackWiseConfig, _View(config, "", faults))
    for rule in (*MODEL_RULES, *TRAINING_RULES):
        try:
            found = list(rule(view))
        except _Unreliable:
            continue
        for path, message in found:
            faults.add(path, message)
    if not faults.messages:
        _buildable(config, faults)


def value_at(config: Any, path: str) -> Any:
    """The value at a dotted path; None below a section that is null."""
    for name in path.split("."):
        config = None if config is None else getattr(config, name)
    return config


class _Unreliable(Exception):
    """A rule reads a field whose value has been refused."""


class _View:
    """Reads like the configuration, and raises ``_Unreliable`` for fields found faulty."""

    def __init__(self, section: Any, prefix: str, faults: Faults) -> None:
        self._section, self._prefix, self._faults = section, prefix, faults

    def __getattr__(self, name: str) -> Any:
        path = f"{self._prefix}{name}"
        if path in self._faults.unreliable:
            raise _Unreliable(path)
        value = getattr(self._section, name)
        if dataclasses.is_dataclass(value):
            return _View(value, f"{path}.", self._faults)
        return value


def _hidden(path: str, faults: Faults) -> bool:
    """Whether the field or a section around it has been refused already."""
    parts = path.split(".")
    return any(".".join(parts[: n + 1]) in faults.unreliable for n in range(len(parts)))


def _buildable(config: StackWiseConfig, faults: Faults) -> None:
    """The model builder has the last word on shapes, so that it never refuses later."""
    from stackwise.model.resolve import resolve_model_config

    if config.model.init_from is not None:
        return
    embedding = dataclasses.replace(config.model.tokenizer_embedding, family=None)
    model = dataclasses.replace(config.model, tokenizer_embedding=embedding)
    try:
        resolve_model_config(
            model, vocab_size=config.data.tokenizer_vocab_size, seq_len=config.training.seq_len
        )
    except ConfigError as error:
        faults.add("model", str(error))


__all__ = ["check", "collect_faults", "notes", "value_at"]
