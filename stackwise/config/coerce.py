"""From plain values to the typed configuration, reporting every fault instead of the first.

Accepted beyond the declared type: a whole float such as ``1e5`` where an integer is needed, an
integer where a float is needed, a list where a tuple is declared, null for a section (its
defaults). Never accepted: a boolean as a number, text as a number, NaN and infinities.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
from typing import Any, Literal, TypeVar, get_args, get_origin

from stackwise.config.fields import (
    FieldSpec,
    all_fields,
    describe_type,
    field_specs,
    format_value,
    union_members,
)
from stackwise.config.renamed import VALUE_HINTS, new_names
from stackwise.config.yaml_tree import FAULTY, MAX_DEPTH

MAX_INT = 2**63 - 1
_REFUSED = object()
T = TypeVar("T")


@dataclasses.dataclass
class Faults:
    """What is wrong so far, in order, and which fields' values cannot be relied on."""

    lines: dict[str, int] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)
    unreliable: set[str] = dataclasses.field(default_factory=set)

    def add(self, path: str, message: str) -> None:
        """Records a fault of the field at ``path``; its value is then ignored by later rules."""
        self.unreliable.add(path)
        line = self.lines.get(path)
        place = f"{path} (line {line})" if line else path
        self.messages.append(f"{place}: {message}")


def build_section(cls: type[T], values: Any, path: str, faults: Faults) -> T:
    """An instance of the section ``cls`` from a mapping (or an instance), defaults elsewhere."""
    if dataclasses.is_dataclass(values) and isinstance(values, cls):
        values = vars(values)
    if values is None:
        values = {}
    if values is FAULTY:
        faults.unreliable.add(path)
        values = {}
    if not isinstance(values, dict):
        faults.add(path or "the file", f"got {_got(values)}; accepted: a mapping of fields")
        values = {}
    prefix = f"{path}." if path else ""
    specs = field_specs(cls)
    chosen = {}
    for key, value in values.items():
        if key in specs:
            chosen[key] = _field_value(specs[key], value, prefix + key, faults)
        else:
            _unknown_key(key, prefix, cls, faults)
    return cls(**chosen)


def _field_value(spec: FieldSpec, value: Any, path: str, faults: Faults) -> Any:
    if spec.section is None and _holds_faulty(value):
        faults.unreliable.add(path)
        return copy.deepcopy(spec.default)
    if spec.section is not None:
        optional = type(None) in union_members(spec.annotation)
        if optional and value is None:
            return None
        return build_section(spec.section, value, path, faults)
    if value is None and isinstance(spec.default, dict):
        return {}
    for option in union_members(spec.annotation):
        converted = _convert(option, value)
        if converted is not _REFUSED:
            return converted
    if isinstance(value, dict) and _renamed_keys(value, path, faults):
        return copy.deepcopy(spec.default)
    accepted = describe_type(spec.annotation)
    faults.add(path, f"got {_got(value)}; accepted: {accepted}{_hint(spec, value, path)}")
    return copy.deepcopy(spec.default)


