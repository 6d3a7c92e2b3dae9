"""Reading, overriding and writing configurations.

A file is read with :func:`load_yaml`; all of its faults, of syntax, of type and of the rules,
arrive together in one ``ConfigError``. Relative paths inside a configuration stay relative to the
working directory, not to the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise.config.coerce import Faults, build_section
from stackwise.config.errors import ConfigError
from stackwise.config.fields import field_specs, format_value
from stackwise.config.schema import StackWiseConfig
from stackwise.config.yaml_tree import emit_yaml, parse_yaml, printable


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> StackWiseConfig:
    """The configuration in the file ``path`` with ``section.field=value`` overrides applied.

    Raises ``ConfigError`` with every fault of the file, of the overrides and of the rules.
    """
    return load_text(_read_text(Path(path)), str(path), overrides)


def load_text(
    text: str, source: str = "configuration", overrides: Sequence[str] = ()
) -> StackWiseConfig:
    """As :func:`load_yaml`, from YAML text; ``source`` names it in messages."""
    tree, lines, messages = parse_yaml(text, source)
    return _build(tree, overrides, source, Faults(lines, messages))


def from_dict(
    values: Any, overrides: Sequence[str] = (), source: str = "configuration"
) -> StackWiseConfig:
    """The configuration in a nested dict, as :func:`to_dict` returns it; checked like a file."""
    return _build(values, overrides, source, Faults())


def to_dict(config: StackWiseConfig) -> dict[str, Any]:
    """``config`` as a nested dict of plain values that shares nothing with it; tuples are lists."""
    plain: dict[str, Any] = _untuple(dataclasses.asdict(config))
    return plain


def apply_overrides(config: StackWiseConfig, overrides: Sequence[str]) -> StackWiseConfig:
    """A copy of ``config`` with ``section.field=value`` overrides applied, checked.

    The value is read as YAML: ``training.lr=3e-4``, ``evaluation.mask_rates=[0.2, 0.8]``,
    ``training.max_steps=null``, ``run.id="2024"``. An empty value is null.
    """
    return from_dict(to_dict(config), overrides)


def dump_yaml(config: StackWiseConfig, path: str | Path | None = None) -> str:
    """``config`` as YAML text, written to ``path`` when given; reading it back gives an equal one.

    Raises ``ConfigError`` when a field holds a value that its type does not allow (infinities,
    objects), so that what is written can be read.
    """
    faults = Faults()
    typed = build_section(StackWiseConfig, config, "", faults)
    raise_faults(faults, "configuration")
    text = emit_yaml(to_dict(typed))
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def raise_faults(faults: Faults, source: str) -> None:
    """Raises one ``ConfigError`` that lists what was found; returns when nothing was."""
    messages = [printable(" ".join(message.split("\n"))) for message in faults.messages]
    if len(messages) == 1:
        raise ConfigError(f"{source}: {messages[0]}")
    if messages:
        listed = "".join(f"\n  {message}" for message in messages)
        raise ConfigError(f"{source} has {len(messages)} faults:{listed}")


def normalize(config: StackWiseConfig, faults: Faults) -> None:
    """Checks the types of a configuration built in Python and brings its values to them in place.

    Lists become tuples, whole floats integers and so on, as when a file is read; an attribute that
    is not a field is a fault.
    """
    _assign(config, build_section(StackWiseConfig, config, "", faults))


def _assign(target: Any, source: Any) -> None:
    for name in field_specs(type(target)):
        value, current = getattr(source, name), getattr(target, name)
        if dataclasses.is_dataclass(value) and type(current) is type(value):
            _assign(current, value)
        elif current != value or type(current) is not type(value):
            setattr(target, name, value)


def _build(tree: Any, overrides: Sequence[str], source: str, faults: Faults) -> StackWiseConfig:
    from stackwise.config.rules import collect_faults

    if overrides:
        tree = _merge(tree, overrides, faults)
    config = build_section(StackWiseConfig, tree, "", faults)
    collect_faults(config, faults)
    raise_faults(faults, source)
    return config


def _merge(tree: Any, overrides: Sequence[str], faults: Faults) -> Any:
    """``tree`` with the overrides set in it; a faulty override becomes a fault."""
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        return tree
    tree = _copy_mappings(tree)
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not path:
            faults.messages.append(
                f"override {ascii(override)[:80]}: accepted: section.field=value"
            )
            continue
        try:
            value, _, messages = parse_yaml(text, f"override {path}")
        except ConfigError as error:
            faults.add(path, f"the value {ascii(text)[:60]} is not YAML ({error})")
            continue
        faults.messages.extend(f"override {path}: {fault}" for fault in messages)
        faults.lines.pop(path, None)
        _set(tree, path, value, faults)
    return tree


def _set(tree: dict[Any, Any], path: str, value: Any, faults: Faults) -> None:
    """Sets a dotted path; sections on the way that are missing or null are made."""
    *sections, name = path.split(".")
    for depth, section in enumerate(sections):
        inner = tree.get(section)
        if inner is None:
            inner = tree[section] = {}
        if not isinstance(inner, dict):
            holder = ".".join(sections[: depth + 1])
            faults.add(path, f"{holder} is {format_value(inner)}, which has no fields to set")
            return
        tree = inner
    tree[name] = value


def _copy_mappings(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy_mappings(value) for key, value in tree.items()}
    return tree


def _untuple(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untuple(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_untuple(item) for item in value]
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{printable(str(path))}: cannot be read: {reason}") from None


__all__ = [
    "apply_overrides",
    "dump_yaml",
    "from_dict",
    "load_text",
    "load_yaml",
    "to_dict",
]
