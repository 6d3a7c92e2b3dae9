"""YAML text to plain values and back.

Read: a node graph is composed and converted here, so that nothing but null, booleans, numbers,
text, lists and mappings can come out of a file. Scalars follow the YAML 1.2 core schema: ``1e-4``
is a float, only ``true`` and ``false`` are booleans, a date is text, ``010`` is ten.
Duplicate keys, tags, anchors and aliases are errors.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from stackwise.config.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50

_SCALARS = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9][0-9_]*\Z"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?\Z"
            r"|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
        ),
        list("-+.0123456789"),
    ),
)
_PREFIX = "tag:yaml.org,2002:"


class _Faulty:
    """Stands for an entry that has already been reported."""


FAULTY = _Faulty()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either these rules or YAML 1.1's would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_YAML_11_AMBIGUOUS = {
    first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_PREFIX + _tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_PREFIX + _tag, _pattern, _first)
for _char, _resolvers in _YAML_11_AMBIGUOUS.items():
    _Dumper.yaml_implicit_resolvers.setdefault(_char, []).extend(_resolvers)


def _flow_list(dumper: yaml.SafeDumper, data: Any) -> yaml.Node:
    return dumper.represent_sequence(_PREFIX + "seq", list(data), flow_style=True)


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    # Single quotes, PyYAML's choice, turn line breaks other than \n into spaces when read back.
    style = None if data.isprintable() else '"'
    return dumper.represent_scalar(_PREFIX + "str", data, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _flow_list)
_Dumper.add_representer(tuple, _flow_list)


def parse_yaml(text: str, source: str) -> tuple[Any, dict[str, int], list[str]]:
    """Values of one YAML document, the line of every dotted key, and what is wrong with it.

    Raises ``ConfigError`` when the text is not YAML at all; faults of single entries are returned
    so that they appear beside the others.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source}: {len(text)} characters is no configuration ({MAX_BYTES} max)")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {_one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: nested too deeply") from None
    converter = _Converter()
    value = None if node is None else converter.convert(node, "", 0)
    return value, converter.lines, converter.faults


def emit_yaml(tree: Any) -> str:
    """``tree`` as block-style YAML; reads back equal."""
    return str(
        yaml.dump(
            tree,
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=False,
            width=100,
        )
    )


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    text = " ".join(str(problem).split())
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return place + printable(text)[:200]


class _Converter:
    """Node graph -> values, refusing what a configuration has no use for."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.faults: list[str] = []
        self._seen: set[int] = set()

    def convert(self, node: yaml.Node, path: str, depth: int) -> Any:
        if id(node) in self._seen:
            return self._fault(node, path, "aliases (*name) are not supported; write the value out")
        self._seen.add(id(node))
        if depth > MAX_DEPTH:
            return self._fault(node, path, f"nested more than {MAX_DEPTH} levels deep")
        tag = node.tag.removeprefix(_PREFIX)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.convert(item, path, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and tag in ("null", "bool", "int", "float", "str"):
            return self._scalar(node, path, tag)
        return self._fault(node, path, f"the tag {node.tag!a} is not supported; leave it out")

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        first_lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(key_node, path, "a key must be a plain word or number")
                continue
            key = self.convert(key_node, path, depth + 1)
            if key is FAULTY:
                continue
            inner = f"{path}.{key}" if path else str(key)
            if key in result:
                self._fault(key_node, inner, f"given twice (first on line {first_lines[key]})")
                continue
            first_lines[key] = self.lines[inner] = line
            result[key] = self.convert(value_node, inner, depth + 1)
        return result

    def _scalar(self, node: yaml.ScalarNode, path: str, tag: str) -> Any:
        text: str = node.value
        try:
            if tag == "int":
                return int(text.replace("_", ""))
            if tag == "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", "").lower()))
            if tag == "bool":
                return {"true": True, "false": False}[text.lower()]
        except (ValueError, KeyError):
            return self._fault(node, path, f"{text[:40]!a} cannot be read as {tag}")
        return None if tag == "null" else text

    def _fault(self, node: yaml.Node, path: str, message: str) -> _Faulty:
        line = f"line {node.start_mark.line + 1}"
        self.faults.append(f"{path} ({line}): {message}" if path else f"{line}: {message}")
        return FAULTY


def printable(text: str) -> str:
    """``text`` on one line, with everything that would not show escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