def _convert(annotation: Any, value: Any) -> Any:
    """``value`` as the single type ``annotation``, or ``_REFUSED``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return value if value is None else _REFUSED
    if annotation is bool:
        return value if isinstance(value, bool) else _REFUSED
    if annotation is int:
        return _whole(value)
    if annotation is float:
        return _real(value)
    if annotation is str:
        return value if _is_text(value) else _REFUSED
    if annotation is Any:
        return _plain(value, 0)
    if origin is Literal:
        return value if isinstance(value, str) and value in arguments else _REFUSED
    if origin is tuple:
        return _tuple(arguments, value)
    if origin is dict:
        return _mapping(arguments[1], value)
    raise TypeError(f"a configuration field has the unsupported type {annotation!r}")


def _whole(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    accepted = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INT
    return value if accepted else _REFUSED


def _real(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _REFUSED
    if isinstance(value, int) and abs(value) > MAX_INT:
        return _REFUSED
    return float(value) if math.isfinite(value) else _REFUSED


def _is_text(value: Any) -> bool:
    """Text that can be written to a file and named to the operating system."""
    if not isinstance(value, str) or "\0" in value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _tuple(arguments: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return _REFUSED
    endless = arguments[-1] is Ellipsis
    if not endless and len(value) != len(arguments):
        return _REFUSED
    converted = tuple(_convert(arguments[0], item) for item in value)
    return _REFUSED if any(item is _REFUSED for item in converted) else converted


def _mapping(annotation: Any, value: Any) -> Any:
    if not isinstance(value, dict) or not all(_is_text(key) for key in value):
        return _REFUSED
    converted = {key: _convert(annotation, item) for key, item in value.items()}
    return _REFUSED if any(item is _REFUSED for item in converted.values()) else converted


def _plain(value: Any, depth: int) -> Any:
    """Nested lists and mappings of plain scalars; tuples become lists."""
    if depth > MAX_DEPTH:
        return _REFUSED
    if isinstance(value, (list, tuple)):
        items = [_plain(item, depth + 1) for item in value]
        return _REFUSED if any(item is _REFUSED for item in items) else items
    if isinstance(value, dict):
        keys = [_plain(key, depth + 1) for key in value if isinstance(key, (str, int, float))]
        items = [_plain(item, depth + 1) for item in value.values()]
        refused = len(keys) != len(value) or any(item is _REFUSED for item in keys + items)
        return _REFUSED if refused else dict(zip(keys, items, strict=True))
    if value is None or isinstance(value, bool) or _is_text(value):
        return value
    if isinstance(value, int):
        return value if abs(value) <= MAX_INT else _REFUSED
    return value if isinstance(value, float) and math.isfinite(value) else _REFUSED


def _holds_faulty(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_faulty(item) for item in value.values())
    if isinstance(value, list):
        return any(_holds_faulty(item) for item in value)
    return value is FAULTY


def _got(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {format_value(value)}"
    if isinstance(value, (list, tuple)):
        return f"the list {format_value(value)}"
    if isinstance(value, dict):
        return f"the mapping {format_value(value)}"
    if value is None or isinstance(value, (bool, int, float)):
        return format_value(value)
    return f"an object of type {type(value).__name__}"


def _hint(spec: FieldSpec, value: Any, path: str) -> str:
    if isinstance(value, (str, bool)) and (path, value) in VALUE_HINTS:
        return f"; write {VALUE_HINTS[path, value]}"
    for option in union_members(spec.annotation):
        if get_origin(option) is Literal:
            near = difflib.get_close_matches(str(value).lower(), get_args(option), 1, 0.0)
            return f"; nearest: {near[0]}" if near else ""
        if option in (int, float, bool) and isinstance(value, str):
            return f"; write it without quotes, as {describe_type(option)}"
        if option is str and isinstance(value, (int, float)):
            return '; put it in quotes, "..."'
    return ""


def _unknown_key(key: Any, prefix: str, cls: type, faults: Faults) -> None:
    path = f"{prefix}{key}"
    if path in new_names():
        replacement, why = new_names()[path]
        faults.unreliable.add(replacement)
        moved = f"replaced by {replacement}: {why}" if why else f"now called {replacement}"
        faults.add(path, moved)
        return
    if path in all_fields():
        section, name = path.rsplit(".", 1)
        faults.add(path, f"write it nested, as {name} inside the section {section}")
        return
    nearest = _nearest(str(key), prefix, cls)
    faults.unreliable.add(nearest)
    faults.add(path, f"unknown key; nearest valid key: {nearest}")


def _nearest(key: str, prefix: str, cls: type) -> str:
    """The closest valid key: in the same section when it is close, else anywhere."""
    here = difflib.get_close_matches(key[:100], field_specs(cls), 1, 0.8)
    if here:
        return prefix + here[0]

    def score(path: str) -> tuple[float, bool]:
        leaf = path.rsplit(".", 1)[-1]
        return difflib.SequenceMatcher(None, key[:100], leaf).ratio(), path.startswith(prefix)

    return max(all_fields(), key=score)


def _renamed_keys(value: dict[Any, Any], path: str, faults: Faults) -> bool:
    """Answers a mapping under a plain field whose keys were settings of the reference system."""
    old = [f"{path}.{key}" for key in value if f"{path}.{key}" in new_names()]
    for key in old:
        replacement, why = new_names()[key]
        faults.unreliable.add(path)
        faults.add(key, f"replaced by {replacement}: {why}")
    return bool(old)
