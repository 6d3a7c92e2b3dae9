"""The configuration's fields as data, for the loader, the documentation and the tests."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Hashable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

from stackwise.config.schema import StackWiseConfig


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """One field: its name, resolved annotation, default value and metadata."""

    name: str
    annotation: Any
    default: Any
    help: str
    renamed: str | None

    @property
    def section(self) -> type | None:
        """The dataclass this field holds (``X`` or ``X | None``), or None for a plain value."""
        options = union_members(self.annotation)
        sections = [option for option in options if dataclasses.is_dataclass(option)]
        return typing.cast("type", sections[0]) if sections else None


def field_specs(cls: type) -> dict[str, FieldSpec]:
    """The fields of a configuration dataclass by name, in their order of declaration."""
    # mypy takes the class of an unhashable dataclass for unhashable itself.
    return _field_specs(typing.cast("Hashable", cls))


@functools.cache
def _field_specs(cls: Any) -> dict[str, FieldSpec]:
    hints = typing.get_type_hints(cls)
    specs = {}
    for item in dataclasses.fields(cls):
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        specs[item.name] = FieldSpec(
            item.name,
            hints[item.name],
            default,
            item.metadata["help"],
            item.metadata.get("renamed"),
        )
    return specs


@functools.cache
def all_fields() -> dict[str, FieldSpec]:
    """Every settable field by its dotted path, nested sections included."""
    return dict(_walk(StackWiseConfig, ""))


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, FieldSpec]]:
    for name, spec in field_specs(cls).items():
        if spec.section is None or spec.default is None:
            yield prefix + name, spec
        if spec.section is not None:
            yield from _walk(spec.section, f"{prefix}{name}.")


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of ``X | Y``; a one-element tuple for anything else."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def describe_type(annotation: Any) -> str:
    """A field's type in a user's words: "number or null", "one of a, b"."""
    if annotation is Any:
        return "any"
    nouns = {int: "whole number", float: "number"}
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words = []
    for option in union_members(annotation):
        origin, arguments = get_origin(option), get_args(option)
        if option is type(None):
            words.append("null")
        elif origin is Literal:
            words.append("one of " + ", ".join(str(choice) for choice in arguments))
        elif origin is tuple and arguments[-1] is Ellipsis:
            words.append(f"a list of {nouns[arguments[0]]}s")
        elif origin is tuple:
            words.append(f"a list of {len(arguments)} {nouns[arguments[0]]}s")
        elif origin is dict or dataclasses.is_dataclass(option):
            words.append("a mapping")
        else:
            words.append(names[option])
    return " or ".join(words)


def format_value(value: Any, limit: int = 60) -> str:
    """A value as it would stand in the YAML file, shortened to ``limit`` characters."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(format_value(item, limit) for item in value[:20]) + "]"
    elif isinstance(value, dict):
        pairs = list(value.items())[:20]
        text = (
            "{"
            + ", ".join(
                f"{format_value(key, limit)}: {format_value(item, limit)}" for key, item in pairs
            )
            + "}"
        )
    elif isinstance(value, int) and abs(value) >= 10**20:
        text = "a whole number of more than 20 digits"
    elif isinstance(value, (int, float)):
        text = repr(value)
    else:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
